"""Optical flow by name.

`lucas_kanade` needs nothing and runs everywhere. RAFT (arXiv 2003.12039), the flow of VBench's
dynamic degree, is torchvision's, with weights from a file of yours: nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from rf_core.weights.files import read_weights

from .metrics import FlowEstimator, lucas_kanade

FlowName = Literal["lucas_kanade", "raft_small", "raft_large"]

_RAFT_UPDATES = 20  # as VBench runs it
_RAFT_UNIT = 8  # pixels: rows and columns come in multiples of it
_RAFT_SMALLEST = 128  # pixels: its four levels of correlation need as many


def flow_estimator(
    name: FlowName, weights: Path | None = None, device: torch.device | str = "cpu"
) -> FlowEstimator:
    """Optical flow by name; RAFT takes torchvision's `weights` as .pth or .safetensors.

    ValueError for an unknown name, for weights that are missing, superfluous or of another
    network, and where RAFT is asked for without torchvision.
    """
    if name not in get_args(FlowName):
        raise ValueError(f"flow is {name!r}; choose one of {', '.join(get_args(FlowName))}")
    if name == "lucas_kanade":
        if weights is not None:
            raise ValueError(f"{weights} is given, but lucas_kanade has no weights; leave it out")
        return lucas_kanade
    if weights is None or not weights.is_file():
        raise ValueError(
            f"the weights of {name} are {weights}; give the file of torchvision's {name}"
        )
    return Raft(name, weights, device)


class Raft:
    """RAFT as a `FlowEstimator`, frozen; flow comes back on the device of the images.

    Raises:
        ValueError: no torchvision, or weights of another network.
    """

    def __init__(self, name: FlowName, weights: Path, device: torch.device | str) -> None:
        try:
            from torchvision.models import optical_flow
        except ImportError:
            raise ValueError(
                f"flow {name} needs torchvision, which is not installed; pip install torchvision "
                "to fit this torch, or take --flow lucas_kanade"
            ) from None
        self.network = getattr(optical_flow, name)(weights=None, progress=False)
        try:
            self.network.load_state_dict(read_weights(weights).tensors)
        except RuntimeError as error:
            raise ValueError(
                f"{weights} does not hold the weights of torchvision's {name} "
                f"({str(error).splitlines()[0]}); download them again"
            ) from error
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """See `FlowEstimator`; pictures are padded by their edge to the size RAFT needs."""
        device = next(self.network.parameters()).device
        height, width = first.shape[2:]
        below, right = (_missing(side) for side in (height, width))
        before, after = (
            F.pad(2 * images.to(device) - 1, (0, right, 0, below), mode="replicate")
            for images in (first, second)
        )
        found = self.network(before, after, num_flow_updates=_RAFT_UPDATES)[-1]
        return found[:, :, :height, :width].to(first.device)


def _missing(side: int) -> int:
    return max(-side % _RAFT_UNIT, _RAFT_SMALLEST - side)
