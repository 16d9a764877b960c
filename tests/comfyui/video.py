"""Reading back what the pack has written."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def images_of(path: Path) -> np.ndarray:
    """Every image of a video, [T, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
