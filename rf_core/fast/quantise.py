"""A network's linear layers in 8 bits, `Fp8Linear`: an approximation, and off by default.

Measured with the bundled student against float32, each pass given the same latents: the flow is off
by 5 to 7 %, by 1 to 2 % in bfloat16. As many captions are kept as before, but within a few chunks
it is another video of the same caption. Every kind of layer adds its share and none stands out; see
`quantise_linears` for those that stay.
"""

from __future__ import annotations

from ..fp8 import Fp8Linear
from ..memory.offload import StreamedLayers
from ..model import WanModel
from ..operations import is_plain_linear
from ..vace import Vace

KINDS = ("fp8",)


def quantise_linears(model: WanModel | Vace, kind: str = "fp8") -> None:
    """Replace the linear layers of the network's blocks, in place, one after another.

    What is outside of them stays: embeddings of prompts and timesteps take no time worth saving,
    and the head alone would make the flow wrong by 3 %. LoRAs are merged, and dtype and device
    chosen, before; weights may be streamed after. ValueError where a network cannot be quantised.
    """
    if kind not in KINDS:
        raise ValueError(f"weights of kind {kind!r} are unknown; use one of {', '.join(KINDS)}")
    if isinstance(model.blocks, StreamedLayers):
        raise ValueError(
            "the weights are streamed from host memory already; quantise them before that"
        )
    layers = [
        (parent, name, layer)
        for parent in model.blocks.modules()
        for name, layer in parent.named_children()
        if is_plain_linear(layer)  # a host's own layers cast, patch and offload by themselves
    ]
    if not layers:
        raise ValueError(
            "there are no plain linear layers in the network's blocks: they are quantised, or a "
            "host's own; load the network with torch.nn's layers"
        )
    while layers:  # each old layer is let go of before the next is made anew
        parent, name, layer = layers.pop()
        setattr(parent, name, Fp8Linear(layer))
