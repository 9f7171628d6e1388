"""Numbers with intervals: worked by hand, and by the group."""

from __future__ import annotations

import math

import pytest

from dsc_hub.stats import estimate, paired_difference


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
    assert estimate([1.0], ["a"])["low"] is None and paired_difference([1.0], [0.0], ["a"])["p"] is None


def test_the_paired_difference_by_hand():
    # differences 1, 2, 3 in three groups: mean 2, sd 1, t = 2 sqrt(3) = 3.4641, two-sided p with 2 df = 0.0742
    d = paired_difference([2, 3, 4], [1, 1, 1], ["a", "b", "c"])
    assert d["mean"] == 2 and d["p"] == pytest.approx(0.0742, abs=1e-4)
    assert d["low"] == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)


def test_no_difference_at_all_has_p_one():
    assert paired_difference([1, 2], [1, 2], ["a", "b"])["p"] == 1.0
    assert paired_difference([2, 3], [1, 2], ["a", "b"])["p"] == 0.0
