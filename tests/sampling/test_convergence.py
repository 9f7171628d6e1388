"""Mixing is told where it means something and refused where it doesn't; what the last step gave."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsc_hub.records import Chain, Score, Step
from dsc_hub.sampling.convergence import last_step, mixing


def chain(prompt: str, number: int, first: float | None, rewards: list[float | None], defect: str = "") -> Chain:
    """A chain whose steps are accepted where a reward is given, and rejected where None."""
    steps = tuple(
        Step(i, "c", f"r{i}", Score(0.0 if r is None else r), "", "not accepted by the rule" if r is None else "")
        for i, r in enumerate(rewards, 1)
    )
    return Chain(prompt, number, "first", Score(first), defect, steps)


def chains(shift: float, prompts: int = 5, steps: int = 200) -> list[Chain]:
    rng = np.random.default_rng(3)
    return [
        chain(f"p{p}", k, 0.0, list(rng.normal(loc=shift * k, size=steps))) for p in range(prompts) for k in range(4)
    ]


@pytest.mark.parametrize(
    ("rule", "steps", "number", "words"),
    [
        ("improve", 50, 4, "only climb"),
        ("always", 50, 4, "'always'"),
        ("metropolis", 19, 4, "19 steps, 20 are needed"),
        ("metropolis", 50, 1, "1 chain a prompt, 2 are needed"),
    ],
)
def test_where_it_means_nothing_it_is_not_estimated(rule: str, steps: int, number: int, words: str):
    found = mixing([], rule, steps, number)
    assert not found["estimable"] and words in found["reason"] and "r_hat" not in found


def test_chains_of_one_distribution_agree_and_others_don_t():
    good, bad = (mixing(chains(shift), "metropolis", 200, 4) for shift in (0.0, 3.0))
    assert good["estimable"] and good["r_hat"]["highest"] < 1.02 and good["prompts"] == 5 and good["draws"] == 800
    assert good["ess"]["median"] == pytest.approx(800, rel=0.25)  # independent draws are worth their number
    assert bad["r_hat"]["median"] > 1.5 and bad["r_hat"]["above_limit"] == 1.0 and bad["ess"]["median"] < 50


def test_states_without_a_reward_and_chains_that_stand_still_are_left_out_and_counted():
    moving = chains(0.0, prompts=1, steps=40)
    still = [chain("still", k, 0.5, [None] * 40) for k in range(4)]
    dirty = [chain("dirty", k, 0.5, [None, *[0.1 * k] * 39], defect="empty") for k in range(4)]
    found = mixing([*moving, *still, *dirty], "metropolis", 40, 4)
    assert (found["prompts"], found["left_out"]) == (1, 2)
    assert not mixing(still, "metropolis", 40, 4)["estimable"]
    apart = [chain("apart", k, 0.1 * k, [None] * 40) for k in range(4)]
    once = [chain("once", k, 0.0, [*[None] * 20, 1.0, *[None] * 19]) for k in range(4)]  # all moved at half-time
    found = mixing([*moving, *apart, *once], "metropolis", 40, 4)
    assert (found["prompts"], found["stuck"]) == (1, 2) and found["r_hat"]["above_limit"] >= 0.5
    json.dumps(found, allow_nan=False)
    odd = [chain("odd", k, 0.0, [*[None] * 10, 1.0, *[None] * 10]) for k in range(2)]  # all moved in the middle of 21
    assert not mixing(odd, "metropolis", 21, 2)["estimable"]


def test_the_state_s_reward_is_that_of_the_last_accepted_revision():
    c = chain("p", 0, -0.2, [0.3, None, 0.1])
    assert [c.reward_after(i) for i in range(4)] == [-0.2, 0.3, 0.3, 0.1]
    assert chain("p", 0, 0.9, [None], defect="empty").reward_after(1) is None
    assert chain("p", 0, None, [None]).reward_after(1) is None


def test_the_last_step_by_hand():
    groups = {f"p{i}": f"film {i}" for i in range(4)}
    up = [chain(f"p{i}", 0, 0.0, [0.1, 0.3 + 0.01 * i]) for i in range(4)]
    found = last_step(up, groups.__getitem__, 2)
    assert found["gain"]["mean"] == pytest.approx(0.215) and found["gain"]["groups"] == 4 and found["first_clean"] == 0
    flat = last_step([chain(f"p{i}", 0, 0.0, [0.1, None]) for i in range(4)], groups.__getitem__, 2)
    assert flat["gain"]["mean"] == 0 and flat["gain"]["ties"] == 4
    saved = last_step([chain(f"p{i}", 0, 0.0, [None, 0.4], defect="empty") for i in range(4)], groups.__getitem__, 2)
    assert (saved["first_clean"], saved["chains"]) == (4, 4) and saved["gain"]["mean"] is None
