"""Nodes that bring in models: a student, the demo, and the settings of its sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..rf_core.config import CacheConfig
from ..rf_core.families import AUTO, FAMILIES
from . import demo, host
from .border import checked_execute
from .inputs import checked, set_on_node
from .types import SINK_VALUES, RFSink

CATEGORY = "Reward Forcing"
WEIGHT_DTYPES = ["default", "bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fn fast"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A sink that is chosen by name."""

    cache: CacheConfig
    about: str
    """What it is good for and what that was measured on, as the tooltip says it."""


PRESETS = {
    "Published": Preset(cache=CacheConfig(), about="the paper's."),
    "Long": Preset(
        cache=CacheConfig(window_frames=15, decay=0.99, accumulator="float32"),
        about="a longer memory that forgets its start sooner.",
    ),
    "Static sink": Preset(
        cache=CacheConfig(decay=1.0),
        about="the opening never fades; for a minute the same as Published.",
    ),
    "Absolute": Preset(
        cache=CacheConfig(decay=1.0, positions="absolute"),
        about="a static one, seen ever further back, as LongLive has it; half of Published's "
        "drift, but prompts may take longer to show.",
    ),
    "No sink": Preset(
        cache=CacheConfig(sink_frames=0),
        about="only the last frames count; freest, but drifts over twice as far. "
        "Drift was measured on the miniature demo's kind, not yet on Wan (docs/claims.md).",
    ),
}
"""Sinks by name, the first Reward Forcing's own; the node's list and tooltip are made of them."""
CUSTOM = "Custom"


class LoadModel(io.ComfyNode):
    """A checkpoint to a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFLoadModel",
            display_name="Load RF Model",
            category=CATEGORY,
            description="A model that makes video as a stream: Reward Forcing, or another causal "
            "student of Wan 2.1, from models/diffusion_models.",
            search_aliases=[CATEGORY, "self forcing", "causal wan 2.1", "real-time video"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.model_files(),
                    tooltip="The student, in models/diffusion_models; .pt files are read too.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=WEIGHT_DTYPES,
                    default="default",
                    tooltip="How weights are kept. Default is bfloat16 on cards and on CPUs that "
                    "multiply it. fp8 halves their memory and changes the video a little; 'fast' "
                    "also computes in fp8 where the card can.",
                ),
                io.Combo.Input(
                    "submodel",
                    options=[AUTO, "generator_ema", "generator"],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Which network of a training file with several to take. Auto prefers "
                    "the averaged one.",
                ),
                io.Combo.Input(
                    "family",
                    options=[AUTO, *FAMILIES],
                    default=AUTO,
                    optional=True,
                    tooltip="Whose student it is: window, steps and images a second follow. Auto "
                    "goes by the file, then by its name. Krea's (the look of 14B) and "
                    "Self-Forcing's weights are non-commercial, Rolling Forcing is for academic "
                    "use only; RF Model Info has each file's licence.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @checked_execute
    def execute(
        cls, model_name: str, weight_dtype: str, submodel: str = AUTO, family: str = AUTO
    ) -> io.NodeOutput:
        path, network = host.model_path(model_name), None if submodel == AUTO else submodel
        return io.NodeOutput(host.load_student(path, weight_dtype, network, family=family))


class LoadDemo(io.ComfyNode):
    """The bundled miniature model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFLoadDemo",
            display_name="Load RF Demo",
            category=CATEGORY,
            description="Everything to try a stream at once, without a download: coloured shapes "
            "that move, 64x64. Prompts are of the form 'a red circle moves left slowly'.",
            search_aliases=[CATEGORY, "example", "try without download"],
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    @checked_execute
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(demo.load_model(), demo.load_clip(), demo.load_vae())


class SinkConfig(io.ComfyNode):
    """What a stream remembers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        published = CacheConfig()
        return io.Schema(
            node_id="RFSinkConfig",
            display_name="EMA-Sink Config",
            category=CATEGORY,
            description="How much a video remembers: a steadier look, or freer motion. Presets set "
            f"all values; choose {CUSTOM} to use those below.",
            search_aliases=[CATEGORY, "attention sink", "context window", "kv cache", "drift"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default=next(iter(PRESETS)),
                    tooltip=" ".join(f"{name}: {each.about}" for name, each in PRESETS.items()),
                    extra_dict={  # which `web/sink_config.js` shows
                        "presets": {
                            name: {value: getattr(each.cache, value) for value in SINK_VALUES}
                            for name, each in PRESETS.items()
                        }
                    },
                ),
                io.Int.Input(
                    "window_frames",
                    default=published.window_frames,
                    min=3,
                    max=63,
                    tooltip="Latent frames (4 images each) the model sees at once. More keeps "
                    "things steadier, costs memory and time; the model was trained on 9.",
                ),
                io.Int.Input(
                    "sink_frames",
                    default=published.sink_frames,
                    min=0,
                    max=60,
                    tooltip="How many of them are kept for the start of the video. They hold its "
                    "look and colours together over minutes.",
                ),
                io.Float.Input(
                    "decay",
                    default=published.decay,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="What the sink keeps each time a chunk leaves the window. 1: it never "
                    "changes. Lower: it follows the video, which moves and changes more freely.",
                ),
                io.Combo.Input(
                    "accumulator",
                    options=["reference", "float32"],
                    default=published.accumulator,
                    tooltip="reference rounds like the published code: in bf16 a decay this close "
                    "to 1 hardly moves the sink. float32 makes the decay real.",
                ),
                io.Int.Input(
                    "anchor_frames",
                    default=published.anchor_frames,
                    min=0,
                    max=60,
                    optional=True,
                    tooltip="First latent frames that never change, kept before the sink: they "
                    "hold the opening's look while the sink follows the video.",
                ),
            ],
            outputs=[RFSink.Output(display_name="sink")],
        )

    @classmethod
    def validate_inputs(
        cls,
        preset: str | None = None,
        window_frames: int | None = None,
        sink_frames: int | None = None,
        decay: float | None = None,
        accumulator: str | None = None,
        anchor_frames: int | None = 0,
    ) -> bool | str:
        values = (preset, window_frames, sink_frames, decay, accumulator, anchor_frames)
        given = set_on_node(**dict(zip(("preset", *SINK_VALUES), values, strict=True)))
        try:
            checked(cls, given)
            if len(given) == len(values):
                _sink(**given)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked_execute
    def execute(
        cls,
        preset: str,
        window_frames: int,
        sink_frames: int,
        decay: float,
        accumulator: str,
        anchor_frames: int = 0,
    ) -> io.NodeOutput:
        values = window_frames, sink_frames, decay, accumulator, anchor_frames
        return io.NodeOutput(_sink(preset, **dict(zip(SINK_VALUES, values, strict=True))))


def _sink(preset: str, **values: Any) -> CacheConfig:
    return CacheConfig(**values) if preset == CUSTOM else PRESETS[preset].cache
