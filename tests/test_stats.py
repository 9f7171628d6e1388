"""Numbers with intervals: worked by hand, by the group, and beside statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats import contingency_tables, multitest, proportion
from statsmodels.stats.power import TTestPower

from dsc_hub import stats
from dsc_hub.stats import estimate, paired_difference, rate, rate_difference


def test_the_interval_is_over_group_means():
    # groups a (0, 2) -> 1 and b (3, 5) -> 4: mean 2.5, sd 3/sqrt(2), half = t(0.975, 1) * sd / sqrt(2) = 12.7062 * 1.5
    e = estimate([0, 2, 3, 5], ["a", "a", "b", "b"])
    assert (e["mean"], e["n"], e["groups"]) == (2.5, 4, 2)
    assert e["low"] == pytest.approx(2.5 - 12.7062 * 1.5, abs=1e-3) and e["high"] == pytest.approx(
        2.5 + 12.7062 * 1.5, abs=1e-3
    )


def test_ten_copies_of_a_row_do_not_make_it_surer():
    few = estimate([0.0, 1.0, 0.5], ["a", "b", "c"])
    many = estimate([0.0] * 10 + [1.0] * 10 + [0.5] * 10, [g for g in "abc" for _ in range(10)])
    assert (few["low"], few["high"]) == (many["low"], many["high"]) and many["n"] == 30


def test_what_can_not_be_estimated_is_none_not_zero():
    assert estimate([], []) == {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
    assert estimate([1.0], ["a"])["low"] is None
    one = paired_difference([1.0], [0.0], ["a"])
    assert [one[k] for k in ("p", "p_t", "effect", "detectable")] == [None] * 4 and one["wins"] == 1
    assert rate([], [])["mean"] is None and rate_difference([True], [False], ["a"])["p"] is None


def test_the_paired_difference_by_hand():
    # differences 1, 2, 3 in three groups: mean 2, sd 1, t = 2 sqrt(3) = 3.4641, two-sided p with 2 df = 0.0742;
    # of the 8 ways to flip signs two (+++ and ---) reach |mean| 2: p = 2/8
    d = paired_difference([2, 3, 4], [1, 1, 1], ["a", "b", "c"])
    assert d["mean"] == 2 and d["p_t"] == pytest.approx(0.0742, abs=1e-4) and d["p"] == pytest.approx(0.25)
    assert d["low"] == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert (d["effect"], d["wins"], d["ties"], d["losses"]) == (2.0, 3, 0, 0)


def test_wins_are_counted_by_pair_and_p_by_group():
    # group a: +1, -1 (mean 0), group b: +2, 0 (mean 1)
    d = paired_difference([1, 0, 2, 1], [0, 1, 0, 1], ["a", "a", "b", "b"])
    assert (d["wins"], d["ties"], d["losses"]) == (2, 1, 1) and (d["n"], d["groups"]) == (4, 2)
    assert d["mean"] == 0.5 and d["p"] == 1.0  # flips of (0, 1): means -.5 and .5, all as far out


def test_no_difference_at_all_has_p_one():
    assert paired_difference([1, 2], [1, 2], ["a", "b"])["p"] == 1.0
    same = paired_difference([2, 3], [1, 2], ["a", "b"])
    assert same["p_t"] == 0.0 and same["effect"] is None and same["detectable"] == 0.0
    # 0.3 - 0.1 and 1.3 - 1.1 differ by rounding: that is no spread
    near = paired_difference([0.3, 1.3, 2.3], [0.1, 1.1, 2.1], ["a", "b", "c"])
    assert near["effect"] is None and near["detectable"] == 0.0 and near["low"] == near["high"]


def test_from_forty_groups_on_a_bootstrap_stands_beside():
    values = np.random.default_rng(1).normal(size=40).tolist()
    names = [str(i) for i in range(40)]
    assert "bootstrap" not in estimate(values[:39], names[:39])
    e = estimate(values, names)
    assert e["bootstrap"]["method"] == "BCa"
    assert e["bootstrap"]["low"] == pytest.approx(e["low"], abs=0.1) and e["bootstrap"]["low"] != e["low"]
    assert e == estimate(values, names)  # seeded
    alike = estimate([2.0] * 40, names)["bootstrap"]
    assert alike == {"low": 2.0, "high": 2.0, "method": "percentile"}


def test_a_rate_is_worth_its_groups_not_its_rows():
    # every group all or nothing: ICC 1, four groups of five are worth four trials, and as the design effect is an estimate
    # from four groups, (1.960 / 3.182)**2 of them (t with three degrees of freedom)
    hits, groups = [True] * 10 + [False] * 10, [g for g in "abcd" for _ in range(5)]
    r = rate(hits, groups)
    worth = 4 * (1.959964 / 3.182446) ** 2
    assert r["effective_n"] == pytest.approx(worth) and (r["mean"], r["n"], r["groups"]) == (0.5, 20, 4)
    assert (r["low"], r["high"]) == pytest.approx(
        proportion.proportion_confint(worth / 2, worth, method="wilson"), abs=1e-6
    )
    # one row a group: n trials; all alike: no more than the groups
    assert rate([True, False, True], ["a", "b", "c"])["effective_n"] == 3
    nothing = rate([False] * 20, groups)
    assert nothing["effective_n"] == pytest.approx(worth) and (nothing["mean"], nothing["low"]) == (0.0, 0.0)
    # half and half in every group: rows of a group are no more alike than others
    even = rate([True, False] * 10, [g for g in "abcde" for _ in range(4)])
    assert even["effective_n"] == pytest.approx(20 * (1.959964 / 2.776445) ** 2)
    # groups of 9 and 1: the mean is that of their shares, as in differences
    assert rate([True] * 9 + [False], ["a"] * 9 + ["b"])["mean"] == 0.5
    alone = rate([True, False], ["a", "a"])
    assert alone["low"] is None and alone["reason"] == "one group" and alone["mean"] == 0.5


def test_mcnemar_gives_each_group_one_verdict():
    # groups: a has more hits in the first, b and c as many, d fewer, e..j more in the first: 7 against 1
    a = [1, 1, 1, 0, 0, 0, 0, 0, *[1] * 6]
    b = [0, 0, 1, 0, 0, 0, 1, 1, *[0] * 6]
    groups = ["a", "a", "b", "b", "c", "c", "d", "d", *"efghij"]
    d = rate_difference(a, b, groups)
    assert (d["wins"], d["ties"], d["losses"]) == (7, 2, 1)
    assert d["p"] == pytest.approx(2 * (1 + 8) / 2**8)
    # one pair a group: McNemar's own
    table = [[0, 7], [1, 2]]
    assert d["p"] == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue)
    nothing = rate_difference([1, 0], [1, 0], ["a", "b"])
    assert nothing["p"] == 1.0 and nothing["low"] is None and nothing["reason"] == "all groups agree"
    wide = rate_difference([1, 0], [0, 0], ["a", "b"])
    assert (wide["low"], wide["high"]) == (-1.0, 1.0)
    many = [str(i) for i in range(1100)]
    assert rate_difference([1] * 1100, [0] * 1100, many)["p"] < 1e-300  # so small that it may be 0, never 1


def test_holm_by_hand_and_by_statsmodels():
    # sorted .01, .03, .04: .01 * 3 = .03; .03 * 2 = .06; .04 * 1 is below that and raised to it
    got = stats.holm({"x": 0.04, "y": 0.01, "z": 0.03, "unmeasured": None})
    assert got == {"x": pytest.approx(0.06), "y": pytest.approx(0.03), "z": pytest.approx(0.06), "unmeasured": None}
    p = np.random.default_rng(0).random(9) ** 3
    theirs = multitest.multipletests(p, method="holm")[1]
    assert list(stats.holm({str(i): x for i, x in enumerate(p)}).values()) == pytest.approx(list(theirs))


@pytest.mark.parametrize("groups", [3, 14, 56])
def test_what_can_be_detected_agrees_with_statsmodels(groups: int):
    d = stats.detectable(2.0, groups)
    assert TTestPower().power(d / 2.0, groups, 0.05, alternative="two-sided") == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (3, 10), (10, 10), (22, 36)])
def test_wilson_agrees_with_statsmodels(hits: int, of: int):
    assert stats.wilson(hits, of) == pytest.approx(proportion.proportion_confint(hits, of, method="wilson"), abs=1e-12)
