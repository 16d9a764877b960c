"""What artists attach to a MODEL or a prompt that a stream does not follow, in their words."""

from __future__ import annotations

from typing import Any

from ..rf_core.families import DEFAULT
from . import host

_CFG = "a CFG patch, such as RescaleCFG's (a stream runs at CFG 1)"
_RANGE = "ConditioningSetTimestepRange (change prompts in time with Prompt Switch)"

_MODEL = {
    "sampler_cfg_function": _CFG,
    "sampler_pre_cfg_function": _CFG,
    "sampler_post_cfg_function": _CFG,
    "sampler_calc_cond_batch_function": _CFG,
    "disable_cfg1_optimization": _CFG,
    "model_function_wrapper": "a wrapper of the model's calls",
    "denoise_mask_function": "a denoise mask",
    "context_handler": "context windows (a stream has its own: EMA-Sink Config)",
}
"""What ComfyUI's samplers read in a MODEL's options and a stream does not."""

_PROMPT = {
    "start_percent": _RANGE,
    "end_percent": _RANGE,
    "strength": "a conditioning's strength",
    "guidance": "guidance (a stream runs at CFG 1)",
    "reference_latents": "reference latents",
    "clip_vision_output": "a CLIP vision output",
    "concat_mask": "a mask of a start image",
}
_FOLLOWED = {"pooled_output", "attention_mask"}
_IDLE = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}
"""Values that ask for nothing."""


def ignored(model: Any, prompts: Any) -> list[str]:
    """What is attached to a MODEL and to a Timeline's prompts without effect, a line for each."""
    named = dict.fromkeys([*_of_model(model), *prompts.ignored])
    return [f"ignored: {each}" for each in named]


def doubtful(model: Any, vae: Any) -> list[str]:
    """What in a student and its VAE may spoil the video without an error, a line for each."""
    settings = host.settings_of(model)
    lines = family_notes(settings)
    if not settings.causal:
        lines.append(
            f"note: {settings.name} does not say whether it is causal; a plain Wan 2.1 looks the "
            "same and makes noise here. If the video is bad, load a student such as "
            "rewardforcing.pt"
        )
    if vae is not None and not host.knows_latents_of(vae, model):
        lines.append(
            "note: this VAE belongs to another student, so colours and shapes will be wrong: "
            "Load RF Demo's MODEL and VAE go together, other students take a Wan 2.1 VAE"
        )
    return lines


def family_notes(settings: Any) -> list[str]:
    """How a student streams where its file leaves that open, and a licence that forbids uses."""
    told, lines = settings.told, []
    is_ours = told.family == DEFAULT
    if (told.source == "name" and not is_ours) or (told.source == "nothing" and settings.causal):
        lines.append(f"note: {settings.name} is streamed as {told} on Load RF Model")
    if settings.family.is_restricted:
        lines.append(f"licence: {settings.family.title}: {settings.family.licence}")
    return lines


def ignored_of_prompt(conditioning: Any) -> tuple[str, ...]:
    """What a CONDITIONING of one prompt carries without effect."""
    _, options = conditioning[0]
    acting = [k for k in options if k not in _FOLLOWED and not _asks_nothing(k, options[k])]
    return tuple(_PROMPT.get(key, key) for key in acting)


def _asks_nothing(key: str, value: Any) -> bool:
    return value is None or (key in _IDLE and value == _IDLE[key])


def _of_model(model: Any) -> list[str]:
    named = [name for key, name in _MODEL.items() if key in model.model_options]
    if patches := host.idle_patches(model):
        named.append(f"patches that a stream has no place for ({', '.join(patches)})")
    if host.idle_sampling(model):
        named.append("the sampling patch (of ModelSampling nodes, the shift of SD3's acts)")
    if number := host.idle_loras(model):
        named.append(
            f"{number} LoRA{'s' * (number > 1)}, made for another model or with names of weights "
            "that this loader does not know; Load RF LoRA knows more, and says what a file is for"
        )
    return named
