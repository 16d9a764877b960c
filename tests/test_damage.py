"""Damaged and hostile files: every reader ends in one sentence, whatever a file holds."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import damage
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from rf_core import video
from rf_core.config import CacheConfig, ModelConfig, SamplerConfig
from rf_core.decoders.decoder import load_decoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.decoders.vae_files import vae_metadata
from rf_core.model import WanModel
from rf_core.state import Snapshot
from rf_core.text import UMT5Encoder, byte_ids, load_text_encoder, save_text_encoder
from rf_core.video import VideoFormat, VideoWriter, read_images, to_uint8
from rf_core.weights.checkpoint import describe, load_student, write_checkpoint
from rf_core.weights.files import CheckpointError, read_weights
from rf_core.weights.lora import Lora, apply_loras

MODEL = ModelConfig(
    dim=16, ffn_dim=8, freq_dim=8, text_dim=12, text_len=7, in_dim=4, out_dim=4, num_heads=2,
    num_layers=2,
)  # fmt: skip


def weights_of(config: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = WanModel(config, device="meta").state_dict()
    return {key: torch.randn(t.shape, generator=generator) for key, t in state.items()}


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message


# safetensors' headers


def write_header(path: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": GOOD | {"shape": [3]}}, "'?a'? of shape \\[3\\] in F32 has 8 bytes"),
        ({"a": GOOD | {"dtype": "F64"}}, "in F64 has 8 bytes"),
        ({"a": GOOD | {"dtype": "F7"}}, "a kind that is not known here, F7"),
        ({"a": GOOD | {"dtype": 7}}, "no description of a tensor"),
        ({"a": GOOD | {"shape": 2}}, "no description of a tensor"),
        ({"a": GOOD | {"shape": [2.0]}}, "a shape or place that is none"),
        ({"a": GOOD | {"shape": [True, 2]}}, "a shape or place that is none"),
        ({"a": GOOD | {"shape": [-2, -1]}}, "a shape or place that is none"),
        ({"a": GOOD | {"shape": [10**12]}}, "has 8 bytes"),
        ({"a": GOOD | {"shape": [0, 10**30], "data_offsets": [0, 0]}}, "beyond any memory"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, "has -8 bytes"),
        ({"a": GOOD | {"data_offsets": [-8, 0]}}, "a shape or place that is none"),
        ({"a": GOOD | {"data_offsets": 8}}, "no description of a tensor"),
        ({"a": GOOD | {"data_offsets": [0, 8, 8]}}, "no description of a tensor"),
        ({"a": GOOD | {"data_offsets": ["0", "8"]}}, "a shape or place that is none"),
        ({"a": GOOD, "b": GOOD}, "overlap or leave gaps"),
        ({"a": GOOD | {"shape": [1], "data_offsets": [4, 8]}}, "overlap or leave gaps"),
        ({"a": 1}, "no description of a tensor"),
        ({"a": GOOD, "__metadata__": {"a": 1}}, "its metadata a is no text"),
        ({"a": GOOD, "__metadata__": []}, "its metadata is no object"),
        (b'{"a":1,"a":2}', "names something twice"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"a"', "Expecting"),
        (b'{"\xff":1}', "decode"),
        (b'{"a":' + b"1" * 5000 + b"}", "."),
    ],
)
def test_a_header_that_cannot_be_believed_is_refused_with_its_fault(tmp_path, header, why):
    path = write_header(tmp_path / "wan.safetensors", header)
    message = error_of(path)
    assert "has a damaged safetensors header" in message
    assert re.search(why, message), message


def test_a_terabyte_promised_in_a_kilobyte_is_refused_before_it_is_allocated(tmp_path):
    entry = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    assert "promises 4,000,000,000" in error_of(write_header(tmp_path / "a.sft", {"a": entry}))
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 2**31) + b"{}" + b" " * 8)
    assert "truncated within its header" in error_of(path)


def test_an_unaligned_header_and_empty_tensors_read(tmp_path):
    entries = {"e": GOOD | {"shape": [0, 3], "data_offsets": [0, 0]}, "a": GOOD}
    for spaces in range(8):
        text = json.dumps(entries).encode() + b" " * spaces
        found = read_weights(
            write_header(tmp_path / "a.safetensors", text, struct.pack("<2f", 3, 4))
        )
        assert found.tensors["a"].tolist() == [3, 4]
        assert found.tensors["e"].shape == (0, 3)


# Containers under other names


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_first_bytes_decide_what_a_file_is(tmp_path, suffix, kind):
    path = tmp_path / f"wan{suffix}"
    if kind == "safetensors":
        save_file(weights_of(), path)
    else:
        torch.save(weights_of(), path, _use_new_zipfile_serialization=kind == "zip")
    student, found = load_student(path, device="cpu", dtype=torch.float32, num_heads=2)
    assert found.container == ("safetensors" if kind == "safetensors" else "torch file")
    assert torch.equal(student.state_dict()["head.head.bias"], weights_of()["head.head.bias"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF\3\0\0\0" + b"\0" * 64, "a GGUF file, whose quantised weights are not supported"),
        (b"\n<!doctype html><html>", "a web page"),
        (b'<?xml version="1.0"?><Error>', "a web page"),
        (b"GIF89a" + b"\0" * 64, "a GIF image"),
        (b"\x1f\x8b\x08" + b"\0" * 64, "a gzip archive"),
        (b"Entry not found", "it begins with b'Entry no'"),
        (pickle.dumps([1, 2]), "a Python pickle"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_every_reader_names_what_is_no_checkpoint(tmp_path, content, said, name):
    path = tmp_path / name
    path.write_bytes(content)
    cpu = {"device": "cpu", "dtype": torch.float32}
    readers: list[Callable[[], object]] = [
        lambda: load_student(path, **cpu),
        lambda: load_decoder(path),
        lambda: apply_loras({}, [Lora(path=path)]),
        lambda: Snapshot.load(path),
        lambda: load_text_encoder(path, **cpu),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=re.escape(said)):
            read()


# torch files


class _Named:
    """A pickle of any names: what it is made of is called `module.name`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def endless() -> dict:
    tree: dict = {}
    tree["a"] = tree
    return tree


def bomb() -> dict:
    tree: dict = {"a": 1}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    return tree


ODD_TREES = {
    "a tensor": (lambda: torch.ones(3), "holds a Tensor where weights by name are needed"),
    "a list": (lambda: [torch.ones(3)], "holds a list where weights by name are needed"),
    "a number": (lambda: 7, "holds a int where weights by name are needed"),
    "no tensor": (lambda: {"a": 1, "b": [torch.ones(1)]}, "holds no tensors"),
    "a name twice": (lambda: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "a.b twice"),
    "itself": (endless, "without end"),
    "a bomb": (bomb, "without end"),
    "meta": (lambda: {"a": torch.ones(3, device="meta")}, "without its numbers"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "sparse"),
    "csr": (lambda: {"a": torch.eye(3).to_sparse_csr()}, "sparse"),
    "quantised": (
        lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        "quantised form",
    ),
    "expanded": (lambda: {"a": torch.ones(1).expand(10**12)}, "with fewer numbers than that"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("make", "said"), ODD_TREES.values(), ids=ODD_TREES)
def test_a_torch_file_of_something_else_is_refused(tmp_path, make, said, zipped):
    torch.save(make(), tmp_path / "wan.pt", _use_new_zipfile_serialization=zipped)
    assert said in error_of(tmp_path / "wan.pt")


def test_keys_that_are_no_text_and_values_that_are_no_tensors_are_taken_as_they_come(tmp_path):
    tree = {1: torch.ones(2), b"b": {None: torch.ones(3)}, "c": None, None: None, "d": [1], "e": {}}
    torch.save(tree, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt").tensors
    assert {key: len(tensor) for key, tensor in found.items()} == {"1": 2, "b'b'.None": 3}


def test_views_of_one_storage_and_other_strides_read(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"a": whole, "t": whole.T, "row": whole[1:2]}, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt").tensors
    assert torch.equal(found["t"], whole.T) and found["row"].tolist() == [[4, 5, 6, 7]]


def rezipped(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_a_storage_smaller_than_its_tensors_is_refused(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")

    def cut(files: dict[str, bytes]) -> None:
        name = next(name for name in files if name.endswith("data/0"))
        files[name] = files[name][:100]

    rezipped(tmp_path / "a.pt", cut)
    assert "truncated or not a torch checkpoint" in error_of(tmp_path / "a.pt")


def test_a_zip_archive_of_something_else_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "is a zip archive and no torch file" in error_of(tmp_path / "a.pt")


def test_a_program_is_named_and_not_run(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    assert "is a TorchScript program" in error_of(tmp_path / "a.pt")


NUMPY = {
    "loss": np.float64(0.5),
    "step": np.int64(3),
    "flag": np.bool_(True),
    "kind": np.dtype("float32"),
    "type": np.float32,
    "array": np.arange(3),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"], ids=["numpy 1", "numpy 2"])
def test_numpys_numbers_beside_the_weights_are_no_obstacle(tmp_path, core, zipped, monkeypatch):
    path = tmp_path / "a.pt"

    class Renamed(pickle._Pickler):
        def save_global(self, obj, name=None):
            module = getattr(obj, "__module__", "") or ""
            if module.startswith(("numpy.core", "numpy._core")):
                rest = module.encode().split(b"core", 1)[1]
                name = (name or obj.__qualname__).encode()
                self.write(b"c" + core + rest + b"\n" + name + b"\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    monkeypatch.setattr(pickle, "Pickler", Renamed)
    torch.save({"model": weights_of(), **NUMPY}, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert core + b".multiarray" in path.read_bytes()
    before = set(torch.serialization.get_safe_globals())
    assert read_weights(path).tensors.keys() == {f"model.{key}" for key in weights_of()}
    assert set(torch.serialization.get_safe_globals()) == before  # nothing stays allowed


@pytest.mark.parametrize(
    "trap",
    [
        lambda path: _Named(os.mkdir, str(path)),
        lambda path: _Named(eval, f"__import__('os').mkdir({str(path)!r})"),
        lambda path: _Named(np.fromfile, str(path)),
        lambda path: _Named(np.load, str(path)),
        lambda path: OrderedDict(a=_Named(Path.touch, path)),
    ],
)
def test_what_could_run_code_is_named_and_not_run(tmp_path, trap):
    torch.save({"model": weights_of(), "x": trap(tmp_path / "sprung")}, tmp_path / "a.pt")
    assert "which may run code and is not unpickled" in error_of(tmp_path / "a.pt")
    assert not (tmp_path / "sprung").exists()


# One reader


ALLOWED = {
    "rf_core/weights/containers.py",  # the reader
}


COPIES = {"training/world/stages.py": 1}  # whole demo files, into a folder of its own


def test_tensors_are_read_in_one_place():
    root = Path(__file__).parents[1]
    reads = re.compile(r"\b(?:torch\.load|safe_open|load_file|torch\.jit\.load|pickle\.load)\b")
    found = {
        str(path.relative_to(root))
        for folder in ("rf_core", "training", "nodes")
        for path in (root / folder).rglob("*.py")
        if reads.search(path.read_text(encoding="utf-8"))
    }
    assert found <= ALLOWED, found - ALLOWED


def test_files_are_written_in_one_way():
    root = Path(__file__).parents[1]
    write = re.compile(r"\.write_(?:text|bytes)\(|save_file\(")
    for folder in ("rf_core", "training", "nodes"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            others = len(write.findall(text)) - text.count("with whole_file(")
            name = str(path.relative_to(root))
            assert others <= COPIES.get(name, 0), f"{name} writes files past rf_core.writing"


# Damage at random


def files_of(
    folder: Path, tensors: dict, metadata: dict[str, str] | None = None
) -> dict[str, bytes]:
    save_file(tensors, folder / "a.safetensors", metadata=metadata)
    torch.save({"model": tensors, "step": 3, "loss": np.float64(1)}, folder / "a.pt")
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.slow
def test_damaged_students_end_in_a_sentence(tmp_path):
    files = files_of(tmp_path, weights_of())
    write_checkpoint(
        tmp_path / "own.safetensors", weights_of(), MODEL, CacheConfig(), SamplerConfig(),
        size=(32, 48), provenance={"step": 600},
    )  # fmt: skip
    files["own.safetensors"] = (tmp_path / "own.safetensors").read_bytes()

    def read(path: Path) -> object:
        heads = None if path.name.startswith("own") else 2
        student, found = load_student(path, device="cpu", dtype=torch.float32, num_heads=heads)
        return student, describe(found)

    damage.fuzz("students", files, read, tmp_path)


def test_damaged_sidecars_and_indexes_end_in_a_sentence(tmp_path):
    names = sorted(weights := weights_of())
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), 1):
        save_file(
            {key: weights[key] for key in part},
            tmp_path / f"model-0000{number}-of-00002.safetensors",
        )
    where = {key: f"model-0000{1 + (key in names[half:])}-of-00002.safetensors" for key in names}
    index = {"metadata": {"total_size": 8}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 7, "eps": 1e-6}))
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    damage.fuzz(
        "sidecars",
        files,
        lambda _: load_student(tmp_path, device="cpu", dtype=torch.float32),
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "taehv"])
def test_damaged_decoders_end_in_a_sentence(tmp_path, kind):
    torch.manual_seed(0)
    config = VAEConfig(dim=2, num_res_blocks=1)
    codec = WanVAE(config)
    if kind == "taehv":
        codec = TAEHV(TAEHVConfig(decoder_widths=(2, 2, 2, 2), encoder_width=2))
    metadata = vae_metadata(config) if kind == "vae" else None
    damage.fuzz(kind, files_of(tmp_path, codec.state_dict(), metadata), load_decoder, tmp_path)


def test_damaged_loras_end_in_a_sentence(tmp_path):
    base = weights_of()
    adapter = {}
    for key in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        out, into = base[f"{key}.weight"].shape
        adapter |= {
            f"diffusion_model.{key}.lora_A.weight": torch.randn(2, into),
            f"diffusion_model.{key}.lora_B.weight": torch.randn(out, 2),
            f"diffusion_model.{key}.alpha": torch.tensor(2.0),
        }
    alphas = json.dumps({"lora_alpha": 4, "r": 2, "alpha_pattern": {"self_attn.q": 8}})
    files = files_of(tmp_path, adapter, {"lora_adapter_metadata": alphas, "ss_network_alpha": "4"})
    damage.fuzz("loras", files, lambda path: apply_loras(base, [Lora(path=path)]), tmp_path)


@pytest.mark.parametrize("compact", [True, False])
def test_damaged_snapshots_end_in_a_sentence(tmp_path, compact):
    stream = tiny.stream()
    stream.step()
    stream.snapshot(compact=compact).save(tmp_path / "a.safetensors")
    files = {"a.safetensors": (tmp_path / "a.safetensors").read_bytes()}
    name = "compact snapshots" if compact else "exact snapshots"
    damage.fuzz(name, files, lambda path: stream.fork().restore(Snapshot.load(path)), tmp_path)


def save_encoder(path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=258, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    encoder = UMT5Encoder(UMT5EncoderModel(config), byte_ids, text_len=8)
    save_text_encoder(path, encoder)


def test_damaged_text_encoders_end_in_a_sentence(tmp_path):
    save_encoder(tmp_path / "a.safetensors")
    files = {"a.safetensors": (tmp_path / "a.safetensors").read_bytes()}
    cpu = {"device": "cpu", "dtype": torch.float32}
    damage.fuzz("encoders", files, lambda path: load_text_encoder(path, **cpu), tmp_path)


# Pictures to start from


def write_png(path: Path, width: int, height: int) -> Path:
    """A picture of that size in some hundred bytes: all rows but the first few are missing."""

    def part(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = part(b"IDAT", zlib.compress(bytes(60_000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + rows + part(b"IEND", b""))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (100_000, 100_000, "cannot be decoded"),  # FFmpeg's own bound
        (12_000, 12_000, "is 12000x12000; a picture that is read has at most 67,108,864 pixels"),
        (16_000, 1, "too narrow to cover 832x480"),
    ],
)
def test_a_picture_that_promises_more_than_it_is_worth_is_refused(tmp_path, width, height, said):
    path = write_png(tmp_path / "a.png", width, height)
    assert path.stat().st_size < 1000
    with pytest.raises(ValueError, match=said) as caught:
        read_images(path, width=832, height=480)
    assert "\n" not in str(caught.value)


def test_large_images_of_a_clip_are_scaled_as_they_come(tmp_path, monkeypatch):
    pictures = torch.rand(1, 5, 3, 32, 48)
    with VideoWriter(tmp_path / "a.mp4", VideoFormat(width=48, height=32)) as writer:
        writer.write(to_uint8(pictures)[0])
    size = {"width": 24, "height": 16, "num_images": 2}
    first, last = (read_images(tmp_path / "a.mp4", **size, last=last) for last in (False, True))
    monkeypatch.setattr(video, "LARGEST_PICTURE", 4 * 32 * 48 - 1)
    assert torch.equal(read_images(tmp_path / "a.mp4", **size), first)
    assert torch.equal(read_images(tmp_path / "a.mp4", **size, last=True), last)
    assert not torch.equal(first, last)


# Sizes


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        *((ModelConfig, each, 10**9) for each in ("dim", "ffn_dim", "num_layers", "text_len")),
        *((ModelConfig, each, value) for each in ("num_heads", "in_dim") for value in (-1, "4")),
        (ModelConfig, "eps", float("nan")),
        (CacheConfig, "window_frames", 10**9),
        (CacheConfig, "window_frames", 9.5),
        (CacheConfig, "sink_frames", True),
        (SamplerConfig, "steps", tuple(1000 - i / 10 for i in range(2000))),
        (SamplerConfig, "shift", 1e30),
    ],
)
def test_sizes_of_no_network_are_refused_by_name(config, field, value):
    with pytest.raises(ValueError, match=r"give|steps"):
        config(**{field: value})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": {"window_frames": 10**9}}, "window_frames is 1000000000; give a number from 1"),
        ({"model": {"text_len": 10**9, "num_heads": 2}}, "text_len is 1000000000"),
        ({"sampler": {"steps": [1000], "shift": 10**9}}, "shift is 1000000000"),
        ({"size": [10**9, 64]}, "unusable size"),
    ],
)
def test_a_checkpoint_of_absurd_settings_is_refused_in_a_sentence(tmp_path, settings, said):
    metadata = {"reward_forcing": json.dumps({"model": {"num_heads": 2}} | settings)}
    save_file(weights_of(), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=said):
        load_student(tmp_path / "a.safetensors", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"text_len": 10**9}, "text_len is 1000000000; give a number from 1 to 4096"),
        ({"umt5": {"num_layers": 10**9}}, "1000000000 layers of"),
    ],
)
def test_a_text_encoder_of_absurd_sizes_is_refused_before_it_is_made(tmp_path, about, said):
    path = tmp_path / "a.safetensors"
    save_encoder(path)
    file = read_weights(path)
    recorded = json.loads(file.metadata["rf_text"])
    recorded |= about | {"umt5": recorded["umt5"] | about.get("umt5", {})}
    save_file(file.tensors, tmp_path / "b.safetensors", metadata={"rf_text": json.dumps(recorded)})
    with pytest.raises(ValueError, match=said):
        load_text_encoder(tmp_path / "b.safetensors", device="cpu", dtype=torch.float32)


def test_a_block_of_an_absurd_number_is_no_reason_to_make_as_many(tmp_path):
    save_encoder(tmp_path / "a.safetensors")
    tensors = read_weights(tmp_path / "a.safetensors").tensors
    tensors["encoder.block.999999999.layer.0.layer_norm.weight"] = torch.ones(8)
    tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "b.safetensors")
    cpu = {"device": "cpu", "dtype": torch.float32, "tokenizer": tmp_path}
    with pytest.raises(ValueError):  # in a moment
        load_text_encoder(tmp_path / "b.safetensors", **cpu)


# Memory that is promised


def test_a_compressed_torch_file_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))
    assert (tmp_path / "a.pt").stat().st_size < 200_000
    assert "is compressed" in error_of(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("trap", "said"),
    [
        (lambda: _Named(bytearray, 10**11), "holds a Python object \\(bytearray\\)"),
        (lambda: _Named(torch.FloatTensor, 10**6, 1000), "where the file has|not a torch"),
    ],
)
def test_memory_that_no_byte_of_a_torch_file_fills_is_refused(tmp_path, trap, said, zipped):
    torch.save({"a": trap()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "a.pt").stat().st_size < 2000
    assert re.search(said, error_of(tmp_path / "a.pt"))
