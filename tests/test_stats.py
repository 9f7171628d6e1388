"""Numbers with intervals: worked by hand, by the group, and beside statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as sps
from statsmodels.stats import contingency_tables, multitest, proportion
from statsmodels.stats.power import TTestPower

from dsc_hub import stats
from dsc_hub.publish import numbers
from dsc_hub.stats import estimate, paired_difference, rate, rate_difference

NAMES = [chr(ord("a") + i) for i in range(26)]


def test_the_interval_is_over_group_means():
    # six groups of two rows, means 0..5: mean 2.5, sd 1.870829, t(0.975, 5) = 2.570582, half = 1.963; of symmetric
    # values the studentised bootstrap hardly reaches beyond it
    rows = [x + d for x in range(6) for d in (-1, 1)]
    e = estimate(rows, [g for g in NAMES[:6] for _ in range(2)])
    assert (e["mean"], e["n"], e["groups"]) == (2.5, 12, 6)
    half = 2.570582 * 1.870829 / math.sqrt(6)
    assert 2.5 - 1.3 * half <= e["low"] <= 2.5 - half + 1e-6 and 2.5 + half - 1e-6 <= e["high"] <= 2.5 + 1.3 * half


def test_ten_copies_of_a_row_do_not_make_it_surer():
    values = [0.0, 1.0, 0.5, 0.2, 0.9, 0.4]
    few = estimate(values, NAMES[:6])
    many = estimate([x for x in values for _ in range(10)], [g for g in NAMES[:6] for _ in range(10)])
    assert (few["low"], few["high"]) == pytest.approx((many["low"], many["high"])) and many["n"] == 60


def test_of_skewed_counts_the_interval_reaches_further_up_than_down():
    """Counts with many zeros: the t interval would reach below zero, and not far enough up."""
    counts = [0.0] * 8 + [1.0, 2.0, 4.0, 16.0]
    e = estimate(counts, NAMES[:12], bounds=(0.0, None))
    mean = sum(counts) / 12
    half = 2.200985 * float(np.std(counts, ddof=1)) / math.sqrt(12)
    assert mean - half < 0 == e["low"] and e["high"] > mean + 1.5 * half
    # and turned round it is the same interval turned round
    down = estimate([-x for x in counts], NAMES[:12])
    up = estimate(counts, NAMES[:12])
    assert (down["low"], down["high"]) == pytest.approx((-up["high"], -up["low"]))


def test_an_interval_stays_in_the_range_of_the_unit():
    values = [1.0, 1.0, 1.0, 0.9, 1.0, 0.2, 1.0]
    assert estimate(values, NAMES[:7])["high"] > 1
    assert estimate(values, NAMES[:7], bounds=(0.0, 1.0))["high"] == 1.0
    d = paired_difference([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], NAMES[:6])
    assert d["high"] > 1
    assert paired_difference([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], NAMES[:6], bounds=(0, 1))["high"] == 1.0
    assert paired_difference([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], NAMES[:6], bounds=(0, None)) == d


@pytest.mark.parametrize("groups", [1, 3, 5])
def test_few_groups_give_neither_interval_nor_p(groups: int):
    names = NAMES[:groups]
    for out in (
        paired_difference([0.3] * groups, [0.0, 0.1, 0.2, 0.0, 0.1][:groups], names),
        rate_difference([1] * groups, [0] * groups, names),
    ):
        assert out["mean"] is not None and (out["low"], out["high"], out["p"]) == (None, None, None)
        assert out["reason"] == f"{groups} group{'s' * (groups > 1)}; an interval needs 6"
    assert rate([True] * groups, names)["low"] is None
    assert estimate([1.0] * groups, names)["reason"] == stats.too_few(groups)


def test_where_all_groups_are_alike_there_is_no_interval():
    e = estimate([0.75] * 7, NAMES[:7])
    assert (e["mean"], e["low"], e["high"], e["reason"]) == (0.75, None, None, "all groups are alike")


def test_what_can_not_be_estimated_is_none_not_zero():
    assert estimate([], []) == {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
    assert estimate([1.0], ["a"])["low"] is None
    assert stats.group_mean([], []) is None and stats.group_mean([1, 3, 5], ["a", "a", "b"]) == 3.5
    one = paired_difference([1.0], [0.0], ["a"])
    assert [one[k] for k in ("p", "p_t", "effect", "detectable")] == [None] * 4 and one["wins"] == 1
    assert rate([], [])["mean"] is None and rate_difference([True], [False], ["a"])["p"] is None


def test_the_paired_difference_by_hand():
    # differences 1..6 in six groups: mean 3.5, sd 1.870829, t = 3.5 sqrt(6) / 1.870829 = 4.5826, two-sided p with 5 df
    # = 0.00593; of the 64 ways to flip signs two (all + and all -) reach |mean| 3.5: p = 2/64
    d = paired_difference([2, 3, 4, 5, 6, 7], [1] * 6, NAMES[:6])
    assert d["mean"] == 3.5 and d["p_t"] == pytest.approx(0.00593, abs=1e-5) and d["p"] == pytest.approx(2 / 64)
    assert d["low"] <= 3.5 - 2.570582 * 1.870829 / math.sqrt(6) + 1e-6
    assert (d["effect"], d["wins"], d["ties"], d["losses"]) == (pytest.approx(3.5 / 1.870829), 6, 0, 0)


def test_wins_are_counted_by_pair_and_p_by_group():
    # group a: +1, -1 (mean 0), group b: +2, 0 (mean 1)
    d = paired_difference([1, 0, 2, 1], [0, 1, 0, 1], ["a", "a", "b", "b"])
    assert (d["wins"], d["ties"], d["losses"]) == (2, 1, 1) and (d["n"], d["groups"]) == (4, 2)
    assert d["mean"] == 0.5


def test_no_difference_at_all_has_p_one():
    names, values = NAMES[:6], np.arange(6.0)
    assert paired_difference(values, values, names)["p"] == 1.0 == paired_difference(values, values, names)["p_t"]
    same = paired_difference(values + 1, values, names)
    assert same["p_t"] is None and same["effect"] is None and same["detectable"] is None and same["low"] is None
    assert paired_difference([0.1 + 0.2] * 6, [0.3] * 6, names)["p"] == 1.0
    # 0.3 - 0.1 and 1.3 - 1.1 differ by rounding: that is no spread
    near = paired_difference(values + 0.3, values + 0.1, names)
    assert near["effect"] is None and near["detectable"] is None and near["reason"] == "all groups are alike"


def test_the_interval_is_the_same_every_time_and_of_many_groups_as_narrow_as_t():
    values = np.random.default_rng(1).normal(size=6000)
    numbers = np.arange(6000)
    for n in (40, 300, 6000):
        e = estimate(values[:n], numbers[:n])
        assert e == estimate(values[:n], numbers[:n])
        half = 1.96 * values[:n].std(ddof=1) / math.sqrt(n)
        assert (e["high"] - e["low"]) / 2 == pytest.approx(half, rel=0.12)


def test_a_rate_is_worth_its_groups_not_its_rows():
    # every group all or nothing: the analysis of variance says ICC 1; 15 events of 30 with 4 of the assumed 0.3
    groups = [g for g in NAMES[:6] for _ in range(5)]
    hits = [True] * 15 + [False] * 15
    r = rate(hits, groups)
    icc = (15 * 1 + 4 * 0.3) / 19
    worth = 6 / (icc + (1 - icc) / 5) * (1.959964 / 2.570582) ** 2
    assert r["effective_n"] == pytest.approx(worth) and (r["mean"], r["n"], r["groups"]) == (0.5, 30, 6)
    assert (r["low"], r["high"]) == pytest.approx(
        proportion.proportion_confint(worth / 2, worth, method="wilson"), abs=1e-6
    )
    # one row a group: n trials; none at all: what is assumed
    assert rate([True, False] * 4, NAMES[:8])["effective_n"] == 8
    nothing = rate([False] * 30, groups)
    assert nothing["effective_n"] == pytest.approx(6 / (0.3 + 0.7 / 5) * (1.959964 / 2.570582) ** 2)
    assert (nothing["mean"], nothing["low"]) == (0.0, 0.0) and 0.15 < nothing["high"] < 0.4
    # groups of 9 and 1: the mean is that of their shares, as in differences
    assert rate([True] * 9 + [False], ["a"] * 9 + ["b"])["mean"] == 0.5


def test_groups_of_unequal_size_are_worth_less():
    # one group of 25 rows and five of one: the mean of shares varies as mean(1/n) says, not as 30 rows in six groups
    # would
    sizes = (25, 1, 1, 1, 1, 1)
    groups = [g for g, n in zip(NAMES, sizes, strict=False) for _ in range(n)]
    hits = [k % 2 == 0 for k in range(30)]
    r = rate(hits, groups)
    icc = stats._icc(hits, groups)
    inverse = (1 / 25 + 5) / 6
    assert r["effective_n"] == pytest.approx(6 / (icc + (1 - icc) * inverse) * (1.959964 / 2.570582) ** 2)
    assert r["effective_n"] < 7


def test_a_difference_of_shares_has_an_interval_where_no_pair_differs():
    groups = [g for g in NAMES[:12] for _ in range(4)]
    same = rate_difference([False] * 48, [False] * 48, groups)
    assert same["mean"] == 0 and same["low"] == -same["high"] < 0 and same["high"] == rate([False] * 48, groups)["high"]
    # the same answers: the shares go together, so their difference is known better than either
    hits = [k % 3 == 0 for k in range(40)] + [True] * 8
    together, apart = rate_difference(hits, hits, groups), rate_difference(hits, hits[::-1], groups)
    assert together["high"] < apart["high"] * 0.7
    # one pair a group is his method 10: phi of the four-fold table, corrected for continuity where it is positive
    a, b = [True] * 8 + [False] * 4, [True, True, True, True, True, True, False, False, False, False, False, False]
    d = rate_difference(a, b, NAMES[:12])
    (l1, u1), (l2, u2) = stats.wilson(8, 12), stats.wilson(6, 12)
    p1, p2 = 8 / 12, 0.5
    both, one_alone, other_alone, neither = 6, 2, 0, 4
    phi = max(0, both * neither - one_alone * other_alone - 12 / 2) / math.sqrt(8 * 4 * 6 * 6)
    below = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    above = math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    assert (d["low"], d["high"]) == pytest.approx((p1 - p2 - below, p1 - p2 + above))
    # two arms that agree everywhere, half of the time on a hit: nobody knows that they always will
    half = rate_difference([True, False] * 6, [True, False] * 6, NAMES[:12])
    assert half["low"] < -0.1 and half["high"] > 0.1


def test_the_jackknife_of_a_mean_is_its_t_interval():
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 3.0])
    j = stats.jackknife(float(values.mean()), [float(np.delete(values, i).mean()) for i in range(7)])
    half = 2.446912 * values.std(ddof=1) / math.sqrt(7)
    assert (j["low"], j["high"]) == pytest.approx((values.mean() - half, values.mean() + half))
    assert stats.jackknife(1.0, [1.0] * 5)["reason"] == stats.too_few(5)


def test_the_primary_comparison_is_a_family_of_its_own():
    def of(**p: float) -> dict:
        return {score: {"p": value} for score, value in p.items()}

    two = {"distilled - base": of(reward=0.02, second=0.03, third=0.04)}
    more = two | {f"arm{i} - base": of(reward=0.01, second=0.01, third=0.5) for i in range(5)}
    for differences in (two, more):
        assert stats.adjust_scores(differences, "distilled - base") == {
            "difference": "distilled - base",
            "scores": ["reward", "second"],
        }
        primary = differences["distilled - base"]
        assert [primary[s]["p_holm"] for s in ("reward", "second")] == pytest.approx([0.04, 0.04])
    assert more["distilled - base"]["third"]["p_holm"] == pytest.approx(min(1.0, 0.04 * 6))
    assert stats.adjust_scores({"a - b": of(reward=0.02)}, None) is None


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
    assert rate_difference([1, 0] * 3, [1, 0] * 3, NAMES[:6])["p"] == 1.0
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


def test_what_can_be_detected_belongs_to_the_interval_that_is_shown():
    """Of seven groups with one far off, the interval is widened: a difference that it can't show is not called found."""
    values = np.array([-0.9, 0.1, 0.15, 0.05, 0.1, 0.12, 0.08])
    d = paired_difference(values, np.zeros(7), NAMES[:7], bounds=(-1, 1))
    half = max(d["mean"] - d["low"], d["high"] - d["mean"])
    assert d["detectable"] > half > stats.detectable(values.std(ddof=1), 7)
    # moved to where it can be found four times in five, the interval of these very groups leaves out zero
    moved = paired_difference(values - values.mean() + d["detectable"], np.zeros(7), NAMES[:7])
    assert moved["low"] > 0 and moved["detectable"] == pytest.approx(d["detectable"])


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (3, 10), (10, 10), (22, 36)])
def test_wilson_agrees_with_statsmodels(hits: int, of: int):
    assert stats.wilson(hits, of) == pytest.approx(proportion.proportion_confint(hits, of, method="wilson"), abs=1e-12)


def test_with_few_groups_what_the_bootstrap_reaches_beyond_t_counts_up_to_twice(monkeypatch: pytest.MonkeyPatch):
    def beyond(n: int) -> float:
        """How far beyond the t interval the upper end is, for skewed values."""
        means = np.resize([0.0, 0.2, 0.5, 1.0, 2.0, 3.5], n)
        half = sps.t.ppf(0.975, n - 1) * means.std(ddof=1) / np.sqrt(n)
        return float(stats.mean_interval(means)[1] - means.mean() - half)

    counted = {n: beyond(n) for n in (12, 40)}
    monkeypatch.setattr(stats, "FEW_GROUPS", 0)
    plain = {n: beyond(n) for n in counted}
    assert min(plain.values()) > 0
    assert {n: counted[n] / plain[n] for n in plain} == pytest.approx({12: 1 + (10 / 12) ** 2, 40: 1.0625})


def test_an_interval_reaches_no_farther_than_the_groups_unless_t_does():
    """Seven groups, one far below: the bootstrap would reach -0.97."""
    means = np.array([-0.71, 0.02, 0.34, 0.59, 0.77, 0.89, 0.90])
    half = sps.t.ppf(0.975, 6) * means.std(ddof=1) / np.sqrt(7)
    assert stats.mean_interval(means) == pytest.approx((-0.71, means.mean() + half))
    alike = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.2])  # t reaches beyond the lowest
    low, _ = stats.mean_interval(alike)
    assert low == pytest.approx(alike.mean() - sps.t.ppf(0.975, 5) * alike.std(ddof=1) / np.sqrt(6)) and low < 0.1
    with stats.intervals_by(1):
        assert stats.mean_interval(means)[0] < -0.9
    assert stats.mean_interval(means)[0] == -0.71


def test_a_rule_for_intervals_of_a_later_version_can_not_be_verified():
    assert [numbers.interval_rule(section) for section in ({}, {"intervals": 2})] == [1, 2]
    for rule in (0, 3, "2", None):
        with pytest.raises(numbers.NotVerifiable, match="later version"):
            numbers.interval_rule({"intervals": rule})
