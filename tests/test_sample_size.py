"""How many groups would be enough: by hand, and whether so many decide a criterion four times in five."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dsc_hub import stats
from dsc_hub.evaluation import claim
from dsc_hub.evaluation import repeated as again
from dsc_hub.runs import verdict
from dsc_hub.runs.metrics_schema import Criterion
from dsc_hub.sample_size import groups_for_p, groups_needed
from tests.evaluation import test_gate_simulation as gate

SETTING = verdict.Setting("test", look=1)


def test_of_a_mean():
    """t of 19 degrees of freedom is 2.0930, of more than a hundred 1.975 to 1.96."""
    e = {"mean": 0.05, "low": -0.05, "high": 0.15, "groups": 20}
    needed = groups_needed(e, 0.0)
    assert needed == pytest.approx(20 * (0.1 / 0.05 * (1 + 0.841621 / 1.959964) * 1.977 / 2.0930) ** 2, rel=0.01)
    assert groups_needed(e, -0.95) == stats.LEAST_GROUPS and groups_needed(e, 0.05) is None
    assert groups_needed(e, 0.035) == pytest.approx(1817 * (1.9615 / 2.0930) ** 2, rel=0.01)
    assert groups_needed(e, 0.041) is None  # 4,430
    # what so many groups of this spread detect is that very difference
    spread = 0.1 / 2.0930 * math.sqrt(20)
    assert stats.detectable(spread, needed) == pytest.approx(0.05, rel=0.02)


def test_one_group_far_off_does_not_make_the_number_as_wide_as_its_interval():
    """Seven differences with one far below: the interval reaches far down, and that of 30 such groups does not."""
    means = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.0, -0.71])
    repeated = again.of_mean(means, [f"g{k}" for k in range(7)], 0.95)
    seen = repeated(1)
    assert seen["low"] == -0.71 and seen["high"] < 1.0  # t alone: -0.14
    needed = groups_needed(seen, 0.0, repeated=repeated)
    by_its_lower_side = 7 * ((seen["mean"] - seen["low"]) / seen["mean"] * (1 + 0.841621 / 1.959964)) ** 2
    assert 17 < needed < 40 and by_its_lower_side > 100
    rng = np.random.default_rng(0)
    above = [stats.mean_interval(means[rng.integers(7, size=needed)])[0] > 0 for _ in range(50)]
    assert np.mean(above) >= 0.8


def test_an_interval_that_shrinks_faster_than_a_means():
    """Half widths of 0.3 / m about 0.05, limit 0.2: 0.15 / 1.4294 is reached at m = 2.859."""
    e = {"mean": 0.05, "low": -0.25, "high": 0.35, "groups": 10}

    def repeated(times: int) -> dict[str, float]:
        return e | {"low": 0.05 - 0.3 / times, "high": 0.05 + 0.3 / times}

    factor = 1 + 0.841621 / 1.959964
    assert groups_needed(e, 0.2, repeated=repeated) == math.ceil(10 * 0.3 * factor / 0.15) == 29
    assert groups_needed(e, 0.2) == pytest.approx(10 * (0.3 * factor / 0.15 * 1.990 / 2.262) ** 2, rel=0.03)
    assert groups_needed(e, 0.0542, repeated=repeated) is None  # 102 times as many
    assert groups_needed(e, 0.0543, repeated=repeated) == math.ceil(10 * 0.3 * factor / 0.0043)


def test_of_an_adjusted_p():
    """p 0.04 is 2.0537 standard errors; 0.025 (Holm, two scores) with power 0.8 needs 2.2414 + 0.8416."""
    assert groups_for_p(0.04, 0.08, 12) == math.ceil(12 * ((2.241403 + 0.841621) / 2.053749) ** 2) == 28
    assert groups_for_p(2 / 64, 4 / 64, 6) == math.ceil(6 * ((2.241403 + 0.841621) / 2.153875) ** 2) == 13
    assert groups_for_p(1.0, 1.0, 12) is None and groups_for_p(0.8, 1.0, 12) is None


@pytest.mark.parametrize(("groups", "hits"), [(7, 0), (12, 0), (20, 0), (20, 1)])
def test_of_a_share_near_zero(groups: int, hits: int):
    """Wilson's interval near 0 % shrinks like 1 / n: the number given is enough, one tenth less is not."""
    names = [str(k) for k in range(groups)]
    c = claim._share("share", [False] * groups, [k < hits for k in range(groups)], names, SETTING)
    aim = (claim.SHARE_MARGIN - c.value) / (1 + 0.841621 / 1.959964)

    def reach(n: float) -> float:
        return stats.wilson(hits / groups * n, n)[1] - c.value

    assert reach(c.groups_needed) <= 1.01 * aim and reach(0.9 * c.groups_needed) > aim
    by_root = groups_needed({"mean": c.value, "low": c.low, "high": c.high, "groups": groups}, claim.SHARE_MARGIN)
    assert c.groups_needed < by_root and (hits or (c.groups_needed < 60 and by_root > 60))


@pytest.mark.long
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.05, 0.1, 0.3])
def test_if_what_was_seen_is_how_it_is_so_many_groups_decide_a_share_four_times_in_five(rate: float):
    """Groups are drawn from those that were seen (12 of 4 prompts), as many as were said to be needed."""
    rng, size = np.random.default_rng(1), gate.PROMPTS

    def judged(sides: list[np.ndarray]) -> Criterion:
        names = [f"g{k}" for k in range(len(sides[0]) // size) for _ in range(size)]
        return claim._share("share", *(list(map(bool, side)) for side in sides), names, SETTING)

    needed, met = [], []
    while len(needed) < 40:
        seen = [np.array(gate.shares(rng, rate, 12)) for _ in range(2)]
        c = judged(seen)
        if c.groups_needed is None or c.groups_needed > 400:
            continue
        needed.append(c.groups_needed)
        for _ in range(10):
            drawn = rng.integers(12, size=c.groups_needed)
            again = judged([side.reshape(12, size)[drawn].ravel() for side in seen])
            met.append(again.verdict == "met")
    print(f"rate {rate:.0%}: {min(needed)} to {max(needed)} groups needed; with them {np.mean(met):.0%} are met")
    assert 0.75 <= np.mean(met) <= (1.0 if rate < 0.05 else 0.95)


@pytest.mark.long
@pytest.mark.parametrize("groups", [7, 12, 24])
@pytest.mark.parametrize("kind", ["normal", "bounded", "a long tail above", "a long tail below", "long tails"])
def test_if_what_was_seen_is_how_it_is_so_many_groups_decide_a_mean(groups: int, kind: str):
    draw = {
        "normal": lambda rng: rng.normal(0.5, 1, groups),
        "bounded": lambda rng: np.clip(rng.normal(0.4, 0.8, groups), -1, 1),
        "a long tail above": lambda rng: rng.exponential(1, groups) - 0.5,
        "a long tail below": lambda rng: 1.5 - rng.exponential(1, groups),
        "long tails": lambda rng: 0.4 + rng.standard_t(3, groups),
    }[kind]
    rng, needed, above = np.random.default_rng(1), [], []
    while len(needed) < 40:
        seen = draw(rng)
        repeated = again.of_mean(seen, [f"g{k}" for k in range(groups)], 0.95)
        estimate = repeated(1)
        number = groups_needed(estimate, 0.0, repeated=repeated)
        if estimate["mean"] <= 0 or estimate["low"] > 0 or number is None or number > 400:
            continue
        needed.append(number)
        above += [stats.mean_interval(seen[rng.integers(groups, size=number)])[0] > 0 for _ in range(10)]
    print(f"{groups} groups, {kind}: median {np.median(needed):.0f} needed; with them {np.mean(above):.0%} are decided")
    assert np.mean(above) >= 0.75
