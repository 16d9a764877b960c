"""The training of a VACE: what it learns from, what stays as it is, what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from test_excerpts import CLIPS, CPU, GREY, MUON
from test_outlines import folder as world  # noqa: F401  # a fixture
from torch import Tensor

from rf_core.config import VaceConfig
from rf_core.options import DEMO
from rf_core.scheduler import add_noise
from rf_core.vace import ControlledModel, Vace
from rf_core.weights.checkpoint import read_checkpoint
from rf_core.weights.vace import load_vace, read_vace
from training.__main__ import main
from training.run.config import apply_overrides
from training.run.controlled import TrainedControl
from training.run.distributed import shard
from training.run.draws import seeded_generator
from training.run.networks import PlacementConfig
from training.stages.control import (
    CONTROL_PRESETS,
    ControlRunConfig,
    ControlTrainer,
    control_errors,
    draw_batch,
    train_control,
)

CONFIG = ControlRunConfig(
    layers=(0, 1),
    frames=6,
    prompt_dropout=0.25,
    optimiser=MUON,
    updates=8,
    batch=4,
    micro_batch=2,
    ema=0.5,
    ema_from=1,
    tensorboard=False,
)
GROUPS = (range(len(CLIPS)),)


@dataclass(frozen=True)
class Contexts:
    """Of each clip two, of its latents and of a seed."""

    def of(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        mask = torch.ones(len(rows), 64, *CLIPS.shape[1:])
        parts = [torch.randn(CLIPS.shape, generator=each) for each in generators]
        return torch.cat([CLIPS.latents(rows), torch.stack(parts), mask], dim=1)


CONTEXTS = Contexts()


def network(hinting: bool = False) -> TrainedControl:
    base = tiny.model()
    vace = Vace(base.config, VaceConfig(layers=CONFIG.layers, in_channels=72))
    vace.initialise(base, torch.Generator().manual_seed(0))
    if hinting:
        tiny.randomise(vace, 3)
    vace.requires_grad_(True)
    made = TrainedControl(ControlledModel(base, vace))
    return shard(made, "cpu")


def trainer(config: ControlRunConfig = CONFIG) -> ControlTrainer:
    return ControlTrainer(config, network(), CLIPS, CONTEXTS, GREY, CPU)


def batch(config: ControlRunConfig = CONFIG, samples: Sequence[int] = range(4)):
    return draw_batch(CLIPS, CONTEXTS, config, 0, samples, GROUPS)


def test_the_loss_is_flow_matching_of_the_base_with_its_hints():
    made, given = network(hinting=True), batch()
    frames = given.latents.shape[2]
    assert frames == 6 == given.context.shape[2]
    at = given.timestep_B[:, None].expand(-1, frames)
    dropped = given.dropped_B[:, None, None]
    base, vace = made.base, made.vace
    whole = ControlledModel(base, vace)
    prompt = whole.prompt_context(torch.where(dropped, GREY, given.embeds))
    control = whole.embed_control(given.context, torch.ones(frames), torch.float32)
    noisy = add_noise(given.latents, given.noise, at)
    flow = whole(noisy, at, prompt, control=control)
    expected = (flow - given.noise + given.latents).square().mean((1, 2, 3, 4))[:, None]
    found = control_errors(made, given, GREY)
    torch.testing.assert_close(found, expected)
    plain = base(noisy, at, base.prompt_context(torch.where(dropped, GREY, given.embeds)))
    assert not torch.allclose(flow, plain, atol=1e-3)  # the hints count


def test_it_begins_as_the_base_alone():
    made, given = network(), batch(replace(CONFIG, prompt_dropout=0.0))
    at = given.timestep_B[:, None].expand(-1, 6)
    noisy = add_noise(given.latents, given.noise, at)
    plain = made.base(noisy, at, made.base.prompt_context(given.embeds))
    found = made(noisy, at, made.prompt_context(given.embeds), given.context)
    torch.testing.assert_close(found, plain)


def test_timesteps_of_an_update_cover_the_range_and_prompts_are_dropped_as_asked():
    many = replace(CONFIG, batch=64, prompt_dropout=0.25, shift=1.0)
    given = batch(many, range(64))
    assert torch.equal((given.timestep_B / 1000 * 64).floor().sort().values, torch.arange(64.0))
    assert 4 < int(given.dropped_B.sum()) < 32
    assert not batch(replace(many, prompt_dropout=0.0), range(64)).dropped_B.any()


def test_only_the_vace_is_trained_and_what_is_written_of_it_is_the_average(tmp_path: Path):
    run = trainer()
    before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
    for _ in range(3):
        run.step()
    for name, parameter in run.network.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == name.startswith("vace."), name
    with run.averaged():
        run.write(tmp_path / "control.safetensors", {"command": run.command})
        expected = {name: p.detach().clone() for name, p in run.network.vace.named_parameters()}
    vace = load_vace(
        tmp_path / "control.safetensors", tiny.CONFIG, device="cpu", dtype=torch.float32
    )
    assert vace.config == VaceConfig(layers=(0, 1), in_channels=72)
    found = vace.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_control_that_tells_the_noise_is_learnt_from():
    """A context that holds the answer lowers the loss, whatever the clip."""

    class Telling(Contexts):
        def of(self, rows, generators):
            context = super().of(rows, generators)
            context[:, 4:8] = context[:, :4]
            return context

    run = ControlTrainer(replace(CONFIG, updates=40), network(), CLIPS, Telling(), GREY, CPU)
    losses = [run.step().loss for _ in range(40)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path):
    whole, first, second = (trainer() for _ in range(3))
    reports = [whole.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    first.save(tmp_path / "at2")
    second.load(tmp_path / "at2")
    assert [second.step() for _ in range(2)] == reports[2:]
    for name, found in second.average.tensors.items():
        assert torch.equal(found, whole.average.tensors[name]), name


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    """One process: its share of two updates, and the file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world_size
    )
    run = trainer()
    numbers = [(each.loss, each.norm) for each in (run.step(), run.step())]
    run.write(folder / "control.safetensors", {})
    video = run.video(CLIPS.captions([0], [0])[1], None, 0)
    if rank == 0:
        torch.save((numbers, video), folder / "numbers.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path):
    spawn(run_rank, (2, tmp_path), nprocs=2)
    run = trainer()
    numbers, _ = torch.load(tmp_path / "numbers.pt")
    for each in numbers:
        report = run.step()
        assert each == pytest.approx((report.loss, report.norm), rel=1e-3)
    file = read_vace(tmp_path / "control.safetensors")
    for name, mine in run.network.vace.state_dict().items():
        torch.testing.assert_close(file.tensors[name], mine, rtol=1e-2, atol=1e-3)


def test_blocks_that_are_recomputed_change_nothing():
    from training.run.networks import prepare

    plain, again = network(hinting=True), network(hinting=True)
    prepare(again, PlacementConfig(checkpointing=True), trained=True)
    losses = []
    for each in (plain, again):
        loss = control_errors(each, batch(), GREY).mean()
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    pairs = zip(plain.vace.parameters(), again.vace.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_presets_survive_json_and_fit_their_bases():
    for preset in CONTROL_PRESETS.values():
        assert apply_overrides(preset(), []) == preset()
    assert len(CONTROL_PRESETS["wan"]().layers) == 15


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": (0, 7)}, r"layers are \[0, 7\], and the base has 5 blocks"),
        ({"base": Path("none")}, "base is none, which is not there"),
        ({"controls": Path("none")}, "controls is none, which holds no control contexts"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_weight_is_read(
    settings,
    said,
    world,  # noqa: F811
    tmp_path,
):
    text = str(DEMO / "text_encoder.safetensors")
    config = replace(
        CONTROL_PRESETS["miniature"](), source=world / "clips", controls=world / "controls"
    )
    config = apply_overrides(replace(config, **settings), [f"data.text_encoder={text}"])
    with pytest.raises(ValueError, match=said):
        next(train_control(config, tmp_path / "run", CPU))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("layers=[1, 3]", "layers are"),
        ("colours_alone=2", "colours_alone is 2"),
        ("placement.sequence_over=2", "placement.sequence_over is 2"),
        ("frames=0", "frames is 0"),
    ],
)
def test_impossible_fields_are_refused_by_name(setting, said):
    with pytest.raises(ValueError, match=said):
        apply_overrides(CONTROL_PRESETS["miniature"](), [setting])


@pytest.mark.slow
def test_clips_and_their_controls_become_a_file_that_fits_the_base(world, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    settings = [
        *(f"source={world / 'clips'}", f"controls={world / 'controls'}", "frames=3"),
        f"data.text_encoder={DEMO / 'text_encoder.safetensors'}",
        *("tensorboard=false", "batch=2", "micro_batch=2", "updates=2", "checkpoint_every=1"),
        *("validation_clips=2", "validate_every=2", "validation_prompts=1", "validation_steps=2"),
    ]
    words = [word for each in settings for word in ("--set", each)]
    assert main(["control", "--out", str(out), *words]) == 0
    base = read_checkpoint(DEMO / "teacher.safetensors")
    vace = load_vace(out / "control.safetensors", base.config, device="cpu", dtype=torch.float32)
    assert vace.config.layers == (0, 2, 4)
    note = read_vace(out / "control.safetensors").provenance
    assert note["command"] == "python -m training control" and note["clips"] == 6
    assert list((out / "validation").rglob("*.mp4"))
    assert main(["control", "--out", str(out), "--resume", "--set", "updates=3"]) == 0
    exported = tmp_path / "mine.safetensors"
    assert main(["export", str(out), str(exported), "--dtype", "float16"]) == 0
    assert read_vace(exported).tensors["vace_blocks.0.after_proj.weight"].dtype == torch.float16
    capsys.readouterr()
    assert main(["control", "--out", str(out), "--resume", "--set", "shift=2"]) == 1
    assert "shift" in capsys.readouterr().err


def test_the_same_seed_draws_the_same():
    first, second = batch(), batch()
    assert torch.equal(first.context, second.context) and torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, batch(replace(CONFIG, seed=1)).noise)
    assert seeded_generator("x").initial_seed() == seeded_generator("x").initial_seed()
