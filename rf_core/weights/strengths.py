"""LoRAs whose strengths are set while the student runs.

A strength is merged anew from the checkpoint's own weights, by the arithmetic that `load_student`
merges with and on the CPU as there, and copied to where the weights lie: the student is then, to
the bit, as if it had been loaded so, however often a strength was set before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .lora import Lora, fit_file, read_lora
from .lora_merge import merge


class Strengths:
    """The LoRAs that a student was loaded with, by name, and their strengths now.

    Keeps what the checkpoint holds of the weights that they change, and the adapters, in RAM.

    Args:
        model: the student; its weights lie in memory as plain floats.
        tensors: the checkpoint's, without any LoRA.
        loras: those it was loaded with, in their order.
    """

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, Tensor], loras: Mapping[str, Lora]
    ) -> None:
        self._adapters = {
            name: fit_file(tensors, read_lora(lora.path), lora.path).adapters
            for name, lora in loras.items()
        }
        changed = {key for adapters in self._adapters.values() for key in adapters}
        self._weights = {key: tensors[key] for key in changed}
        own = model.state_dict()
        self._places = {key: own[key] for key in changed}
        self._strengths = {name: lora.strength for name, lora in loras.items()}

    def __call__(self, name: str, strength: float) -> None:
        """Set a strength. ValueError, and all is as before, where a weight would overflow."""
        before = self._strengths[name]
        self._strengths[name] = strength
        try:
            self._write(name)
        except ValueError:
            self._strengths[name] = before
            self._write(name)
            raise

    @torch.no_grad()
    def _write(self, name: str) -> None:
        for key in self._adapters[name]:
            place = self._places[key]
            weight = self._merged(key).to(place.dtype)
            if not weight.isfinite().all():
                kind = str(place.dtype).removeprefix("torch.")
                raise ValueError(
                    f"a strength of {self._strengths[name]:g} is too much for {name}: {key} "
                    f"overflows {kind}; take a smaller one"
                )
            place.copy_(weight)

    def _merged(self, key: str) -> Tensor:
        weight = self._weights[key]
        for name, adapters in self._adapters.items():
            if key in adapters:
                weight = merge(weight, adapters[key], self._strengths[name])
        return weight


def names_of(loras: tuple[Lora, ...]) -> dict[str, Lora]:
    """LoRAs by what they are called: their files' names, numbered where two are alike."""
    named: dict[str, Lora] = {}
    for lora in loras:
        name, number = lora.path.stem, 2
        while name in named:
            name, number = f"{lora.path.stem}-{number}", number + 1
        named[name] = lora
    return named
