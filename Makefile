# Everything a fresh clone needs: `make test` and `make demo` set up their own .venv.
# Without make, the README gives the same steps as plain commands.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
COMFY_VENV := .venv-comfy
COMFY_READY := $(COMFY_VENV)/.ready

.PHONY: test test-comfy coverage demo card lint clean

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto

coverage: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --cov --cov-report=term

# Against the ComfyUI at COMFYUI_PATH, which is only read; its packages go to a venv of their own.
test-comfy: $(COMFY_READY)
	COMFYUI_PATH="$(COMFYUI_PATH)" $(COMFY_VENV)/bin/python -m pytest tests/comfyui

demo: $(READY)
	$(BIN)/python -m rf_core generate --timeline rf_core/demo/timeline.txt --seconds 10 \
		--output demo.mp4 --overwrite

# What this machine's card can do, in nine minutes at most: card/table.txt is made to be pasted.
card: $(READY)
	$(BIN)/python -m rf_core card card

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch comes first, pinned for development alone: nothing may choose another one later.
$(READY): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable ".[dev]"
	touch $(READY)

$(COMFY_READY): $(COMFYUI_PATH)/requirements.txt constraints-comfy.txt
	$(PYTHON) -m venv $(COMFY_VENV)
	$(COMFY_VENV)/bin/python -m pip install --quiet --constraint constraints-comfy.txt \
		--requirement "$(COMFYUI_PATH)/requirements.txt" pytest playwright comfy-cli
	touch $(COMFY_READY)

clean:
	rm -rf $(VENV) $(COMFY_VENV) .pytest_cache .mypy_cache .ruff_cache .coverage build dist *.egg-info
