"""The average of the weights: how long it remembers, the same for every loop that trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from training.run.config import apply_overrides
from training.run.ema import AverageConfig, WeightAverage
from training.stages.recipes import PRESETS
from training.stages.regression import INIT_PRESETS


def old_share(config: AverageConfig, batch: int, samples: int) -> float:
    """What is left of the first weights in the average, after so many samples."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    average = WeightAverage(layer)
    nn.init.zeros_(layer.weight)
    for update in range(samples // batch):
        average.update(config.decay(update, batch))
    return float(average.tensors["weight"])


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_half_of_the_average_is_newer_after_its_half_life_at_every_batch_size(batch):
    config = AverageConfig(ema=None, ema_half_life=512, ema_from=0)
    assert old_share(config, batch, 512) == pytest.approx(0.5, rel=1e-4)
    assert old_share(config, batch, 1024) == pytest.approx(0.25, rel=1e-4)


def test_a_short_memory_that_grows_bounds_a_half_life_too():
    config = AverageConfig(ema=None, ema_half_life=512)
    assert config.decay(0, 8) == pytest.approx(0.1)
    assert config.decay(10**6, 8) == pytest.approx(0.5 ** (8 / 512))
    assert replace(config, ema_from=3).decay(2, 8) == 0


@pytest.mark.parametrize(
    ("make", "group"), [(PRESETS["wan"], "run."), (INIT_PRESETS["wan"], "")], ids=["re_dmd", "init"]
)
def test_one_of_decay_and_half_life_counts_in_every_recipe(make, group):
    both = [f"{group}ema_half_life=4000"]
    with pytest.raises(ValueError, match=r"ema is 0\.99 and ema_half_life is 4000\.0"):
        apply_overrides(make(), both)
    with pytest.raises(ValueError, match="ema is None and ema_half_life is None"):
        apply_overrides(make(), [f"{group}ema=null"])
    taken = apply_overrides(make(), [*both, f"{group}ema=null"])
    config = taken.run if group else taken
    assert config.decay(10**6, 4000) == pytest.approx(0.5)
