"""The noise that trajectories begin with: a function of seed and clip, and so not stored.

It is drawn on the CPU. There its last digits depend on the kind of processor (vectorised logarithms
and cosines), and another release of torch may draw other numbers altogether. So a few of its values
are stored, which what is recreated must be near.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..run.draws import seeded_generator

_ROLE = "ode_pairs"
_PROBED = 64
_NEAR = 1e-3
"""Of a value with spread 1; processors differ by some millionths."""


def clip_noise(seed: int, clip: int, shape: Sequence[int]) -> Tensor:
    """The noise of a clip's trajectory, float32 [C, F, h, w]."""
    return torch.randn(*shape, generator=seeded_generator(seed, _ROLE, clip))


def probe(noise: Tensor) -> Tensor:
    """Some 64 of its values, evenly spread, in float32."""
    values = noise.flatten()
    return values[:: max(1, len(values) // _PROBED)].float().clone()


def is_near(noise: Tensor, stored_probe: Tensor) -> bool:
    """Whether noise is that of which `probe` gave those values, but for rounding."""
    found = probe(noise)
    return found.shape == stored_probe.shape and torch.allclose(
        found, stored_probe, rtol=0, atol=_NEAR
    )
