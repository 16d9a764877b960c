"""What a workflow says about App Mode, where ComfyUI shows its inputs and its result alone."""

from __future__ import annotations

from typing import Any

DEMO_INPUTS = (
    ("CLIPTextEncode", "text"),
    ("RFStreamingSampler", "length"),
    ("RFStreamingSampler", "seed"),
)


def with_app(
    workflow: dict[str, Any],
    inputs: tuple[tuple[str, str], ...] = DEMO_INPUTS,
    output: str = "RFStreamingSampler",
) -> dict[str, Any]:
    """The workflow, opened as an app: `inputs` are node types and widgets, `output` a node type."""
    number = {node["type"]: node["id"] for node in workflow["nodes"]}
    shown = {
        "inputs": [[number[node], widget] for node, widget in inputs],
        "outputs": [number[output]],
    }
    said = {"linearData": shown, "linearMode": True}
    return workflow | {"extra": workflow.get("extra", {}) | said}
