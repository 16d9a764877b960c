"""The groups of the pack, as data: `make_blueprints.py` has the real frontend make them."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLER = "RFStreamingSampler"


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A group, as ComfyUI's node library offers it; nodes are named by their types."""

    workflow: str
    """Of which template it is made; notes and frames are left out."""
    description: str
    inputs: tuple[tuple[str, str], ...]
    """Widgets and sockets seen from outside: node and input."""
    outputs: tuple[tuple[str, str], ...] = ((SAMPLER, "VIDEO"), (SAMPLER, "state"))
    """Node and output."""
    links: tuple[tuple[str, str, str, str], ...] = ()
    """More links: node, output, node, input; a node that is not there is added."""


SHOWN = (
    ("CLIPTextEncode", "text"),
    *((SAMPLER, name) for name in ("width", "height", "length", "unit", "seed")),
)
FILES = (("RFLoadModel", "model_name"), ("CLIPLoader", "clip_name"), ("VAELoader", "vae_name"))

BLUEPRINTS = {
    "Text to Video (Reward Forcing)": Blueprint(
        workflow="text_to_video",
        description="Streams a video of any length from a prompt with the published weights. "
        "'state' lets another group go on from its end.",
        inputs=(*SHOWN, *FILES),
    ),
    "Continue Video (Reward Forcing)": Blueprint(
        workflow="text_to_video",
        description="Goes on from the last frames of any video, with the published weights. "
        "Experimental, as every start from pictures.",
        inputs=(("GetVideoComponents", "video"), *SHOWN, *FILES),
        links=(("GetVideoComponents", "images", SAMPLER, "start_image"),),
    ),
    "Text to Video Demo (Reward Forcing)": Blueprint(
        workflow="text_to_video_demo",
        description="Coloured shapes that move, from the bundled miniature model: nothing to "
        "download. Prompts are of the form 'a red circle moves left slowly'.",
        inputs=SHOWN,
    ),
}
