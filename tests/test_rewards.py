"""Rewards of latents: several at once, and classes of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.__main__ import main
from training.choices import RewardConfig, open_reward
from training.objective.redmd import ReDMDConfig
from training.rewards.reward import LatentRewards, WeightedScore
from training.run.journal import read_journal
from training.stages.recipes import DistilConfig
from training.stages.trainer import RunConfig

CPU = torch.device("cpu")
PAGE = Path(__file__).parent.parent / "docs" / "rewards.md"


class Pixels:
    """The decoder of this test: latents are pictures."""

    def decode(self, latents: Tensor, state: None) -> tuple[Tensor, None]:
        return latents.transpose(1, 2), None


class Brightness:
    scores = ("mean", "words")

    def __call__(self, videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        words = torch.tensor([float(len(prompt.split())) for prompt in prompts])
        return {"mean": videos.mean((1, 2, 3, 4)), "words": words}


def test_scores_are_summed_by_their_shares_and_each_is_told() -> None:
    parts = [
        WeightedScore(name="a", reward=Brightness(), score="mean", share=2.0),
        WeightedScore(name="b", reward=Brightness(), score="words", share=-0.5),
    ]
    rewards = LatentRewards(parts, Pixels(), ["one", "one two", "one two three"], CPU)
    x0 = torch.rand(3, 3, 4, 5, 6)
    expected = 2 * x0.mean((1, 2, 3, 4)) - 0.5 * torch.tensor([3.0, 1.0, 2.0])
    found = torch.cat([rewards(x0[:2], [2, 0]), rewards(x0[2:], [1])])
    torch.testing.assert_close(found, expected)
    means = rewards.take_means()
    assert means == pytest.approx({"a.mean": float(x0.mean()), "b.words": 2.0})
    assert rewards.take_means() == {"a.mean": 0.0, "b.words": 0.0}


def example() -> str:
    """The class that the page shows."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(code)


@pytest.mark.slow
def test_the_page_s_reward_weights_a_run_beside_the_tracker(tmp_path, monkeypatch) -> None:
    assert len(example().splitlines()) <= 16
    (tmp_path / "my_rewards.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    settings = (
        *("run.updates=1", "run.critic_ratio=1", "run.redmd.batch=2", "run.micro_batch=2"),
        *("run.latents=[16, 6, 8, 8]", "data.limit=3", "output.validate_every=0"),
        *("output.tensorboard=false", "reward.kind=my_rewards:Redness", "reward.score=redness"),
        'more_rewards=[{"kind": "tracker", "score": "caption", "share": 0.5}]',
    )
    words = [word for each in settings for word in ("--set", each)]
    assert main(["re_dmd", "--out", str(tmp_path / "run"), *words]) == 0
    (line,) = read_journal(tmp_path / "run" / "log.jsonl")
    parts = line["reward/my_rewards:Redness.redness"], line["reward/tracker.caption"]
    assert line["reward/mean_score"] == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        (
            "beauty",
            "",
            "choose one of 'none', 'tracker', 'soft_speed', .* 'videoalign', or name a class",
        ),
        ("mine:Missing", "", "mine:Missing', which is not there"),
        ("nowhere:Reward", "", "which is not there: No module named 'nowhere'"),
        ("mine:Silent", "class Silent: pass", "`scores` names what it gives"),
        ("mine:Other", "class Other: scores = ('a', 'b')", "reward.score is 'motion'.* gives a, b"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(write_mine, kind, source, said) -> None:
    write_mine(source)
    with pytest.raises(ValueError, match=said):
        RewardConfig(kind=kind)


def test_every_reward_gives_what_its_class_names() -> None:
    videos = torch.rand(1, 5, 3, 64, 64)
    for kind in ("tracker", "soft_speed", "flow", "soft_flow"):
        opened = open_reward(RewardConfig(kind=kind), CPU)
        assert opened.score == "motion"
        found = opened.reward(videos, ["a red circle moves left slowly"])
        assert tuple(found) == opened.reward.scores


def test_a_reward_beside_none_may_weight_the_critic() -> None:
    run = RunConfig(redmd=ReDMDConfig(weigh="critic"))
    with pytest.raises(ValueError, match="weigh is critic, which a reward weights"):
        DistilConfig(run=run)
    config = DistilConfig(run=run, more_rewards=(RewardConfig(kind="flow"),))
    assert [each.kind for each in config.rewards] == ["flow"]
