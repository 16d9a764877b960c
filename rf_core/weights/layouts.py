"""The names Wan's tensors go by in published files, and what marks a file as something else.

Trainers and hosts wrap the same network in different prefixes, diffusers renames its layers, and
LoRA files add styles of their own. All tables of names live here; `checkpoint` and `lora` apply
them. Wan's own bare names are the target.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
"""Segments that FSDP, activation checkpointing, torch.compile and DDP put anywhere in a name."""

_CONTAINERS = frozenset({"model", "diffusion_model", "transformer", "net", "state_dict"})
"""Segments that hold the network; what stands before them names a sub-model."""

_ATTENTION = re.compile(r"^((?:.*?\.)?)blocks\.\d+\.(?:self_attn|cross_attn|attn1|attn2)\.")

# diffusers' WanTransformer3DModel counts norms in the order of use: its norm2 is Wan's norm3.
_ATTENTION_LEAVES = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_BLOCK_NAMES = {
    **{f"attn1.{theirs}": f"self_attn.{ours}" for theirs, ours in _ATTENTION_LEAVES.items()},
    **{f"attn2.{theirs}": f"cross_attn.{ours}" for theirs, ours in _ATTENTION_LEAVES.items()},
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
_OUTER_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}

_LORA = re.compile(r"\.lora[_.](A|B|down|up|mid)\b|\.(hada|lokr)_\w+$|\.diff(_b)?$")

_UNDERSCORE_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_LORA_PREFIXES = _CONTAINERS | {"base_model", "unet", "pipe", "dit"}

_QUANTISED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|comfy_quant)$")

_WAN_VARIANTS = (
    (r"(^|\.)(img_emb|k_img|image_embedder|add_k_proj)\.", "an image-to-video Wan"),
    (r"(^|\.)vace_\w+\.", "a VACE Wan"),
    (r"(^|\.)control_adapter\.", "a camera-control Wan"),
    (r"(^|\.)(casual_audio_encoder|audio_proj)\.", "a sound-driven Wan"),
    (r"(^|\.)face_adapter\.", "an Animate Wan"),
)
_OTHER_MODELS = (
    (r"(^|\.)decoder\.(upsamples|middle|up_blocks|mid_block|up)\.", "a VAE"),
    (r"^(taesd_)?decoder\.\d+\.", "a TAEHV decoder"),
    (
        r"(^|\.)(encoder\.block|blocks)\.\d+\.(layer\.\d+\.SelfAttention|attn)\.q\.",
        "a text encoder",
    ),
    (r"(^|\.)text_model\.encoder\.layers\.\d+\.", "a text encoder"),
)


def unwrap(key: str) -> str:
    """Drop the segments that training wrappers leave in a name."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def wan_prefixes(keys: Iterable[str]) -> list[str]:
    """What stands before `blocks.N` in each Wan network among unwrapped keys, sorted."""
    return sorted({match[1] for key in keys if (match := _ATTENTION.match(key))})


def submodel_name(prefix: str) -> str:
    """`generator_ema.model.` -> `generator_ema`; empty for a network without a name."""
    parts = prefix.split(".")[:-1]
    while parts and parts[-1] in _CONTAINERS:
        parts.pop()
    return ".".join(parts)


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether bare keys are diffusers' WanTransformer3DModel's."""
    return any(key.startswith("condition_embedder.") or ".attn1." in key for key in keys)


def from_diffusers(key: str) -> str:
    """A bare diffusers name under Wan's name; a name of neither is returned as it is."""
    return _rename(key, _BLOCK_NAMES, _OUTER_NAMES)


def to_diffusers(key: str) -> str:
    """The inverse of `from_diffusers`."""
    return _rename(key, _inverted(_BLOCK_NAMES), _inverted(_OUTER_NAMES))


def is_lora(keys: Collection[str]) -> bool:
    """Whether the keys are an adapter's rather than a network's."""
    whole = any(key.endswith("self_attn.q.weight") for key in keys)
    return not whole and any(_LORA.search(key) for key in keys)


def lora_targets(keys: Iterable[str]) -> dict[str, str]:
    """Every name a LoRA file may give a tensor, without its prefix, and the tensor's key.

    A tensor goes by its module's Wan name or diffusers name, with dots or (kohya) underscores.
    """
    targets = {}
    for key in keys:
        name = key.removesuffix(".weight")
        for alias in (name, to_diffusers(name)):
            targets[alias] = targets[alias.replace(".", "_")] = key
    return targets


def lora_module(name: str) -> str:
    """A module's name in a LoRA file without the prefixes of ComfyUI, PEFT, diffusers or kohya."""
    for prefix in _UNDERSCORE_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    parts = unwrap(name).split(".")
    while len(parts) > 1 and parts[0] in _LORA_PREFIXES:
        parts.pop(0)
    return ".".join(parts)


def is_scaled(keys: Iterable[str]) -> bool:
    """Whether weights are quantised with scales beside them."""
    return any(_QUANTISED.search(key) for key in keys)


def wan_variant(keys: Collection[str]) -> str | None:
    """The kind of Wan that keys beyond the text-to-video network show."""
    return _first_match(keys, _WAN_VARIANTS)


def other_model(keys: Collection[str]) -> str | None:
    """What a file without a Wan network holds, where its keys tell."""
    return _first_match(keys, _OTHER_MODELS)


def _first_match(keys: Collection[str], table: Iterable[tuple[str, str]]) -> str | None:
    for pattern, kind in table:
        if any(re.search(pattern, key) for key in keys):
            return kind
    return None


def _rename(key: str, block_names: dict[str, str], outer_names: dict[str, str]) -> str:
    block = re.match(r"blocks\.\d+\.", key)
    start, names = (block[0], block_names) if block else ("", outer_names)
    rest = key[len(start) :]
    for old, new in names.items():
        if rest == old or rest.startswith(old + "."):
            return start + new + rest[len(old) :]
    return key


def _inverted(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
