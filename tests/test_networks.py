"""Opening networks over processes, in bf16, recomputed, compiled, offloaded, as adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from rf_core.config import SamplerConfig
from rf_core.weights.checkpoint import write_checkpoint
from training.data.embeddings import MemoryEmbeds
from training.objective.redmd import Networks, ReDMDConfig
from training.run.lora import LoRAConfig
from training.run.networks import PlacementConfig, open_network, placement_dtype, prepare
from training.run.optimise import OptimiserConfig
from training.stages.export import write_student
from training.stages.trainer import RunConfig, Trainer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RATE = OptimiserConfig(rate=1e-3)
CONFIG = RunConfig(
    redmd=ReDMDConfig(cache=tiny.window(9, 3), sampler=SamplerConfig(steps=(1000, 500)), batch=2),
    generator=RATE,
    critic=RATE,
    latents=(tiny.CONFIG.in_dim, 12, 4, 6),
    critic_ratio=1,
    micro_batch=1,
)


@pytest.fixture
def files(tmp_path) -> Path:
    for seed, name in enumerate(("student", "teacher")):
        weights = tiny.model(seed=seed).state_dict()
        write_checkpoint(tmp_path / f"{name}.safetensors", weights, tiny.CONFIG, None, None)
    return tmp_path


def opened(files: Path, placement: PlacementConfig, lora: LoRAConfig | None = None) -> Trainer:
    def network(name: str, trained: bool) -> object:
        return open_network(
            files / f"{name}.safetensors",
            placement,
            CPU,
            trained=trained,
            offload=placement.offload == "all" or (placement.offload != "none" and not trained),
            lora=lora if trained else None,
        )

    networks = Networks(
        student=network("student", True),
        teacher=network("teacher", False),
        critic=network("teacher", True),
        dtype=placement_dtype(placement),
    )
    return Trainer(CONFIG, networks, MemoryEmbeds(tiny.prompt(batch=4)), tiny.prompt(9))


def result(run: Trainer) -> dict[str, torch.Tensor]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(run.networks.student, options=options)


def one_step(files: Path, placement: PlacementConfig, lora: LoRAConfig | None = None):
    run = opened(files, placement, lora)
    reports = [run.step() for _ in range(2)]
    return reports, result(run)


def streamed(run: Trainer) -> torch.Tensor:
    """What a validation streams, under a prompt with padding."""
    stream = tiny.stream(model=run.networks.student, prompt_embeds=tiny.prompt(tokens=3))
    return stream.generate()


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(PlacementConfig(checkpointing=True), id="recomputed"),
        pytest.param(PlacementConfig(compile="eager"), id="compiled"),
        pytest.param(PlacementConfig(compile="eager", checkpointing=True), id="both"),
    ],
)
def test_recomputed_and_compiled_blocks_have_the_gradients_of_plain_ones(placement):
    x = torch.randn(2, tiny.CONFIG.in_dim, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for options in (PlacementConfig(), placement):
        model = prepare(tiny.model().requires_grad_(True), options, trained=True)
        names = [name for name, _ in model.named_parameters()]
        flow = model(x, torch.full((2, 3), 500.0), model.prompt_context(tiny.prompt(batch=2)))
        found.append([flow, *torch.autograd.grad(flow.square().sum(), list(model.parameters()))])
    assert names == [name for name, _ in tiny.model().named_parameters()]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def run_rank(rank: int, world: int, files: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    meet = f"file://{files / f'meet{world}'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    results = {}
    for case in cases:
        placement, lora = CASES[case]
        reports, weights = one_step(files, placement, lora)
        results[case] = ([r.generator_loss for r in reports], weights)
    run = opened(files, PlacementConfig())
    torch.save(streamed(run), files / f"streamed{rank}.pt")
    write_student(
        files / "written.safetensors",
        run.networks.student,
        CONFIG.redmd.cache,
        CONFIG.redmd.sampler,
        (32, 48),
        {},
    )
    if rank == 0:
        torch.save(results, files / "results.pt")
    dist.barrier()  # none goes while another may still be at work with it
    dist.destroy_process_group()


CASES = {
    "plain": (PlacementConfig(), None),
    "recomputed": (PlacementConfig(checkpointing=True), None),
    "gathered once": (PlacementConfig(reshard=False), None),
    "bfloat16": (PlacementConfig(dtype="bfloat16"), None),
    "adapters": (PlacementConfig(), LoRAConfig(rank=2, alpha=4.0)),
}


def test_two_processes_open_and_train_what_one_does_in_every_placement(files):
    spawn(run_rank, (2, files, list(CASES)), nprocs=2)
    results = torch.load(files / "results.pt", weights_only=True)
    expected, weights = one_step(files, PlacementConfig())
    losses = [report.generator_loss for report in expected]
    for case in ("plain", "recomputed", "gathered once"):
        found, others = results[case]
        assert found == pytest.approx(losses, rel=1e-4), case
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, atol=3e-4, rtol=1e-2)
    alone = streamed(opened(files, PlacementConfig()))
    for rank in range(2):
        sharded = torch.load(files / f"streamed{rank}.pt", weights_only=True)
        torch.testing.assert_close(sharded, alone, atol=1e-5, rtol=1e-5)
    found, others = results["bfloat16"]
    assert found == pytest.approx(losses, rel=0.1) and found != losses
    assert all(weight.dtype == torch.float32 for weight in others.values())

    expected, weights = one_step(files, *CASES["adapters"])
    found, others = results["adapters"]
    assert found == pytest.approx([r.generator_loss for r in expected], rel=1e-4)
    assert weights.keys() == others.keys()
    start = tiny.model(seed=0).state_dict()
    for name, weight in others.items():
        plain = name.replace(".base_layer", "")
        if ".lora_" not in name:
            assert torch.equal(weight, start[plain]), name
    written = torch.load(files / "results.pt", weights_only=True)["plain"][1]
    assert written.keys() == start.keys()
    student = open_network(files / "written.safetensors", PlacementConfig(), CPU, trained=False)
    assert all(torch.equal(w, start[name]) for name, w in student.state_dict().items())


def test_one_process_refuses_what_only_shards_can_do():
    for placement in (PlacementConfig(dtype="bfloat16"), PlacementConfig(offload="teacher")):
        with pytest.raises(ValueError, match="torchrun"):
            placement_dtype(placement)
    assert placement_dtype(replace(PlacementConfig(), checkpointing=True)) == torch.float32
