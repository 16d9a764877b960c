from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from torch import Tensor

from rf_core.config import WAN_1_3B, WAN_14B, SamplerConfig
from training.__main__ import main
from training.data.embeddings import MemoryEmbeds
from training.objective.causal import predict_clip
from training.objective.redmd import Networks, ReDMDConfig
from training.objective.weights import WeightConfig
from training.run.distributed import shard
from training.run.optimise import OptimiserConfig
from training.run.sequence import SequenceParallelModel, check_sequence, split_sequence
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


def trainer(over: int | None = None, shard_over: int | None = None) -> Trainer:
    networks = Networks(
        student=network(0, True, over, shard_over),
        teacher=network(1, False, over, shard_over),
        critic=network(2, True, over, shard_over),
    )
    embeds = MemoryEmbeds(tiny.prompt(batch=6))
    return Trainer(CONFIG, networks, embeds, tiny.prompt(9), Numbers(), over)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def flow_of(run: Trainer) -> Tensor:
    """The teacher's, of a window of two samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *CONFIG.window_latents, generator=generator)
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
    cache = run.networks.student.new_cache(
        CONFIG.redmd.cache,
        batch=1,
        grid=tiny_grid(),
        dtype=torch.float32,
        device="cpu",
    )
    return cache.nbytes


def tiny_grid():
    from rf_core.config import Grid

    return Grid.of_latents(*CONFIG.latents[2:], SIZES.patch_size)


def run_rank(
    rank: int, world: int, folder: Path, over: int, shard_over: int | None, resume: bool
) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / f'meet{world}{over}{resume}'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    run = trainer(over, shard_over)
    assert isinstance(run.networks.student, SequenceParallelModel)
    if resume:
        run.load(folder / "at1")
        found: dict[str, object] = update(run)
    else:
        # FSDP averages; a group's processes leave parts, of which the clip's loss has one a group.
        found = everything(run, copies=over)
        found["cache"] = cache_bytes(run)
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
    spawn(run_rank, (world, tmp_path, over, shard_over, False), nprocs=world)
    for rank in range(world):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert_same(found, expected, ("flow", "clip", *STEPS))
        assert found["cache"] * over == cache_bytes(alone)
