"""The names Wan's tensors go by in published files, and what marks a file as something else.

Trainers and hosts wrap the same network in different prefixes, diffusers renames its layers, and
LoRA files add styles of their own. All tables of names live here; `checkpoint` and `lora` apply
them. Wan's own bare names are the target.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
"""Segments that FSDP, activation checkpointing, torch.compile and DDP put anywhere in a name."""

_CONTAINERS = frozenset({"model", "diffusion_model", "transformer", "net", "state_dict"})
"""Segments that hold the network; what stands before them names a sub-model."""

_AVERAGES = frozenset({"ema", "average", "averaged", "avg", "shadow", "swa"})
"""Words in a sub-model's name that tell an average over training from the weights themselves."""

_ANY_NETWORK = frozenset(
    {"model", "diffusion", "transformer", "net", "network", "module", "online"}
)
_ANY_WEIGHTS = frozenset({"state", "dict", "weights", "params"})
_STUDENT = frozenset({"generator", "student"})

_BESIDE = re.compile(r"^[a-z]+_lora\.")
"""LongLive's adapters of its generator and its critic, in a bundle of their own or the bases'."""

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
    "proj_in": "before_proj",  # of a VACE's blocks
    "proj_out": "after_proj",
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

_UNDERSCORE_PREFIX = re.compile(
    r"^(?:lora_(?:unet|transformer|dit|wan)|lycoris)_+(?:(?:base_model|model|diffusion_model)_+)*"
)
_LORA_PREFIXES = _CONTAINERS | {"base_model", "unet", "pipe", "dit", "lora_unet", "lycoris"}

_PAIR = r"(?:[._]lora|\.lora_linear_layer)[._]"
_NAMED = r"(?:\.[^.]+)?"  # an adapter's own name, as PEFT has it in the middle
_LORA_PARTS = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        ("up_bias", rf"{_PAIR}(?:B|up){_NAMED}\.bias$"),
        ("down", rf"{_PAIR}(?:A|down){_NAMED}(?:\.weight)?$"),
        ("up", rf"{_PAIR}(?:B|up){_NAMED}(?:\.weight)?$"),
        ("mid", r"\.lora_mid\.weight$"),
        ("alpha", rf"(?:[._]lora)?\.(?:lora_)?alpha{_NAMED}$"),
        ("dora", rf"\.dora_scale$|\.lora_magnitude_vector{_NAMED}(?:\.weight)?$"),
        ("diff", r"\.(?:diff|w_norm)$"),
        ("diff_b", r"\.(?:diff_b|b_norm)$"),
        ("diff_m", r"\.diff_m$"),  # of what Wan calls a block's, or the head's, modulation
        *((name, rf"\.{name}{_NAMED}$") for w in "12" for name in (f"hada_t{w}", f"lokr_w{w}")),
        *(
            (f"{family}_w{w}_{f}", rf"\.{family}_w{w}_{f}{_NAMED}$")
            for family in ("hada", "lokr")
            for w in "12"
            for f in "ab"
        ),
        ("lokr_t2", rf"\.lokr_t2{_NAMED}$"),
    )
)
"""What a name ends in, and which part of an adapter it is: `lora_merge` has the arithmetic."""

_OTHER_ADAPTERS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.boft_[RPs]\b", "BOFT"),
        (r"\.oft_(?:blocks|diag|[Rr])\b", "OFT"),
        (r"\.[ab][12]\.weight$", "GLoRA"),
        (r"\.(?:ia3_l|on_input)\b", "(IA)³"),
        (r"\.(?:lora_E|ranknum)\b", "AdaLoRA"),
        (r"\.vera_lambda_[bd]\b", "VeRA"),
        (r"\.randlora_(?:lambda|gamma)\b", "RandLoRA"),
        (r"\.vblora_", "VB-LoRA"),
        (r"\.fourierft_spectrum\b", "FourierFT"),
        (r"\.hra_u\b", "HRA"),
        (r"\.(?:bone|miss)_\w+$", "Bone"),
        (r"\.shira_weight\b", "SHiRA"),
        (r"\.scalar$", "a LyCORIS adapter with a scalar of its own"),
        (r"\.(?:set_weight|reshape_weight)$", "a replacement of whole weights"),
    )
)

_TEXT_ENCODER = re.compile(
    r"^(?:lora_te\d?_|lora_t5_|text_encoders?[._\d]|te\d?\.|text_model\.|(?:\w+\.)?clip_[lgh]\.)"
    r"|text_model[._]encoder"
)
_LORA_MODELS = (
    (r"(?:^|[._])(?:double|single)_(?:transformer_)?blocks[._]", "Flux or HunyuanVideo"),
    (r"(?:^|[._])joint_blocks[._]", "Stable Diffusion 3"),
    (
        r"(?:^|[._])(?:(?:down|up)_blocks|(?:in|out)put_blocks|mid_block|middle_block)[._]",
        "SD or XL",
    ),
    (r"(?:^|[._])transformer_blocks[._]", "a transformer such as LTX-Video's or Qwen-Image's"),
    (r"(?:^|[._])vace_blocks[._]", "a VACE Wan"),
)

_QUANTISED = (
    (r"(^|\.)(?:scaled_fp8|scale_weight|scale_input)$", "ComfyUI's scaled fp8"),
    (r"\.comfy_quant$", "ComfyUI's mixed precision"),
    (r"\.(?:SCB|absmax|nested_absmax|quant_map|nested_quant_map)$|\.quant_state\.", "bitsandbytes"),
    (r"\.(?:qweight|qzeros|wscales|wzeros|g_idx)$", "GPTQ, AWQ or SVDQuant"),
    (r"\.weight\._(?:data|scale)$", "quanto"),
)
_SCALE = re.compile(r"^(?P<layer>.+)\.(?:weight[_.]scale\w*|input_scale)$")
FLOATS = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    }
)
"""What weights may be made of."""

_WAN_VARIANTS = (
    (r"(^|\.)(img_emb|k_img|image_embedder|add_k_proj)\.", "an image-to-video Wan"),
    (r"(^|\.)vace_\w+\.", "a VACE Wan"),
    (r"(^|\.)control_adapter\.", "a camera-control Wan"),
    (r"(^|\.)(casual_audio_encoder|audio_proj)\.", "a sound-driven Wan"),
    (r"(^|\.)face_adapter\.", "an Animate Wan"),
)
_OTHER_MODELS = (
    (r"(^|\.)vace_blocks\.\d+\.", "a VACE, which controls a student,"),
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


def is_beside(key: str) -> bool:
    """Whether a name is of an adapter that lies beside the networks of a bundle."""
    return _BESIDE.match(key) is not None


def wan_prefixes(keys: Iterable[str]) -> list[str]:
    """What stands before `blocks.N` in each Wan network among unwrapped keys, sorted."""
    return sorted({match[1] for key in keys if (match := _ATTENTION.match(key))})


def submodel_name(prefix: str) -> str:
    """`generator_ema.model.` -> `generator_ema`; empty for a network without a name."""
    parts = prefix.split(".")[:-1]
    while parts and parts[-1] in _CONTAINERS:
        parts.pop()
    return ".".join(parts)


@dataclass(frozen=True, kw_only=True)
class KeyNames:
    """What a library calls the tensors of the same network."""

    name: str
    """The library's, for people."""
    mark: str
    """A regular expression that some bare key of such a file matches, and none of Wan's."""
    blocks: Mapping[str, str]
    """Its name of a module within `blocks.N.` to Wan's, without `.weight` and the like."""
    others: Mapping[str, str]
    """The same outside the blocks."""

    def to_wan(self, key: str) -> str:
        """A bare name under Wan's name; another is returned as it is."""
        return _rename(key, self.blocks, self.others)


DIFFUSERS = KeyNames(  # of WanTransformer3DModel
    name="diffusers",
    mark=r"^condition_embedder\.|\.attn1\.",
    blocks=_BLOCK_NAMES,
    others=_OUTER_NAMES,
)
KEY_NAMES = (DIFFUSERS,)
"""Every naming but Wan's own that is read. A new one is a line here, with tables of its own."""


def key_names(keys: Iterable[str]) -> KeyNames | None:
    """Whose names bare keys are; None for Wan's own."""
    keys = list(keys)
    marked = (each for each in KEY_NAMES if any(re.search(each.mark, key) for key in keys))
    return next(marked, None)


def to_diffusers(key: str) -> str:
    """A Wan name under diffusers' name."""
    return _rename(key, _inverted(_BLOCK_NAMES), _inverted(_OUTER_NAMES))


def is_lora(keys: Collection[str]) -> bool:
    """Whether the keys are an adapter's, of whatever kind, rather than a network's."""
    whole = any(key.endswith("self_attn.q.weight") for key in keys)
    # An alpha alone is also an activation's, in audio networks.
    parts = (lora_part(key)[1] not in ("", "alpha") or other_adapter(key)[1] for key in keys)
    return not whole and any(parts)


def lora_part(key: str) -> tuple[str, str]:
    """A name in a LoRA file as its module and the part that the tensor is; "" where it is none."""
    for part, pattern in _LORA_PARTS:
        if match := pattern.search(key):
            return key[: match.start()], part
    return key, ""


def other_adapter(key: str) -> tuple[str, str]:
    """A name's module and the kind of its adapter, of those that no exact merge is known for.

    The kind is "" where it is none of these.
    """
    for pattern, kind in _OTHER_ADAPTERS:
        if match := pattern.search(key):
            return key[: match.start()], kind
    return key, ""


def is_text_encoders(key: str) -> bool:
    """Whether a name in a LoRA file is a text encoder's."""
    return _TEXT_ENCODER.search(key) is not None


def lora_model(keys: Collection[str]) -> str | None:
    """What a LoRA file without a layer of Wan's was made for, where its names tell."""
    if all(map(is_text_encoders, keys)):
        return "a text encoder"
    return _first_match(keys, _LORA_MODELS)


def lora_targets(keys: Iterable[str]) -> dict[str, str]:
    """Every name a LoRA file may give a tensor, without its prefix, and the tensor's key.

    A tensor goes by its module's Wan name or diffusers name, with dots or (kohya) underscores.
    """
    targets = {}
    for key in keys:
        name = key.removesuffix(".weight")
        diffusers = to_diffusers(name)
        for alias in (name, diffusers, re.sub(r"\.to_out\.0$", ".to_out", diffusers)):
            targets[alias] = targets[alias.replace(".", "_")] = key
    return targets


def lora_module(name: str) -> str:
    """A module's name in a LoRA file without the prefixes of ComfyUI, PEFT, diffusers or kohya."""
    bare = _UNDERSCORE_PREFIX.sub("", name)
    if bare != name:
        return bare
    parts = [part for part in unwrap(name).split(".") if part != "processor"]
    while len(parts) > 1 and parts[0] in _LORA_PREFIXES:
        parts.pop(0)
    return ".".join(parts)


def quantised(tensors: Mapping[str, Tensor], weights: Collection[str]) -> str | None:
    """The format of quantised weights, by what lies beside them or by whole numbers in place of
    `weights`; None where they are plain numbers."""
    if kind := _first_match(tensors, _QUANTISED):
        return kind
    for key in tensors:
        if match := _SCALE.match(key):
            weight = tensors.get(f"{match['layer']}.weight")
            return f"{'numbers' if weight is None else _name(weight)} with scales beside them"
    packed = [key for key in weights if _is_whole(tensors[key])]
    return f"{_name(tensors[packed[0]])}, as {packed[0]} is" if packed else None


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def is_average(submodel: str) -> bool:
    """Whether a sub-model's name says that it is an average over training."""
    return bool(_words(submodel) & _AVERAGES)


def preference(submodel: str) -> int | None:
    """How late a sub-model comes when a student is looked for; None where it is another network.

    `generator_ema`, then an average of no named network, `generator`, and what has no name.
    """
    named = _words(submodel) - _AVERAGES - _ANY_NETWORK - _ANY_WEIGHTS
    if named - _STUDENT:
        return None
    return 2 * (not is_average(submodel)) + (not named)


def _words(submodel: str) -> set[str]:
    return {word for word in re.split(r"[._]", submodel.lower()) if word and not word.isdigit()}


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


def _rename(key: str, block_names: Mapping[str, str], outer_names: Mapping[str, str]) -> str:
    block = re.match(r"(?:vace_)?blocks\.\d+\.", key)
    start, names = (block[0], block_names) if block else ("", outer_names)
    rest = key[len(start) :]
    for old, new in names.items():
        if rest == old or rest.startswith(old + "."):
            return start + new + rest[len(old) :]
    return key


def _inverted(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
