"""A LoRA onto a MODEL, whatever its makers call the layers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import host
from .border import checked_execute
from .loaders import CATEGORY


class LoadLoRA(io.ComfyNode):
    """A MODEL with a LoRA's patches."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFLoadLoRA",
            display_name="Load RF LoRA",
            category=CATEGORY,
            description="A style or motion LoRA for Wan 2.1 onto a model, as any trainer saves it. "
            "Says how much of the file fits. Several can be chained.",
            search_aliases=[CATEGORY, "lora", "apply lora", "lora loader", "lokr", "dora", "style"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA changes."),
                io.Combo.Input(
                    "lora_name",
                    options=host.lora_files(),
                    tooltip="The LoRA, in models/loras; of kohya, PEFT, diffusers and others.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of it. 0: nothing; below 0: away from it.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> Any:
        return host.changed(host.lora_path(lora_name)) if lora_name else None

    @classmethod
    @checked_execute
    def execute(cls, model: Any, lora_name: str, strength_model: float) -> io.NodeOutput:
        patched, text = host.with_lora(model, host.lora_path(lora_name), strength_model)
        return io.NodeOutput(patched, ui=ui.PreviewText(text))
