"""Memory of decoding under autograd, for the gradient of a reward."""

from __future__ import annotations

import torch

from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.decoders.taehv import TAEHV
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.memory.live_bytes import fake_tensors, peak_bytes
from rf_core.memory.placement import decoder_config
from rf_core.options import DEMO

from ..run.networks import DTYPES
from .recipes import DistilConfig, recomputed_frames

NAME = "decoding for the reward's gradient"


def decoding_memory(config: DistilConfig) -> dict[str, int]:
    """The decoder, and what a window of one sample takes there and back; nothing without it.

    That is a part's activations, the states between parts, and the images with their gradient. A
    VAE whose file is not there counts as Wan's.
    """
    if not config.run.redmd.gradient_beta:
        return {}
    path = config.files.vae or DEMO / "vae.safetensors"
    sizes = decoder_config(path) if path.exists() else VAEConfig()
    run, dtype = config.run, DTYPES[config.placement.dtype]
    frames = recomputed_frames(config) or run.window_frames
    with fake_tensors("cuda") as place:
        decoder: WanDecoder | TAEHVDecoder
        if isinstance(sizes, VAEConfig):
            decoder = WanDecoder(WanVAE(sizes, device=place, dtype=dtype))
        else:
            decoder = TAEHVDecoder(TAEHV(sizes, device=place, dtype=dtype))
        decoder.codec.requires_grad_(False)
        latents = torch.empty(1, run.latents[0], frames, *run.largest_size, device=place)
        with torch.no_grad():
            images, state = decoder.decode(latents, None)

        def there_and_back() -> None:
            with torch.enable_grad():
                own = latents.clone().requires_grad_(True)
                made, _ = decoder.decode(own, state.fork() if parts > 1 else None)
                torch.autograd.grad(made.sum(), own)

        parts = -(-run.window_frames // frames)
        found = peak_bytes(there_and_back, place) + 2 * parts * images.nbytes
        found += (parts - 1) * state.nbytes
        found += sum(each.nbytes for each in decoder.codec.parameters())
    return {NAME: found}
