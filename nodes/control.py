"""Control: a network beside the student, and what it follows."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..rf_core.ranges import STRONGEST_CONTROL
from ..rf_core.source import AtEnd
from . import demo, host
from .border import checked_execute
from .control_input import ControlInput
from .loaders import CATEGORY, WEIGHT_DTYPES
from .types import RFControl

DEMO = "demo (bundled)"
"""The control network of Load RF Demo's student, among the files."""


class LoadControl(io.ComfyNode):
    """A MODEL with a control network beside it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFLoadControl",
            display_name="Load RF Control",
            category=CATEGORY,
            description="Puts a VACE beside a model, so that a stream follows depth, pose, "
            "outlines or a masked video from Control Video. Published for Wan 2.1 1.3B; other "
            "sizes do not fit.",
            search_aliases=[CATEGORY, "vace", "controlnet", "video control", "depth", "pose"],
            inputs=[
                io.Model.Input("model", tooltip="From Load RF Model, Load RF Demo or a LoRA."),
                io.Combo.Input(
                    "control_name",
                    options=[*host.model_files(), DEMO],
                    tooltip="The VACE, in models/diffusion_models, such as "
                    "wan2.1_vace_1.3B_fp16.safetensors: of its file the control alone is read. "
                    f"{DEMO} is for Load RF Demo.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=WEIGHT_DTYPES,
                    default="default",
                    tooltip="How its weights are kept. Default is what the model computes in. fp8 "
                    "halves their memory and changes the video a little; 'fast' also computes in "
                    "fp8 where the card can.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @checked_execute
    def execute(cls, model: Any, control_name: str, weight_dtype: str) -> io.NodeOutput:
        bundled = control_name == DEMO
        path = demo.CONTROL if bundled else host.model_path(control_name, "control_name")
        return io.NodeOutput(host.with_control(model, path, weight_dtype))


class ControlVideo(io.ComfyNode):
    """What a control network follows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RFControlVideo",
            display_name="Control Video",
            category=CATEGORY,
            description="What a stream is to follow beside its prompt: the structure of a video "
            "(depth, pose, outlines), a part of a video to make anew, or what pictures show. The "
            "model needs Load RF Control.",
            search_aliases=[CATEGORY, "vace", "controlnet", "inpaint video", "reference image"],
            inputs=[
                io.MultiType.Input(
                    "control",
                    types=[io.Image, io.Video],
                    optional=True,
                    tooltip="Depth, pose or outlines, one image for each of the video's; a single "
                    "picture holds for all of it. A VIDEO is read as it is needed.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the control video is made anew, black where it is kept as "
                    "it is. One mask holds for all of it.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="Pictures whose things or people are to appear. Each takes a frame of "
                    "the sink.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=STRONGEST_CONTROL,
                    step=0.05,
                    round=False,
                    tooltip="How closely it is followed. 1: as the network was trained; 0: not.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.5,
                    round=False,
                    tooltip="Acts from this second of the video on, at the nearest chunk.",
                ),
                io.Float.Input(
                    "end",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.5,
                    round=False,
                    tooltip="Acts until this second of the video. 0: to its end.",
                ),
                io.Combo.Input(
                    "at_end",
                    options=list(get_args(AtEnd)),
                    default="stop",
                    tooltip="Where the control video is shorter than the video: stop leaves the "
                    "rest to the prompt, hold keeps its last image, loop begins it again.",
                ),
            ],
            outputs=[RFControl.Output(display_name="control")],
        )

    @classmethod
    @checked_execute
    def execute(
        cls,
        strength: float,
        start: float,
        end: float,
        at_end: AtEnd,
        control: Any = None,
        mask: Any = None,
        reference: Any = None,
    ) -> io.NodeOutput:
        if control is None and reference is None:
            raise ValueError("nothing is connected; connect control, a video, or reference")
        if control is None and mask is not None:
            raise ValueError(
                "mask says which part of a control video is made anew; connect control"
            )
        if end and end <= start:
            raise ValueError(f"end is {end:g} and start {start:g}; let it end later, or 0: never")
        return io.NodeOutput(
            ControlInput(
                video=control,
                mask=mask,
                reference=reference,
                strength=strength,
                start=start,
                end=end or None,
                at_end=at_end,
            )
        )
