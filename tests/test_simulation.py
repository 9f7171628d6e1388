"""Do the intervals and p values keep their word? Simulated evaluations of two equal models (`make long`).

14 and 56 groups x 4 prompts x 2 samples, paired differences with an intraclass correlation of 0.3, 5,000 rounds, seeded. A
rate of 5 % has a standard error of 0.3 points there, so 4 to 6 % is three of them.
"""

from __future__ import annotations

import numpy as np
import pytest

from dsc_hub import stats

ROUNDS, PROMPTS, SAMPLES, ICC = 5000, 4, 2, 0.3

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def groups_of(groups: int) -> list[str]:
    return [str(g) for g in range(groups) for _ in range(PROMPTS * SAMPLES)]


def correlated(rng: np.random.Generator, groups: int) -> np.ndarray:
    """Standard normal values of all rows; those of a group have correlation ICC."""
    shared = np.repeat(rng.normal(size=groups), PROMPTS * SAMPLES)
    return np.sqrt(ICC) * shared + np.sqrt(1 - ICC) * rng.normal(size=groups * PROMPTS * SAMPLES)


@pytest.mark.parametrize("groups", [14, 56])
def test_two_equal_models_differ_in_five_of_a_hundred_evaluations(groups: int, capsys):
    rng, names, zero = np.random.default_rng(20261125), groups_of(groups), np.zeros(groups * PROMPTS * SAMPLES)
    alarms = {"t": 0, "sign-flip": 0, "covered by t": 0, "BCa": 0}
    for _ in range(ROUNDS):
        d = stats.paired_difference(correlated(rng, groups), zero, names)
        alarms["t"] += d["p_t"] < 0.05
        alarms["sign-flip"] += d["p"] < 0.05
        alarms["covered by t"] += d["low"] <= 0 <= d["high"]
        if "bootstrap" in d:
            alarms["BCa"] += not d["bootstrap"]["low"] <= 0 <= d["bootstrap"]["high"]
    shares = {k: v / ROUNDS for k, v in alarms.items() if k != "BCa" or groups >= stats.BOOTSTRAP_FROM}
    with capsys.disabled():
        print(f"\n{groups} groups: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    assert 0.04 <= shares["t"] <= 0.06 and 0.04 <= shares["sign-flip"] <= 0.06
    assert 0.94 <= shares["covered by t"] <= 0.96


@pytest.mark.parametrize("groups", [14, 56])
def test_rates_of_two_equal_models_and_families_of_them(groups: int, capsys):
    """McNemar's false alarms, those of a family of five differences after Holm, and how often Wilson's interval covers."""
    rng, names = np.random.default_rng(20261126), groups_of(groups)
    mcnemar = family = covered = 0
    for _ in range(ROUNDS):
        a, b = correlated(rng, groups) > 0.8, correlated(rng, groups) > 0.8  # a rate of 21 %
        mcnemar += stats.rate_difference(a, b, names)["p"] < 0.05
        r = stats.rate(a, names)
        covered += r["low"] <= 0.2119 <= r["high"]
        means = [correlated(rng, groups).reshape(groups, -1).mean(axis=1) for _ in range(5)]
        adjusted = stats.holm({str(i): stats._t_test(m, float(m.std(ddof=1))) for i, m in enumerate(means)})
        family += min(p for p in adjusted.values() if p is not None) < 0.05
    with capsys.disabled():
        print(
            f"\n{groups} groups: McNemar {mcnemar / ROUNDS:.1%}, a family of five after Holm {family / ROUNDS:.1%}, "
            f"covered by Wilson {covered / ROUNDS:.1%}"
        )
    assert mcnemar / ROUNDS <= 0.06 and family / ROUNDS <= 0.06
    assert 0.94 <= covered / ROUNDS <= 0.97  # for shares never exact
