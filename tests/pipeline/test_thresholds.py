"""Thresholds of training rows that no chain can reach are problems of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc_hub.config.recipe_files import load_recipe_file
from dsc_hub.metrics import loading
from dsc_hub.pipeline.thresholds import threshold_problems

PRIVACY = "reward={metric: privacy, scorer: spacy}"
SUM = "reward={metric: sentiment, scorer: vader, weight: 2, plus: [{metric: safety, scorer: rule}]}"
JUDGE = "reward={metric: judge, scorer: guard, options: {endpoint: http://a/v1, model: m}}"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["dataset.min_reward=1"], ""),
        (["dataset.min_reward=1.01"], "dataset.min_reward: 1.01 is above what the reward can reach: -1 to 1; lower it"),
        ([PRIVACY, "dataset.min_reward=-2"], ""),
        ([PRIVACY, "dataset.min_reward=2"], "is above what the reward can reach: at most 0; lower it"),
        ([PRIVACY, "dataset.min_gain=200"], ""),  # there is no worst
        ([SUM, "dataset.min_reward=3"], ""),
        ([SUM, "dataset.min_reward=3.5"], "3.5 is above what the reward can reach: -2 to 3"),
        ([JUDGE, "dataset.min_reward=4"], "4 is above what the reward can reach: 0 to 1"),
        (["reward={metric: own.py, scorer: x}", "dataset.min_reward=9"], ""),
        (["dataset.min_gain=1.9"], ""),
        (["dataset.min_gain=2"], "dataset.min_gain: a gain must be above 2, and it can be at most 2"),
        (["reward={metric: side_effects, scorer: repetition}", "dataset.min_reward=0.1"], "can reach: -1 to 0"),
    ],
)
def test_a_threshold_that_no_chain_can_reach_is_a_problem(recipe_file: Path, overrides: list[str], problem: str):
    problems = list(threshold_problems(load_recipe_file(recipe_file, overrides)))
    assert len(problems) == bool(problem) and problem in "".join(problems), problems


def test_declared_bounds_are_those_of_the_loaded_reward(recipe_file: Path):
    recipe = load_recipe_file(recipe_file, [SUM])
    identity = dict.fromkeys(("reward", "reward.plus.0"), "")
    assert loading.reward_bounds(recipe) == loading.load_named("reward", recipe, identity, recipe_file.parent).bounds
