"""A trainer's checkpoint from somebody else: it is data, and whatever it says is checked."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import damage
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as classes

from training.run.checkpointing import load, read_part, save

CLASSES = "torch.distributed.checkpoint.metadata"


def state_of(seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    weights = {
        "a.weight": torch.randn(6, 4, generator=draw),
        "a.bias": torch.randn(6, generator=draw).bfloat16(),
        "scale": torch.randn((), generator=draw),
        "empty": torch.ones(0, 3),
    }
    return {"average": weights, "update": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(state_of(), tmp_path / "update_000003")
    return tmp_path / "update_000003"


def refused(folder: Path) -> str:
    """What both readers say: one sentence that names the folder."""
    said = []
    for read in (lambda: read_part(folder, "average"), lambda: load(state_of(1), folder)):
        with pytest.raises(ValueError) as caught:
            read()
        said.append(str(caught.value))
    assert said[0] == said[1] and said[0].startswith(str(folder)) and "\n" not in said[0]
    assert len(said[0]) < 500
    return said[0]


def test_what_was_saved_is_read_whole_and_gone_on_from(folder):
    read, state = read_part(folder, "average"), state_of(1)
    load(state, folder)
    for found in (read, state["average"]):
        for name, tensor in state_of()["average"].items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert state["update"] == 3


# Pickles


def name(module: str, of: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, of)) + b"\x93"


def made_of(of: object) -> bytes:
    held = io.BytesIO()
    plain = pickle.Pickler(held, protocol=3)
    plain.fast = True  # without a memo
    plain.dump(of)
    return held.getvalue()[2:-1]


def called(function: bytes, *arguments: object) -> bytes:
    return b"\x80\x04" + function + made_of(arguments) + b"R."


def through_dataclass(marker: Path) -> bytes:
    """`dataclass` executes source that it writes from a class's annotations; names hold code."""
    code = f"x=open({str(marker)!r}, 'w'), *y"
    quiet = made_of(None) + made_of({"init": False, "repr": False}) + b"\x86b"
    field = name(CLASSES, "field") + b")R" + quiet
    state = (
        b"N}("
        + made_of("__annotations__")
        + made_of({code: None})
        + made_of(code)
        + field
        + b"u\x86"
    )
    return (
        b"\x80\x04"
        + name(CLASSES, "StorageMeta")
        + state
        + b"b"
        + (b"\x94" + name(CLASSES, "dataclass") + b"h\0\x85R.")
    )


METADATA = name(CLASSES, "Metadata")
PICKLES = {
    "dataclass": (through_dataclass, "field"),
    "system": (lambda m: called(name("posix", "system"), f"touch {m}"), "posix.system"),
    "eval": (lambda m: called(name("builtins", "eval"), f"open({str(m)!r}, 'w')"), "builtins.eval"),
    "touch": (lambda m: called(name("pathlib", "Path.touch"), str(m)), "pathlib.Path.touch"),
    "load": (lambda m: called(name("torch", "load"), str(m)), "torch.load"),
    "dotted": (
        lambda m: called(name(CLASSES, "_MEM_FORMAT_ENCODING.__class__.__call__"), "x", {}),
        "_MEM_FORMAT_ENCODING.__class__.__call__",
    ),
    "old names": (lambda m: b"cos\nsystem\n(X" + struct.pack("<I", 4) + b"truetR.", "0x63"),
    "extensions": (lambda m: b"\x80\x04\x82\x01.", "0x82"),
    "a class's attribute": (
        lambda m: b"\x80\x04" + METADATA + made_of((None, {"__init__": 1})) + b"b.",
        "can have none",
    ),
    "a module's name": (lambda m: called(b")]\x93", 1), "no class"),
    "memory": (lambda m: b"\x80\x04Kar" + struct.pack("<I", 2**31) + b".", "0x72"),
    "endless hashes": (
        lambda m: b"\x80\x04})" + b"\x94h\0\x86" + b"".join(
            b"\x94h" + bytes([i]) + b"\x86" for i in range(1, 60)
        ) + b"Ns.",
        "keys that are no names",
    ),
    "nothing": (lambda m: b"", "cut short"),
    "a stop": (lambda m: b".", "cut short"),
    "a list": (lambda m: pickle.dumps([]), "no Metadata"),
    "None": (lambda m: pickle.dumps(None), "no Metadata"),
    "random": (lambda m: os.urandom(400), "its index"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "why"), PICKLES.values(), ids=PICKLES)
def test_an_index_that_would_run_code_or_is_none_is_refused_and_not_run(
    folder, tmp_path, make, why
):
    marker, before = tmp_path / "sprung", dict(vars(classes.StorageMeta))
    (folder / ".metadata").write_bytes(make(marker))
    assert why in refused(folder)
    assert not marker.exists() and dict(vars(classes.StorageMeta)) == before


class _Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_an_object_in_a_tensor_s_place_is_not_unpickled(tmp_path):
    state = state_of()
    state["update"] = _Trap(tmp_path / "sprung")
    dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    assert "BytesStorageMetadata, which is refused" in refused(tmp_path / "a")
    assert not (tmp_path / "sprung").exists()


def test_an_object_among_the_data_is_not_unpickled(folder, tmp_path):
    held = io.BytesIO()
    torch.save(_Trap(tmp_path / "sprung"), held)
    index = index_of(folder)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    for key, place in index.storage_data.items():
        index.storage_data[key] = replace(place, offset=len(data), length=len(held.getvalue()))
    (folder / "__0_0.distcp").write_bytes(data + held.getvalue() * 5)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="may run code and is not unpickled"):
        read_part(folder, "average")
    with pytest.raises(ValueError, match="may run code and is not unpickled"):
        load(state_of(), folder)
    assert not (tmp_path / "sprung").exists()


# Indexes that lie


def index_of(folder: Path) -> classes.Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


WEIGHT = "average.a.weight"


def sized(*size: int):
    def change(index: classes.Metadata) -> None:
        entry = index.state_dict_metadata[WEIGHT]
        entry.size = torch.Size(size)
        entry.chunks = [replace(entry.chunks[0], sizes=torch.Size(size))]

    return change


def placed(**fields: object):
    def change(index: classes.Metadata) -> None:
        for key, place in index.storage_data.items():
            if key.fqn == WEIGHT:
                index.storage_data[key] = replace(place, **fields)

    return change


def chunked(*chunks: tuple[tuple[int, ...], tuple[int, ...]]):
    def change(index: classes.Metadata) -> None:
        parts = [classes.ChunkStorageMetadata(*map(torch.Size, each)) for each in chunks]
        index.state_dict_metadata[WEIGHT].chunks = parts
        place = next(p for key, p in index.storage_data.items() if key.fqn == WEIGHT)
        for offsets, _ in chunks:
            index.storage_data[classes.MetadataIndex(WEIGHT, offsets)] = place

    return change


def entries_of_one(index: classes.Metadata) -> None:
    entry = index.state_dict_metadata[WEIGHT]
    index.state_dict_metadata |= {f"average.{n}": entry for n in range(5000)}


def parts_of_one(index: classes.Metadata) -> None:
    place = next(p for key, p in index.storage_data.items() if key.fqn == WEIGHT)
    for n in range(5000):
        index.state_dict_metadata[f"average.{n}"] = index.state_dict_metadata[WEIGHT]
        index.storage_data[classes.MetadataIndex(f"average.{n}", (0, 0))] = place


def of(**fields: object):
    def change(index: classes.Metadata) -> None:
        for field, new in fields.items():
            setattr(index.state_dict_metadata[WEIGHT], field, new)

    return change


LIES = {
    "a terabyte": (sized(10**12, 4), "promises more of"),
    "beyond any memory": (sized(2**40, 2**40), "a size or place that is none"),
    "less than nothing": (sized(-6, 4), "a size or place that is none"),
    "many axes": (sized(*[1] * 5000), "a size or place that is none"),
    "a folder above": (placed(relative_path="../__0_0.distcp"), "outside its folder"),
    "another folder": (placed(relative_path="/etc/hostname"), "outside its folder"),
    "the folder itself": (placed(relative_path=".."), "is missing"),
    "a name of no file": (placed(relative_path="other.distcp"), "is missing"),
    "no name": (placed(relative_path=7), "a name that is none"),
    "beyond its end": (placed(offset=10**7), "is cut short"),
    "before its begin": (placed(offset=-1), "a size or place that is none"),
    "a part": (placed(length=8), "promises more of"),
    "a form of its own": (placed(transform_descriptors=["zstd"]), "does not write"),
    "no parts": (chunked(), "with parts missing"),
    "a gap": (chunked(((0, 0), (2, 4)), ((4, 0), (2, 4))), "with parts missing"),
    "an overlap": (chunked(((0, 0), (4, 4)), ((2, 0), (4, 4))), "with parts missing"),
    "half the columns": (chunked(((0, 0), (3, 4)), ((3, 0), (3, 2))), "with parts missing"),
    "two axes": (chunked(((0, 0), (6, 2)), ((3, 2), (3, 2))), "with parts missing"),
    "another's axes": (chunked(((0,), (24,))), "with parts missing"),
    "one for all": (entries_of_one, "more parts than it has places"),
    "one place for all": (parts_of_one, "promises more than its files hold"),
    "parts of no list": (of(chunks=7), "without parts"),
    "no size": (of(size=[6, 4]), "a size or place that is none"),
    "no properties": (of(properties=None), "of no dtype"),
    "no entries": (lambda index: setattr(index, "state_dict_metadata", []), "no entries by name"),
    "no places": (lambda index: setattr(index, "storage_data", None), "no entries by name"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "why"), LIES.values(), ids=LIES)
def test_an_index_that_lies_is_refused_before_anything_is_allocated(folder, change, why):
    index = index_of(folder)
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    tracemalloc.start()
    try:
        assert why in refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_file_that_is_a_link_is_not_followed(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "__0_0.distcp", elsewhere)
    (folder / "__0_0.distcp").symlink_to(elsewhere)
    assert "__0_0.distcp is missing" in refused(folder)


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.T.contiguous()])
def test_a_chunk_that_is_another_tensor_is_refused(folder, change):
    held = io.BytesIO()
    torch.save(change(state_of()["average"]["a.weight"]), held)
    index, file = index_of(folder), folder / "__0_0.distcp"
    placed(offset=file.stat().st_size, length=len(held.getvalue()))(index)
    file.write_bytes(file.read_bytes() + held.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    for read in (lambda: read_part(folder, "average"), lambda: load(state_of(), folder)):
        with pytest.raises(ValueError, match=r"holds another tensor than average\.a\.weight"):
            read()


def test_another_run_s_checkpoint_is_refused_in_a_sentence(folder):
    for change in ({"more": torch.ones(3)}, {"average": {"a.weight": torch.ones(7, 4)}}):
        with pytest.raises(ValueError, match="cannot be resumed from") as caught:
            load(state_of() | change, folder)
        assert "\n" not in str(caught.value)


def test_damaged_checkpoints_end_in_a_sentence(folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def read(path: Path) -> None:
        read_part(folder, "average")
        load(state_of(), folder)

    damage.fuzz("checkpoints of a run", files, read, folder)
