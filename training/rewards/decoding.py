"""Decoding for rewards under autograd: only what carries gradient is kept, or made again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rf_core.decoders.decoder import Decoder, DecoderState


def decode_with_gradient(
    decoder: Decoder, latents: Tensor, fixed_frames: int = 0, recomputed_frames: int | None = None
) -> Tensor:
    """Images [B, T, 3, H, W] in [0, 1] of a clip's latents [B, C, F, h, w], differentiable by them.

    The first `fixed_frames` are decoded without gradient: they are past to the rest. With
    `recomputed_frames`, as many latent frames at a time are decoded again in the backward pass, so
    that one part's activations are held, and of the others the states between them.
    """
    images, state = [], None
    if fixed_frames:
        with torch.no_grad():
            begun, state = decoder.decode(latents[:, :, :fixed_frames], None)
        images.append(begun)
    rest = latents[:, :, fixed_frames:]
    for part in rest.split(recomputed_frames or max(1, rest.shape[2]), dim=2):
        if recomputed_frames is None:
            made, state = decoder.decode(part, state)
        else:
            made, state = checkpoint(
                _decode, decoder, part, state, use_reentrant=False, preserve_rng_state=False
            )
        images.append(made)
    return torch.cat(images, dim=1)


def _decode(
    decoder: Decoder, part: Tensor, state: DecoderState | None
) -> tuple[Tensor, DecoderState]:
    return decoder.decode(part, None if state is None else state.fork())


def fixed_frames(mask: Tensor | None, sample: int) -> int:
    """How many of a sample's first latent frames carry no gradient.

    `mask`, which broadcasts to latents [B, C, F, h, w], is true where they do; None for everywhere.
    """
    if mask is None:
        return 0
    carries = mask[sample].any(dim=0).flatten(1).any(dim=1)
    return int((~carries).cumprod(0).sum())
