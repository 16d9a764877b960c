"""What the planner knows of files and machines: sizes of networks, and memory that is free."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..decoders.taehv import is_taehv, scales_of_file, taehv_config_of
from ..decoders.vae_files import naming, vae_config_of, vae_state_dict
from ..weights.files import read_weights
from .footprint import DecoderConfig, TextSizes

_MEMINFO = Path("/proc/meminfo")
_LAYER = re.compile(r"\bblocks?\.(\d+)\.")
_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def decoder_config(path: Path) -> DecoderConfig:
    """Sizes of the decoder a file holds; ValueError where it is none."""
    file = read_weights(path)
    with naming(file.path):
        if is_taehv(file.tensors):
            return taehv_config_of(file.tensors, scales_of_file(file))
        return vae_config_of(vae_state_dict(file.tensors), file.metadata)


def text_sizes(place: str) -> TextSizes:
    """Sizes of a text encoder's file; of a folder or hub id, those of Wan's own are taken."""
    path = Path(place)
    if not path.is_file():
        return TextSizes()
    sizes = {name: tensor.numel() for name, tensor in read_weights(path).tensors.items()}
    layers = {name: int(match[1]) for name in sizes if (match := _LAYER.search(name))}
    return TextSizes(
        parameters=sum(sizes.values()),
        outside=sum(size for name, size in sizes.items() if name not in layers),
        layers=max(layers.values(), default=0) + 1,
    )


def free_bytes(device: str) -> int:
    """Bytes of a device's memory that nobody uses; ValueError where it does not say."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind == "cpu" and _MEMINFO.exists():
        match = re.search(r"^MemAvailable: +(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    raise ValueError(
        f"how much memory is free on {device} is not known here; say how many latent frames to "
        "decode at once instead of auto, or how much is available"
    )


def parse_bytes(text: str) -> int:
    """A size such as 16GB, 15.5 GiB or 800MB in bytes; ValueError for another form."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it as 16GB, 15.5GiB or 800MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
