"""Which prompts a run's validation videos show."""

from __future__ import annotations

from itertools import pairwise

import pytest

from training.stages.recipes import OutputConfig
from training.stages.validation import spread_prompts
from training.world.scenes import all_captions


def test_validation_shows_prompts_that_differ_where_neighbours_are_alike():
    captions = all_captions()
    count = OutputConfig().validation_prompts
    shown = [captions[number].split() for number in spread_prompts(count, len(captions))]
    colours, shapes, ways = ({words[place] for words in shown} for place in (1, 2, 4))
    assert len(colours) == count and len(shapes) > 1 and len(ways) > 1


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 12, 216, 1000, 46368])
def test_prompts_are_spread_over_the_list_each_once_and_more_begin_with_the_fewer(total):
    every = spread_prompts(total, total)
    assert sorted(every) == list(range(total)) and every[0] == 0
    assert spread_prompts(total + 5, total) == every
    for count in (1, 4, 10):
        shown = spread_prompts(count, total)
        assert shown == every[:count]
        ends = [*sorted(shown), total]
        gaps = [later - earlier for earlier, later in pairwise(ends)]
        assert max(gaps) <= max(2, 3 * total / count)
