"""Drives a checkout of the published Reward Forcing code, for comparisons of speed.

Nothing of that code is here. Its causal network, its wrapper and its inference pipeline are
imported from the folder a user names and run as they are; what they take for granted is supplied
from outside: sizes of the network and of the picture (they spell out those of 1.3B at 480x832),
prompt embeddings, noise, and an attention where flash-attn cannot run. Packages whose names they
import and do not use in this run are stood in for, so that torch and einops are all it needs.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention import sdpa
from ..config import CacheConfig, Grid, ModelConfig, SamplerConfig
from ..fast.stopwatch import Stopwatch
from ..model import WanModel

REPOSITORY = "JaydenLyh/Reward-Forcing"
_FILES = (
    "wan/modules/causal_model.py",
    "wan/modules/model.py",
    "wan/modules/attention.py",
    "utils/wan_wrapper.py",
    "pipeline/causal_inference.py",
)
_FOLDERS = ("wan", "wan.modules", "utils", "pipeline", "demo_utils")
# Imported there by name, and not used by a run whose weights, prompt and decoder are given.
_UNUSED = {
    "wan.modules.tokenizers": ("HuggingfaceTokenizer",),
    "wan.modules.t5": ("umt5_xxl",),
    "wan.modules.vae": ("_video_vae",),
    "demo_utils.memory": (
        "gpu",
        "get_cuda_free_memory_gb",
        "DynamicSwapInstaller",
        "move_model_to_device_with_memory_preservation",
    ),
}


class _Mixin:
    """In place of diffusers' mixins, of which only loading and saving is known there."""


BeforeChunk = Callable[[int], None]
"""Called before each of the published code's chunks with its number, its clock standing still."""


@dataclass(frozen=True)
class Modules:
    """The parts of the checkout that run."""

    network: Any
    layers: Any
    attention: Any
    wrapper: Any
    pipeline: Any


class Published:
    """The published pipeline around our weights, which it shares and leaves as they are.

    ValueError where the folder is not a checkout, where it needs a package that is not installed,
    or where it cannot do what the cache asks for.
    """

    def __init__(
        self,
        folder: Path,
        model: WanModel,
        *,
        cache: CacheConfig,
        sampler: SamplerConfig,
        grid: Grid,
    ) -> None:
        check_settings(cache, sampler)
        modules = import_checkout(folder)
        weight = model.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.replaced_attention = _replace_attention(modules, self.device, self.dtype)
        self._config, self._grid, self._cache = model.config, grid, cache
        self._passes = len(sampler.steps) + 1
        generator = _generator(modules, model, cache, sampler, grid)
        self._pipeline = _pipeline(modules, generator, cache, sampler, grid, model.config)
        self._clean_add_noise = self._pipeline.scheduler.add_noise

    @torch.no_grad()
    def stream(
        self,
        prompt_embeds: Tensor,
        noise: Tensor,
        renoise: Iterator[Tensor],
        before_chunk: BeforeChunk = lambda chunk: None,
    ) -> tuple[Tensor, list[tuple[float, float]]]:
        """A whole rollout from noise [1, C, F, h, w]; latents of that shape, and each chunk's
        seconds by the wall and of CPU time, [chunks, 2].

        `renoise` gives what is mixed back between passes, [1, C, frames, h, w], in order.
        """
        watch = _ChunkWatch(self._passes, self.device, before_chunk)
        self._reset(renoise)
        self._pipeline.text_encoder = lambda text_prompts: {
            "prompt_embeds": prompt_embeds.to(self.device, self.dtype)
        }
        self._pipeline.vae = SimpleNamespace(decode_to_pixel=watch.finish)
        hook = self._pipeline.generator.register_forward_pre_hook(watch.on_pass)
        try:
            _, latents = self._pipeline.inference(
                noise=rearrange(noise, "b c f h w -> b f c h w").to(self.device, self.dtype),
                text_prompts=[""],
                return_latents=True,
            )
        finally:
            hook.remove()
        return rearrange(latents, "b f c h w -> b c f h w").float().cpu(), watch.seconds

    def _reset(self, renoise: Iterator[Tensor]) -> None:
        config, window = self._config, self._cache.window_frames * self._grid.frame_tokens
        shape = (1, window, config.num_heads, config.head_dim)
        place = {"device": self.device, "dtype": self.dtype}
        self._pipeline.kv_cache1 = [
            {
                "k": torch.zeros(shape, **place),
                "v": torch.zeros(shape, **place),
                "global_end_index": torch.zeros(1, dtype=torch.long, device=self.device),
                "local_end_index": torch.zeros(1, dtype=torch.long, device=self.device),
            }
            for _ in range(config.num_layers)
        ]
        self._pipeline.crossattn_cache = [{"is_init": False} for _ in range(config.num_layers)]

        def add_noise(latents: Tensor, drawn: Tensor, timestep: Tensor) -> Tensor:
            given = rearrange(next(renoise), "b c f h w -> (b f) c h w")
            return self._clean_add_noise(latents, given.to(drawn), timestep)

        self._pipeline.scheduler.add_noise = add_noise


class _ChunkWatch:
    """Times chunks by counting the passes of the published loop."""

    def __init__(self, passes: int, device: torch.device, before_chunk: BeforeChunk) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._passes, self._before_chunk = passes, before_chunk
        self._count, self._watch = 0, Stopwatch(device)

    def on_pass(self, *_: object) -> None:
        chunk, within = divmod(self._count, self._passes)
        self._count += 1
        if within:
            return
        if chunk:
            self.seconds.append(self._watch.laps())
        self._before_chunk(chunk)
        self._watch.laps()

    def finish(self, latents: Tensor, use_cache: bool) -> Tensor:
        """Stands for the decoder, which the published code runs once, at the end."""
        self.seconds.append(self._watch.laps())
        return latents.new_zeros(1)


def check_settings(cache: CacheConfig, sampler: SamplerConfig) -> None:
    """ValueError where the published code's window or steps work otherwise, or not at all."""
    room = cache.window_frames - cache.sink_frames
    if cache.sink_frames != cache.chunk_frames or room % cache.chunk_frames:
        raise ValueError(
            f"a window of {cache.window_frames} with a sink of {cache.sink_frames} is not what "
            f"the published code can do; use a sink of {cache.chunk_frames} frames and a window "
            f"of whole chunks of {cache.chunk_frames}"
        )
    known = {"window_frames", "sink_frames", "chunk_frames", "decay", "steps", "shift"}
    unknown = [
        f"{name} {getattr(config, name)!r}"
        for config in (cache, sampler)
        for name in vars(config).keys() - known
        if getattr(config, name) != getattr(type(config)(), name)
    ]
    if unknown:
        raise ValueError(
            f"the published code does not know {', '.join(sorted(unknown))}; race it with settings "
            "of its own"
        )


def import_checkout(folder: Path) -> Modules:
    """Import what runs from a checkout; sys.modules is left as it was."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not a checkout of the published code, as it has no {missing[0]}; "
            f"clone {REPOSITORY} and give its folder"
        )
    try:
        with _importable(folder):
            modules = Modules(*(import_module(_module_name(name)) for name in _FILES))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the checkout {folder} needs the package {error.name}, which is not installed; "
            "pip install it"
        ) from error
    except ImportError as error:
        raise ValueError(f"the checkout {folder} cannot be imported ({error})") from error
    if not hasattr(getattr(modules.network, "CausalWanSelfAttention", None), "incremental_update"):
        raise ValueError(
            f"{folder} has no EMA-Sink, so it is of another project; clone {REPOSITORY}"
        )
    return modules


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    ours = set(_FOLDERS) | _stand_ins().keys()

    def belongs(name: str) -> bool:
        return name in ours or name.partition(".")[0] in _FOLDERS

    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if belongs(name)}
    # Packages without their __init__: those import every model and trainer there is.
    for name in _FOLDERS:
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules.update(_stand_ins())
    try:
        # Compiled on import for training; here nothing calls it.
        with patch.object(torch, "compile", lambda function, **options: function):
            yield
    finally:
        for name in [name for name in sys.modules if belongs(name)]:
            del sys.modules[name]
        sys.modules.update(aside)


def _stand_ins() -> dict[str, ModuleType]:
    names: dict[str, dict[str, Any]] = {
        module: dict.fromkeys(unused) for module, unused in _UNUSED.items()
    }
    names |= {
        "diffusers": {},
        "diffusers.configuration_utils": {
            "ConfigMixin": _Mixin,
            "register_to_config": lambda init: init,
        },
        "diffusers.models": {},
        "diffusers.models.modeling_utils": {"ModelMixin": nn.Module},
    }
    modules = {}
    for name, members in names.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(members)
    return modules


def _module_name(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _replace_attention(modules: Modules, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SDPA had to take the place of flash-attn: as installed, in half precision, on CUDA.

    Left to itself without it, the published code rounds to bf16 in one place and fails in another.
    """
    flags = ("FLASH_ATTN_2_AVAILABLE", "FLASH_ATTN_3_AVAILABLE")
    installed = any(getattr(modules.attention, flag, False) for flag in flags)
    if installed and device.type == "cuda" and dtype != torch.float32:
        return False

    def attention(q: Tensor, k: Tensor, v: Tensor, k_lens: None = None) -> Tensor:
        assert k_lens is None
        return sdpa(q, k, v)

    modules.network.attention = modules.layers.flash_attention = attention
    return True


def _generator(
    modules: Modules, model: WanModel, cache: CacheConfig, sampler: SamplerConfig, grid: Grid
) -> Any:
    """The published wrapper around a published network with our weights."""
    config = model.config
    network_class = modules.network.CausalWanModel

    def from_pretrained(folder: str, local_attn_size: int, sink_size: int) -> nn.Module:
        sizes = {**vars(config), "local_attn_size": local_attn_size, "sink_size": sink_size}
        with torch.device("meta"):
            network: nn.Module = network_class(**sizes)
        # No buffer, so it does not come with the weights.
        network.freqs = network_class(**{**sizes, "num_layers": 1}).freqs
        network.load_state_dict(model.state_dict(), assign=True)
        return network.requires_grad_(False)

    loader = SimpleNamespace(from_pretrained=from_pretrained)
    with patch.object(modules.wrapper, "CausalWanModel", loader):
        generator = modules.wrapper.WanDiffusionWrapper(
            checkpoint_path="",
            timestep_shift=sampler.shift,
            is_causal=True,
            local_attn_size=cache.window_frames,
            sink_size=cache.sink_frames,
        )
    generator.seq_len = max(generator.seq_len, cache.window_frames * grid.frame_tokens)
    for block in generator.model.blocks:
        block.self_attn.max_attention_size = cache.window_frames * grid.frame_tokens
        block.self_attn.compression_alpha = cache.decay
    return generator


def _pipeline(
    modules: Modules,
    generator: Any,
    cache: CacheConfig,
    sampler: SamplerConfig,
    grid: Grid,
    config: ModelConfig,
) -> Any:
    settings = SimpleNamespace(
        denoising_step_list=list(sampler.steps),
        warp_denoising_step=True,
        num_frame_per_block=cache.chunk_frames,
        independent_first_frame=False,
        context_noise=0,
    )
    unused = SimpleNamespace()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
        pipeline = modules.pipeline.CausalInferencePipeline(
            settings, generator.model, generator=generator, text_encoder=unused, vae=unused
        )
    pipeline.frame_seq_length = grid.frame_tokens
    pipeline.num_transformer_blocks = config.num_layers
    return pipeline
