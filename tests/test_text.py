"""UMT5 from each kind of file, prompts to embeddings, and the cache that frees the encoder."""

from __future__ import annotations

import ast
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from rf_core import text
from rf_core.text import (
    BYTE_VOCAB_SIZE,
    PromptCache,
    UMT5Encoder,
    byte_ids,
    clean_prompt,
    encode_prompts,
    load_text_encoder,
    save_text_encoder,
)

TEXT_LEN = 24
BUCKETS = 8
HEADS = 3
LAYERS = 2
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
PROMPTS = ["a panda walks", "", "größer als 雪"]


def make_model(seed: int = 0) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=BYTE_VOCAB_SIZE,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=BUCKETS,
    )
    torch.manual_seed(seed)
    model = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)
            weight.copy_(weight.to(torch.float8_e4m3fn))  # what fp8 files can hold exactly
    return model


@pytest.fixture(scope="module")
def encoder() -> UMT5Encoder:
    return UMT5Encoder(make_model(), byte_ids, text_len=TEXT_LEN)


def wan_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers under the names of the Wan release."""
    pairs = (
        ("encoder.block", "blocks"),
        (".layer.0.SelfAttention.relative_attention_bias", ".pos_embedding.embedding"),
        (".layer.0.SelfAttention", ".attn"),
        (".layer.0.layer_norm", ".norm1"),
        (".layer.1.layer_norm", ".norm2"),
        (".layer.1.DenseReluDense.wi_0", ".ffn.gate.0"),
        (".layer.1.DenseReluDense.wi_1", ".ffn.fc1"),
        (".layer.1.DenseReluDense.wo", ".ffn.fc2"),
        ("encoder.final_layer_norm", "norm"),
        ("shared", "token_embedding"),
    )
    renamed = {}
    for key, weight in weights.items():
        for old, new in pairs:
            key = key.replace(old, new)
        renamed[key] = weight
    return renamed


def bare_weights(encoder: UMT5Encoder) -> dict[str, Tensor]:
    """The encoder's weights as ComfyUI's files name them."""
    state = encoder.model.state_dict()
    return {key: w.clone() for key, w in state.items() if key != "encoder.embed_tokens.weight"}


def bucket(distance: int) -> int:
    """T5's relative position bucket: half exact, half logarithmic up to 128, for each side."""
    half = BUCKETS // 2
    exact = half // 2
    near = abs(distance)
    if near >= exact:
        near = exact + int(math.log(near / exact) / math.log(128 / exact) * (half - exact))
    return min(near, half - 1) + (half if distance > 0 else 0)


def reference(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """UMT5 on one prompt, from the Wan release's names, a head at a time: [L, D]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]

    x = weights["token_embedding.weight"][ids]
    positions = range(len(ids))
    for name in (f"blocks.{layer}" for layer in range(LAYERS)):
        y = norm(x, f"{name}.norm1")
        q, k, v = ((y @ weights[f"{name}.attn.{part}.weight"].T).chunk(HEADS, -1) for part in "qkv")
        table = weights[f"{name}.pos_embedding.embedding.weight"]
        buckets = torch.tensor([[bucket(key - query) for key in positions] for query in positions])
        heads = [(q[h] @ k[h].T + table[buckets][..., h]).softmax(-1) @ v[h] for h in range(HEADS)]
        x = x + torch.cat(heads, -1) @ weights[f"{name}.attn.o.weight"].T
        y = norm(x, f"{name}.norm2")
        gate = F.gelu(y @ weights[f"{name}.ffn.gate.0.weight"].T, approximate="tanh")
        hidden = gate * (y @ weights[f"{name}.ffn.fc1.weight"].T)
        x = x + hidden @ weights[f"{name}.ffn.fc2.weight"].T
    return norm(x, "norm")


def test_embeddings_equal_the_architecture_written_out(encoder: UMT5Encoder) -> None:
    weights = wan_names(bare_weights(encoder))
    for prompt, embeds in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        expected = reference(weights, byte_ids(prompt))
        assert torch.allclose(embeds[: len(expected)], expected, atol=1e-4)


def test_every_prompt_length_is_embedded_and_zero_past_its_end(encoder: UMT5Encoder) -> None:
    prompts = ["x" * length for length in range(TEXT_LEN)]
    embeds = encoder.encode(prompts)
    assert embeds.shape == (TEXT_LEN, TEXT_LEN, encoder.text_dim)
    for length, one in enumerate(embeds):
        assert one[: length + 1].abs().sum(-1).gt(0).all()
        assert one[length + 1 :].eq(0).all()


def test_an_empty_prompt_gives_the_end_token_alone(encoder: UMT5Encoder) -> None:
    ids, mask = encoder.tokens([""])
    assert ids[0].tolist() == [1] + [0] * (TEXT_LEN - 1)
    assert mask.sum() == 1


def test_a_prompt_in_a_batch_equals_the_prompt_alone(encoder: UMT5Encoder) -> None:
    batch = encoder.encode(PROMPTS)
    for prompt, embeds in zip(PROMPTS, batch, strict=True):
        assert torch.allclose(embeds, encoder.encode([prompt])[0], atol=1e-5)


def test_padding_does_not_change_a_prompt(encoder: UMT5Encoder) -> None:
    longer = UMT5Encoder(encoder.model, byte_ids, text_len=2 * TEXT_LEN)
    short, long = encoder.encode(PROMPTS), longer.encode(PROMPTS)
    assert torch.allclose(long[:, :TEXT_LEN], short, atol=1e-5)


def test_a_long_prompt_is_cut_before_its_end_token_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = UMT5Encoder(make_model(), byte_ids, text_len=8)
    with caplog.at_level(logging.WARNING):
        fits = encoder.tokens(["1234567"])
        assert not caplog.records
        ids, mask = encoder.tokens(["1234567890"])
        encoder.tokens(["1234567890"])
    assert torch.equal(ids, fits[0]) and mask.all()
    assert len(caplog.records) == 1
    assert "has 11 tokens; the last 3 are cut, as 8 is the limit" in caplog.text


def test_embedding_is_differentiable_and_encoding_is_not(encoder: UMT5Encoder) -> None:
    model = make_model()
    trained = UMT5Encoder(model, byte_ids, text_len=TEXT_LEN)
    assert not trained.encode(PROMPTS).requires_grad
    trained.embed(*trained.tokens(PROMPTS)).sum().backward()
    assert model.shared.weight.grad is not None


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\n\tpanda  walks\u00a0", "a panda walks"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("a \u201cbig\u201d dog\u2019s day", 'a "big" dog\'s day'),
        ("小熊 — 雪", "小熊 — 雪"),
        (" \n", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_does(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned
    assert clean_prompt(cleaned) == cleaned


def test_cleaning_happens_before_encoding(encoder: UMT5Encoder) -> None:
    assert torch.equal(encoder.encode(["a  &amp;\nb"]), encoder.encode(["a & b"]))


def test_bytes_are_unambiguous_and_fit_the_vocabulary() -> None:
    ids = byte_ids("".join(map(chr, range(0x250))) + "雪🐼")
    assert min(ids[:-1]) >= 2 and max(ids) < BYTE_VOCAB_SIZE and ids[-1] == 1
    assert bytes(token - 2 for token in ids[:-1]).decode().endswith("雪🐼")


def test_the_demo_file_gives_the_encoder_back(encoder: UMT5Encoder, tmp_path: Path) -> None:
    save_text_encoder(tmp_path / "text.safetensors", encoder)
    loaded = load_text_encoder(tmp_path / "text.safetensors", **ON_CPU)
    assert (loaded.text_len, loaded.text_dim) == (TEXT_LEN, encoder.text_dim)
    assert torch.allclose(loaded.encode(PROMPTS), encoder.encode(PROMPTS), atol=1e-5)
    state = loaded.model.state_dict()
    assert all(torch.equal(weight, state[key]) for key, weight in bare_weights(encoder).items())
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    shorter = load_text_encoder(tmp_path / "text.safetensors", text_len=9, **ON_CPU)
    assert shorter.encode(["a"]).shape[1] == 9


def test_weights_take_the_asked_type(encoder: UMT5Encoder, tmp_path: Path) -> None:
    save_text_encoder(tmp_path / "text.safetensors", encoder)
    loaded = load_text_encoder(tmp_path / "text.safetensors", device="cpu", dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    embeds = loaded.encode(PROMPTS)
    assert embeds.dtype == torch.bfloat16
    assert (embeds.float() - encoder.encode(PROMPTS)).abs().mean() < 0.02


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words as tokens, saved as the release's tokenizer is: pad 0, end of sequence 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "a", "panda", "walks"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "pad_token": "<pad>", "unk_token": "<unk>"})
    )
    return folder


@pytest.fixture(scope="module")
def word_encoder(tokenizer_folder: Path) -> UMT5Encoder:
    tokenize = text._load_tokenizer(str(tokenizer_folder))
    return UMT5Encoder(make_model(), tokenize, text_len=TEXT_LEN)


def test_a_folders_tokenizer_ends_prompts_with_the_end_token(word_encoder: UMT5Encoder) -> None:
    ids, mask = word_encoder.tokens(["a panda walks", "a tiger"])
    assert ids[:, :4].tolist() == [[3, 4, 5, 1], [3, 2, 1, 0]]
    assert mask.sum(1).tolist() == [4, 3]


def save_layout(layout: str, weights: dict[str, Tensor], folder: Path) -> Path:
    if layout == "wan":
        torch.save(wan_names(weights), folder / "models_t5_umt5.pth")
        return folder / "models_t5_umt5.pth"
    extra = {"spiece_model": torch.zeros(5, dtype=torch.uint8)}
    if layout == "whole":
        extra = {"decoder.block.0.x.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}
    if layout.startswith("fp8"):
        extra["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        name = "scale_weight" if layout == "fp8" else "weight_scale"
        for key in [key for key in weights if ".DenseReluDense." in key]:
            weights[key] = (weights[key] / 0.5).to(torch.float8_e4m3fn)
            extra[key.replace(".weight", f".{name}")] = torch.tensor(0.5)
            extra[key.replace(".weight", ".comfy_quant")] = torch.zeros(3, dtype=torch.uint8)
    save_file({**weights, **extra}, str(folder / "umt5_xxl.safetensors"))
    return folder / "umt5_xxl.safetensors"


@pytest.mark.parametrize("layout", ["wan", "comfy", "whole", "fp8", "fp8 newer"])
def test_single_files_of_every_layout_give_the_same_embeddings(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path, layout: str
) -> None:
    path = save_layout(layout, bare_weights(word_encoder), tmp_path)
    loaded = load_text_encoder(path, tokenizer=tokenizer_folder, text_len=TEXT_LEN, **ON_CPU)
    expected, seen = word_encoder.encode(["a panda walks"]), loaded.encode(["a panda walks"])
    assert torch.allclose(seen, expected, atol=1e-5)


def test_block_quantised_files_are_refused(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path
) -> None:
    weights = bare_weights(word_encoder)
    stem = "encoder.block.0.layer.1.DenseReluDense.wo"
    weights[f"{stem}.weight"] = torch.zeros(16, 12, dtype=torch.uint8)
    weights[f"{stem}.weight_scale"] = torch.zeros(16, 1)
    save_file(weights, str(tmp_path / "umt5.safetensors"))
    with pytest.raises(ValueError, match="quantised in blocks"):
        load_text_encoder(tmp_path / "umt5.safetensors", tokenizer=tokenizer_folder, **ON_CPU)


def test_the_release_tokenizer_beside_a_file_is_found(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = save_layout("wan", bare_weights(word_encoder), tmp_path)
    with pytest.raises(ValueError, match="no tokenizer beside it"):
        load_text_encoder(path, **ON_CPU)
    shutil.copytree(tokenizer_folder, tmp_path / "google" / "umt5-xxl")
    loaded = load_text_encoder(path, **ON_CPU)
    assert loaded.text_len == 512
    assert torch.equal(loaded.tokens(["a panda"])[0][0, :4], torch.tensor([3, 4, 1, 0]))


@pytest.mark.parametrize("beside", [False, True])
def test_folders_are_loaded_with_the_tokenizer_in_or_beside_them(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path, beside: bool
) -> None:
    folder = tmp_path / ("text_encoder" if beside else "umt5")
    word_encoder.model.save_pretrained(folder)
    shutil.copytree(
        tokenizer_folder, tmp_path / "tokenizer" if beside else folder, dirs_exist_ok=True
    )
    loaded = load_text_encoder(folder, text_len=TEXT_LEN, **ON_CPU)
    expected = word_encoder.encode(["a panda walks"])
    assert torch.allclose(loaded.encode(["a panda walks"]), expected, atol=1e-5)


def test_folders_without_their_parts_are_refused(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "umt5"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_text_encoder(folder, **ON_CPU)
    (folder / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(ValueError, match="'clip_text_model'; Wan needs 'umt5'"):
        load_text_encoder(folder, **ON_CPU)
    word_encoder.model.save_pretrained(folder)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_text_encoder(folder, **ON_CPU)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.0.layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as encoder\.block\.1"):
        load_text_encoder(folder, tokenizer=tokenizer_folder, **ON_CPU)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"text encoder in .* cannot be read"):
        load_text_encoder(folder, tokenizer=tokenizer_folder, **ON_CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"text encoder in .* cannot be read"):
        load_text_encoder(folder, tokenizer=tokenizer_folder, **ON_CPU)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP"),
        ("model.layers.0.self_attn.q_proj.weight", "a decoder-only language model"),
        ("model.diffusion_model.patch_embedding.weight", "a diffusion transformer"),
        ("blocks.0.self_attn.q.weight", "a diffusion transformer"),
        ("decoder.conv1.weight", "a VAE"),
        ("blocks.0.attn.q.lora_A.weight", "a LoRA"),
        ("something.else", "something.else"),
    ],
)
def test_other_models_are_named_and_refused(tmp_path: Path, key: str, kind: str) -> None:
    save_file({key: torch.zeros(2, 2)}, str(tmp_path / "wrong.safetensors"))
    with pytest.raises(ValueError, match=rf"wrong\.safetensors .*{kind}, not a UMT5"):
        load_text_encoder(tmp_path / "wrong.safetensors", **ON_CPU)


def test_a_t5_that_is_no_umt5_is_refused(word_encoder: UMT5Encoder, tmp_path: Path) -> None:
    weights = bare_weights(word_encoder)
    del weights["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(weights, str(tmp_path / "t5.safetensors"))
    with pytest.raises(ValueError, match="is a T5"):
        load_text_encoder(tmp_path / "t5.safetensors", **ON_CPU)


@pytest.mark.parametrize("name", ["umt5.safetensors", "umt5.pth"])
def test_cut_off_files_are_refused(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path, name: str
) -> None:
    path = save_layout(
        "wan" if name == "umt5.pth" else "comfy", bare_weights(word_encoder), tmp_path
    )
    data = path.read_bytes()
    for length in (0, 100, len(data) // 2, len(data) - 1):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is empty|truncated|is not a checkpoint"):
            load_text_encoder(tmp_path / name, tokenizer=tokenizer_folder, **ON_CPU)


def test_files_with_missing_or_misshapen_weights_are_refused(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path
) -> None:
    key = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    path = tmp_path / "umt5.safetensors"
    for change in ({key: torch.zeros(3, 3)}, {"encoder.block.0.bias": torch.zeros(3)}):
        save_file({**bare_weights(word_encoder), **change}, str(path))
        with pytest.raises(ValueError, match="1 tensors missing, unknown"):
            load_text_encoder(path, tokenizer=tokenizer_folder, **ON_CPU)
    weights = bare_weights(word_encoder)
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(weights, str(path))
    with pytest.raises(ValueError, match="not a whole UMT5 encoder"):
        load_text_encoder(path, tokenizer=tokenizer_folder, **ON_CPU)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"shared.weight": Trap()}, tmp_path / "umt5.pth")
    with pytest.raises(ValueError, match="may run code and is not unpickled"):
        load_text_encoder(tmp_path / "umt5.pth", **ON_CPU)
    assert not (tmp_path / "ran").exists()


def test_missing_paths_are_refused_without_asking_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for name in (tmp_path / "no", "models/umt5", "no.safetensors", "a/b.pth", "../x", "~/x"):
        with pytest.raises(ValueError, match="does not exist"):
            load_text_encoder(name, **ON_CPU)


def test_an_unreachable_hub_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: object, **place: object) -> None:
        assert place["pretrained_model_name_or_path"] == "nobody/umt5"
        assert place["subfolder"] == "text_encoder"
        raise OSError("no route\nto host")

    monkeypatch.setattr(transformers.UMT5Config, "get_config_dict", fail)
    with pytest.raises(ValueError, match=r"hub gave no text encoder .*\(no route\); check"):
        load_text_encoder("nobody/umt5/text_encoder", **ON_CPU)


def test_a_tokenizer_of_another_model_is_refused(
    word_encoder: UMT5Encoder, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="use its own tokenizer"):
        UMT5Encoder(word_encoder.model, lambda _: [3, 4], text_len=TEXT_LEN)
    with pytest.raises(ValueError, match="vocabulary of 258"):
        UMT5Encoder(word_encoder.model, lambda _: [258, 1], text_len=TEXT_LEN)
    with pytest.raises(ValueError, match="read bytes"):
        save_text_encoder(tmp_path / "text.safetensors", word_encoder)


def test_a_demo_file_takes_no_tokenizer(encoder: UMT5Encoder, tmp_path: Path) -> None:
    save_text_encoder(tmp_path / "text.safetensors", encoder)
    with pytest.raises(ValueError, match="'bytes', which takes none"):
        load_text_encoder(tmp_path / "text.safetensors", tokenizer="google/umt5-xxl", **ON_CPU)


class CountingEncoder:
    """Counts what it is asked for, and how many of it are alive."""

    alive = 0

    def __init__(self) -> None:
        type(self).alive += 1
        self.seen: list[str] = []

    def __del__(self) -> None:
        type(self).alive -= 1

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.seen += prompts
        return torch.tensor([[[float(len(prompt))]] for prompt in prompts])


@pytest.mark.slow
def test_the_cache_encodes_each_prompt_once_and_frees_the_encoder() -> None:
    made = []

    def factory() -> CountingEncoder:
        made.append(1)
        return CountingEncoder()

    cache = PromptCache(factory)
    assert not made
    assert [cache.get(prompt).item() for prompt in ("a", "bb", "a")] == [1, 2, 1]
    assert cache._encoder is not None and cache._encoder.seen == ["a", "bb"]
    cache.release()
    assert CountingEncoder.alive == 0
    assert cache.get("bb").item() == 2 and len(made) == 1
    assert cache.get("ccc").item() == 3 and len(made) == 2
    cache.release()


def test_encoding_a_list_up_front_leaves_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(CountingEncoder.alive))
    embeds = encode_prompts(["a", "bb", "a"], CountingEncoder)
    assert {prompt: one.shape for prompt, one in embeds.items()} == {
        "a": (1, 1, 1),
        "bb": (1, 1, 1),
    }
    assert freed == [0]


def test_a_failing_encoder_is_freed_too() -> None:
    class Failing(CountingEncoder):
        alive = 0

        def encode(self, prompts: Sequence[str]) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError) as caught:
        encode_prompts(["a"], Failing)
    del caught
    assert Failing.alive == 0


def test_importing_text_does_not_import_transformers() -> None:
    tree = ast.parse(Path(text.__file__).read_text())
    roots = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "torch" in roots
    assert not {"transformers", "tokenizers", "safetensors"} & {r.split(".")[0] for r in roots}
