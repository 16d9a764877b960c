# Everything a fresh clone needs: `make test` and `make demo` set up their own .venv.
# Without make, the README gives the same steps as plain commands.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
# One environment for each version of ComfyUI: their requirements differ.
COMFY_VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' "$(COMFYUI_PATH)/comfyui_version.py" 2>/dev/null)
COMFY_VENV := .venv-comfy-$(COMFY_VERSION)
COMFY_READY := $(COMFY_VENV)/.ready

# The oldest Python at hand of those the package is for.
OLDEST_PYTHON ?= $(shell for minor in 10 11 12 13; do \
	python3.$$minor --version >/dev/null 2>&1 && echo python3.$$minor && break; done)
FLOOR_VENV := .venv-floor
TRAINER_FLOOR_VENV := .venv-floor-training
TRAINER_TESTS := grep -lE "^ *(from|import) training"
ENGINE_TESTS := grep -LE "^ *(from|import) training"

# Each process has a stretch of files of its own, so that what a file shares is made once, and takes
# over from the others when it is done.
IN_PARALLEL := --numprocesses auto --dist worksteal

.PHONY: check test test-comfy test-floor rehearse coverage demo card lint clean

# Lint and every test but the slow ones. What took over a second is named: mark it slow.
check: lint
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow" --durations 5 --durations-min 1

test: $(READY)
	$(BIN)/python -m pytest $(IN_PARALLEL)

coverage: $(READY)
	$(BIN)/python -m pytest $(IN_PARALLEL) --cov --cov-report=term

# Against the ComfyUI at COMFYUI_PATH, which is only read; its packages go to a venv of their own.
test-comfy: $(COMFY_READY)
	COMFYUI_PATH="$(COMFYUI_PATH)" $(COMFY_VENV)/bin/python -m pytest --numprocesses auto --dist loadfile tests/comfyui

# The oldest releases that pyproject.toml allows: of the engine, and of the trainer, which needs newer.
test-floor: $(FLOOR_VENV)/.ready $(TRAINER_FLOOR_VENV)/.ready
	$(FLOOR_VENV)/bin/python -m pytest $(IN_PARALLEL) $$($(ENGINE_TESTS) tests/test_*.py)
	$(TRAINER_FLOOR_VENV)/bin/python -m pytest $(IN_PARALLEL) $$($(TRAINER_TESTS) tests/test_*.py)

# Files of the official names, layouts, sizes and types, through the command line: before a release.
rehearse: $(READY)
	$(BIN)/python tests/rehearse.py

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

$(FLOOR_VENV)/.ready: pyproject.toml constraints-floor.txt
	$(OLDEST_PYTHON) -m venv $(FLOOR_VENV)
	$(FLOOR_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(FLOOR_VENV)/bin/python -m pip install --quiet --constraint constraints-floor.txt \
		--editable ".[osc,video]" pytest pytest-xdist
	touch $@

$(TRAINER_FLOOR_VENV)/.ready: pyproject.toml constraints-floor-training.txt
	$(OLDEST_PYTHON) -m venv $(TRAINER_FLOOR_VENV)
	$(TRAINER_FLOOR_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TRAINER_FLOOR_VENV)/bin/python -m pip install --quiet \
		--constraint constraints-floor-training.txt --editable ".[osc,training]" pytest pytest-xdist
	touch $@

$(COMFY_READY): $(COMFYUI_PATH)/requirements.txt constraints-comfy.txt
	$(PYTHON) -m venv $(COMFY_VENV)
	$(COMFY_VENV)/bin/python -m pip install --quiet --constraint constraints-comfy.txt \
		--requirement "$(COMFYUI_PATH)/requirements.txt" pytest pytest-xdist playwright comfy-cli python-osc
	touch $(COMFY_READY)

clean:
	rm -rf $(VENV) .venv-comfy-* .venv-floor* .pytest_cache .mypy_cache .ruff_cache .coverage build dist *.egg-info
