"""Nodes for what a stream leaves: its state on disk, and facts about a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..rf_core.state import Snapshot
from ..rf_core.weights.checkpoint import describe, read_checkpoint
from . import host
from .border import checked_execute
from .loaders import CATEGORY
from .names import ROOM, plain
from .types import RFState, State


class SaveState(io.ComfyNode):
    """A stream's state to disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFSaveState",
            display_name="Save Stream State",
            category=CATEGORY,
            description="Keeps where a video ended in output/stream_states, so that it can go on "
            "tomorrow or branch.",
            search_aliases=[CATEGORY, "continue video", "extend video", "resume", "pause"],
            inputs=[
                RFState.Input("state", tooltip="From Streaming Sampler."),
                io.String.Input("name", default="stream", tooltip="Name without folder or ending."),
            ],
            outputs=[RFState.Output(display_name="state")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        try:
            if name is not None:
                plain(name, "name", ROOM)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked_execute
    def execute(cls, state: State, name: str) -> io.NodeOutput:
        path = host.free_state_path(plain(name, "name", ROOM))
        state.snapshot.save(path)
        text = f"{path.name}: {_summary(state.snapshot)}"
        return io.NodeOutput(state, ui=ui.PreviewText(text))


class LoadState(io.ComfyNode):
    """A stream's state from disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFLoadState",
            display_name="Load Stream State",
            category=CATEGORY,
            description="Goes on with a video that Save Stream State has kept, or branches it.",
            search_aliases=[CATEGORY, "continue video", "extend video", "resume"],
            inputs=[
                io.Combo.Input(
                    "name", options=_saved(), tooltip="A file that Save Stream State has written."
                )
            ],
            outputs=[RFState.Output(display_name="state")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        if name is not None and name not in _saved():
            return f"there is no state {name!r} in output/stream_states; save one first"
        return True

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None) -> Any:
        return host.changed(host.state_path(name)) if name else None

    @classmethod
    @checked_execute
    def execute(cls, name: str) -> io.NodeOutput:
        snapshot = Snapshot.load(host.state_path(name))
        state = State(snapshot=snapshot, source={"file": name})
        return io.NodeOutput(state, ui=ui.PreviewText(_summary(snapshot)))


class ModelInfo(io.ComfyNode):
    """What a checkpoint is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFModelInfo",
            display_name="RF Model Info",
            category=CATEGORY,
            description="Says what a model file is, without loading it: sizes, layout, settings.",
            search_aliases=[CATEGORY, "inspect checkpoint", "metadata"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.model_files(),
                    tooltip="A file in models/diffusion_models; it is read, not loaded.",
                )
            ],
            outputs=[io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    @checked_execute
    def execute(cls, model_name: str) -> io.NodeOutput:
        found = read_checkpoint(host.model_path(model_name))
        text = describe(replace(found, path=Path(model_name)))  # where a server keeps it is its own
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _saved() -> list[str]:
    return sorted(path.name for path in host.state_folder().glob(f"*{host.STATE}"))


def _summary(snapshot: Snapshot) -> str:
    facts = snapshot.facts
    kind = "compact" if snapshot.compact else "exact"
    return (
        f"{kind}, {snapshot.nbytes / 1e6:.1f} MB, {facts['width']}x{facts['height']}, "
        f"after {facts['num_chunks']} chunks"
    )
