from __future__ import annotations

import os
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from torch import Tensor

from rf_core.config import WAN_1_3B, WAN_14B, CacheConfig, Grid, SamplerConfig
from training.__main__ import main
from training.data.embeddings import MemoryEmbeds
from training.data.pairs import Pairs
from training.objective.causal import predict_clip
from training.objective.redmd import Networks, ReDMDConfig
from training.objective.weights import WeightConfig
from training.run.config import apply_overrides
from training.run.distributed import shard
from training.run.journal import read_journal
from training.run.optimise import OptimiserConfig
from training.run.sequence import (
    SequenceParallelModel,
    check_cache,
    check_sequence,
    split_sequence,
)
from training.stages.estimate import Sizes, estimate
from training.stages.re_dmd import distil
from training.stages.recipes import miniature, wan
from training.stages.trainer import RunConfig, Trainer

SIZES = replace(tiny.CONFIG, num_heads=4)
RATE = OptimiserConfig(rate=1e-6)  # so that a step does not blow up what rounding has left
CONFIG = RunConfig(
    redmd=ReDMDConfig(
        cache=tiny.window(9, 3),
        sampler=SamplerConfig(steps=(1000, 500)),
        batch=4,
        window_chunks=2,
        weights=WeightConfig(mean_one=True),
    ),
    generator=RATE,
    critic=RATE,
    latents=(tiny.CONFIG.in_dim, 12, 4, 8),  # two windows, and an eviction in the second
    critic_ratio=1,
    micro_batch=1,
)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Numbers:
    """Rewards a sample by its prompt's number."""

    def __call__(self, x0: Tensor, numbers: list[int]) -> Tensor:
        return torch.tensor([float(n) for n in numbers]) / 10

    def take_means(self) -> dict[str, float]:
        return {}


def network(seed: int, trained: bool, over: int | None, shard_over: int | None):
    whole = tiny.model(SIZES, seed).requires_grad_(trained)
    return shard(split_sequence(whole, over, CONFIG.latents, "cpu"), "cpu", shard_over=shard_over)


def trainer(
    over: int | None = None, shard_over: int | None = None, config: RunConfig = CONFIG
) -> Trainer:
    networks = Networks(
        student=network(0, True, over, shard_over),
        teacher=network(1, False, over, shard_over),
        critic=network(2, True, over, shard_over),
    )
    embeds = MemoryEmbeds(tiny.prompt(batch=6))
    return Trainer(config, networks, embeds, tiny.prompt(9), Numbers(), over)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def flow_of(run: Trainer) -> Tensor:
    """The teacher's, of a window of two samples."""
    generator = torch.Generator().manual_seed(3)
    channels, _, *size = CONFIG.latents
    x = torch.randn(2, channels, CONFIG.window_frames, *size, generator=generator)
    at = torch.full((2, x.shape[2]), 600.0)
    return run.networks.predict_flow(run.networks.teacher, x, at, tiny.prompt(batch=2))


def clip_gradients_of(run: Trainer) -> dict[str, Tensor]:
    """Of a causal pass over a clip, as `ode_init` trains on; every process has the same clip."""
    student, generator = run.networks.student, torch.Generator().manual_seed(4)
    noisy, clean = torch.randn(2, 1, *CONFIG.latents, generator=generator)
    prompt = student.prompt_context(tiny.prompt())
    at = torch.full((1, noisy.shape[2]), 500.0)
    x0 = predict_clip(student, noisy, at, prompt, CONFIG.redmd.cache, clean=clean)
    (x0 - clean).square().mean().backward()
    found = gradients(student)
    run.trained["generator"].clear()
    return found


def update(run: Trainer) -> dict[str, object]:
    """One update's report, the gradients of each step, and the weights after it."""
    found: dict[str, object] = {}
    for role, trained in run.trained.items():
        step = trained.step

        def noted(factor: float, role=role, trained=trained, step=step) -> float:
            found[role] = gradients(trained.network)
            return step(factor)

        trained.step = noted  # type: ignore[method-assign]
    report = run.step()
    found["losses"] = torch.tensor([report.generator_loss, report.critic_loss])
    found["norms"] = torch.tensor([report.generator_norm, report.critic_norm])
    assert report.rewards is not None
    found["weights"] = report.rewards.weights
    found["student"] = {n: whole(p) for n, p in run.networks.student.named_parameters()}
    return found


def everything(run: Trainer, copies: int = 1) -> dict[str, object]:
    """`copies` is how many times the samples of a clip are counted over all processes."""
    flow = whole(flow_of(run))
    clip = {name: grad * copies for name, grad in clip_gradients_of(run).items()}
    return {"flow": flow, "clip": clip, **update(run)}


def cache_bytes(run: Trainer) -> int:
    grid = Grid.of_latents(*CONFIG.latents[2:], SIZES.patch_size)
    cache = run.networks.student.new_cache(
        CONFIG.redmd.cache, batch=1, grid=grid, dtype=torch.float32, device="cpu"
    )
    return cache.nbytes


def run_rank(rank: int, world: int, folder: Path, over: int, shard_over: int | None) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / f'meet{world}{over}'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    run = trainer(over, shard_over)
    assert isinstance(run.networks.student, SequenceParallelModel)
    # FSDP averages over processes; a group's leave parts of the gradient of the clip they share.
    found = everything(run, copies=over)
    found["cache"] = torch.tensor(cache_bytes(run))
    run.save(folder / "at1")
    torch.save(found, folder / f"found{rank}.pt")
    dist.barrier()  # none goes while another may still be at work with it
    dist.destroy_process_group()


def assert_same(found: dict[str, object], expected: dict[str, object], names: Sequence[str]):
    for name in names:
        torch.testing.assert_close(
            found[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


STEPS = ("critic", "generator", "losses", "norms", "weights", "student")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "over", "shard_over"), [(2, 2, None), (4, 2, None), (4, 2, 2), (4, 4, None)]
)
def test_samples_whose_tokens_are_shared_out_have_the_losses_and_gradients_of_one_process(
    tmp_path, world, over, shard_over
):
    alone = trainer()
    expected = everything(alone)
    spawn(run_rank, (world, tmp_path, over, shard_over), nprocs=world)
    for rank in range(world):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert_same(found, expected, ("flow", "clip", *STEPS))
        assert int(found["cache"]) * over == cache_bytes(alone)


BUCKETS = replace(CONFIG, buckets=((8, 4),), seed=4)  # which draws that size for both roles


def sizes_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    torch.save(update(trainer(world, config=BUCKETS)), folder / f"found{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_tokens_of_another_size_of_the_same_area_are_shared_out_as_well(tmp_path):
    for role in ("generator", "critic"):
        assert BUCKETS.size_of(role, BUCKETS.part(role, 0)) == (8, 4)
    expected = update(trainer(config=BUCKETS))
    spawn(sizes_rank, (2, tmp_path), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert_same(found, expected, STEPS)


def resume_rank(rank: int, world: int, folder: Path, over: int | None) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / f'resume{world}'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    run = trainer(over)
    run.load(folder / "at1")
    torch.save(update(run), folder / f"resumed{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_checkpoint_of_groups_is_resumed_by_other_groups_and_by_one_process(tmp_path):
    alone = trainer()
    update(alone)
    expected = update(alone)
    spawn(run_rank, (4, tmp_path, 2, None), nprocs=4)
    resumed = trainer()
    resumed.load(tmp_path / "at1")
    assert_same(update(resumed), expected, STEPS)
    spawn(resume_rank, (2, tmp_path, 2), nprocs=2)
    found = torch.load(tmp_path / "resumed1.pt", weights_only=True)
    assert_same(found, expected, STEPS)


SMALL = ("updates=2", "batch=4", "micro_batch=2", "tensorboard=false", "ema_from=0")
PAIRS = ("kind=clips", "source=null", "clips=6", "shard=2", "batch=2", "steps=2", "data.limit=3")
RE_DMD = (
    *("updates=2", "critic_ratio=1", "redmd.batch=2", "micro_batch=1", "latents=[16, 6, 8, 8]"),
    "redmd.weights.mean_one=true",
)
STAGES = {
    "teacher": ("phases=[{'until': 1, 'kinds': ['excerpt', 'whole']}]", "opening_batch=4", *SMALL),
    "ode_init": SMALL,
    "consistency": SMALL,
    "re_dmd": (
        *(f"run.{each}" for each in RE_DMD),
        *("data.limit=3", "output.validation_chunks=1", "output.validation_prompts=1"),
    ),
}


def command_of(stage: str, folder: Path, out: Path, *settings: str) -> list[str]:
    more = {"ode_init": ["--pairs", str(folder / "pairs")]}.get(stage, [])
    own = PAIRS if stage == "ode_pairs" else STAGES[stage]
    if stage in ("teacher", "consistency"):
        own = (*own, f"source={folder / 'pairs'}")
    found = [part for each in (*own, *settings) for part in ("--set", each.replace("'", '"'))]
    return [stage, "--device", "cpu", "--out", str(out), *more, *found]


def command_rank(rank: int, world: int, ports: Sequence[int], commands: list[list[str]]) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    for port, command in zip(ports, commands, strict=True):
        os.environ.update({n: str(v) for n, v in (numbers | {"MASTER_PORT": port}).items()})
        assert main(command) == 0


def free_ports(count: int) -> list[int]:
    """Below those that the system hands out, for they are taken up minutes later."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 4 * count):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports[:count]


@pytest.mark.slow
def test_every_recipe_makes_the_same_on_groups_of_processes(tmp_path):
    shared, stages = ("placement.sequence_over=2", "placement.checkpointing=true"), (*STAGES,)
    assert main(command_of("ode_pairs", tmp_path, tmp_path / "pairs")) == 0
    for stage in stages:
        assert main(command_of(stage, tmp_path, tmp_path / stage)) == 0
    commands = [command_of("ode_pairs", tmp_path, tmp_path / "pairs-4", *shared)]
    commands += [command_of(each, tmp_path, tmp_path / f"{each}-4", *shared) for each in stages]
    spawn(command_rank, (4, free_ports(len(commands)), commands), nprocs=4)
    alone, together = (Pairs.open(tmp_path / name).rows(range(6)) for name in ("pairs", "pairs-4"))
    assert alone.prompts == together.prompts
    torch.testing.assert_close(together.clean, alone.clean, atol=5e-3, rtol=5e-3)
    for stage in stages:
        for first, second in zip(
            *(read_journal(tmp_path / f"{stage}{n}" / "log.jsonl") for n in ("", "-4")), strict=True
        ):
            numbers = {n: v for n, v in first.items() if "loss" in n or "reward" in n}
            assert numbers == pytest.approx({n: second[n] for n in numbers}, rel=1e-3), stage


def error_of(capsys, command: list[str]) -> str:
    assert main(command) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("stage", ["re_dmd", "teacher", "ode_init", "consistency", "ode_pairs"])
def test_processes_that_are_no_whole_groups_are_refused_before_a_group_exists(
    stage, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "6")
    command = command_of(stage, tmp_path, tmp_path / "run", "placement.sequence_over=4")
    assert "placement.sequence_over is 4, of which the number of processes, 6, is no multiple" in (
        error_of(capsys, command)
    )
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_groups_cannot_share_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "12")
    command = command_of("re_dmd", tmp_path, tmp_path / "run", "placement.sequence_over=2")
    error = error_of(capsys, command)
    assert "over 12 processes in groups of placement.sequence_over 2" in error
    assert "a multiple of 6" in error


def test_heads_and_tokens_that_cannot_be_shared_out_are_refused_with_what_can():
    latents = (16, 21, 60, 104)
    check_sequence(8, WAN_14B, latents, "files.teacher")
    check_sequence(None, WAN_14B, latents, "files.teacher")
    with pytest.raises(ValueError, match=r"12 heads of files\.critic.*use 2, 3, 4, 6, 12$"):
        check_sequence(8, WAN_1_3B, latents, "files.critic")
    with pytest.raises(ValueError, match=r"the 6 tokens of a frame; use 2$"):
        check_sequence(4, SIZES, (4, 12, 4, 6), "files.student")


def test_networks_that_cannot_be_shared_out_are_refused_before_a_weight_is_read(
    tmp_path, monkeypatch
):
    def refused(*args, **kwargs):
        raise AssertionError("a weight is read")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refused)
    config = apply_overrides(miniature(), ["placement.sequence_over=3"])
    with pytest.raises(ValueError, match=r"the 4 heads of files\.student"):
        next(distil(config, tmp_path / "run", torch.device("cpu")))
    assert not (tmp_path / "run").exists()


def test_a_cache_that_measures_keys_over_all_heads_is_refused():
    with pytest.raises(ValueError, match=r"run\.redmd\.cache\.keep_key_norms.*sequence_over 2"):
        check_cache(2, CacheConfig(keep_key_norms=True), "run.redmd.cache")
    check_cache(None, CacheConfig(keep_key_norms=True), "run.redmd.cache")


@pytest.mark.slow
def test_an_estimate_divides_what_tokens_take_and_counts_a_copy_of_the_weights_a_group():
    sizes = Sizes(student=WAN_1_3B, teacher=WAN_14B, critic=WAN_1_3B)
    alone, shared = (
        estimate(apply_overrides(wan(), settings), sizes, 64)
        for settings in ((), ("placement.sequence_over=4", "placement.shard_over=16"))
    )
    for name, part in {"KV cache": 4, "kept for the backward pass": 4, "teacher": 1 / 4}.items():
        assert shared.memory[name] * part == pytest.approx(alone.memory[name], rel=0.02)
    assert shared.flops == alone.flops


def test_an_estimate_for_what_cannot_be_shared_out_is_refused(capsys):
    settings = ("--set", "placement.sequence_over=4", "--device", "cpu")
    assert main(["estimate", "--processes", "6", *settings]) == 1
    assert "placement.sequence_over is 4" in capsys.readouterr().err
    sizes = ("--student", "14b", "--teacher", "14b", "--critic", "1.3b", "--preset", "wan")
    wide = ("--set", "placement.sequence_over=8", "--device", "cpu")
    assert main(["estimate", "--processes", "64", *sizes, *wide]) == 1
    assert "the 12 heads of the critic" in capsys.readouterr().err
