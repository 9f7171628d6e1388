"""Do the intervals and p values keep their word? Simulated (`python -m pytest -m long -s tests/test_simulation.py`
prints tables).

Values of four rows a group that are alike within it: normal; counts per 100 words with many zeros and a long tail, as
mentions of people are; heavier tails than those; lognormal ones, as lengths are; polarities bunched at an end of -1..1; shares of rare events. Of a
rate of 95 % the standard error is 0.5 points with 2,000 rounds.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as sps

from dsc_hub import stats

ROUNDS, ROWS, ICC = 2000, 4, 0.3
GROUPS = (12, 16, 39, 60)

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def group_means(kind: str, groups: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """[rounds, groups] means of ROWS rows of a group."""
    shape, rows = (rounds, groups, 1), (rounds, groups, ROWS)
    if kind == "normal":
        return rng.normal(size=rows[:2])
    if kind == "counts":
        mentions = rng.poisson(rng.gamma(0.5, 1.0, shape), rows)
        return (100 * mentions / rng.integers(20, 60, rows)).mean(axis=-1)
    if kind == "heavy tails":
        return (rng.gamma(0.6, 1.0, rows) * rng.gamma(0.7, 2.0, shape)).mean(axis=-1)
    if kind == "lognormal":
        return np.exp(rng.normal(0, 0.8, shape) + rng.normal(0, 0.8, rows)).mean(axis=-1)
    if kind == "bounded":
        centre = rng.beta(8, 1.2, shape)
        return (2 * rng.beta(6 * centre, 6 * (1 - centre) + 1e-9, rows) - 1).mean(axis=-1)
    rate = rng.beta(0.1 * (1 - ICC) / ICC, 0.9 * (1 - ICC) / ICC, shape)  # "rare events"
    return (rng.random(rows) < rate).mean(axis=-1)


def covered(kind: str, groups: int, smaller: float | None) -> tuple[float, float]:
    """How often the interval of a mean covers it, of those that there are, and how often a t interval would; with
    `smaller` of the difference of an arm that is smaller by this factor and another."""
    rng, many = np.random.default_rng(groups), np.random.default_rng(7)

    def draw(rounds: int, rng: np.random.Generator) -> np.ndarray:
        one = group_means(kind, groups, rounds, rng)
        return one if smaller is None else smaller * group_means(kind, groups, rounds, rng) - one

    truth, ours, students, given = float(draw(60_000, many).mean()), 0, 0, 0
    for means in draw(ROUNDS, rng):
        e = stats.estimate(means, np.arange(groups))
        if e["low"] is None:  # all alike: nothing is claimed
            continue
        given += 1
        ours += e["low"] <= truth <= e["high"]
        half = sps.t.ppf(0.975, groups - 1) * means.std(ddof=1) / np.sqrt(groups)
        students += abs(means.mean() - truth) <= half
    return ours / given, students / given


# Less than 94 % is covered where so few groups can't tell how long a tail is that they have hardly seen.
LEAST = {
    "heavy tails": {12: 0.925, 16: 0.925},
    "lognormal": {12: 0.92, 16: 0.93, 39: 0.93, 60: 0.93},
    "rare events": {12: 0.925, 16: 0.92},
}


@pytest.mark.parametrize("smaller", [None, 0.6, 0.1], ids=["a mean", "a difference", "a large difference"])
@pytest.mark.parametrize("kind", ["normal", "counts", "heavy tails", "lognormal", "bounded", "rare events"])
def test_intervals_cover(kind: str, smaller: float | None, capsys):
    what = {None: "mean", 0.6: "difference", 0.1: "difference from an arm of almost nothing"}[smaller]
    shares = {n: covered(kind, n, smaller) for n in GROUPS}
    with capsys.disabled():
        told = "   ".join(f"{n} groups {ours:.1%} (t {t:.1%})" for n, (ours, t) in shares.items())
        print(f"\n{kind}, {what}: {told}")
    for n, (ours, _) in shares.items():
        assert ours >= LEAST.get(kind, {}).get(n, 0.935)


def groups_of(sizes: np.ndarray) -> list[str]:
    return [str(g) for g, n in enumerate(sizes) for _ in range(n)]


SIZES = {
    "12 groups of 8": np.full(12, 8),
    "16 groups of 8": np.full(16, 8),
    "40 groups of 4": np.full(40, 4),
    "12 groups of 1 to 60": np.resize([1, 2, 3, 5, 8, 13, 21, 34, 60], 12),
    "40 groups of 1 to 60": np.resize([1, 2, 3, 5, 8, 13, 21, 34, 60], 40),
}


@pytest.mark.parametrize("sizes", SIZES)
def test_wilson_s_interval_covers_whatever_the_sizes_of_the_groups(sizes: str, capsys):
    """Rates from 1 to 50 % at correlations of 0.1 and 0.3 within a group; n trials as if independent cover far less."""
    rng, n, names = np.random.default_rng(3), SIZES[sizes], groups_of(SIZES[sizes])
    shares = {}
    for icc in (0.1, 0.3):
        for rate in (0.01, 0.05, 0.2, 0.5):
            size, hits = (1 - icc) / icc, 0
            for _ in range(ROUNDS // 2):
                by_group = np.repeat(rng.beta(rate * size, (1 - rate) * size, len(n)), n)
                r = stats.rate(list(rng.random(n.sum()) < by_group), names)
                hits += r["low"] <= rate <= r["high"]
            shares[icc, rate] = hits / (ROUNDS // 2)
    with capsys.disabled():
        print(
            f"\n{sizes}: " + "   ".join(f"{rate:.0%} at {icc:g}: {share:.1%}" for (icc, rate), share in shares.items())
        )
    assert all(0.93 <= share <= 0.995 for share in shares.values())


@pytest.mark.parametrize("groups", [16, 40])
def test_two_equal_models_differ_in_five_of_a_hundred_evaluations(groups: int, capsys):
    """False alarms of the sign-flip test, of McNemar's, of a family of five after Holm, and how often the interval of a
    difference of shares covers."""
    rng, names = np.random.default_rng(20261126), groups_of(np.full(groups, ROWS))
    alarms = dict.fromkeys(("sign-flip", "McNemar", "family"), 0)
    shares_covered = 0

    def values() -> np.ndarray:
        shared = np.repeat(rng.normal(size=groups), ROWS)
        return np.sqrt(ICC) * shared + np.sqrt(1 - ICC) * rng.normal(size=groups * ROWS)

    for _ in range(ROUNDS):
        alarms["sign-flip"] += stats.paired_difference(values(), values(), names)["p"] <= 0.05
        d = stats.rate_difference(values() > 0.8, values() > 0.8, names)  # a rate of 21 %
        alarms["McNemar"] += d["p"] <= 0.05
        shares_covered += d["low"] <= 0 <= d["high"]
        means = [values().reshape(groups, -1).mean(axis=1) for _ in range(5)]
        adjusted = stats.holm({str(i): stats._t_test(m, float(m.std(ddof=1))) for i, m in enumerate(means)})
        alarms["family"] += min(p for p in adjusted.values() if p is not None) <= 0.05
    rates = {name: n / ROUNDS for name, n in alarms.items()}
    with capsys.disabled():
        told = ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items())
        print(f"\n{groups} groups: {told}, difference of shares covered {shares_covered / ROUNDS:.1%}")
    assert 0.035 <= rates["sign-flip"] <= 0.065 and rates["McNemar"] <= 0.065 and rates["family"] <= 0.065
    assert shares_covered / ROUNDS >= 0.94
