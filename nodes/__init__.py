"""The ComfyUI pack: thin nodes over `rf_core`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .control import ControlVideo, LoadControl
from .live import LiveStream
from .live_http import register
from .loaders import LoadDemo, LoadModel, SinkConfig
from .lora import LoadLoRA
from .output import LoadState, ModelInfo, SaveState
from .prompt import PromptSchedule, PromptSwitch
from .sampler import StreamingSampler

NODES: list[type[io.ComfyNode]] = [
    LoadModel,
    LoadDemo,
    LoadLoRA,
    LoadControl,
    ControlVideo,
    SinkConfig,
    PromptSwitch,
    PromptSchedule,
    StreamingSampler,
    LiveStream,
    SaveState,
    LoadState,
    ModelInfo,
]


class RewardForcing(ComfyExtension):
    """What ComfyUI asks the pack for."""

    async def on_load(self) -> None:
        """Once, before the server answers anybody."""
        register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes."""
        return NODES
