from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

import training.stages.estimate as estimates
from rf_core.config import WAN_1_3B, WAN_14B, Grid
from rf_core.kv_cache import KVSnapshot
from rf_core.measure.counts import num_parameters
from training.__main__ import main
from training.run.config import apply_overrides
from training.run.networks import PlacementConfig
from training.stages.costs import Given, costs
from training.stages.estimate import Sizes, estimate, saved_bytes
from training.stages.recipes import wan

GRID = Grid(height=4, width=6)
WAN = Sizes(student=WAN_1_3B, teacher=WAN_14B, critic=WAN_1_3B)


class Attention(torch.autograd.Function):
    """Plain attention that keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        weights = torch.einsum("blhd,bshd->bhls", q, k).softmax(-1)
        out = torch.einsum("bhls,bshd->blhd", weights, v)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.zeros_like(saved) for saved in ctx.saved_tensors[:3])


@pytest.mark.parametrize("context", [None, 0, 6])
def test_what_autograd_keeps_is_counted_without_arithmetic(context):
    size, frames = tiny.CONFIG, 3
    network = tiny.model().requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}
    held = []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.no_grad():
        prompt = network.prompt_context(tiny.prompt())
    cache = None
    if context is not None:
        shape = (size.num_layers, 1, context * GRID.frame_tokens, size.num_heads, size.head_dim)
        cache = KVSnapshot(torch.zeros(shape), torch.zeros(shape), context)
    x = torch.zeros(1, size.in_dim, frames, 8, 12)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(x, torch.zeros(1, frames), prompt, cache, Attention.apply)
    found = saved_bytes(size, PlacementConfig(), GRID, frames, context)
    assert found == pytest.approx(sum(kept.values()), rel=0.1)  # norms differ by device


def test_recomputed_blocks_keep_far_less():
    size = replace(tiny.CONFIG, num_layers=12)
    plain, recomputed = (
        saved_bytes(size, PlacementConfig(checkpointing=on), GRID, 3, 6) for on in (False, True)
    )
    assert recomputed < plain / 3


@pytest.mark.slow
def test_memory_is_shared_out_and_the_published_batch_over_64_cards_is_the_papers_time():
    one, eight = (estimate(wan(), WAN, processes) for processes in (1, 8))
    trained = 12 * num_parameters(WAN_1_3B)  # weights, gradients and one moment, in float32
    assert one.memory["critic, gradients, moments"] == trained
    assert eight.memory["critic, gradients, moments"] == trained // 8
    assert eight.memory["KV cache"] == one.memory["KV cache"]
    # About 3 hours (arXiv 2512.04678) on 64 cards of at most 990 TFLOP/s.
    seconds = 3 * 3600 / wan().run.updates
    needed = sum(estimate(wan(), WAN, 64).flops.values()) / seconds
    assert 100e12 < needed < 500e12


@pytest.mark.slow
def test_hybrid_sharding_divides_weights_by_the_cards_of_a_copy():
    plain = estimate(apply_overrides(wan(), ["placement.shard_over=8"]), WAN, 64)
    name, of = "critic, gradients, moments", 12 * num_parameters(WAN_1_3B)
    assert plain.memory[name] == of // 8
    assert plain.memory["teacher"] == 2 * num_parameters(WAN_14B) // 8
    sizes = {"student": WAN_1_3B, "teacher": WAN_14B, "critic": WAN_1_3B}
    with pytest.raises(ValueError, match=r"shard_over is 8, of which the number of processes, 12"):
        costs(apply_overrides(wan(), ["placement.shard_over=8"]), Given(sizes=sizes), 12)


@pytest.mark.slow
def test_choices_show_in_the_count():
    def count(*settings: str) -> estimates.Estimate:
        return estimate(apply_overrides(wan(), settings), WAN, 8)

    plain = count()
    adapters = count("student_lora={}", "critic_lora={}")
    assert adapters.memory["critic, gradients, moments"] < plain.bytes / 10
    kept = count("run.critic.betas=[0.9,0.999]").memory["critic, gradients, moments"]
    assert 3 * kept == pytest.approx(4 * plain.memory["critic, gradients, moments"])
    assert count("placement.offload=teacher").memory["teacher"] == 0
    assert count("placement.reshard=false").memory["gathered weights"] > 30e9
    assert count("placement.checkpointing=false").bytes > 2 * plain.bytes
    long = count("run.latents=[16, 63, 60, 104]")
    assert 2.5 < long.flops["rollouts"] / plain.flops["rollouts"] < 3.5
    assert long.bytes < 1.5 * plain.bytes  # a window at a time
    drawn = count("run.latents=[16, 63, 60, 104]", "run.random_length=true")
    assert drawn.flops["scores"] == pytest.approx(long.flops["scores"] * 2 / 3)
    changing = count("run.latents=[16, 63, 60, 104]", "run.switch_share=0.5")
    assert long.flops["rollouts"] < changing.flops["rollouts"] < 1.1 * long.flops["rollouts"]


@pytest.mark.parametrize("latents", [(16, 21, 80, 80), (16, 63, 80, 80)])
def test_updates_of_several_sizes_are_counted_as_of_the_largest(latents):
    own = (*latents[:2], 60, 104)
    several = replace(wan().run, latents=own, buckets=((40, 40), latents[2:]))
    one = replace(wan().run, latents=latents)
    assert estimate(replace(wan(), run=several), WAN, 8) == estimate(
        replace(wan(), run=one), WAN, 8
    )


@pytest.mark.slow
def test_the_command_prints_both_totals(capsys):
    assert main(["estimate", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "a process takes about" in printed and "an update on a process" in printed
    assert "this machine's matrix products" in printed
    sizes = ["--student", "1.3b", "--teacher", "14b", "--critic", "1.3b"]
    small = ["--set", "placement.dtype=float32"]
    assert main(["estimate", "--preset", "wan", "--processes", "64", *sizes, *small]) == 0
    assert "PFLOP" in capsys.readouterr().out
    assert main(["estimate", "--preset", "wan"]) == 1
    assert "which is not there" in capsys.readouterr().err
