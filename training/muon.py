"""Muon: momentum whose matrices are made orthogonal before the step (Jordan et al., 2024).

Small transformers learn the same in about half the steps of AdamW. torch's own version runs its
iteration in bfloat16, which CPUs emulate; this one stays in the gradient's dtype and treats all
matrices of a shape at once. Vectors, embeddings and the output head belong to AdamW.

Under FSDP every process gathers a matrix's momentum and computes the whole step, of which it takes
its share: the same numbers, at the cost of repeated work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients, from the reference
NUM_ITERATIONS = 5
MAX_ENTRIES = 2**26
"""Largest number of entries of the matrices in one batch; it bounds the memory of a step."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices [out, in].

    A step moves a matrix by `lr * 0.2 * sqrt(max(out, in))` times a nearly orthogonal matrix, so
    that its entries move as far as under AdamW with the same `lr` (Liu et al., arXiv 2502.16982).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                some = max(1, MAX_ENTRIES // shape.numel())
                for start in range(0, len(matrices), some):
                    self._step_shape(matrices[start : start + some], group)

    def _step_shape(self, matrices: list[Tensor], group: dict[str, float]) -> None:
        updates = []
        for matrix in matrices:
            assert matrix.grad is not None
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 1 - group["momentum"])
            updates.append(_full_tensor(matrix.grad.lerp(momentum, group["momentum"])))
        rate = group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
        for matrix, update in zip(matrices, orthogonalise(torch.stack(updates)), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(_shard_like(update, matrix), alpha=-rate)


def _full_tensor(matrix: Tensor) -> Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _shard_like(whole: Tensor, of: Tensor) -> Tensor:
    """The shard of a full matrix that this process holds of `of`."""
    if not isinstance(of, DTensor):
        return whole
    mesh = of.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, of.placements)


def orthogonalise(matrices_NOI: Tensor) -> Tensor:
    """The matrices [N, out, in] with all singular values brought near 1 (0.7 to 1.2)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices_NOI.shape[1] > matrices_NOI.shape[2]
    x = matrices_NOI.mT if tall else matrices_NOI
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
