"""Files that version 0.1 saved open today, and what is made of them is the same.

`data/saved` was written once, by commit 5e0e75c on a CPU, and is never written again:

- `student.safetensors`: `write_checkpoint` of `tiny.model()` in bfloat16, with `tiny.window(9, 3)`
  and `tiny.TWO_STEPS`. Every other file was made with it, in float32, at 32x48.
- `exact`, `compact` and `int8.safetensors`: `Stream.snapshot` after five chunks of seed 7, in the
  middle of a blend of three chunks and with a decay that is still due; the last of a cache that
  keeps 8-bit numbers.
- `session.jsonl`: the log of a live session with a change of prompt, of a LoRA's strength and of
  the decay, a cut, and three branches.
- `expected.safetensors`: each stream's next chunk, the session's chunks in the order they were made
  in, and the embeddings of its prompts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from rf_core.live import digest_of, read_log, replay_log
from rf_core.model import WanModel
from rf_core.state import Snapshot
from rf_core.stream import Stream
from rf_core.weights.checkpoint import load_student

SAVED = Path(__file__).parent / "data" / "saved"
CLOSE = {"rtol": 0, "atol": 1e-5}


def student() -> WanModel:
    path = SAVED / "student.safetensors"
    return load_student(path, device="cpu", dtype=torch.float32)[0]


def expected(prefix: str) -> dict[str, Tensor]:
    """Of `expected.safetensors`, the tensors of a name, by the rest of it."""
    tensors = load_file(SAVED / "expected.safetensors")
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def test_a_saved_student_has_its_sizes_its_settings_and_where_it_came_from() -> None:
    path = SAVED / "student.safetensors"
    model, checkpoint = load_student(path, device="cpu", dtype=torch.float32)
    assert checkpoint.config == tiny.CONFIG
    assert checkpoint.cache == tiny.window(9, 3)
    assert checkpoint.sampler == tiny.TWO_STEPS
    assert checkpoint.size == (32, 48)
    assert checkpoint.provenance == {"step": 600}
    assert model.fingerprint() == "b48e861b8dbd82b1"


@pytest.mark.parametrize("name", ["exact", "compact", "int8"])
def test_a_saved_snapshot_goes_on_with_the_chunk_that_followed_it(name: str) -> None:
    snapshot = Snapshot.load(SAVED / f"{name}.safetensors")
    assert snapshot.compact == (name == "compact")
    stream = Stream.from_snapshot(student(), snapshot)
    torch.testing.assert_close(stream.generate(), expected(name)[".next"], **CLOSE)
    assert stream.state.num_chunks == 6


def test_a_saved_log_makes_the_chunks_that_its_marks_name() -> None:
    """The marks are held against the saved chunks: another CPU rounds, and its own marks differ."""
    log = read_log(SAVED / "session.jsonl")
    prompts, chunks = expected("prompt."), expected("session.")
    were = [chunks[str(number)] for number in range(len(chunks))]
    assert [digest_of(latents) for latents in were] == log.digests

    stream = tiny.stream(
        model=student(), cache=tiny.window(9, 3), prompt_embeds=prompts[log.header.prompt]
    )
    weight = stream.model.blocks[0].ffn[0].weight
    before = weight.clone()
    made: list[tuple[str, int, Tensor]] = []
    replay_log(
        log,
        stream,
        lambda text: prompts[text],
        set_lora=lambda name, strength: weight.copy_(before * (1 + strength)),
        on_chunk=lambda branch, chunk, latents: made.append((branch.name, chunk, latents)),
        exact=False,
    )
    assert [(branch, chunk) for branch, chunk, _ in made] == [
        ("main", 0),
        ("main", 1),
        ("main", 2),
        ("branch-2", 1),
        ("b", 2),
    ]
    for (_, _, latents), was in zip(made, were, strict=True):
        torch.testing.assert_close(latents, was, **CLOSE)
