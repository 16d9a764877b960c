from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from test_generate import images_of
from torch import Tensor

from rf_core.__main__ import main
from rf_core.config import WAN_1_3B, CacheConfig, Grid
from rf_core.fast.parallel import (
    Process,
    SequenceParallelModel,
    SequenceParallelStream,
    Split,
    any_process,
)
from rf_core.state import Snapshot
from rf_core.stream import Stream

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONFIG = replace(tiny.CONFIG, num_heads=6)
GRID = Grid(height=2, width=3)  # a 32x48 picture's: two processes take rows, three columns
OPTIONS = {"height": 32, "width": 48, "sampler": tiny.TWO_STEPS, "cache": tiny.window(9, 3)}
SWITCHES = {2: "recache", 4: "soft", 5: "blend 2", 8: "cut"}
SHORT = tiny.prompt(tokens=3)  # the first prompt, whose padding is counted
CHUNKS, MIDDLE = 10, 6  # over two evictions to the middle of a blend, and on
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def latents_of(stream: Stream, chunks: range) -> Tensor:
    """Chunks [B, C, F, h, w] of a stream that follows `SWITCHES`."""
    made = []
    for chunk in chunks:
        if chunk in SWITCHES:
            stream.switch(tiny.prompt(chunk), SWITCHES[chunk])
        made.append(stream.generate())
    return torch.cat(made, dim=2)


def whole_stream() -> Stream:
    return Stream(tiny.model(CONFIG), SHORT, **OPTIONS)


def parallel_stream(process: Process) -> SequenceParallelStream:
    split = Split.of(process, CONFIG, GRID, OPTIONS["cache"])
    return SequenceParallelStream(
        SequenceParallelModel(tiny.model(CONFIG), split), SHORT, **OPTIONS
    )


def run_rank(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / f'meet{count}'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count)
    process = Process(rank=rank, world_size=count)
    stream = parallel_stream(process)
    first = latents_of(stream, range(MIDDLE))
    snapshot = stream.snapshot()
    found = {
        "through": torch.cat([first, latents_of(stream, range(MIDDLE, CHUNKS))], dim=2),
        "cache bytes": torch.tensor(stream.state.cache.nbytes),
    }
    stream = parallel_stream(process)
    stream.restore(Snapshot.load(folder / "alone.safetensors"))
    found["restored"] = latents_of(stream, range(MIDDLE, CHUNKS))
    asked = any_process(lambda: rank == 1)
    found["agreed"] = torch.tensor([asked(), any_process(lambda: False)()])
    torch.save(found, folder / f"found-{count}-{rank}.pt")
    if rank == 0:
        snapshot.save(folder / f"spread{count}.safetensors")
    dist.barrier()  # none goes while another may still be at work with it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, Tensor]:
    """A folder with one process's snapshot in the middle, and all it made."""
    folder, stream = tmp_path_factory.mktemp("parallel"), whole_stream()
    first = latents_of(stream, range(MIDDLE))
    stream.snapshot().save(folder / "alone.safetensors")
    return folder, torch.cat([first, latents_of(stream, range(MIDDLE, CHUNKS))], dim=2)


@pytest.fixture(scope="module", params=[2, 3])
def spread(request, alone) -> tuple[int, list[dict[str, Tensor]]]:
    """What each of two processes (rows), and of three (columns), has found."""
    folder, _ = alone
    spawn(run_rank, (request.param, folder), nprocs=request.param)
    paths = [folder / f"found-{request.param}-{rank}.pt" for rank in range(request.param)]
    return request.param, [torch.load(path, weights_only=True) for path in paths]


def test_a_stream_spread_over_processes_is_the_stream_of_one(alone, spread):
    _, expected = alone
    for found in spread[1]:
        torch.testing.assert_close(found["through"], expected, **TOLERANCE)
        assert torch.equal(found["through"], spread[1][0]["through"])  # all go on alike


def test_each_process_keeps_its_share_of_the_cache(spread):
    count, every = spread
    whole = whole_stream().state.cache.nbytes
    assert [int(found["cache bytes"]) * count for found in every] == [whole] * count


def test_a_snapshot_is_of_the_whole_stream_however_many_processes_made_it(alone, spread):
    folder, expected = alone
    rest = expected[:, :, MIDDLE * 3 :]
    for found in spread[1]:
        torch.testing.assert_close(found["restored"], rest, **TOLERANCE)
    stream = whole_stream()
    stream.restore(Snapshot.load(folder / f"spread{spread[0]}.safetensors"))
    torch.testing.assert_close(latents_of(stream, range(MIDDLE, CHUNKS)), rest, **TOLERANCE)


def test_one_process_that_is_to_stop_stops_all(spread):
    assert all(found["agreed"].tolist() == [True, False] for found in spread[1])


def test_tokens_come_back_to_their_places_after_the_trades(monkeypatch):
    """Two processes' trades, played in one: rows of the traded tensors change places."""
    grid, heads = Grid(height=4, width=3), torch.randn(2, 1, 2 * 12, 4, 5)
    q, v = heads  # of two frames, [B, L, H, D]
    splits = [Split(rank=r, world_size=2, axis=-2, run=6) for r in range(2)]
    bands = [_band_tokens(heads, grid, rank) for rank in range(2)]
    sent: list[Tensor] = []
    monkeypatch.setattr("rf_core.fast.parallel.all_to_all", lambda x: sent.append(x) or x)
    for split, band in zip(splits, bands, strict=True):
        split.to_heads(*band)
    received = [torch.stack([each[rank] for each in sent]) for rank in range(2)]
    for rank, split in enumerate(splits):
        monkeypatch.setattr("rf_core.fast.parallel.all_to_all", lambda x, rank=rank: received[rank])
        own_q, own_v = split.to_heads(*bands[rank])
        assert torch.equal(own_q, split.own_heads(q)) and torch.equal(own_v, split.own_heads(v))


def _band_tokens(x_NBLHD: Tensor, grid: Grid, rank: int) -> Tensor:
    """Upper or lower half of every frame's tokens."""
    rows = x_NBLHD.unflatten(2, (-1, grid.height, grid.width)).chunk(2, dim=3)[rank]
    return rows.flatten(2, 4)


def test_numbers_of_processes_that_do_not_fit_are_refused_with_those_that_do():
    grid = Grid(height=30, width=52)  # 480x832

    def split(count: int, cache: CacheConfig | None = None) -> Split:
        process = Process(rank=1, world_size=count)
        return Split.of(process, WAN_1_3B, grid, cache or CacheConfig())

    assert [(split(n).axis, split(n).run) for n in (2, 3, 4, 6)] == [
        (-2, 15 * 52),
        (-2, 10 * 52),
        (-1, 13),
        (-2, 5 * 52),
    ]
    for count in (5, 8, 12):
        with pytest.raises(ValueError, match=r"rows or columns: use 2, 3, 4, 6$"):
            split(count)
    with pytest.raises(ValueError, match="keep_key_norms"):
        split(2, CacheConfig(keep_key_norms=True))


def test_a_parallel_stream_refuses_a_snapshot_of_another_model(alone, monkeypatch):
    folder, _ = alone
    monkeypatch.setattr("rf_core.fast.parallel.all_gather", lambda part, axis: part)
    stream = parallel_stream(Process(rank=0, world_size=2))
    snapshot = Snapshot.load(folder / "alone.safetensors")
    wider = {**snapshot.facts["model"], "ffn_dim": 96}
    with pytest.raises(ValueError, match="96"):
        stream.restore(replace(snapshot, facts={**snapshot.facts, "model": wider}))


def test_torchrun_makes_one_video_that_looks_like_that_of_one_process(tmp_path):
    alone, spread = tmp_path / "alone.mp4", tmp_path / "spread.mp4"
    prompt = (
        "--prompt",
        "a red circle moves right",
        "--chunks",
        "5",
        "--device",
        "cpu",
        "--crf",
        "0",
    )
    assert main(["generate", *prompt, "--output", str(alone)]) == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rf_core", "generate"]
    command = [sys.executable, *torchrun, *prompt, "--parallel", "context"]
    done = subprocess.run(
        [*command, "--output", str(spread), "--snapshot-every", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chunk 5/5") == 1
    difference = abs(images_of(spread).astype(int) - images_of(alone))
    assert len(images_of(alone)) == 9 + 12 * 4 and difference.max() <= 2
    assert not list(tmp_path.glob("*.state*"))


def test_parallel_in_one_process_or_beside_prompts_is_refused(tmp_path, capsys):
    spread = ("--parallel", "context", "--device", "cpu")
    assert main(["generate", "--prompt", "x", "--chunks", "1", *spread]) == 1
    assert "--nproc-per-node" in capsys.readouterr().err
    prompts = tmp_path / "p.txt"
    prompts.write_text("x")
    batch = ("--prompts", str(prompts), "--chunks", "1", "--output", str(tmp_path / "o"))
    assert main(["generate", *batch, *spread]) == 1
    assert "leave out --parallel" in capsys.readouterr().err
