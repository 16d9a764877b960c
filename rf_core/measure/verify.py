"""A self-check against recorded outputs of the published code.

`python -m rf_core verify FOLDER` runs every file of the known kinds on a user's own card and
backends, and prints the largest error of each output. Sizes come from the files. Kinds that
belong to the trainer are named and left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..attention import Attention, sdpa
from ..config import (
    NUM_TRAIN_TIMESTEPS,
    SPATIAL_FACTOR,
    CacheConfig,
    Grid,
    ModelConfig,
    SamplerConfig,
)
from ..decoders.vae import VAEConfig, WanVAE
from ..kv_cache import KVCache
from ..model import WanModel
from ..scheduler import flow_to_x0, sampling_timesteps, training_sigmas, training_weights
from ..stream import Stream, denoise
from ..weights.files import parse_json, read_weights

ATOL, RTOL = 2e-5, 1e-4  # agreed for float32, element by element
RELATIVE_NORM = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Norm of the error over the norm of the record, by rounding."""

Tensors = dict[str, Tensor]
Outputs = Iterator[tuple[str, Tensor]]
Kinds = Mapping[str, "Callable[[Mapping[str, Any], Tensors, Backend], Outputs]"]
"""What re-runs a file of each kind."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Where and how a file is run again."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: Attention = sdpa


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One output against its record."""

    file: str
    output: str
    max_error: float
    """Largest absolute difference."""
    relative_error: float
    """Norm of the difference over the norm of the record."""
    agrees: bool

    def __str__(self) -> str:
        return (
            f"{'ok  ' if self.agrees else 'FAIL'} {self.file} {self.output}: "
            f"largest error {self.max_error:.3g}, relative {self.relative_error:.3g}"
        )


def verify_folder(
    folder: Path, backend: Backend, kinds: Kinds | None = None
) -> Iterator[Comparison | str]:
    """Compare every known file below `folder`; yields a line of text for each that is skipped.

    `kinds` are `KINDS` unless given. ValueError when no file in the folder is of them.
    """
    kinds = KINDS if kinds is None else kinds
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds the golden files")
    compared = 0
    for path in sorted(folder.rglob("*.safetensors")):
        kind, config, tensors = _read(path)
        if kind not in kinds:
            yield f"{path.name}: kind {kind!r} skipped; {WHERE.get(kind, 'it is unknown here')}"
            continue
        compared += 1
        for output, found in kinds[kind](config, tensors, backend):
            record = tensors[output]
            if output.startswith("cache."):  # a record may go on past what was ever written
                record = record[:, : found.shape[1]]
            yield _compare(path.name, output, found, record, backend.dtype)
    if not compared:
        raise ValueError(f"{folder} holds no file of the kinds {', '.join(kinds)}")


def student_stream(config: Mapping[str, Any], tensors: Tensors, backend: Backend) -> Outputs:
    """A streamed rollout from given noise, with the cache it leaves."""
    model, sizes = _network(config, tensors, backend)
    cache_config = CacheConfig(
        window_frames=_window(config, tensors),
        sink_frames=config["sink_size"],
        chunk_frames=config["num_frame_per_block"],
        decay=config["alpha"],
    )
    sampler = SamplerConfig(steps=tuple(config["denoising_step_list"]), shift=config["shift"])
    timesteps = sampling_timesteps(sampler)
    if "denoising_timesteps" in tensors:
        yield "denoising_timesteps", timesteps
    noise, renoise = tensors["noise"], iter(tensors["renoise"])
    grid = Grid.of_latents(noise.shape[-2], noise.shape[-1], sizes.patch_size)
    cache = model.new_cache(
        cache_config,
        batch=noise.shape[0],
        grid=grid,
        dtype=backend.dtype,
        device=backend.device,
    )
    prompt = model.counted_prompt(_to(tensors["prompt_embeds"], backend))

    def predict(x: Tensor, timestep: float) -> Tensor:
        at_BF = x.new_full((x.shape[0], x.shape[2]), timestep)
        return model(x.to(backend.dtype), at_BF, prompt, cache, backend.attention)

    chunks = []
    for start in _chunks(tensors.get("initial_latent"), cache_config.chunk_frames, backend):
        cache.advance(start.shape[2])
        predict(start, 0.0)
        chunks.append(start)
    for chunk in _chunks(noise, cache_config.chunk_frames, backend):
        cache.advance(chunk.shape[2])
        again = [_video(next(renoise), backend) for _ in range(len(timesteps) - 1)]
        chunks.append(denoise(predict, chunk, again, timesteps.tolist()))
        predict(chunks[-1], 0.0)
    yield "latents", rearrange(torch.cat(chunks, dim=2), "b c f h w -> b f c h w")
    yield from _windows(cache, tensors)


def sibling_stream(config: Mapping[str, Any], tensors: Tensors, backend: Backend) -> Outputs:
    """Another student's stream, by `Stream` itself, from recorded noise."""
    model, _ = _network(config, tensors, backend)
    stream = _RecordedStream(model, config, tensors, backend)
    for is_first, suffix in ((False, ""), (True, "_first_chunk")):
        if (name := f"denoising_timesteps{suffix}") in tensors:
            yield name, sampling_timesteps(stream.sampler, is_first=is_first)
    yield "latents", rearrange(stream.all_latents(), "b c f h w -> b f c h w")
    yield from _windows(stream.state.cache, tensors)


class _RecordedStream(Stream):
    """A stream that draws what a record has drawn."""

    def __init__(
        self, model: WanModel, config: Mapping[str, Any], tensors: Tensors, backend: Backend
    ) -> None:
        *_, rows, columns = tensors["noise"].shape
        super().__init__(
            model,
            _to(tensors["prompt_embeds"], backend),
            height=rows * SPATIAL_FACTOR,
            width=columns * SPATIAL_FACTOR,
            batch=len(tensors["noise"]),
            cache=sibling_cache(config, tensors),
            sampler=sibling_sampler(config),
            attention=backend.attention,
            last_chunk=tensors["noise"].shape[1] // config["num_frame_per_block"] - 1,
        )
        start = tensors.get("initial_latent")
        self._start = None if start is None else _video(start, backend)
        self._switches = {each["chunk"]: each for each in config.get("switches", ())}
        self._tensors, self._backend = tensors, backend
        self._left = _video(tensors["noise"], backend)
        self._renoise = iter(tensors["renoise"])
        self._first_renoise = iter(tensors.get("renoise_first", ()))
        self._heads = iter(tensors.get("reencoded", ()))

    def all_latents(self) -> Tensor:
        """The record's video, [B, C, F, h, w]."""
        begun = [] if self._start is None else self.start_from(self._start)
        made, first = [each.latents for each in begun], len(begun)
        frames = self._tensors["noise"].shape[1] + sum(each.shape[2] for each in made)
        while sum(each.shape[2] for each in made) < frames:
            if (due := self._switches.get(self.state.num_chunks - first)) is not None:
                mode = f"blend {due['blocks']}" if due["mode"] == "lerp" else "recache"
                self.switch(_to(self._tensors[due["prompt_embeds"]], self._backend), mode)
            made.append(self.generate())
        if self.cache_config.rebuild == "never":
            self.finish_clean_pass()
        return torch.cat(made, dim=2)

    def _noise(self, num_draws: int) -> Iterator[Tensor]:
        frames = self.state.cache.slot_frames
        yield self._left[:, :, :frames]
        self._left = self._left[:, :, frames:]
        drawn = self._renoise if frames == self.cache_config.chunk_frames else self._first_renoise
        for _ in range(num_draws - 1):
            yield _video(next(drawn), self._backend)

    def _draw(self, chunk: int, number: int) -> Tensor:
        frames = self.cache_config.chunk_frames
        if number:
            return _video(next(self._renoise), self._backend)
        return _video(self._tensors["noise"], self._backend)[:, :, chunk * frames :][:, :, :frames]

    def _encoded_head(self) -> Tensor:
        return _video(next(self._heads), self._backend)


def sibling_cache(config: Mapping[str, Any], tensors: Tensors) -> CacheConfig:
    """The cache that a record's fields describe."""
    switches = config.get("switches", ())
    joint = [each["keep_sink"] for each in switches if each["mode"] == "recache_joint"]
    memory, rebuild = config.get("memory"), config.get("rebuild")
    chunk, given = config["num_frame_per_block"], config.get("initial_chunks")
    first = given[0] if given else config.get("first_chunk_frames", chunk)
    rolling = config["rope"] == "rolling"  # the anchor lies beside the window there
    return CacheConfig(
        window_frames=_window(config, tensors) + rolling * config["sink_size"],
        sink_frames=config["sink_size"],
        chunk_frames=chunk,
        first_chunk_frames=None if first == chunk else first,
        decay=config["alpha"],
        positions="window" if rolling else config["rope"],
        memory_rates=() if memory is None else (memory["long"], memory["short"]),
        recache=("joint" if all(joint) else "joint_new_sink") if joint else "chunks",
        rebuild="never" if rebuild is None else rebuild["head"],
        blend_holds=any(each["mode"] == "lerp" for each in switches),
    )


def sibling_sampler(config: Mapping[str, Any]) -> SamplerConfig:
    """The steps that a record's fields describe."""
    return SamplerConfig(
        steps=config["denoising_step_list"],
        shift=config["shift"],
        first_steps=config.get("denoising_step_list_first_chunk", ()),
        clean_timestep=config.get("context_noise", 0),
        rolling=config["rope"] == "rolling",
    )


def teacher_forward(config: Mapping[str, Any], tensors: Tensors, backend: Backend) -> Outputs:
    """The bidirectional network and the tables of the training schedule."""
    model, _ = _network(config, tensors, backend)
    x, timestep = _video(tensors["x"], backend), tensors["timestep"].to(backend.device)
    prompt = model.prompt_context(_to(tensors["prompt_embeds"], backend))
    flow = model(x.to(backend.dtype), timestep, prompt, None, backend.attention)
    sigmas = training_sigmas(config["shift"])
    timesteps = sigmas * NUM_TRAIN_TIMESTEPS
    yield "flow", rearrange(flow, "b c f h w -> b f c h w")
    yield "x0", rearrange(flow_to_x0(flow, x, timestep), "b c f h w -> b f c h w")
    tables = {"sigmas": sigmas, "timesteps": timesteps, "loss_weights": training_weights(timesteps)}
    yield from ((name, table) for name, table in tables.items() if name in tensors)


def vae(config: Mapping[str, Any], tensors: Tensors, backend: Backend) -> Outputs:
    """The Wan VAE both ways, whole and, which must be the same, latent frame by latent frame."""
    sizes = {k: config[k] for k in ("dim", "z_dim", "num_res_blocks")}
    model = WanVAE(
        VAEConfig(
            **sizes,
            dim_mult=tuple(config["dim_mult"]),
            temporal_downsample=tuple(config["temporal_downsample"]),
        )
    )
    model.load_state_dict(_weights(tensors))
    model = model.to(backend.device, backend.dtype)
    if "latents" in tensors:
        latents = _to(tensors["latents"], backend)
        yield "pixels", model.decode(latents)
        parts, state = [], None
        for frame in latents.split(1, dim=2):
            part, state = model.decode_chunk(frame, state)
            parts.append(part)
        yield "pixels", torch.cat(parts, dim=2)
    if "video" in tensors:
        video = _to(tensors["video"], backend)
        yield "encoded", model.encode(video)
        step, parts, state = model.config.temporal_factor, [], None
        for images in (video[:, :, :1], *video[:, :, 1:].split(step, dim=2)):
            if images.shape[2]:
                part, state = model.encode_chunk(images, state)
                parts.append(part)
        yield "encoded", torch.cat(parts, dim=2)


KINDS: Kinds = {
    "student_stream": student_stream,
    "sibling_stream": sibling_stream,
    "rolling_stream": sibling_stream,
    "teacher_forward": teacher_forward,
    "vae": vae,
}
WHERE = dict.fromkeys(KINDS, "the engine checks it: python -m rf_core verify FOLDER") | {
    "redmd_losses": "the trainer checks it: python -m training verify FOLDER"
}


def _read(path: Path) -> tuple[str, dict[str, Any], Tensors]:
    file = read_weights(path)
    config = parse_json(path, file.metadata.get("config", "{}"))
    return file.metadata.get("kind", "unknown"), config, file.tensors


def _network(
    config: Mapping[str, Any], tensors: Tensors, backend: Backend
) -> tuple[WanModel, ModelConfig]:
    names = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "in_dim", "num_heads")
    sizes = ModelConfig(
        **{name: config[name] for name in names},
        num_layers=config["num_layers"],
        out_dim=config.get("out_dim", config["in_dim"]),
    )
    model = WanModel(sizes)
    model.load_state_dict(_weights(tensors))
    return model.to(backend.device, backend.dtype).requires_grad_(False), sizes


def _window(config: Mapping[str, Any], tensors: Tensors) -> int:
    # The published code writes -1 for attention to the whole clip.
    window = config["local_attn_size"]
    start = tensors.get("initial_latent")
    whole = tensors["noise"].shape[1] + (0 if start is None else start.shape[1])
    least = config["sink_size"] + config["num_frame_per_block"]
    return max(whole, least) if window == -1 else int(window)


def _chunks(frames: Tensor | None, size: int, backend: Backend) -> tuple[Tensor, ...]:
    return () if frames is None else _video(frames, backend).split(size, dim=2)


def _windows(cache: KVCache, tensors: Tensors) -> Outputs:
    """What is left in a cache of the layers that a record has."""
    for name in sorted(name for name in tensors if name.startswith("cache.")):
        _, layer, which = name.split(".")
        window = cache.k_NBWHD if which == "k" else cache.v_NBWHD
        yield name, window[int(layer)][:, : cache.num_frames * cache.frame_tokens]


def _weights(tensors: Tensors) -> Tensors:
    prefix = "weights."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _to(tensor: Tensor, backend: Backend) -> Tensor:
    return tensor.to(backend.device, backend.dtype)


def _video(frames: Tensor, backend: Backend) -> Tensor:
    return rearrange(frames, "b f c h w -> b c f h w").to(backend.device)


def _compare(
    file: str, output: str, found: Tensor, record: Tensor, dtype: torch.dtype
) -> Comparison:
    found, record = found.detach().double().cpu(), record.double()
    if found.shape != record.shape:
        raise ValueError(
            f"{file}: {output} has shape {tuple(found.shape)}, the record {tuple(record.shape)}"
        )
    error = (found - record).abs()
    relative = float(error.norm() / record.norm().clamp_min(torch.finfo(dtype).tiny))
    agrees = relative <= RELATIVE_NORM[dtype]
    if dtype == torch.float32:
        agrees &= bool((error <= ATOL + RTOL * record.abs()).all())
    return Comparison(
        file=file,
        output=output,
        max_error=float(error.max()),
        relative_error=relative,
        agrees=agrees,
    )
