"""Trajectories whose noise is recreated in place of being stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training.data.embeddings import MemoryEmbeds
from training.data.pairs import (
    Origin,
    Pairs,
    PairsConfig,
    Trajectories,
    shard_path,
    shards_of,
    write_shard,
)
from training.stages.trajectories import make_shard, prompt_conditions

PAIRS = PairsConfig(
    sampler=tiny.TWO_STEPS, latents=(4, 12, 4, 6), clips=4, shard=2, steps=2, seed=3
)


@pytest.fixture
def made(tmp_path) -> list[Trajectories]:
    """The trajectories of two shards, which lie in `tmp_path`."""
    begin = prompt_conditions(["a", "b"], MemoryEmbeds(tiny.prompt(batch=2)), PAIRS)
    found = [make_shard(tiny.model(seed=1), begin, tiny.prompt(9), PAIRS, n) for n in (0, 1)]
    for number, each in enumerate(found):
        write_shard(shard_path(tmp_path, number), each, PAIRS, number, Origin(teacher="t"))
    return found


def rewritten(folder: Path, change) -> None:
    """The shards of a folder with their tensors changed."""
    for path in shards_of(folder):
        with safe_open(path, "pt") as file:
            note = file.metadata()
        save_file(change(load_file(path)), path, note)


def test_noise_is_not_stored_and_trajectories_are_read_as_they_were_made(tmp_path, made):
    stored = load_file(shard_path(tmp_path, 1))
    latents = sum(t.numel() for name, t in stored.items() if name not in ("embeds", "noise_probe"))
    assert latents == 2 * (1 + 1) * made[0].clean[0].numel()  # a later point and the end, no noise
    rows = Pairs.open(tmp_path).rows([3, 0])
    for name in ("points", "clean"):
        expected = torch.stack([getattr(made[1], name)[1], getattr(made[0], name)[0]])
        assert torch.equal(getattr(rows, name), expected)


def test_a_shard_is_known_by_its_number_where_others_are_not_there(tmp_path, made):
    shard_path(tmp_path, 0).unlink()
    assert torch.equal(Pairs.open(tmp_path).rows([0, 1]).points, made[1].points)


def test_older_shards_that_hold_their_noise_are_read(tmp_path, made):
    def as_before(tensors):
        del tensors["noise_probe"], tensors["later_points"]
        seed = int(tensors["clean"].equal(made[1].clean))
        return tensors | {"points": made[seed].points}

    rewritten(tmp_path, as_before)
    points = torch.cat([each.points for each in made])
    assert torch.equal(Pairs.open(tmp_path).rows(range(4)).points, points)


@pytest.mark.parametrize(("difference", "refused"), [(1e-5, False), (0.1, True)])
def test_noise_may_differ_by_rounding_and_no_more(tmp_path, made, difference, refused):
    def moved(tensors):
        return tensors | {"noise_probe": tensors["noise_probe"] + difference}

    rewritten(tmp_path, moved)
    pairs = Pairs.open(tmp_path)
    assert len(pairs.captions([0], [0])[0]) == 1  # what does not need the noise is there
    if not refused:
        assert torch.equal(pairs.rows([1]).points, made[0].points[1:])
        return
    with pytest.raises(ValueError, match=r"pairs-000000.* was made with torch .*, whose noise"):
        pairs.rows([1])
