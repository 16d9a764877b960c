"""AdamW without its first moment, for runs whose beta1 is 0.

There the first moment is the gradient itself, and torch's AdamW keeps it all the same: at 1.3B
5.7 GB a network, in memory and in every checkpoint. Steps are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_ENTRIES = 2**26
"""Entries of the weights that are stepped at once; it bounds the memory of a step."""


class MomentlessAdamW(torch.optim.Optimizer):
    """AdamW with betas (0, beta2): decoupled weight decay, and no first moment.

    Its state has torch's names, `step` and `exp_avg_sq`, so that a checkpoint of AdamW can be
    resumed from: its `exp_avg` is not read.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            given = [weight for weight in group["params"] if weight.grad is not None]
            for weights in _in_parts(given):
                self._step(weights, group)

    def _step(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(weight) for weight in weights]
        gradients, squares = [w.grad for w in weights], [state["exp_avg_sq"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        bias_roots = [(1 - group["beta2"] ** state["step"].item()) ** 0.5 for state in states]

        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["beta2"])
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, bias_roots)
        torch._foreach_add_(divisors, group["eps"])
        torch._foreach_addcdiv_(weights, gradients, divisors, -group["lr"])

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state


def _in_parts(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The weights in their order, some at a time: at most `MAX_ENTRIES`, or a single one."""
    part: list[Tensor] = []
    entries = 0
    for weight in weights:
        if part and entries + weight.numel() > MAX_ENTRIES:
            yield part
            part, entries = [], 0
        part.append(weight)
        entries += weight.numel()
    if part:
        yield part
