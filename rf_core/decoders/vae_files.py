"""VAE files: the official, ComfyUI and diffusers layouts, sizes found from the tensors.

A VAE that is not the published one carries its latents' mean and deviation in the safetensors
metadata, under `rf_vae`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..weights.files import read_weights
from .codec import Codec, Operations, some_keys
from .vae import VAEConfig, WanVAE

METADATA_KEY = "rf_vae"
_WAN22_Z_DIM = 48
AnyCodec = TypeVar("AnyCodec", bound=Codec)


def vae_state_dict(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the official keys, from the official, ComfyUI or diffusers layout.

    Keys outside a `vae.` or `first_stage_model.` prefix are left out where there is one.
    """
    for prefix in ("first_stage_model.", "vae."):
        inside = {key[len(prefix) :]: value for key, value in sd.items() if key.startswith(prefix)}
        if inside:
            return vae_state_dict(inside)
    if "encoder.conv_in.weight" not in sd:
        return dict(sd)
    first_level = [re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", key) for key in sd]
    blocks = max((int(match[1]) for match in first_level if match), default=0) + 1
    return {_official_key(key, blocks): value for key, value in sd.items()}


# diffusers' AutoencoderKLWan names (scripts/convert_wan_to_diffusers.py there) -> the official.
_DIFFUSERS_NAMES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
_DIFFUSERS_RESIDUAL = {"norm1": "0", "conv1": "2", "norm2": "3", "conv2": "6"}


def _official_key(key: str, blocks_per_level: int) -> str:
    # Inside residual blocks first: the outer names reuse conv1 with another meaning.
    inner = r"(resnets\.\d+|down_blocks\.\d+)\.(norm1|conv1|norm2|conv2)\."
    key = re.sub(inner, lambda m: f"{m[1]}.residual.{_DIFFUSERS_RESIDUAL[m[2]]}.", key)

    def flat(match: re.Match[str]) -> str:
        level, kind, index = int(match[1]), match[2], int(match[3])
        within = index if kind == "resnets" else blocks_per_level
        return f".upsamples.{level * (blocks_per_level + 1) + within}."

    key = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, key)
    for theirs, official in _DIFFUSERS_NAMES:
        key = re.sub(theirs, official, key)
    return key


def vae_config_of(sd: Mapping[str, Tensor], metadata: Mapping[str, str]) -> VAEConfig:
    """Sizes from tensors under the official keys; latent mean and std from metadata, if given.

    `metadata` is a safetensors header's; see `vae_metadata`. ValueError where this is no Wan 2.1
    VAE, with what it is instead as far as can be told.
    """
    needed = ("encoder.conv1.weight", "encoder.downsamples.0.residual.6.weight", "conv2.weight")
    if "conv2.weight" in sd and sd["conv2.weight"].shape[0] == _WAN22_Z_DIM:
        raise ValueError(
            f"this is a Wan 2.2 VAE ({_WAN22_Z_DIM} latent channels); Reward Forcing makes Wan 2.1 "
            "latents (16 channels): use Wan2.1_VAE.pth or wan_2.1_vae.safetensors"
        )
    if any(key not in sd for key in needed):
        raise ValueError(
            f"this is not a Wan VAE: its keys are {some_keys(sd)}, where {needed[0]} and the like "
            "are expected; use Wan2.1_VAE.pth or wan_2.1_vae.safetensors"
        )
    dim = sd[needed[0]].shape[0]
    widths, blocks, temporal = _encoder_levels(sd)
    return VAEConfig(
        dim=dim,
        z_dim=sd["conv2.weight"].shape[0],
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=blocks,
        temporal_downsample=temporal,
        **normalisation_of(metadata),
    )


def _encoder_levels(sd: Mapping[str, Tensor]) -> tuple[list[int], int, tuple[bool, ...]]:
    """Channels of each level, residual blocks of the last one, and which steps halve time."""
    widths, blocks, temporal = [0], 0, []
    for index in range(len(sd)):
        at = f"encoder.downsamples.{index}"
        if f"{at}.residual.6.weight" in sd:
            widths[-1], blocks = sd[f"{at}.residual.6.weight"].shape[0], blocks + 1
        elif f"{at}.resample.1.weight" in sd:
            temporal.append(f"{at}.time_conv.weight" in sd)
            widths, blocks = [*widths, 0], 0
    return widths, blocks, tuple(temporal)


def vae_metadata(config: VAEConfig) -> dict[str, str]:
    """The safetensors metadata that carries a VAE's own latent mean and std."""
    values = {"latent_mean": config.latent_mean, "latent_std": config.latent_std}
    return {METADATA_KEY: json.dumps(values)}


def normalisation_of(metadata: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """The latent_mean and latent_std that `vae_metadata` wrote; empty where there are none."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        return {key: tuple(map(float, values[key])) for key in ("latent_mean", "latent_std")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"metadata {METADATA_KEY} is {text[:80]!r}; it must be JSON with the lists latent_mean "
            "and latent_std, or be left out for the published Wan 2.1 values"
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's path in front of any ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def frozen(
    codec: AnyCodec,
    sd: Mapping[str, Tensor],
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> AnyCodec:
    """The codec, made without weights, with `sd` as its weights there, for inference.

    ValueError naming keys that are missing or do not fit.
    """
    cast = {key: value.to(device=device, dtype=dtype) for key, value in sd.items()}
    _load_strictly(codec, cast, name)
    return codec.eval().requires_grad_(False)


def _load_strictly(module: nn.Module, sd: Mapping[str, Tensor], name: str) -> None:
    wanted = module.state_dict()
    both = wanted.keys() & sd.keys()
    faults = {
        "missing": wanted.keys() - sd.keys(),
        "unexpected": sd.keys() - wanted.keys(),
        "of another shape": {key for key in both if wanted[key].shape != sd[key].shape},
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(k)} {kind}: {some_keys(k)}" for kind, k in faults.items() if k)
        raise ValueError(f"the weights do not fit the {name} ({listed}); use an unmodified file")
    module.load_state_dict(sd, assign=True)


def vae_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    operations: Operations = nn,
) -> WanVAE:
    """A frozen Wan 2.1 VAE from the tensors and metadata of a file; see `load_vae`."""
    sd = vae_state_dict(tensors)
    vae = WanVAE(vae_config_of(sd, metadata), operations, device="meta")
    return frozen(vae, sd, "Wan 2.1 VAE", device, dtype)


def load_vae(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanVAE:
    """A frozen Wan 2.1 VAE from a .safetensors or .pth file in any layout `vae_state_dict` reads.

    ValueError, with the file's path, for a file that is not one.
    """
    file = read_weights(path)
    with naming(file.path):
        return vae_of(file.tensors, file.metadata, device, dtype)
