"""Prompts to embeddings: UMT5 through transformers, from every file people have it in.

A prompt becomes `text_len` rows of the encoder's output, zero past its last token, as Wan was
trained. The full-size encoder weighs 11 GB and each prompt passes it once, so `PromptCache` loads
it late and lets go of it early. The miniature demo's encoder has the same architecture at toy
width and reads bytes, so that one safetensors file holds all of it.
"""

from __future__ import annotations

import gc
import html
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from .config import WAN_1_3B
from .devices import empty_caches
from .ranges import LONGEST_TEXT
from .weights.files import parse_json, read_weights
from .writing import whole_file

logger = logging.getLogger(__name__)

Tokenize = Callable[[str], list[int]]
"""Text to token ids, the end-of-sequence token included, of any length."""

METADATA_KEY = "rf_text"
_PAD, _EOS = 0, 1  # the same in every T5
BYTE_VOCAB_SIZE = 256 + 2
"""Tokens of `byte_ids`: padding, end of sequence and every byte."""

_CONFIG_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "feed_forward_proj",
    "layer_norm_epsilon",
)
# Of transformers' attentions, this one rounds as the Wan release does: bit for bit, in bf16 too.
_ATTENTION = {"attn_implementation": "eager"}
# Names in the Wan release's models_t5_umt5-xxl-enc-bf16.pth and what transformers calls them.
_WAN_NAMES = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_WAN_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_WRONG_KINDS = (
    ("patch_embedding.", "a diffusion transformer"),
    ("text_model.", "a CLIP"),
    ("resblocks.", "a CLIP"),
    ("lora_", "a LoRA"),
    ("decoder.conv", "a VAE"),
    ("layers.0.self_attn.", "a decoder-only language model"),
    ("blocks.0.", "a diffusion transformer"),
)
_STRAIGHT_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)
# What ComfyUI's quantised files keep beside a weight: old and new names, and the activations'.
_SCALES = ("scale_weight", "weight_scale")
_QUANTISATION = (*_SCALES, "scale_input", "input_scale", "comfy_quant")


class TextEncoder(Protocol):
    """What turns prompts into what the network reads."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D] of B prompts, zero past each prompt's tokens."""
        ...


class UMT5Encoder:
    """A transformers `UMT5EncoderModel` with its tokenizer.

    Args:
        model: the `UMT5EncoderModel`; stays where it is, in its dtype.
        tokenize: gives the ids of a text, ending with the end-of-sequence token.
        text_len: tokens each prompt is padded or cut to.

    Raises:
        ValueError: the tokenizer is not the one the model was trained with.
    """

    def __init__(self, model: Any, tokenize: Tokenize, *, text_len: int) -> None:
        if not 1 <= text_len <= LONGEST_TEXT:
            raise ValueError(f"text_len is {text_len}; give a number from 1 to {LONGEST_TEXT}")
        ids = tokenize("a panda")
        if ids[-1] != _EOS or max(ids) >= model.config.vocab_size:
            raise ValueError(
                f"the tokenizer turns 'a panda' into {ids}; this encoder has a vocabulary of "
                f"{model.config.vocab_size} and ends prompts with {_EOS}: use its own tokenizer, "
                "google/umt5-xxl for Wan"
            )
        self.model = model
        self.text_len = text_len
        self._tokenize = tokenize
        self._warned: set[str] = set()

    @property
    def text_dim(self) -> int:
        """Channels of an embedding."""
        return int(self.model.config.d_model)

    @property
    def reads_bytes(self) -> bool:
        """Whether the tokens are bytes, so that no tokenizer has to be kept."""
        return self._tokenize is byte_ids

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [B, L] and mask [B, L] (1 on the prompt), int64; too long prompts are cut, and
        a warning says so once for each."""
        assert not isinstance(prompts, str), "one prompt goes in a list"
        ids = torch.full((len(prompts), self.text_len), _PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            prompt_ids = self._cut(prompt, self._tokenize(clean_prompt(prompt)))
            ids[row, : len(prompt_ids)] = torch.tensor(prompt_ids)
            mask[row, : len(prompt_ids)] = 1
        return ids, mask

    def _cut(self, prompt: str, ids: list[int]) -> list[int]:
        num_cut = len(ids) - self.text_len
        if num_cut <= 0:
            return ids
        if prompt not in self._warned:
            self._warned.add(prompt)
            logger.warning(
                "The prompt %r has %d tokens; the last %d are cut, as %d is the limit.",
                prompt if len(prompt) <= 40 else prompt[:40] + "...",
                len(ids),
                num_cut,
                self.text_len,
            )
        return [*ids[: self.text_len - 1], _EOS]

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, L, D] of `tokens`, zero where the mask is; differentiable."""
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.masked_fill(rearrange(mask == 0, "b l -> b l 1"), 0)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D], zero past each prompt's tokens, on the model's device."""
        return self.embed(*self.tokens(prompts))


class PromptCache:
    """Embeddings by prompt; the encoder is made at the first new prompt, and again after release.

    Args:
        factory: makes the encoder.
    """

    def __init__(self, factory: Callable[[], TextEncoder]) -> None:
        self._factory = factory
        self._encoder: TextEncoder | None = None
        self._embeds: dict[str, Tensor] = {}

    def get(self, prompt: str) -> Tensor:
        """The embedding [1, L, D] of one prompt, on the CPU."""
        if prompt not in self._embeds:
            if self._encoder is None:
                self._encoder = self._factory()
            self._embeds[prompt] = self._encoder.encode([prompt]).cpu()
        return self._embeds[prompt]

    def release(self) -> None:
        """Let go of the encoder's memory; embeddings stay."""
        self._encoder = None
        gc.collect()
        empty_caches()


def encode_prompts(prompts: Sequence[str], factory: Callable[[], TextEncoder]) -> dict[str, Tensor]:
    """Embeddings [1, L, D] by prompt, on the CPU; the encoder is gone when this returns."""
    cache = PromptCache(factory)
    try:
        return {prompt: cache.get(prompt) for prompt in prompts}
    finally:
        cache.release()


def clean_prompt(text: str) -> str:
    """A prompt as Wan's tokenizer was fed: entities resolved, quotes straight, single spaces.

    Wan runs ftfy first. Of what that changes, curly quotes are what people do type and the
    tokenizer's own Unicode normalisation leaves alone.
    """
    text = html.unescape(html.unescape(text)).translate(_STRAIGHT_QUOTES)
    return " ".join(text.split())


def byte_ids(text: str) -> list[int]:
    """The UTF-8 bytes of a text as tokens: 0 pads, 1 ends the sequence, byte b is b + 2."""
    return [byte + 2 for byte in text.encode()] + [_EOS]


def load_text_encoder(
    path_or_id: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tokenizer: str | Path | None = None,
    text_len: int | None = None,
) -> UMT5Encoder:
    """A UMT5 encoder from a file, a local folder or the Hugging Face hub.

    Args:
        path_or_id: one of
            a file: the Wan release's `models_t5_umt5-xxl-enc-bf16.pth`, ComfyUI's
            `umt5_xxl_*.safetensors` (scaled fp8 too), or what `save_text_encoder` wrote;
            a folder `save_pretrained` wrote;
            a hub id, `owner/name` or `owner/name/folder`.
        device: where the weights go.
        dtype: their type.
        tokenizer: a folder or hub id, such as `google/umt5-xxl`. By default the one that came
            with the encoder: in its folder, in `tokenizer` beside a folder `text_encoder`, or in
            `google/umt5-xxl` beside a file. Local encoders never look for one on the network.
        text_len: tokens a prompt is padded or cut to; by default the file's own, or Wan's.

    Raises:
        ValueError: nothing there, not a UMT5 encoder, or no tokenizer for it.
    """
    path = Path(path_or_id)
    if path.is_file():
        model, tokenize, own_len = _load_file(path, tokenizer, device, dtype)
    else:
        model, tokenize = _load_pretrained(path.as_posix(), tokenizer, device, dtype)
        own_len = WAN_1_3B.text_len
    model.eval().requires_grad_(False)
    return UMT5Encoder(model, tokenize, text_len=own_len if text_len is None else text_len)


def save_text_encoder(path: str | Path, encoder: UMT5Encoder) -> None:
    """Write a byte-reading encoder as one safetensors file that `load_text_encoder` reads.

    Raises:
        ValueError: the encoder needs a tokenizer's files, which this format does not hold.
    """
    from safetensors.torch import save_file

    if not encoder.reads_bytes:
        raise ValueError("only encoders that read bytes (byte_ids) fit in one file; use the folder")
    weights = {
        key: weight.detach().cpu().contiguous()
        for key, weight in encoder.model.state_dict().items()
        if key != "encoder.embed_tokens.weight"  # the same tensor as shared.weight
    }
    config = {field: getattr(encoder.model.config, field) for field in _CONFIG_FIELDS}
    about = {"umt5": config, "tokenizer": "bytes", "text_len": encoder.text_len}
    with whole_file(path) as part:
        save_file(weights, part, metadata={METADATA_KEY: json.dumps(about)})


def _load_file(
    path: Path, tokenizer: str | Path | None, device: torch.device | str, dtype: torch.dtype
) -> tuple[Any, Tokenize, int]:
    file = read_weights(path)
    weights, metadata = file.tensors, file.metadata
    tokenize: Tokenize = byte_ids
    if METADATA_KEY in metadata:
        about = parse_json(path, metadata[METADATA_KEY])
        if about.get("tokenizer") != "bytes" or tokenizer is not None:
            raise ValueError(
                f"{path} reads {about.get('tokenizer')} and was given the tokenizer {tokenizer}; "
                "this version knows 'bytes', which takes none"
            )
        config, text_len = _recorded_config(path, about, len(weights))
    else:
        weights = _encoder_weights(path, weights)
        config = _config_of(path, weights)
        tokenize = _load_tokenizer(str(tokenizer or _release_tokenizer(path)))
        text_len = WAN_1_3B.text_len
    return _build(path, config, _plain(path, weights, device, dtype)), tokenize, text_len


def _recorded_config(path: Path, about: Mapping[str, Any], most: int) -> tuple[Any, int]:
    """The sizes and the length of prompts that `save_text_encoder` wrote."""
    from transformers import UMT5Config

    try:
        sizes = {name: about["umt5"][name] for name in _CONFIG_FIELDS}
        if sizes["num_layers"] > most:
            raise ValueError(f"{sizes['num_layers']} layers of {most} tensors")
        return UMT5Config(**sizes, **_ATTENTION), int(about["text_len"])
    except Exception as error:  # transformers checks some of it, with errors of its own
        raise ValueError(
            f"{path} records sizes that cannot be used ({_first_line(error)}); get it again"
        ) from error


def last_norm(path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight of an encoder's last norm, which quantisation leaves alone.

    ValueError where a file holds no encoder.
    """
    return _encoder_weights(path, tensors)["encoder.final_layer_norm.weight"]


def _encoder_weights(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a file, by the names of transformers' `UMT5EncoderModel`."""
    weights = {_umt5_name(key): tensor for key, tensor in tensors.items()}
    if "shared.weight" not in weights or "encoder.final_layer_norm.weight" not in weights:
        kinds = [kind for mark, kind in _WRONG_KINDS if any(mark in key for key in tensors)]
        looks = f"looks like {kinds[0]}" if kinds else f"holds {', '.join(list(tensors)[:3])}"
        raise ValueError(
            f"{path} {looks}, not a UMT5 text encoder; give models_t5_umt5-xxl-enc-bf16.pth or "
            "umt5_xxl_*.safetensors"
        )
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" not in weights:
        raise ValueError(
            f"{path} is a T5, with position biases in its first block only; Wan needs UMT5"
        )
    keep = ("shared.", "encoder.block.", "encoder.final_layer_norm.")
    return {key: tensor for key, tensor in weights.items() if key.startswith(keep)}


def _umt5_name(key: str) -> str:
    name = key.removesuffix(".weight")
    if name in _WAN_NAMES:
        return f"{_WAN_NAMES[name]}.weight"
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block and block[2] in _WAN_BLOCK_NAMES:
        return f"encoder.block.{block[1]}.{_WAN_BLOCK_NAMES[block[2]]}.weight"
    return key


def _plain(
    path: Path, weights: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights in their final place and type, ComfyUI's scaled fp8 multiplied out."""
    plain = {}
    for key, weight in weights.items():
        stem, _, leaf = key.rpartition(".")
        if leaf in _QUANTISATION:
            continue
        for scale in (weights[f"{stem}.{name}"] for name in _SCALES if f"{stem}.{name}" in weights):
            if scale.numel() != 1 or not weight.is_floating_point():
                raise ValueError(
                    f"{path} is quantised in blocks (seen at {key}); use the fp16, bf16 or "
                    "fp8_e4m3fn_scaled file"
                )
            weight = weight.to(device).float() * scale.to(device).float()
        plain[key] = weight.to(device, dtype)
    return plain


def _config_of(path: Path, weights: Mapping[str, Tensor]) -> Any:
    """The sizes of an encoder, from its tensors."""
    from transformers import UMT5Config

    first = "encoder.block.0.layer"
    try:
        num_buckets, num_heads = weights[
            f"{first}.0.SelfAttention.relative_attention_bias.weight"
        ].shape
        inner, d_model = weights[f"{first}.0.SelfAttention.q.weight"].shape
        d_ff = len(weights[f"{first}.1.DenseReluDense.wi_0.weight"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; it is not a whole UMT5 encoder") from error
    blocks = {int(key.split(".")[2]) for key in weights if key.startswith("encoder.block.")}
    return UMT5Config(
        vocab_size=len(weights["shared.weight"]),
        d_model=d_model,
        d_kv=inner // num_heads,
        d_ff=d_ff,
        num_layers=len(blocks),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        **_ATTENTION,
    )


def _build(path: Path, config: Any, weights: dict[str, Tensor]) -> Any:
    """A `UMT5EncoderModel` that takes the tensors as they are, without a copy."""
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {key: tensor.shape for key, tensor in weights.items()}
    wrong = sorted({key for key, _ in expected.items() ^ found.items()})
    if wrong:
        raise ValueError(
            f"{path} is not a whole UMT5 encoder: {len(wrong)} tensors missing, unknown or "
            f"of a wrong size, such as {wrong[0]}; download it again"
        )
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def _release_tokenizer(path: Path) -> Path:
    beside = path.parent / "google" / "umt5-xxl"
    if not beside.is_dir():
        raise ValueError(
            f"{path} has no tokenizer beside it (the folder google/umt5-xxl of the Wan release); "
            "name one as tokenizer: a local folder, or google/umt5-xxl to download it"
        )
    return beside


def _place(path_or_id: str) -> dict[str, Any]:
    """Where transformers is to look: arguments for its `from_pretrained`."""
    if Path(path_or_id).is_dir():
        return {"pretrained_model_name_or_path": path_or_id, "local_files_only": True}
    owner, name, *folders = [*path_or_id.split("/"), ""]
    # Nothing that looks like a path of this machine is asked for on the network.
    looks_local = Path(owner or "/").exists() or name.endswith((".safetensors", ".pth", ".pt"))
    if looks_local or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", f"{owner}/{name}"):
        raise ValueError(
            f"{path_or_id} does not exist; give a file, a folder or a hub id (owner/name)"
        )
    return {
        "pretrained_model_name_or_path": f"{owner}/{name}",
        "subfolder": "/".join(folders).strip("/"),
        "local_files_only": False,
    }


def _failure(path_or_id: str, what: str, error: Exception) -> ValueError:
    reason = _first_line(error)
    if Path(path_or_id).is_dir():
        return ValueError(f"the {what} in {path_or_id} cannot be read: {reason}")
    return ValueError(
        f"{path_or_id} is no file or folder here, and the Hugging Face hub gave no {what} for it "
        f"({reason}); check the name and the connection, or give a local path"
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _load_tokenizer(path_or_id: str) -> Tokenize:
    from transformers import AutoTokenizer

    place = _place(path_or_id)
    names = ("tokenizer.json", "spiece.model")
    if place["local_files_only"] and not any((Path(path_or_id) / name).is_file() for name in names):
        raise ValueError(
            f"{path_or_id} holds no tokenizer ({' or '.join(names)}); name one as tokenizer: a "
            "local folder, or google/umt5-xxl to download it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError, ImportError) as error:
        raise _failure(path_or_id, "tokenizer", error) from error
    # Not verbose: it would warn of long prompts, which are cut and warned of here.
    return lambda text: list(tokenizer(text, verbose=False).input_ids)


def _load_pretrained(
    path_or_id: str,
    tokenizer: str | Path | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Any, Tokenize]:
    from safetensors import SafetensorError
    from transformers import UMT5Config, UMT5EncoderModel

    place = _place(path_or_id)
    if place["local_files_only"] and not (Path(path_or_id) / "config.json").is_file():
        raise ValueError(
            f"{path_or_id} has no config.json; give a folder that save_pretrained wrote, such as "
            "text_encoder of a diffusers release, or the encoder's one file"
        )
    try:
        kind = UMT5Config.get_config_dict(**place)[0].get("model_type")
        if kind != "umt5":
            raise ValueError(f"{path_or_id} holds a model of type {kind!r}; Wan needs 'umt5'")
        tokenize = _load_tokenizer(str(tokenizer or _tokenizer_beside(path_or_id)))
        model, report = UMT5EncoderModel.from_pretrained(
            **place, torch_dtype=dtype, output_loading_info=True, **_ATTENTION
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _failure(path_or_id, "text encoder", error) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path_or_id} lacks {len(missing)} weights, such as {missing[0]}")
    return model.to(device=device, dtype=dtype), tokenize


def _tokenizer_beside(path_or_id: str) -> str:
    """Diffusers releases keep `text_encoder` and `tokenizer` side by side."""
    return re.sub(r"(?<![^/])text_encoder$", "tokenizer", path_or_id)
