"""The Wan VAE's decoder: each fast form on and off, layouts, groups, and every convolution."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....decoders.codec import FastPaths
from ....decoders.decoder import WanDecoder
from ....fast.stopwatch import Stopwatch, device_seconds
from ...verify import RELATIVE_NORM
from ...workload import WorkloadOptions, load_workload
from ..plan import Setting
from ..record import Record
from . import off, workload

_REPEATS = 3

Convolution = nn.Conv2d | nn.Conv3d


@torch.no_grad()
def run(record: Record, setting: Setting) -> None:
    """Fast paths first, as they decide what a stream does."""
    options = WorkloadOptions(decoder="wan", **workload(setting))
    work = load_workload(options)
    decoder = work.decoders["wan"]
    assert isinstance(decoder, WanDecoder)
    generator, channels = torch.Generator().manual_seed(0), work.model.config.out_dim
    shape = (1, channels, options.cache.chunk_frames, *work.stream().latent_size)
    latents = torch.randn(shape, generator=generator).to(options.device)
    _fast_paths(record, decoder, latents, options)
    decoder.codec.fast_paths = None
    for group in (1, options.cache.chunk_frames):
        decoder.group_frames = group
        seconds, _ = _decode(decoder, latents)
        record.append("groups", {"latent_frames": group, "seconds": seconds})
    _convolutions(record, decoder, latents)
    for parameter in decoder.codec.parameters():
        parameter.data = parameter.data.contiguous()
    record.note("channels_first_seconds", _decode(decoder, latents)[0])


def _fast_paths(
    record: Record, decoder: WanDecoder, latents: Tensor, options: WorkloadOptions
) -> None:
    usual = FastPaths.on(latents.device)
    each = {
        f.name: replace(usual, **{f.name: not getattr(usual, f.name)}) for f in fields(FastPaths)
    }
    wanted, chosen = None, {}
    for name, fast_paths in {"definitions": FastPaths(), "as chosen": usual, **each}.items():
        decoder.codec.fast_paths = fast_paths
        seconds, images = _decode(decoder, latents)
        wanted = images if wanted is None else wanted
        error = off(images, wanted)
        chosen[name] = seconds
        row: dict[str, Any] = {"forms": name, "seconds": seconds, "error": error}
        record.append("forms", row | {"on": [n for n, on in vars(fast_paths).items() if on]})
        record.check(f"images with {name}", error, RELATIVE_NORM[options.dtype])
    plain, fast = (1e3 * chosen[name] for name in ("definitions", "as chosen"))
    record.say(f"a decode takes {plain:.1f} ms by definition, {fast:.1f} as chosen")
    gains = {n: chosen[n] - chosen["as chosen"] for n in each if getattr(usual, n)}
    record.say("; ".join(f"without {n} {1e3 * s:+.1f} ms" for n, s in gains.items()))


def _decode(decoder: WanDecoder, latents: Tensor) -> tuple[float, Tensor]:
    """The least seconds of a chunk of a stream that has begun, and its images."""
    _, state = decoder.decode(latents, None)
    images, state = decoder.decode(latents, state)
    kept, watch, seconds = images, Stopwatch(latents.device), []
    for _ in range(_REPEATS):
        images, state = decoder.decode(latents, state)
        seconds.append(watch.lap())
    return min(seconds), kept


def _convolutions(record: Record, decoder: WanDecoder, latents: Tensor) -> None:
    """Each convolution of a decode alone, with its own bias, on inputs of its shape."""
    found: dict[Convolution, tuple[torch.Size, tuple[int, ...]]] = {}

    def keep(conv: Convolution, inputs: tuple[Tensor, ...]) -> None:
        found[conv] = inputs[0].shape, inputs[0].stride()

    convolutions = {
        module: name
        for name, module in decoder.codec.decoder.named_modules()
        if isinstance(module, Convolution)
    }
    hooks = [conv.register_forward_pre_hook(keep) for conv in convolutions]
    decoder.codec.fast_paths = FastPaths()  # in which hooks see every layer
    try:
        _, state = decoder.decode(latents, None)
        decoder.decode(latents, state)
    finally:
        decoder.codec.fast_paths = None
        for hook in hooks:
            hook.remove()
    place: dict[str, Any] = {
        "device": latents.device,
        "dtype": next(decoder.codec.parameters()).dtype,
    }
    for conv, input_layout in found.items():  # small ones go another way on a CPU
        x = torch.empty_strided(*input_layout, **place).normal_()
        flops = 2 * conv(x).numel() * conv.weight[0].numel()
        seconds = device_seconds(partial(conv, x), latents.device)
        row = {"convolution": convolutions[conv], "input": list(x.shape), "seconds": seconds}
        record.append("convolutions", row | {"tflops": flops / seconds / 1e12})
