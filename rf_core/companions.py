"""The files a student belongs with: the VAE whose latents it makes, the encoder it reads.

A student's file names them, and knows them again in any layout and dtype: a VAE by the mean and
deviation of its latents, which the published ones share, a text encoder by its last norm. Shapes
cannot tell: the miniature's VAE fits Wan's latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .decoders.taehv import is_taehv
from .decoders.vae_files import naming, vae_config_of, vae_state_dict
from .model import fingerprint_of
from .text import last_norm
from .weights.checkpoint import Companion
from .weights.files import read_weights

TEXT_ENCODER, VAE = "text_encoder", "vae"
OPTIONS = MappingProxyType({VAE: "--vae", TEXT_ENCODER: "--text-encoder"})


def companion_of(kind: str, place: str | Path) -> Companion:
    """A VAE or a text encoder, as a student's file names it; ValueError where it is none."""
    path = Path(place)
    find = {VAE: _vae_fingerprint, TEXT_ENCODER: _text_fingerprint}[kind]
    # A folder or a hub id goes by its name.
    return Companion(name=path.name, fingerprint=find(path) if path.is_file() else None)


def companions_of(vae: str | Path, text_encoder: str | Path) -> dict[str, Companion]:
    """Both, by kind."""
    return {VAE: companion_of(VAE, vae), TEXT_ENCODER: companion_of(TEXT_ENCODER, text_encoder)}


def belongs_with(companions: Mapping[str, Companion], kind: str, place: str | Path) -> bool | None:
    """Whether a file is what a student belongs with; None where one of the two does not say."""
    wanted = companions.get(kind)
    if wanted is None or wanted.fingerprint is None:
        return None
    found = companion_of(kind, place).fingerprint
    return None if found is None else found == wanted.fingerprint


def check_vae(model: Path, companions: Mapping[str, Companion], vae: Path) -> None:
    """ValueError for a VAE of other latents than the student makes: it would show noise."""
    if belongs_with(companions, VAE, vae) is False:
        raise ValueError(
            f"{model} was trained for the latents of {companions[VAE].name}, and {vae} has others; "
            "give that one as --vae"
        )


def _vae_fingerprint(path: Path) -> str | None:
    file = read_weights(path)
    if is_taehv(file.tensors):  # stands in for a VAE that it does not name
        return None
    with naming(file.path):
        config = vae_config_of(vae_state_dict(file.tensors), file.metadata)
    scales = json.dumps([config.latent_mean, config.latent_std])
    return hashlib.blake2b(scales.encode(), digest_size=8).hexdigest()


def _text_fingerprint(path: Path) -> str:
    return fingerprint_of(last_norm(path, read_weights(path).tensors))
