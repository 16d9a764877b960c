"""VideoAlign at toy size, against its published forward spelled out over the release's names."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.rewards import videoalign
from training.rewards.videoalign import convert, load_videoalign
from training.rewards.videoalign_files import METADATA_KEY, WEIGHTS, VideoAlignConfig
from training.rewards.videoalign_frames import (
    CLIP_MEAN,
    CLIP_STD,
    frame_numbers,
    frame_size,
    patches,
    sample_frames,
    sample_frames_as_published,
)
from training.rewards.videoalign_network import set_rotary_frequencies
from training.rewards.videoalign_text import DETAILED_SPECIAL, REWARD_TOKENS, chat, load_tokenizer
from training.run.config import from_json

PEFT = "base_model.model."
DIM, HEADS, HEAD_DIM, LAYERS, INNER = 32, 2, 16, 2, 48
VISION_HEADS, VISION_HEAD_DIM, BLOCKS = 2, 16, 2
RANK, ALPHA = 4, 12
NORM = {"VQ": (3.5, 2.0), "MQ": (1.25, 1.5), "TA": (-2.75, 0.5)}
_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
CHAT_TOKENS = [f"<|{name}|>" for name in _NAMES]
PROMPTS = ["a small panda walks through tall bamboo", "rain"]
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
# Qwen2-VL-2B-Instruct's chat_template.json.
QWEN_CHAT = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content "
    "or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --- A base model and a release, both made up ---


def write_base(folder: Path) -> Path:
    """Qwen2-VL's config, flat as on the hub, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    split = pre_tokenizers.Whitespace()
    text = " ".join([DETAILED_SPECIAL, *PROMPTS, "system user assistant You are a helpful ."])
    for token in REWARD_TOKENS:
        text = text.replace(token, "")
    words = sorted({word for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(CHAT_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "qwen2_vl",
        "hidden_size": DIM,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "vocab_size": 2000,
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_config": {
            "depth": BLOCKS,
            "embed_dim": VISION_HEADS * VISION_HEAD_DIM,
            "hidden_size": DIM,
            "mlp_ratio": 2,
            "num_heads": VISION_HEADS,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def release_shapes(num_tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of transformers 4.45's Qwen2-VL with a reward head, before PEFT."""
    width = VISION_HEADS * VISION_HEAD_DIM
    linears = [
        ("visual.merger.mlp.0", 4 * width, 4 * width),
        ("visual.merger.mlp.2", DIM, 4 * width),
    ]
    norms = ["visual.merger.ln_q"]
    for i in range(BLOCKS):
        block = f"visual.blocks.{i}"
        linears += [(f"{block}.attn.qkv", 3 * width, width), (f"{block}.attn.proj", width, width)]
        linears += [(f"{block}.mlp.fc1", 2 * width, width), (f"{block}.mlp.fc2", width, 2 * width)]
        norms += [f"{block}.norm1", f"{block}.norm2"]
    yield "visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for name in norms:
        yield from ((f"{name}.weight", (width,)), (f"{name}.bias", (width,)))
    for name, out, into in linears:
        yield from ((f"{name}.weight", (out, into)), (f"{name}.bias", (out,)))
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, out in (("q", DIM), ("k", HEAD_DIM), ("v", HEAD_DIM)):
            yield f"{layer}.self_attn.{name}_proj.weight", (out, DIM)
            yield f"{layer}.self_attn.{name}_proj.bias", (out,)
        yield f"{layer}.self_attn.o_proj.weight", (DIM, DIM)
        yield from ((f"{layer}.mlp.{name}_proj.weight", (INNER, DIM)) for name in ("gate", "up"))
        yield f"{layer}.mlp.down_proj.weight", (DIM, INNER)
        yield f"{layer}.input_layernorm.weight", (DIM,)
        yield f"{layer}.post_attention_layernorm.weight", (DIM,)
    yield from (("model.norm.weight", (DIM,)), ("model.embed_tokens.weight", (num_tokens, DIM)))
    yield from (("lm_head.weight", (num_tokens, DIM)), ("rm_head.weight", (3, DIM)))


def release_state(num_tokens: int) -> dict[str, Tensor]:
    """A state dict under PEFT's names: LoRAs on the language model's linears, all in bf16."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], size: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).bfloat16()

    state = {}
    for name, shape in release_shapes(num_tokens):
        is_norm = len(shape) == 1 and name.endswith("weight")
        fan_in = max(1, torch.Size(shape[1:]).numel())
        sharp = 3 if any(each in name for each in (".qkv.", ".q_proj.", ".k_proj.")) else 1
        tensor = 1 + random(shape, 0.1) if is_norm else random(shape, sharp * fan_in**-0.5)
        module, _, leaf = name.rpartition(".")
        if "_proj" in module:
            state[f"{PEFT}{module}.base_layer.{leaf}"] = tensor
            if leaf == "weight":
                state[f"{PEFT}{module}.lora_A.default.weight"] = random((RANK, shape[1]), 0.1)
                state[f"{PEFT}{module}.lora_B.default.weight"] = random((shape[0], RANK), 0.1)
        else:
            state[f"{PEFT}{name}"] = tensor
    state[f"{PEFT}lm_head.weight"] = state[f"{PEFT}model.embed_tokens.weight"]
    return state


# The head's diagonal for `clips` and PROMPTS, recorded from the release's own inference.py (commit
# 219ab9d) on `write_release`, under transformers 4.45.2 and peft 0.10.0: its model cast to bf16, as
# it is there, then run in float32.
RELEASED = [[-0.1644215, -0.2063958, 0.5387374], [-0.2163436, 0.1451371, 1.0314581]]


def settings() -> dict[str, Any]:
    """What matters of the release's `model_config.json`, with other means and stds."""
    norm = {f"{name}_mean": mean for name, (mean, _) in NORM.items()}
    return {
        "data_config": {
            "max_frame_pixels": 200_704,
            "num_frames": None,
            "fps": 2.0,
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
            "eval_dim": ["VQ", "MQ", "TA"],
        },
        "model_config": {"output_dim": 3, "use_special_tokens": True, "reward_token": "special"},
        "peft_lora_config": {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA},
        "inference_config": norm | {f"{name}_std": std for name, (_, std) in NORM.items()},
    }


def write_release(folder: Path, base: Path) -> Path:
    (folder / "checkpoint-11352").mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps(settings()))
    num_tokens = load_tokenizer(base).get_vocab_size()
    torch.save(release_state(num_tokens), folder / "checkpoint-11352" / "model.pth")
    return folder


def clips(seed: int = 1, height: int = 36, width: int = 60) -> Tensor:
    """Two videos [2, 20, 3, H, W] in [0, 1] at 16 images a second: 4 frames are looked at."""
    noise = torch.rand((2, 20, 3, height // 4, width // 4), generator=_seeded(seed))
    return F.interpolate(noise.flatten(0, 1), (height, width)).unflatten(0, (2, 20))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Base, release, its state in float32, the converted folder and the reward read from it."""
    root = tmp_path_factory.mktemp("videoalign")
    base = write_base(root / "base")
    release = write_release(root / "release", base)
    convert(release, base, root / "out", dtype=torch.float32)
    state = torch.load(release / "checkpoint-11352" / "model.pth", weights_only=True)
    return SimpleNamespace(
        base=base,
        release=release,
        out=root / "out",
        state={key: tensor.float() for key, tensor in state.items()},
        reward=load_videoalign(root / "out", **ON_CPU),
    )


# --- The published forward, one video at a time, over the names and parts of the release ---


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A linear with its LoRA beside it, as PEFT runs it."""
    kind = ".base_layer" if f"{PEFT}{name}.base_layer.weight" in state else ""
    y = x @ state[f"{PEFT}{name}{kind}.weight"].T + state.get(f"{PEFT}{name}{kind}.bias", 0)
    if kind:
        down, up = (state[f"{PEFT}{name}.lora_{side}.default.weight"] for side in "AB")
        y = y + (x @ down.T) @ up.T * (ALPHA / RANK)
    return y


def layer_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return x * state[f"{PEFT}{name}.weight"] + state[f"{PEFT}{name}.bias"]


def rms_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{PEFT}{name}.weight"]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[H, L, D] each."""
    weights = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        weights = weights + torch.full(weights.shape[-2:], -torch.inf).triu(1)
    return weights.softmax(-1) @ v


def vision_angles(height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one frame's patches, in the order of `pixel_values`."""
    half = VISION_HEAD_DIM // 2
    inv_freq = (1 / 10_000 ** (torch.arange(0, half, 2).float() / half)).to(dtype)
    table = torch.outer(torch.arange(max(height, width), dtype=dtype), inv_freq)
    places = [
        (2 * i + di, 2 * j + dj)
        for i in range(height // 2)
        for j in range(width // 2)
        for di in range(2)
        for dj in range(2)
    ]
    angles = torch.stack([torch.cat([table[row], table[column]]) for row, column in places])
    return angles.cos().float().repeat(1, 2), angles.sin().float().repeat(1, 2)


def see(
    state: dict[str, Tensor], pixels: Tensor, grid: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """The vision tower: features [tokens, DIM] of one video's patches."""
    count, height, width = grid
    kernel = state[f"{PEFT}visual.patch_embed.proj.weight"].flatten(1)
    x = (pixels @ kernel.T).unflatten(0, (count, height * width))
    cos, sin = vision_angles(height, width, dtype)
    for i in range(BLOCKS):
        name = f"visual.blocks.{i}"
        for t in range(count):  # a frame's patches see each other alone
            mixed = linear(state, f"{name}.attn.qkv", layer_norm(state, f"{name}.norm1", x[t]))
            q, k, v = mixed.unflatten(1, (3, VISION_HEADS, -1)).permute(1, 2, 0, 3)
            seen = attention(turned(q, cos, sin), turned(k, cos, sin), v, causal=False)
            seen = seen.transpose(0, 1).flatten(1)
            x = x.index_add(0, torch.tensor([t]), linear(state, f"{name}.attn.proj", seen)[None])
        inner = linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x))
        x = x + linear(state, f"{name}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))
    merged = layer_norm(state, "visual.merger.ln_q", x).reshape(-1, 4 * x.shape[-1])
    return linear(
        state, "visual.merger.mlp.2", F.gelu(linear(state, "visual.merger.mlp.0", merged))
    )


def read(state: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The language model: normed hidden states [L, DIM] of embeddings at 0, 1, 2 ..."""
    inv_freq = (1 / 1e6 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)).to(dtype).float()
    angles = torch.outer(torch.arange(len(x)).float(), inv_freq).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    for i in range(LAYERS):
        name = f"model.layers.{i}"
        normed = rms_norm(state, f"{name}.input_layernorm", x)
        q, k, v = (
            linear(state, f"{name}.self_attn.{each}_proj", normed)
            .unflatten(1, (-1, HEAD_DIM))
            .transpose(0, 1)
            for each in "qkv"
        )
        seen = attention(turned(q, cos, sin), turned(k, cos, sin), v, causal=True)
        x = x + linear(state, f"{name}.self_attn.o_proj", seen.transpose(0, 1).flatten(1))
        normed = rms_norm(state, f"{name}.post_attention_layernorm", x)
        gate = F.silu(linear(state, f"{name}.mlp.gate_proj", normed))
        inner = gate * linear(state, f"{name}.mlp.up_proj", normed)
        x = x + linear(state, f"{name}.mlp.down_proj", inner)
    return rms_norm(state, "model.norm", x)


def embedded(state: dict[str, Tensor], ids: list[int], features: Tensor, video_id: int) -> Tensor:
    """Embeddings [L, DIM], a feature in the place of each token of the video."""
    left = iter(features)
    table = state[f"{PEFT}model.embed_tokens.weight"]
    return torch.stack([next(left) if each == video_id else table[each] for each in ids])


def slow_pixels(video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`pixel_values` and grid of one clip [20, 3, 36, 60]: its 4 frames, at 252x420."""
    frames = (video[[0, 6, 13, 19]] * 255).round()
    frames = F.interpolate(frames, (252, 420), mode="bicubic", antialias=True)
    frames = frames.clamp(0, 255).round().numpy()
    scaled = (frames * (1 / 255)).astype(np.float32)  # as numpy does it in transformers 4.45
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    normed = torch.from_numpy((scaled - mean) / std)
    rows = [
        normed[2 * t : 2 * t + 2, :, y : y + 14, x : x + 14].transpose(0, 1).flatten()
        for t in range(2)
        for tall in range(0, 252, 28)
        for wide in range(0, 420, 28)
        for y in (tall, tall + 14)
        for x in (wide, wide + 14)
    ]
    return torch.stack(rows), (2, 18, 30)


# --- Text ---


def test_the_questionnaire_is_the_release_s_to_the_letter():
    # of DETAILED_PROMPT_WITH_SPECIAL_TOKEN in KwaiVGI/VideoAlign's prompt_template.py
    digest = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    assert hashlib.sha256(DETAILED_SPECIAL.encode()).hexdigest() == digest


def test_the_chat_is_what_qwen2_vl_s_own_template_makes():
    prompt = 'braces {0} and "quotes"\n'
    text = DETAILED_SPECIAL.replace("{text_prompt}", prompt)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(QWEN_CHAT)
    expected = template.render(messages=messages, add_generation_prompt=True)
    assert chat(prompt, 3) == expected.replace("<|video_pad|>", "<|video_pad|>" * 3)


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|MQ_reward|>"])
def test_a_prompt_that_spells_one_of_the_judge_s_tokens_is_refused(token):
    with pytest.raises(ValueError, match=r"holds <\|.*take it out"):
        chat(f"a panda {token}", 3)


def test_prompts_of_different_lengths_are_padded_on_the_right(toy):
    ids, mask = toy.reward.text_inputs(PROMPTS, torch.tensor([[2, 18, 30]] * 2))
    tokenizer = toy.reward.tokenizer
    for prompt, row, kept in zip(PROMPTS, ids, mask, strict=True):
        expected = tokenizer.encode(chat(prompt, 270), add_special_tokens=False).ids
        assert row[: len(expected)].tolist() == expected and kept.sum() == len(expected)
        assert set(row[len(expected) :].tolist()) <= {tokenizer.token_to_id("<|endoftext|>")}
    assert mask[0].sum() == mask[1].sum() + 6 and not mask[1, -6:].any()
    assert (ids == tokenizer.token_to_id("<|video_pad|>")).sum(1).tolist() == [270, 270]


# --- Frames ---


@pytest.mark.parametrize(
    ("total", "video_fps", "expected"),
    [  # recorded from the release's smart_nframes and linspace
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (121, 24, [0, 13, 27, 40, 53, 67, 80, 93, 107, 120]),
        (33, 24, [0, 11, 21, 32]),
        (20, 16, [0, 6, 13, 19]),
        (5, 16, [0, 1, 3, 4]),
        (3, 8, [0, 2]),
        (2, 16, [0, 1]),
    ],
)
def test_the_frames_taken_are_those_the_release_takes(total, video_fps, expected):
    assert frame_numbers(total, video_fps, 2.0).tolist() == expected


def test_at_most_768_frames_are_taken_and_one_frame_is_refused():
    assert len(frame_numbers(2000, 2, 2.0)) == 768
    with pytest.raises(ValueError, match="1 frames; a reward needs at least 2"):
        frame_numbers(1, 16, 2.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # recorded from the release's smart_resize, at most 200,704 pixels
        ((480, 832), (336, 588)),
        ((832, 480), (588, 336)),
        ((1080, 1920), (336, 588)),
        ((336, 588), (336, 588)),
        ((100, 900), (112, 896)),
        ((64, 64), (336, 336)),
        ((30, 5000), (28, 5012)),
    ],
)
def test_frames_get_the_size_the_release_gives_them(shape, expected):
    assert frame_size(*shape, 200_704) == expected


def test_a_video_too_narrow_to_resize_is_refused():
    with pytest.raises(ValueError, match="20x4020; sides differ at most 200 times"):
        frame_size(20, 4020, 200_704)


@pytest.mark.parametrize("shape", [(36, 60), (280, 500)])
def test_resized_frames_are_whole_numbers_within_a_level_of_pillow_s(shape):
    videos = (
        clips(height=shape[0], width=shape[1])[:1] / 2 + 0.25
    )  # Pillow clips between its passes
    frames = sample_frames(videos, 16, 2.0, (252, 420))[0]
    assert torch.equal(frames, frames.round())
    for frame, number in zip(frames, (0, 6, 13, 19), strict=True):
        bytes_ = (videos[0, number] * 255).round().byte().permute(1, 2, 0).numpy()
        pillow = Image.fromarray(bytes_).resize((420, 252), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
        assert (frame - expected).abs().max() <= 1


def test_pixels_are_cut_into_patches_as_the_release_cuts_them(toy):
    videos = clips()
    pixel_values, grid = toy.reward.vision_inputs(videos)
    assert grid.tolist() == [[2, 18, 30]] * 2
    for video, found in zip(videos, pixel_values.chunk(2), strict=True):
        expected, _ = slow_pixels(video)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_published_form_sees_every_frame_with_pixels_below_zero():
    videos = clips()[:, :5]
    frames = sample_frames_as_published(videos, (36, 60))
    assert frames.shape[1] == 6 and torch.equal(frames[:, 5], frames[:, 4])
    torch.testing.assert_close(frames[:, :5], videos * 510 - 255, rtol=0, atol=1e-3)
    values, grid = patches(sample_frames_as_published(videos, (28, 28)))
    assert grid.tolist() == [[3, 2, 2]] * 2 and values.shape == (24, 3 * 2 * 14 * 14)


# --- The forward ---


def test_every_step_of_the_forward_is_the_published_one(toy):
    reward, state = toy.reward, toy.state
    video_id = reward.tokenizer.token_to_id("<|video_pad|>")
    pixel_values, grid = reward.vision_inputs(clips())
    ids, mask = reward.text_inputs(PROMPTS, grid)
    network = reward.network
    features = network.features(pixel_values, grid).chunk(2)
    hidden = network.hidden(ids, mask, pixel_values, grid)
    reward_ids = torch.tensor(reward.config.reward_token_ids)
    heads = network.head(hidden, torch.isin(ids, reward_ids))
    scores = reward(clips(), PROMPTS)
    for b, video in enumerate(clips()):
        pixels, shape = slow_pixels(video)
        seen = see(state, pixels, shape, torch.bfloat16)
        torch.testing.assert_close(features[b], seen, rtol=1e-4, atol=1e-4)
        row = ids[b, : int(mask[b].sum())].tolist()
        states = read(state, embedded(state, row, seen, video_id), torch.bfloat16)
        torch.testing.assert_close(hidden[b, : len(row)], states, rtol=1e-4, atol=5e-4)
        at = [row.index(each) for each in reward_ids.tolist()]
        head = states[at] @ state[f"{PEFT}rm_head.weight"].T
        torch.testing.assert_close(heads[b], head, rtol=1e-4, atol=1e-4)
        for i, (name, (mean, std)) in enumerate(NORM.items()):
            assert float(scores[name][b]) == pytest.approx(float(head[i, i] - mean) / std, abs=5e-4)


def test_the_scores_are_those_the_released_code_gives(toy):
    scores = toy.reward(clips(), PROMPTS)
    for i, (name, (mean, std)) in enumerate(NORM.items()):
        expected = (torch.tensor(RELEASED)[:, i] - mean) / std
        torch.testing.assert_close(scores[name], expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(scores["Overall"], scores["VQ"] + scores["MQ"] + scores["TA"])


def test_angles_that_are_not_rounded_give_other_scores(toy):
    exact = load_videoalign(toy.out, **ON_CPU)
    set_rotary_frequencies(exact.network, torch.float32)
    found, expected = exact(clips(), PROMPTS), toy.reward(clips(), PROMPTS)
    assert (found["MQ"] - expected["MQ"]).abs().max() > 0.01


def test_two_videos_at_once_score_as_each_alone(toy):
    together = toy.reward(clips(), PROMPTS)
    for b in range(2):
        alone = toy.reward(clips()[b : b + 1], PROMPTS[b : b + 1])
        for name, score in together.items():
            torch.testing.assert_close(score[b : b + 1], alone[name], rtol=1e-4, atol=1e-4)
    swapped = toy.reward(clips(), PROMPTS[::-1])
    assert (swapped["TA"] - together["TA"]).abs().min() > 0.01


def test_a_slower_video_shows_more_of_its_frames(toy):
    assert replace(toy.reward, fps=4).vision_inputs(clips())[1].tolist() == [[5, 18, 30]] * 2


def test_the_published_form_gives_other_scores(toy):
    videos = clips()[:, :7]
    published = load_videoalign(toy.out, **ON_CPU, published=True)
    pixel_values, grid = published.vision_inputs(videos)
    assert grid.tolist() == [[4, 18, 30]] * 2
    black = torch.tensor([(-1 - mean) / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)])
    found = published.vision_inputs(torch.zeros_like(videos))[0]
    torch.testing.assert_close(found[0].view(3, -1).mean(1), black)
    right = toy.reward(videos, PROMPTS)
    assert (published(videos, PROMPTS)["MQ"] - right["MQ"]).abs().min() > 0.01
    assert pixel_values.shape[0] == 2 * 4 * 18 * 30


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        (torch.zeros(2, 3, 20, 36, 60), PROMPTS, r"\[2, 3, 20, 36, 60\]"),
        (torch.zeros(2, 20, 3, 36, 60), PROMPTS[:1], "prompts 1; give"),
        (torch.zeros(1, 1, 3, 36, 60), PROMPTS[:1], "1 frames; a reward needs"),
    ],
)
def test_what_cannot_be_judged_is_refused(toy, videos, prompts, message):
    with pytest.raises(ValueError, match=message):
        toy.reward(videos, prompts)


def test_videos_without_a_frame_rate_are_refused(toy):
    with pytest.raises(ValueError, match="fps is 0; give"):
        replace(toy.reward, fps=0)


# --- Conversion ---


def test_converted_weights_are_the_base_s_plus_the_scaled_lora(toy):
    weights = load_file(toy.out / WEIGHTS)
    assert not [key for key in weights if "lora" in key or "lm_head" in key or "base" in key]
    for key, tensor in weights.items():
        old = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if "_proj" not in old:
            assert torch.equal(tensor, toy.state[PEFT + old])
            continue
        module, _, leaf = old.rpartition(".")
        expected = toy.state[f"{PEFT}{module}.base_layer.{leaf}"].double()
        if leaf == "weight":
            down, up = (toy.state[f"{PEFT}{module}.lora_{x}.default.weight"].double() for x in "AB")
            assert (up @ down).abs().max() > 0.01
            expected = expected + ALPHA / RANK * (up @ down)
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    num_loras = sum("lora" in key for key in toy.state)
    assert len(weights) == len(toy.state) - num_loras - 1


def test_the_constants_are_the_release_s(toy):
    with safe_open(toy.out / WEIGHTS, "pt") as file:
        config = from_json(VideoAlignConfig, file.metadata()[METADATA_KEY])
    assert config == VideoAlignConfig(
        means=(3.5, 1.25, -2.75),
        stds=(2.0, 1.5, 0.5),
        fps=2.0,
        max_pixels=200_704,
        reward_token_ids=tuple(map(toy.reward.tokenizer.token_to_id, REWARD_TOKENS)),
    )
    assert toy.reward.config == config


def test_a_folder_in_bf16_scores_nearly_as_one_in_float32(toy, tmp_path):
    convert(toy.release, str(toy.base), tmp_path)
    assert {each.dtype for each in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    expected = toy.reward(clips(), PROMPTS)
    for dtype, error in ((torch.float32, 0.15), (torch.bfloat16, 0.3)):
        found = load_videoalign(tmp_path, "cpu", dtype)(clips(), PROMPTS)
        assert all(each.dtype == torch.float32 for each in found.values())
        torch.testing.assert_close(found, expected, rtol=0, atol=error)


def test_rank_stabilised_loras_and_modules_trained_in_full_are_merged(toy, tmp_path):
    release = copied(toy.release, tmp_path)
    change_settings(release, "peft_lora_config", use_rslora=True)

    def change(state: dict[str, Tensor]) -> None:
        kept = state.pop(f"{PEFT}rm_head.weight")
        state[f"{PEFT}rm_head.original_module.weight"] = kept
        state[f"{PEFT}rm_head.modules_to_save.default.weight"] = kept + 1

    change_state(release, change)
    convert(release, toy.base, tmp_path / "out", dtype=torch.float32)
    weights, plain = load_file(tmp_path / "out" / WEIGHTS), load_file(toy.out / WEIGHTS)
    torch.testing.assert_close(
        weights["rm_head.weight"], plain["rm_head.weight"] + 1, atol=0.01, rtol=0
    )
    name = "layers.1.mlp.down_proj"
    base = toy.state[f"{PEFT}model.{name}.base_layer.weight"]
    key = f"model.language_model.{name}.weight"
    torch.testing.assert_close(weights[key] - base, (plain[key] - base) * RANK**0.5)


def test_the_latest_checkpoint_is_taken_unless_another_is_asked_for(toy, tmp_path):
    release = copied(toy.release, tmp_path)
    shutil.copytree(release / "checkpoint-11352", release / "checkpoint-9")
    change_state(release, lambda state: state[f"{PEFT}rm_head.weight"].zero_(), step=9)
    convert(release, toy.base, tmp_path / "latest")
    convert(release, toy.base, tmp_path / "ninth", step=9)
    assert load_file(tmp_path / "latest" / WEIGHTS)["rm_head.weight"].any()
    assert not load_file(tmp_path / "ninth" / WEIGHTS)["rm_head.weight"].any()
    with pytest.raises(ValueError, match=r"no checkpoint 10; it has \[9, 11352\]"):
        convert(release, toy.base, tmp_path / "tenth", step=10)


def test_a_base_is_downloaded_by_its_hub_id_without_its_weights(toy, tmp_path, monkeypatch):
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(toy.base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert(toy.release, "Qwen/Qwen2-VL-2B-Instruct", tmp_path)
    assert asked == {"Qwen/Qwen2-VL-2B-Instruct": ["config.json", "tokenizer.json"]}
    assert (tmp_path / "tokenizer.json").read_bytes() == (toy.base / "tokenizer.json").read_bytes()


def test_a_base_that_is_nowhere_is_refused(toy, tmp_path, monkeypatch):
    def download(*_: Any, **__: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=r"could not be downloaded \(offline\); give a folder"):
        convert(toy.release, "Qwen/Qwen2-VL-2B-Instruct", tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        convert(toy.release, tmp_path / "nothing", tmp_path)


def copied(release: Path, folder: Path) -> Path:
    return Path(shutil.copytree(release, folder / "release"))


def change_settings(release: Path, group: str, **values: Any) -> None:
    path = release / "model_config.json"
    found = json.loads(path.read_text())
    found[group] |= values
    path.write_text(json.dumps(found))


def change_state(release: Path, change: Callable[[dict[str, Tensor]], Any], step=11352) -> None:
    path = release / f"checkpoint-{step}" / "model.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


LAYER = f"{PEFT}model.layers.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop(f"{LAYER}.input_layernorm.weight"),
            "1 missing .*layers.0.input_layernorm",
        ),
        (lambda s: s.pop(f"{PEFT}rm_head.weight"), "1 missing .*rm_head.weight"),
        (lambda s: s.pop(f"{PEFT}model.embed_tokens.weight"), "lack model.language_model.embed"),
        (
            lambda s: s.pop(f"{LAYER}.mlp.up_proj.lora_A.default.weight"),
            "has only base_layer, lora_B",
        ),
        (
            lambda s: s.update({f"{PEFT}rm_head.weight": torch.zeros(1, DIM)}),
            r"1 of another size \(rm_head.weight \[1, 32\], not \[3, 32\]\)",
        ),
        (
            lambda s: s.update(
                {f"{LAYER}.mlp.up_proj.lora_B.default.weight": torch.zeros(INNER, 2)}
            ),
            "which rank 4 does not give",
        ),
        (
            lambda s: s.update({f"{PEFT}model.embed_tokens.weight": torch.zeros(7, DIM)}),
            "knows 7 tokens, the tokenizer in .* give the base",
        ),
        (
            lambda s: s.update(
                {f"{PEFT}model.layers.7.mlp.up_proj.weight": torch.zeros(INNER, DIM)}
            ),
            "1 unknown .*layers.7",
        ),
        (lambda s: s.update({"blocks.0.weight": torch.zeros(1)}), "which is no part of a Qwen2-VL"),
        (
            lambda s: s.update(
                {f"{LAYER}.mlp.up_proj.lora_magnitude_vector.default": torch.zeros(1)}
            ),
            "PEFT's LoRA does not name so",
        ),
    ],
)
def test_a_release_whose_tensors_do_not_fit_is_refused(toy, tmp_path, change, message):
    release = copied(toy.release, tmp_path)
    change_state(release, change)
    with pytest.raises(ValueError, match=message):
        convert(release, toy.base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("data_config", {"prompt_template_type": "simple"}, "template is 'simple'; choose one of"),
        ("data_config", {"sample_type": "multi_pts"}, "sample_type is 'multi_pts'; only 'uniform'"),
        ("data_config", {"num_frames": 8}, "num_frames is 8; only None"),
        ("model_config", {"output_dim": 1}, "output_dim is 1; this judge has 3"),
        ("model_config", {"use_special_tokens": False}, "use_special_tokens is False; only True"),
        ("inference_config", {"MQ_std": 0.0}, "stds are .* give positive numbers"),
    ],
)
def test_a_release_that_was_trained_otherwise_is_refused(toy, tmp_path, group, values, message):
    release = copied(toy.release, tmp_path)
    change_settings(release, group, **values)
    with pytest.raises(ValueError, match=message):
        convert(release, toy.base, tmp_path / "out")


def test_a_release_without_means_is_refused(toy, tmp_path):
    release = copied(toy.release, tmp_path)
    path = release / "model_config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in found.items() if k != "inference_config"}))
    with pytest.raises(ValueError, match="lacks 'inference_config'"):
        convert(release, toy.base, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_config.json", "holds no model_config.json; give VideoReward's folder"),
        ("checkpoint-11352", "holds no folder checkpoint-"),
        ("checkpoint-11352/model.pth", "model.pth is not there"),
    ],
)
def test_a_release_that_is_not_whole_is_refused(toy, tmp_path, name, message):
    release = copied(toy.release, tmp_path)
    (release / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=message):
        convert(release, toy.base, tmp_path / "out")


def test_a_base_of_another_kind_is_refused(toy, tmp_path):
    base = Path(shutil.copytree(toy.base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="is of the kind 'qwen2'; give Qwen2-VL-2B-Instruct's"):
        convert(toy.release, base, tmp_path / "out")
    tokenizer = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(tokenizer.replace("<|video_pad|>", "<|film|>"))
    with pytest.raises(ValueError, match=r"has no token <\|video_pad\|>"):
        convert(toy.release, base, tmp_path / "out")
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        convert(toy.release, base, tmp_path / "out")


def test_a_folder_that_does_not_belong_together_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match=f"holds no {WEIGHTS}; convert the release"):
        load_videoalign(tmp_path, **ON_CPU)
    out = Path(shutil.copytree(toy.out, tmp_path / "out"))
    weights = load_file(out / WEIGHTS)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="carries no constants of VideoAlign"):
        load_videoalign(out, **ON_CPU)
    with safe_open(toy.out / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    weights.pop("rm_head.weight")
    save_file(weights, out / WEIGHTS, metadata=metadata)
    with pytest.raises(ValueError, match=r"1 missing \(rm_head.weight\)"):
        load_videoalign(out, **ON_CPU)
    tokenizer = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(tokenizer.replace('"<|image_pad|>"', '"<|MQ_reward|>"'))
    with pytest.raises(ValueError, match=r"tokenizer.json and .* differ"):
        load_videoalign(out, **ON_CPU)


def test_importing_it_imports_none_of_the_large_libraries():
    large = {"transformers", "tokenizers", "huggingface_hub", "torchvision", "peft"}
    paths = list(Path(videoalign.__file__).parent.glob("videoalign*.py"))
    assert len(paths) == 5
    for path in paths:
        for each in ast.parse(path.read_text()).body:
            names = [alias.name for alias in each.names] if isinstance(each, ast.Import) else []
            names += [str(each.module)] if isinstance(each, ast.ImportFrom) else []
            assert not large & {name.partition(".")[0] for name in names}
