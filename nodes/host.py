"""ComfyUI, seen from here: the one file that touches `comfy` and `folder_paths`.

A student becomes a real MODEL: a ModelPatcher around rf_core's network, built with ComfyUI's
`operations`, so that LoRA, offloading, fp8 weights and torch.compile treat it like any other. A
stream runs through `BaseModel.apply_model`, where wrappers act, and reads attention from
`optimized_attention`.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import itertools
import logging
import os
import threading
import time
import types
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taehv
import comfy.text_encoders.t5
import comfy.utils
import comfy.weight_adapter
import folder_paths
import latent_preview
import psutil
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from PIL import Image, ImageOps
from server import PromptServer
from torch import Tensor

from ..rf_core.config import FPS, TEMPORAL_FACTOR, CacheConfig, Grid, ModelConfig, SamplerConfig
from ..rf_core.devices import preferred_dtype
from ..rf_core.families import AUTO, Family
from ..rf_core.kv_cache import KeyValues
from ..rf_core.measure.counts import stream_bytes
from ..rf_core.model import PromptContext, TimeContext, WanModel, fingerprint_of
from ..rf_core.text import byte_ids, clean_prompt
from ..rf_core.weights.checkpoint import Checkpoint, read_checkpoint
from ..rf_core.weights.checks import require_finite
from ..rf_core.weights.lora import fit_file, read_lora
from ..rf_core.weights.lora_merge import Adapter, change
from ..rf_core.weights.recognise import Told
from . import names

StockWanVAE = comfy.ldm.wan.vae.WanVAE
StockTAEHV = comfy.taesd.taehv.TAEHV
MemBlock = comfy.taesd.taehv.MemBlock
TGrow = comfy.taesd.taehv.TGrow
TPool = comfy.taesd.taehv.TPool
count_cache_layers = comfy.ldm.wan.vae.count_cache_layers

SETTINGS = "reward_forcing"
"""Key of a patcher's `model_options` under which the checkpoint's settings travel."""
LORAS = "reward_forcing_loras"
"""Key under which a clone keeps the LoRAs without effect before it, and its parent's patches."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a checkpoint says about its use."""

    cache: CacheConfig
    sampler: SamplerConfig
    size: tuple[int, int]
    """Height and width in pixels it was trained at."""
    name: str
    """The file's name."""
    fingerprint: str
    """Tells its weights from another training's."""
    causal: bool
    """Whether the file, or its name, says that it is a causal student."""
    told: Told
    """Whose student it is, and how that is known."""

    @property
    def family(self) -> Family:
        """How its authors stream it."""
        return self.told.preset


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass of a stream sees besides its latents."""

    time: TimeContext
    prompt: PromptContext
    cache: KeyValues | None


class ComfyWanModel(WanModel):
    """rf_core's network as ComfyUI constructs it: sizes by name, layers from `operations`."""

    def __init__(self, *, dtype: Any, device: Any, operations: Any, **unet_config: Any) -> None:
        names = ModelConfig.__dataclass_fields__
        sizes = ModelConfig(**{name: unet_config[name] for name in names})
        super().__init__(sizes, operations=operations, dtype=dtype, device=device)
        self.dtype = dtype


class StreamingModel(
    comfy.model_base.WAN21, comfy.model_base.QwenImage, comfy.model_base.HunyuanDiT
):
    """A student that runs as a stream and in no other way.

    Of QwenImage and HunyuanDiT it is only in name: `comfy.lora.model_lora_keys_unet` chooses the
    names that LoRA files may use by class and offers no other way. They add the names that are
    bare or begin with `transformer.`, `lycoris_` and `base_model.model.`.
    """

    def __init__(self, model_config: Any, device: Any = None) -> None:
        # The parents' own constructors would build ComfyUI's networks.
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device, unet_model=ComfyWanModel
        )
        self.image_to_video = False
        self.steered: tuple[Any, ...] = ()
        """The last patchers of `with_strengths`."""

    def extra_conds(self, **_: Any) -> dict[str, Any]:
        """Nothing: a stream brings its prompt along."""
        return {}

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        rf_pass: Pass | None = None,
        **_: Any,
    ) -> Tensor:
        """The flow of latents x [B, C, F, h, w] at timesteps t [B, F], float32."""
        if rf_pass is None:
            raise ValueError(
                "this MODEL is a causal student that makes video chunk by chunk, at CFG 1 and "
                "without a negative prompt: connect it to Streaming Sampler, not to a KSampler or "
                "guider"
            )
        options = (transformer_options or {}) | {"prefetch_dynamic_vbars": self._is_dynamic()}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            merged = (each.flatten(2) for each in (q, k, v))
            heads = q.shape[2]
            out = optimized_attention(*merged, heads=heads, transformer_options=options)
            return out.unflatten(2, (heads, -1))

        x = x.to(self.get_dtype_inference())
        seen = (rf_pass.time, rf_pass.prompt, rf_pass.cache, attend)
        return self.diffusion_model(x, *seen).float()

    def _is_dynamic(self) -> bool:
        return self.current_patcher is not None and self.current_patcher.is_dynamic()

    def memory_required(self, input_shape: list[int], cond_shapes: Any = None) -> float:
        """Bytes of a stream with the published cache, over latents [B, C, F, h, w]."""
        published = CacheConfig(), SamplerConfig()
        return self.stream_memory(input_shape[0], tuple(input_shape[3:]), *published)

    def stream_memory(
        self,
        batch: int,
        latent_size: tuple[int, int],
        cache: CacheConfig,
        sampler: SamplerConfig,
    ) -> float:
        """Bytes a stream takes beside the weights and the decoder."""
        sizes = self.diffusion_model.config
        itemsize = comfy.model_management.dtype_size(self.get_dtype_inference())
        grid = Grid.of_latents(*latent_size, sizes.patch_size)
        return float(batch * stream_bytes(sizes, cache, sampler, grid, itemsize))


class StreamingWan(comfy.supported_models.WAN21_T2V):
    """How ComfyUI describes the model: Wan 2.1's latents and sampling shift 5."""

    sampling_settings = {"shift": 5.0}  # noqa: RUF012  # as ComfyUI declares it
    # As published. The sink's average rounds otherwise in float16, and moves ten times as far.
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> StreamingModel:
        """The model without weights."""
        return StreamingModel(self, device=device)


def model_files() -> list[str]:
    """Names in models/diffusion_models."""
    return folder_paths.get_filename_list("diffusion_models")


def load_student(
    path: Path,
    weight_dtype: str = "default",
    submodel: str | None = None,
    latent_format: comfy.latent_formats.LatentFormat | None = None,
    family: str = AUTO,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A checkpoint in any layout the engine reads, as a MODEL.

    `latent_format` stands for a VAE with statistics of its own; the default is Wan 2.1's.
    """
    checkpoint = _read_student(path, submodel, family)
    if checkpoint.family_from != "metadata":
        log(f"{path.name} is streamed as {checkpoint.told}")
    fingerprint = fingerprint_of(checkpoint.tensors["blocks.0.modulation"])
    options = _dtype_options(weight_dtype)
    manage = comfy.model_management
    device = manage.get_torch_device()
    config = StreamingWan(_unet_config(checkpoint.config))
    if latent_format is not None:
        config.latent_format = latent_format
    native = _cpu_computes(device, checkpoint.config)
    dtype = (
        options.get("dtype")
        or native
        or manage.unet_dtype(
            model_params=checkpoint.num_parameters,
            supported_dtypes=list(config.supported_inference_dtypes),
            weight_dtype=comfy.utils.weight_dtype(checkpoint.tensors),
        )
    )
    if dtype == native:
        log(f"{path.name} computes in {dtype}, which this CPU multiplies")
        cast = None
    else:
        cast = manage.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    config.optimizations["fp8"] = options.get("fp8_optimizations", False)

    model = config.get_model(None)
    kind = (
        comfy.model_patcher.ModelPatcher
        if disable_dynamic
        else comfy.model_patcher.CoreModelPatcher
    )
    patcher = kind(model, load_device=device, offload_device=manage.unet_offload_device())
    tensors = checkpoint.merged()
    require_finite(Path(path.name), tensors)  # a folder of the server says nothing on a node
    if patcher.is_dynamic():  # whose weights are not copied to the model's but become them
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    model.to(patcher.offload_device)
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_CLONE, _remember_loras)
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, _patch_modulations)
    patcher.model_options[LORAS] = (0, *_patches(patcher))
    patcher.cached_patcher_init = (
        load_student,
        (path, weight_dtype, submodel, latent_format, family),
    )
    patcher.model_options[SETTINGS] = Settings(
        cache=checkpoint.cache or checkpoint.preset.cache,
        sampler=checkpoint.sampler or checkpoint.preset.sampler,
        size=checkpoint.size,
        told=checkpoint.told,
        name=path.name,
        fingerprint=fingerprint,
        causal=_is_causal(checkpoint),
    )
    return patcher


def lora_files() -> list[str]:
    """Names in models/loras."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """Where a file of models/loras lies."""
    return _listed("loras", name, "lora_name")


def changed(path: Path) -> int:
    """When a file was last written."""
    return path.stat().st_mtime_ns


class LoraPatch(comfy.weight_adapter.WeightAdapterBase):
    """A LoRA's part in one weight, which ComfyUI moves and strengthens and the engine computes."""

    name = "reward_forcing"

    def __init__(self, loaded_keys: set[str], weights: Any, lora: str = "") -> None:
        self.loaded_keys, self.weights, self.lora = loaded_keys, weights, lora

    @classmethod
    def of(cls, adapter: Adapter, lora: str) -> LoraPatch:
        """The patch of an adapter of that LoRA; ComfyUI finds the tensors among the weights."""
        parts = tuple(adapter.parts), tuple(adapter.parts.values()), adapter.alpha
        return cls(set(), parts, lora)

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """The weight, which ComfyUI has copied for this, with the patch in it."""
        names, tensors, alpha = self.weights
        moved = [comfy.model_management.cast_to_device(t, weight.device, t.dtype) for t in tensors]
        adapter = Adapter(parts=dict(zip(names, moved, strict=True)), alpha=alpha)
        weight += function((strength * change(weight, adapter)).to(weight.dtype))
        return weight


@functools.lru_cache(maxsize=4)  # as a chain of loaders runs again where one strength changes
def _read_lora(path: Path, changed: int) -> dict[str, Tensor]:
    return read_lora(path)


def with_lora(model: Any, path: Path, strength: float) -> tuple[Any, str]:
    """A clone of a MODEL with a LoRA file's patches, and how much of the file that is.

    It has them at a strength of 0, too: a live stream may raise it.
    """
    weights = student_of(model).diffusion_model.state_dict()
    fit = fit_file(weights, _read_lora(path, changed(path)), path)
    name = _free_name(path.stem, strengths(model))
    adapters = fit.adapters.items()
    patches = {f"diffusion_model.{key}": LoraPatch.of(each, name) for key, each in adapters}
    patched = model.clone()
    patched.add_patches(patches, strength)
    return patched, str(fit) if strength else "strength 0: the model is as it was"


def _free_name(name: str, taken: Collection[str]) -> str:
    names = (f"{name} {number}" if number > 1 else name for number in itertools.count(1))
    return next(each for each in names if each not in taken)


def strengths(model: Any) -> dict[str, float]:
    """Name and strength of each LoRA that Load RF LoRA gave a MODEL."""
    patches = (patch for patches in model.patches.values() for patch in patches)
    return {each[1].lora: each[0] for each in patches if isinstance(each[1], LoraPatch)}


def with_strengths(model: Any, wanted: Mapping[str, float]) -> Any:
    """A clone of a MODEL whose LoRAs have these strengths, as if they had been loaded with them."""

    def changed(patch: Any) -> Any:
        known = isinstance(patch[1], LoraPatch)
        return (wanted.get(patch[1].lora, patch[0]), *patch[1:]) if known else patch

    clone = model.clone()
    clone.patches = {key: list(map(changed, each)) for key, each in model.patches.items()}
    clone.patches_uuid = uuid.uuid4()
    # With a parent, ComfyUI keeps a note of this one's load as long as that lives. Without, nobody
    # but us must let it go while it is loaded: this one, or the one before where this fails.
    clone.parent, base = None, student_of(model)
    base.steered = (*base.steered[-1:], clone)
    return clone


def _patch_modulations(model: Any, device: Any, *_: Any) -> None:
    # ComfyUI patches what innermost modules hold; a block's own parameter is not among it.
    outer = {key for key in model.patches if key.endswith(".modulation")}
    for key in sorted(outer - model.backup.keys()):
        model.patch_weight_to_device(key, device_to=device)


def idle_loras(model: Any) -> int:
    """How many LoRAs were loaded onto a MODEL without a name that ComfyUI knows it by."""
    idle, number, uuid = model.model_options[LORAS]
    now, changed = _patches(model)
    return int(idle) + (changed != uuid and now == number)


def idle_patches(model: Any) -> list[str]:
    """Kinds of patches on a MODEL that act inside other networks or samplers, not in a stream."""
    options = model.model_options.get("transformer_options", {})
    wrapped = [options.get("wrappers", {}), model.wrappers]
    kinds = {
        kind for wrappers in wrapped for kind, found in wrappers.items() if any(found.values())
    }
    kinds -= {comfy.patcher_extension.WrappersMP.APPLY_MODEL}
    named = {*options.get("patches", {}), *options.get("patches_replace", {})}
    named |= {"rope_options"} & set(options)
    return sorted(named | kinds)


def schedule_of(model: Any) -> SamplerConfig:
    """The checkpoint's schedule, with the shift of a ModelSamplingSD3 on the MODEL."""
    trained, patch = settings_of(model).sampler, _sampling_patch(model)
    return replace(trained, shift=float(patch.shift)) if _is_flow(patch) else trained


def idle_sampling(model: Any) -> bool:
    """Whether a MODEL's sampling is patched in a way that is more than a shift."""
    patch = _sampling_patch(model)
    more = not _is_flow(patch) or getattr(patch, "noise_scale", 1.0) != 1.0
    return patch is not None and more


def _sampling_patch(model: Any) -> Any:
    return model.object_patches.get("model_sampling")


def _is_flow(sampling: Any) -> bool:
    return isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow)


def _remember_loras(model: Any, clone: Any) -> None:
    # A loader clones and adds patches: where there are none, only the patches' name is new.
    clone.model_options[LORAS] = (idle_loras(model), *_patches(model))


def _patches(model: Any) -> tuple[int, Any]:
    return sum(map(len, model.patches.values())), model.patches_uuid


def _cpu_computes(device: torch.device, sizes: ModelConfig) -> torch.dtype | None:
    """bfloat16 where the network is computed in it on the CPU, which ComfyUI takes for slow at it.

    None elsewhere, and where a precision was asked for on ComfyUI's command line.
    """
    args = comfy.cli_args.args
    asked = ("fp32", "fp64", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2", "fp8_e8m0fnu")
    forced = args.force_fp32 or any(getattr(args, f"{name}_unet", False) for name in asked)
    dtype = preferred_dtype(device, sizes)
    return dtype if device.type == "cpu" and dtype == torch.bfloat16 and not forced else None


def _read_student(path: Path, submodel: str | None, family: str) -> Checkpoint:
    checkpoint = read_checkpoint(path, submodel=submodel, family=family)
    if checkpoint.provenance and checkpoint.cache is None:
        raise ValueError(
            f"{path.name} is a bidirectional Wan, a teacher, which cannot stream; load a causal "
            "student such as rewardforcing.pt"
        )
    return checkpoint


def _is_causal(checkpoint: Checkpoint) -> bool:
    # The published student's file is a bare Wan's but for its name.
    return bool(checkpoint.causal or checkpoint.submodel or checkpoint.family_from != "nothing")


def _unet_config(sizes: ModelConfig) -> dict[str, Any]:
    return {"image_model": "wan2.1", "model_type": "t2v", **asdict(sizes)}


def _dtype_options(weight_dtype: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if weight_dtype != "default":
        name, _, fast = weight_dtype.partition(" ")
        options["dtype"] = getattr(torch, name)
        options["fp8_optimizations"] = bool(fast)
    return options


def latent_format(
    mean: Sequence[float],
    std: Sequence[float],
    rgb_factors: list[list[float]],
    rgb_bias: list[float],
) -> comfy.latent_formats.LatentFormat:
    """Wan's latent format with other statistics and preview colours (of normalised latents)."""
    made = comfy.latent_formats.Wan21()
    made.latents_mean, made.latents_std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (mean, std)
    )
    made.latent_rgb_factors, made.latent_rgb_factors_bias = rgb_factors, rgb_bias
    made.taesd_decoder_name = None
    return made


def build_vae(
    weights: dict[str, Tensor], latents: comfy.latent_formats.LatentFormat
) -> comfy.sd.VAE:
    """A VAE socket from weights that ComfyUI recognises, and its latents' statistics."""
    vae = comfy.sd.VAE(sd=weights)
    vae.rf_latents = latents
    return vae


def knows_latents_of(vae: Any, model: Any) -> bool:
    """Whether a VAE's latents have the statistics of the student's; all but ours have Wan's."""
    theirs = getattr(vae, "rf_latents", None) or comfy.latent_formats.Wan21()
    ours = student_of(model).latent_format
    return torch.equal(theirs.latents_mean, ours.latents_mean) and torch.equal(
        theirs.latents_std, ours.latents_std
    )


class ByteTokenizer:
    """Text to the UTF-8 bytes that the demo's text encoder reads, as ComfyUI's CLIP asks for it."""

    def __init__(self, text_len: int) -> None:
        self.text_len = text_len

    def __call__(self, **_: Any) -> ByteTokenizer:
        """ComfyUI constructs its tokenizers; this one is made already."""
        return self

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> Any:
        """One row of (token, weight), padded to the encoder's length."""
        ids = byte_ids(clean_prompt(text))
        if len(ids) > self.text_len:
            log(f"the prompt {text[:40]!r}... is cut to {self.text_len} bytes")
            ids = [*ids[: self.text_len - 1], ids[-1]]
        ids += [0] * (self.text_len - len(ids))
        row = [(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in ids]
        return {ByteT5.name: [row]}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: bytes need no vocabulary."""
        return {}


class ByteT5(comfy.sd1_clip.SD1ClipModel):
    """ComfyUI's T5 at the demo's size."""

    name = "demo"

    def __init__(self, sizes: dict[str, Any], **options: Any) -> None:
        encoder = functools.partial(
            comfy.sd1_clip.SDClipModel,
            textmodel_json_config=sizes,
            special_tokens={"end": 1, "pad": 0},
            model_class=comfy.text_encoders.t5.T5,
            enable_attention_masks=True,
            zero_out_masked=True,
        )
        super().__init__(name=self.name, clip_model=encoder, **options)


def build_clip(weights: dict[str, Tensor], sizes: dict[str, Any], text_len: int) -> comfy.sd.CLIP:
    """A CLIP socket from the weights and sizes of a UMT5 over bytes."""
    sizes = sizes | {
        "model_type": "umt5",
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
    }
    target = comfy.supported_models_base.ClipTarget(ByteTokenizer(text_len), ByteT5)
    target.params = {"sizes": sizes}
    parameters = comfy.utils.calculate_parameters(weights)
    return comfy.sd.CLIP(target, parameters=parameters, state_dict=[weights])


def student_of(model: Any) -> StreamingModel:
    """The streaming model inside a MODEL; ValueError that names what it is otherwise."""
    inside = model.model
    if not isinstance(inside, StreamingModel):
        raise ValueError(
            "this MODEL is another kind of model, or a student that another node has loaded: load "
            "the student's file with Load RF Model (or take Load RF Demo)"
        )
    return inside


class ComfyNetwork:
    """What a Stream asks of a network, answered by a loaded MODEL."""

    def __init__(self, model: Any) -> None:
        self._base = student_of(model)
        network = self._base.diffusion_model
        self.config = network.config
        self.patch_embedding = network.patch_embedding
        self._fingerprint = settings_of(model).fingerprint
        # ComfyUI's attention, and what overrides it, sees whole prompts: it knows no counts.
        self.counted_prompt, self.time_context = network.prompt_context, network.time_context
        self.new_cache = network.new_cache
        self._options = comfy.model_patcher.create_model_options_clone(model.model_options)
        transformer = self._options.setdefault("transformer_options", {})
        for name in ("wrappers", "callbacks"):
            comfy.patcher_extension.merge_nested_dicts(
                transformer.setdefault(name, {}), getattr(model, name), copy_dict1=False
            )

    def __call__(
        self, x: Tensor, time: TimeContext, prompt: PromptContext, cache: Any, attention: Any
    ) -> Tensor:
        """See `WanModel.forward`; ComfyUI chooses the attention."""
        return self._base.apply_model(
            x,
            time.timestep_BF,
            transformer_options=self._options["transformer_options"],
            rf_pass=Pass(time=time, prompt=prompt, cache=cache),
        )

    def fingerprint(self) -> str:
        """The file's: what ComfyUI holds of it may be patched, or in 8 bits."""
        return self._fingerprint

    def write_cache(self, *seen: Any) -> None:
        """See `WanModel.write_cache`; a whole pass, as wrappers around the model expect one."""
        self(*seen)


@contextlib.contextmanager
def loaded(model: Any, others: list[Any], memory: float) -> Iterator[Callable[[Any], None]]:
    """The models in memory with `memory` bytes to spare, as a sampler has them.

    Gives what loads them again where another model took their place, or a clone of the first.
    """
    extra = model.get_nested_additional_models()
    before: list[tuple[Any, int]] | None = None

    def load(model: Any) -> None:
        nonlocal before
        wanted = [model, *others, *extra]
        if _in_place(wanted) == before:
            return
        comfy.model_management.load_models_gpu(wanted, memory_required=memory)
        before = _in_place(wanted)

    load(model)
    model.pre_run()
    try:
        with on_card(model.load_device):
            yield load
    finally:
        model.cleanup()


def _in_place(models: list[Any]) -> list[tuple[Any, int]]:
    """Those of the models that are loaded, and how many bytes of each."""
    there = [each.model for each in comfy.model_management.current_loaded_models]
    return [(each, each.loaded_size()) for each in models if any(each is one for one in there)]


on_card = comfy.model_management.cuda_device_context
"""Makes a card the current one, as much of ComfyUI takes for granted."""


def stays_on_cuda(patcher: Any) -> bool:
    """Whether all of a loaded model lies on a CUDA device and ComfyUI does not move it in a run."""
    whole = patcher.loaded_size() >= patcher.model_size()
    return patcher.load_device.type == "cuda" and whole and not patcher.is_dynamic()


def settings_of(model: Any) -> Settings:
    """What the MODEL's checkpoint says about its use."""
    student_of(model)
    return model.model_options[SETTINGS]


_PICTURE_STEP, _PICTURE_SIDE = 2, 256  # of images shown while they are made: how many, how large


class Progress:
    """ComfyUI's progress bar, previews and interrupt, over the denoising passes of a run."""

    def __init__(self, model: Any, num_passes: int, *, previews: bool, rate: int = FPS) -> None:
        """With `previews` latents are shown, as far as ComfyUI is told to, in a video's `rate`."""
        self._total, self._done, self._rate = num_passes, 0, rate
        self._bar = comfy.utils.ProgressBar(self._total)
        self._previewer = None
        if previews:
            format = model.model.latent_format
            self._previewer = latent_preview.get_previewer(model.load_device, format)

    def on_pass(self, kind: str, number: int) -> None:
        """Act on an interrupt before every pass."""
        check_interrupt()

    def on_prediction(self, number: int, x0: Tensor) -> None:
        """Count a step; show all latent frames of the chunk as it stands, in a loop."""
        self._done += 1
        preview = None
        if self._previewer is not None:
            frames = [
                self._previewer.decode_latent_to_preview_image("JPEG", x0[:1, :, i : i + 1])
                for i in range(x0.shape[2])
            ]
            preview = (
                "PNG",
                animated([frame[1] for frame in frames], frames[0][2], self._rate),
                None,
            )
        self._bar.update_absolute(self._done, self._total, preview)


def _server() -> Any:
    return getattr(PromptServer, "instance", None)  # none where nodes are called by hand


def unique_id(node: Any) -> str | None:
    """A node's number in the graph that runs; None where it is called by hand."""
    return getattr(node.hidden, "unique_id", None)


def send_event(kind: str, data: dict[str, Any]) -> bool:
    """Send an event to the client that queued the prompt which runs, and to nobody else.

    False where there is no such client.
    """
    server, context = _server(), get_executing_context()
    if server is None or server.client_id is None or server.client_id not in server.sockets:
        return False
    data = data | {"prompt_id": getattr(context, "prompt_id", None)}
    server.send_sync(kind, data, server.client_id)
    return True


running = get_executing_context
"""The run of a node that calls it, by `prompt_id`, `node_id` and, of a list's items, `list_index`;
None where it is called by hand."""


def other_prompts_wait(besides: Collection[str] = ()) -> bool:
    """Whether a prompt waits in the queue whose id is none of these."""
    server = _server()
    if server is None:
        return False
    _, queue = server.prompt_queue.get_current_queue_volatile()
    return any(each[1] not in besides for each in queue)


def requeue() -> str:
    """Put the prompt that runs at the end of the queue, once however often asked; its new id."""
    global _queued_again
    server, now = _server(), running()
    assert server is not None and now is not None, "a prompt runs"
    before, again = _queued_again
    if before == now.prompt_id and _is_queued(again):
        return again
    items, _ = server.prompt_queue.get_current_queue_volatile()
    _, _, prompt, extra, *rest = next(each for each in items if each[1] == now.prompt_id)
    again = str(uuid.uuid4())
    number, server.number = server.number, server.number + 1
    extra = extra | {"create_time": int(time.time() * 1000)}
    server.prompt_queue.put((number, again, prompt, extra, *rest))
    _queued_again = now.prompt_id, again
    return again


_queued_again = ("", "")  # the last prompt that was, and its new id


def _is_queued(prompt_id: str) -> bool:
    now, queue = _server().prompt_queue.get_current_queue_volatile()
    return any(each[1] == prompt_id for each in (*now, *queue))


def on_dequeued(prompt_id: str, do: Callable[[], object]) -> None:
    """Do something once a prompt neither waits nor runs, in a thread of its own."""

    def watch() -> None:
        while _is_queued(prompt_id):
            time.sleep(_LOOK)
        do()

    threading.Thread(target=watch, daemon=True).start()


_LOOK = 0.5  # seconds between two looks at the queue


def routes() -> Any:
    """Where ComfyUI's server is told what it answers to; None without one."""
    server = _server()
    return None if server is None else server.routes


def call_later(seconds: float, do: Callable[[], object]) -> None:
    """Do something in the server's own thread, so much later; not at all without a server."""
    server = _server()
    if server is not None:
        server.loop.call_soon_threadsafe(server.loop.call_later, seconds, do)


def process_memory() -> int:
    """Bytes of RAM that this process holds."""
    return int(psutil.Process().memory_info().rss)


def device_memory(device: torch.device) -> int | None:
    """Bytes of tensors on a CUDA device; None on others, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def progress_bar(total: int) -> Any:
    """ComfyUI's progress bar; `update(1)` says that one more is done."""
    return comfy.utils.ProgressBar(total)


def preview_of(image: Tensor) -> Any:
    """An image [H, W, 3], uint8, as ComfyUI's progress bar takes it."""
    return "JPEG", Image.fromarray(image.numpy()), None


def check_interrupt() -> None:
    """Act on Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def send_ui_output(node_id: str | None, output: dict[str, Any]) -> None:
    """What a node shows at its end, where it ends otherwise than by returning it."""
    server, context = _server(), get_executing_context()
    if node_id is None or server is None or server.client_id is None or context is None:
        return
    sent = {"node": node_id, "display_node": node_id, "output": output}
    server.send_sync("executed", sent | {"prompt_id": context.prompt_id}, server.client_id)


def show_images(node_id: str | None, images: Tensor, rate: int = FPS) -> None:
    """A chunk's finished images [T, H, W, 3], uint8, on the node that makes them; from any thread.

    Every other image, so small that all of it takes a chunk less than a fiftieth of its time
    (`web/reward_forcing.js` shows them). It never costs the run.
    """
    server = _server()
    if node_id is None or server is None:
        return
    with contextlib.suppress(Exception):
        pictures = [_jpeg(image.numpy()) for image in images[1::_PICTURE_STEP]]
        sent = {"node": node_id, "pictures": pictures, "rate": rate / _PICTURE_STEP}
        server.send_sync("rf.pictures", sent, server.client_id)


def _jpeg(image: Any) -> str:
    picture, file = Image.fromarray(image), io.BytesIO()
    picture = picture.reduce(max(1, max(picture.size) // _PICTURE_SIDE))
    picture.save(file, "JPEG", quality=75)
    return base64.b64encode(file.getvalue()).decode()


def animated(frames: list[Image.Image], max_size: int | None, rate: int = FPS) -> Image.Image:
    """The first frame, which saves as an animated PNG of all of them.

    ComfyUI sends previews as PNG or JPEG; browsers play a PNG that is animated.
    """
    if max_size:
        frames = [ImageOps.contain(frame, (max_size, max_size)) for frame in frames]
    first, *others = frames
    duration = round(1000 * TEMPORAL_FACTOR / rate)

    def save(file: Any, format: str = "PNG", **_: Any) -> None:
        Image.Image.save(
            first, file, "PNG", save_all=True, append_images=others, duration=duration, loop=0
        )

    first.save = save  # type: ignore[method-assign]
    return first


def model_path(name: str) -> Path:
    """Where a file of models/diffusion_models lies."""
    return _listed("diffusion_models", name, "model_name")


def _listed(kind: str, name: str, asked: str) -> Path:
    # ComfyUI's own list holds the files of its folders and what their owner has linked there.
    known = name in folder_paths.get_filename_list(kind)
    path = folder_paths.get_full_path(kind, name) if known else None
    if path is None:
        raise ValueError(
            f"{asked} {names.printable(name)} is no file of models/{kind}; press R to read it again"
        )
    return Path(path)


def folders() -> list[str]:
    """The folders whose files nodes show by name, with a separator; the deepest first."""
    kinds = ("diffusion_models", "loras")
    known: list[str | Path] = [
        each for kind in kinds for each in folder_paths.get_folder_paths(kind)
    ]
    known.append(state_folder())
    known += [folder_paths.get_input_directory()]
    known += [folder_paths.get_output_directory(), folder_paths.get_temp_directory()]
    return sorted((f"{Path(each)}{os.sep}" for each in known), key=len, reverse=True)


def output_file(prefix: str, width: int, height: int, suffix: str) -> Path:
    """A free name in the output folder for a prefix such as `video/rf`.

    No link may lead out of it: ComfyUI's own nodes follow none either, as of core 0.33.
    """
    asked, root = "filename_prefix", Path(folder_paths.get_output_directory())
    names.inside(root, names.place(prefix, asked, names.ROOM), asked)
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            prefix, str(root), width, height
        )
    except OSError as error:
        raise ValueError(
            f"{asked} {names.printable(prefix)} cannot be a place in the output folder "
            f"({error.strerror}); give another"
        ) from None
    path = Path(folder) / f"{name}_{counter:05}_{suffix}"  # in which %year% and others are filled
    return names.inside(root, within_output(path).as_posix(), asked)


def within_output(path: Path) -> Path:
    """A file of the output folder, as seen from there."""
    return path.absolute().relative_to(Path(folder_paths.get_output_directory()).absolute())


def output_named(name: str) -> Path | None:
    """A file by its name in the output folder; None where it is not in there."""
    root = Path(folder_paths.get_output_directory())
    try:
        path = names.inside(root, names.place(name, "file"), "file")
    except ValueError:
        return None
    return path if path.is_file() else None


class IdentityKey:
    """Equal to another one of the very same object alone, and to none once that is gone."""

    def __init__(self, thing: Any) -> None:
        self._hash = id(thing)
        try:
            self._thing = weakref.ref(thing)
        except TypeError:  # what cannot be watched is held: its number may not be given away
            self._thing = lambda: thing

    def __eq__(self, other: object) -> bool:
        thing = self._thing()
        return isinstance(other, IdentityKey) and thing is not None and thing is other._thing()

    def __hash__(self) -> int:
        return self._hash


def identity(model: Any) -> Any:
    """Equal for a MODEL of the same weights, patches, wrappers and options, as far as is certain.

    What a node makes anew each time it runs, such as a function, is another one then.
    """
    parts = ("patches_uuid", "object_patches", "wrappers", "callbacks", "injections", "attachments")
    parts += ("hook_patches", "forced_hooks", "current_hooks", "additional_models")
    named = {name: getattr(model, name, None) for name in parts}
    return IdentityKey(model.model), _plain({**named, "options": model.model_options})


def _plain(value: Any) -> Any:
    """A value that compares by its content, where it is data, and else by identity."""
    if isinstance(value, dict):
        return tuple(
            (str(k), _plain(v)) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))
        )
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(_plain, value)
    if value is None or isinstance(value, (bool, int, float, str, bytes, uuid.UUID, torch.dtype)):
        return type(value).__name__, value
    if isinstance(value, (Settings, torch.device)):
        return value
    if isinstance(value, types.MethodType):  # made anew whenever it is asked for
        return _plain(value.__self__), _plain(value.__func__)
    return IdentityKey(value)


def state_folder() -> Path:
    """Where stream states are saved."""
    return Path(folder_paths.get_output_directory()) / "stream_states"


def state_path(name: str) -> Path:
    """Where a stream state of that name lies, or would."""
    root = Path(folder_paths.get_output_directory())
    file = state_folder().relative_to(root) / names.plain(name, "name")
    return names.inside(root, file.as_posix(), "name")


STATE = ".safetensors"
"""How the name of a stream state's file ends."""


def free_state_path(name: str) -> Path:
    """Where a stream state goes, beside any of the same name."""
    path, number = state_path(f"{name}{STATE}"), 2
    path.parent.mkdir(parents=True, exist_ok=True)
    while path.exists():
        path, number = state_path(f"{name}_{number}{STATE}"), number + 1
    return path


def resize(images: Tensor, width: int, height: int) -> Tensor:
    """Images [T, 3, H, W] scaled to cover the size and cut at the centre."""
    return comfy.utils.common_upscale(images, width, height, "lanczos", "center")


def block(message: str | None) -> ExecutionBlocker:
    """An output that stops whatever is connected to it, with a reason or without a word."""
    return ExecutionBlocker(message)


Interrupted: type[BaseException] = comfy.model_management.InterruptProcessingException
"""What Cancel raises, between passes and in the layers of any network."""


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """For work that must not end half way: ComfyUI's layers act on Cancel only after it."""
    manage = comfy.model_management
    act = manage.throw_exception_if_processing_interrupted
    manage.throw_exception_if_processing_interrupted = lambda: None
    try:
        yield
    finally:
        manage.throw_exception_if_processing_interrupted = act


OutOfMemory: type[Exception] = comfy.model_management.OOM_EXCEPTION
"""After which ComfyUI unloads all models."""


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's memory ran out."""
    return bool(comfy.model_management.is_oom(error))


def free_memory() -> None:
    """Give cached device memory back."""
    comfy.model_management.soft_empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure what a CUDA device holds at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes of tensors a CUDA device has held at most; None on others, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def log(message: str) -> None:
    """One line in ComfyUI's log."""
    logging.info("[Reward Forcing] %s", message)
