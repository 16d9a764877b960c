"""Trains a tiny VAE of the Wan architecture on the miniature world, on a CPU.

Most of a picture is plain background, so training looks at crops around shapes and weighs shape
pixels up; a share of whole pictures and of long clips teaches what crops cannot: how far to look
in space and in time. Noise on the latents, in units of their own spread, makes the decoder
forgiving of what a diffusion model gets slightly wrong, and keeps it from hiding detail in
latents too fine to model. Three channels are pulled to the mean colour of what they stand for: left
alone, the encoder puts red and yellow a tenth as far apart as red and cyan, and a model of the
latents then takes long to tell them apart. The result carries the measured latent statistics, so
that `WanVAE.encode` returns latents of unit spread.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rf_core.config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.decoders.vae_files import vae_metadata
from rf_core.weights.files import read_weights
from rf_core.writing import whole_file

from ..muon import Muon
from .budget import Budget, Periodic, run
from .scenes import BACKGROUND, LIT, PLAIN, SIZE, WORLDS, Scene, caption, render, sample_scene
from .tracker import score

NUM_CHANNELS = 3  # red, green, blue
FILE_NAME = "vae.safetensors"
PROVENANCE_KEY = "provenance"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipKind:
    """One kind of training clip."""

    size: int
    """Pixels along each side: the whole picture, or a crop around a shape."""
    images: int
    """Length; 4k + 1."""
    share: float
    """How often it is drawn, relative to the others."""


@dataclass(frozen=True, kw_only=True)
class VAETrainConfig:
    """A run of the VAE's training. Defaults make the demo's VAE in 24 minutes on two slow cores."""

    dim: int = 8
    """Channels at full resolution."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level in multiples of `dim`."""
    num_res_blocks: int = 1
    """Residual blocks of an encoder level."""
    z_dim: int = 16
    """Latent channels."""
    clips: tuple[ClipKind, ...] = (
        ClipKind(size=32, images=9, share=0.40),
        ClipKind(size=32, images=17, share=0.20),
        ClipKind(size=32, images=45, share=0.15),
        ClipKind(size=SIZE, images=9, share=0.15),
        ClipKind(size=SIZE, images=17, share=0.10),
    )
    """What is trained on."""
    pixels_per_step: int = 55_296
    """Upper bound on the pixels of a batch; a batch has at least two clips, because convolutions of
    a single one miss the fast path on a CPU."""
    budget: Budget = field(default_factory=lambda: Budget(minutes=24.0))
    """How long the run may take."""
    learning_rate: float = 1.5e-2
    """Peak rate of Muon, which moves the convolutions. AdamW does not get far in so few steps."""
    vector_learning_rate: float = 3e-3
    """Peak rate of AdamW, which moves gains, biases and the convolution to RGB."""
    clip_norm: float = 1.0
    """Largest norm of a step's gradient."""
    ema_decay: float = 0.998
    """Decay a step of the averaged weights, which are what is saved."""
    shape_weight: float = 8.0
    """Weight of pixels near a shape; 1 for the rest."""
    latent_noise: float = 0.3
    """Standard deviation of the noise on latents, in units of each channel's own."""
    colour_weight: float = 0.1
    """Weight of the squared distance between the first three channels and the mean colour."""
    colour_unit: float = 0.12
    """Difference of mean colour from the background, in [0, 1], that makes 1 in a latent."""
    latent_penalty: float = 1e-4
    """Weight of the latents' mean square: holds their scale."""
    checkpoint_minutes: float = 5.0
    """Time between intermediate files."""
    statistics_clips: int = 32
    """Clips the latent statistics and the quality report are measured on."""
    statistics_images: int = 45
    """Their length; 4k + 1."""
    world: str = PLAIN
    """Of `scenes.WORLDS`."""
    seed: int = 0
    """Seeds weights, scenes and noise."""

    def __post_init__(self) -> None:
        for kind in self.clips:
            if kind.images % 4 != 1 or kind.size % 8 or kind.size > SIZE:
                raise ValueError(
                    f"{kind}: images must be 4k + 1, size a multiple of 8 and at most {SIZE}"
                )


def to_wan(video: Tensor) -> Tensor:
    """Videos [B, T, 3, H, W] in [0, 1] as the VAE reads them: [B, 3, T, H, W] in [-1, 1]."""
    return rearrange(video, "b t c h w -> b c t h w") * 2 - 1


def from_wan(pixels: Tensor) -> Tensor:
    """The VAE's pixels [B, 3, T, H, W] as videos [B, T, 3, H, W] in [0, 1], clamped."""
    return rearrange((pixels.clamp(-1, 1) + 1) / 2, "b c t h w -> b t c h w")


def train_vae(config: VAETrainConfig, out: Path, start: Path | None = None) -> Path:
    """Train a VAE, anew or from the file `start`, and write it to `out`; returns the file.

    The safetensors metadata holds the latent statistics and, under `provenance`, the config, the
    steps taken and the quality reached. The file is rewritten as the run goes on.
    """
    torch.manual_seed(config.seed)
    vae, average = _new_vae(config), _new_vae(config).requires_grad_(False)
    if start:
        vae.load_state_dict(read_weights(start).tensors)
    average.load_state_dict(vae.state_dict())
    matrices = _matrices(vae)
    batches, save_now, step = sample_batches(config), Periodic(config.checkpoint_minutes), 0
    for step, spent in run(config.budget, _optimisers(config, vae, matrices)):
        _average(average, vae, min(config.ema_decay, (1 + step) / (10 + step)))
        if save_now():
            _save(config, average, step, out, start)
        vae.zero_grad()
        loss = reconstruction_loss(vae, next(batches), config)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), config.clip_norm)
        for weight, matrix in matrices:
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad)
        if step % 50 == 0:
            _log.info("step %d, %.1f%%: loss %.5f", step, 100 * spent, loss.item())
    return _save(config, average, step + 1, out, start)


def _new_vae(config: VAETrainConfig) -> WanVAE:
    vae = WanVAE(
        VAEConfig(
            dim=config.dim,
            dim_mult=config.dim_mult,
            num_res_blocks=config.num_res_blocks,
            z_dim=config.z_dim,
            latent_mean=(0.0,) * config.z_dim,
            latent_std=(1.0,) * config.z_dim,
        )
    )
    # Channels last: a third less time on a CPU.
    for weight in vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return vae


def _matrices(vae: WanVAE) -> list[tuple[nn.Parameter, Tensor]]:
    """The kernels inside the network, each with a view of its memory as a matrix for Muon."""
    kernels = [
        weight
        for name, weight in vae.named_parameters()
        if name.endswith("weight") and weight.shape[0] > NUM_CHANNELS
    ]
    pairs = [(kernel, _as_matrix(kernel.data)) for kernel in kernels]
    assert all(kernel.data_ptr() == matrix.data_ptr() for kernel, matrix in pairs)
    return pairs


def _as_matrix(kernel: Tensor) -> Tensor:
    return rearrange(kernel, "o i ... -> o (... i)")  # a view where channels lie last


def _optimisers(
    config: VAETrainConfig, vae: WanVAE, matrices: list[tuple[nn.Parameter, Tensor]]
) -> list[torch.optim.Optimizer]:
    kernels = {id(kernel) for kernel, _ in matrices}
    rest = [weight for weight in vae.parameters() if id(weight) not in kernels]
    return [
        Muon([matrix for _, matrix in matrices], lr=config.learning_rate),
        torch.optim.AdamW(
            rest, lr=config.vector_learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        ),
    ]


@torch.no_grad()
def _average(average: WanVAE, vae: WanVAE, decay: float) -> None:
    for mean, now in zip(average.parameters(), vae.parameters(), strict=True):
        mean.lerp_(now, 1 - decay)


def sample_batches(config: VAETrainConfig) -> Iterator[Tensor]:
    """Endless batches [B, T, 3, size, size] in [0, 1], each of one kind of clip."""
    rng = np.random.default_rng(config.seed)
    shares = np.array([kind.share for kind in config.clips])
    while True:
        kind = config.clips[rng.choice(len(shares), p=shares / shares.sum())]
        count = max(2, config.pixels_per_step // (kind.size**2 * kind.images))
        scenes = [sample_scene(rng, WORLDS[config.world]) for _ in range(count)]
        videos = render(scenes, kind.images)
        crops = [_crop(*pair, kind, rng) for pair in zip(videos, scenes, strict=True)]
        yield torch.stack(crops)


def _crop(video: Tensor, scene: Scene, kind: ClipKind, rng: np.random.Generator) -> Tensor:
    """The part of a video around where its first thing is at mid-time."""
    if kind.size == SIZE:
        return video
    half_time = torch.tensor([kind.images // 2])
    middle = scene.things[0].centres(half_time, scene.wall)[0].numpy()
    jitter = rng.uniform(-kind.size / 2, kind.size / 2, 2)
    corner = np.clip(middle - kind.size / 2 + jitter, 0, SIZE - kind.size)
    x, y = (int(value) for value in corner.round())
    return video[:, :, y : y + kind.size, x : x + kind.size]


def reconstruction_loss(vae: WanVAE, video: Tensor, config: VAETrainConfig) -> Tensor:
    """L1 plus squared error of [B, T, 3, H, W] through noised latents, shape pixels weighed up."""
    target = to_wan(video).contiguous(memory_format=torch.channels_last_3d)
    latents = vae.encode(target)
    spread = latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    noise = torch.randn_like(latents) * spread * config.latent_noise
    error = (vae.decode(latents + noise) - target).abs()
    weight = 1 + (config.shape_weight - 1) * near_shapes(video)
    loss = (weight * (error + error.square())).mean() / weight.mean()
    colour = (latents[:, :NUM_CHANNELS] - mean_colour(video) / config.colour_unit).square().mean()
    return (
        loss
        + config.colour_weight * colour
        + config.latent_penalty * latents[:, NUM_CHANNELS:].square().mean()
    )


def mean_colour(video: Tensor) -> Tensor:
    """The mean difference from the background over what each latent stands for.

    Takes [B, T, 3, H, W] with T = 4k + 1; returns [B, 3, k + 1, H / 8, W / 8].
    """
    shown = rearrange(video - torch.tensor(BACKGROUND)[:, None, None], "b t c h w -> b c t h w")
    first = shown[:, :, :1].expand(-1, -1, TEMPORAL_FACTOR, -1, -1)
    cell = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)
    return F.avg_pool3d(torch.cat([first, shown[:, :, 1:]], dim=2), cell)


def near_shapes(video: Tensor) -> Tensor:
    """1 within two pixels of a thing or a wall, else 0: [B, T, 3, H, W] to [B, 1, T, H, W]."""
    shown = reduce(video, "b t c h w -> b t h w", "max") > LIT
    return F.max_pool2d(shown.float(), 5, 1, 2)[:, None]


def _save(
    config: VAETrainConfig, average: WanVAE, steps: int, out: Path, start: Path | None
) -> Path:
    """Write the averaged weights with their statistics and quality."""
    rng = np.random.default_rng([config.seed, 1])  # other scenes than those trained on
    scenes = [sample_scene(rng, WORLDS[config.world]) for _ in range(config.statistics_clips)]
    mean, std = latent_statistics(average, scenes, config.statistics_images)
    measured = replace(average.config, latent_mean=mean, latent_std=std)
    quality = reconstruction_quality(average, scenes, config.statistics_images)
    _log.info("after %d steps: %s", steps, quality)
    provenance = {
        "command": "python -m training.world vae",
        "config": asdict(config),
        "steps": steps,
        "torch": str(torch.__version__),
        "quality": quality,
    }
    if start:
        provenance["started_from"] = json.loads(read_weights(start).metadata[PROVENANCE_KEY])
    out.mkdir(parents=True, exist_ok=True)
    path = out / FILE_NAME
    tensors = {key: value.contiguous() for key, value in average.state_dict().items()}
    metadata = vae_metadata(measured) | {PROVENANCE_KEY: json.dumps(provenance)}
    with whole_file(path) as part:
        save_file(tensors, part, metadata=metadata)
    return path


@torch.no_grad()
def latent_statistics(
    vae: WanVAE, scenes: list[Scene], images: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over whole clips of the scenes."""
    latents = torch.cat([vae.encode(to_wan(video)) for video, _ in _pairs(scenes, images)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    return tuple(mean.tolist()), tuple(std.tolist())


@torch.no_grad()
def reconstruction_quality(vae: WanVAE, scenes: list[Scene], images: int) -> dict[str, float]:
    """What survives the VAE: the tracker's accuracy per attribute, and PSNR in dB.

    `psnr_shapes` counts only pixels near a shape.
    """
    totals: dict[str, float] = defaultdict(float)
    for videos, pair in _pairs(scenes, images):
        seen = from_wan(vae.decode(vae.encode(to_wan(videos))))
        near = rearrange(near_shapes(videos), "b c t h w -> b t c h w")
        for each in range(len(pair)):
            found = score(seen[each], caption(pair[each]))
            found["psnr"] = _psnr(seen[each], videos[each])
            found["psnr_shapes"] = _psnr(seen[each], videos[each], near[each])
            for name, value in found.items():
                totals[name] += value / len(scenes)
    del totals["measured_speed"]
    return {name: round(value, 4) for name, value in totals.items()}


def _pairs(scenes: list[Scene], images: int) -> Iterator[tuple[Tensor, list[Scene]]]:
    """The scenes two by two, rendered: convolutions of a single clip are slow on a CPU."""
    for start in range(0, len(scenes), 2):
        pair = scenes[start : start + 2]
        yield render(pair, images), pair


def _psnr(seen: Tensor, true: Tensor, weight: Tensor | None = None) -> float:
    weight = torch.ones_like(true) if weight is None else weight.expand_as(true)
    error = (weight * (seen - true).square()).sum() / weight.sum()
    return -10 * math.log10(max(float(error), 1e-10))


@torch.no_grad()
def latent_colours(vae: WanVAE, scenes: list[Scene], images: int) -> list[list[float]]:
    """The affine map from normalised latents to the mean colour in [-1, 1] of what they stand for.

    Least squares over the scenes: rows of z_dim + 1 for red, green and blue, the last the bias. A
    user interface can show latents by it without a decoder.
    """
    rows, colours = [], []
    for video, _ in _pairs(scenes, images):
        latents = rearrange(vae.encode(to_wan(video)), "b c f h w -> (b f h w) c")
        rows.append(F.pad(latents, (0, 1), value=1.0))
        mean = mean_colour(video) + torch.tensor(BACKGROUND)[:, None, None, None]
        colours.append(rearrange(2 * mean - 1, "b c f h w -> (b f h w) c"))
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(colours)).solution
    return [[round(value, 5) for value in row] for row in solution.T.tolist()]
