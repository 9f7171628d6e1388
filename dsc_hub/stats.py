"""Every number with an interval that a table or a card may print.

The unit is the split group (film, topic), not the row: several phrasings of one film are correlated, and counting them as
independent makes false alarms. So values are averaged within a group first, and t intervals are taken over group means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats as sps


def _group_means(values: Sequence[float], groups: Sequence[str]) -> np.ndarray:
    by_group: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        by_group[group].append(value)
    return np.array([float(np.mean(v)) for v in by_group.values()])


def estimate(values: Sequence[float], groups: Sequence[str], confidence: float = 0.95) -> dict[str, Any]:
    """Mean of group means with a t interval: {mean, low, high, n, groups}. Absent numbers are None: mean without values,
    low and high with fewer than two groups."""
    means = _group_means(values, groups)
    out: dict[str, Any] = {"mean": None, "low": None, "high": None, "n": len(values), "groups": len(means)}
    if len(means):
        out["mean"] = float(means.mean())
    if len(means) > 1:
        half = float(sps.t.ppf((1 + confidence) / 2, len(means) - 1)) * float(means.std(ddof=1)) / math.sqrt(len(means))
        out |= {"low": out["mean"] - half, "high": out["mean"] + half}
    return out


def wilson(hits: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share hits/of, both ends in 0..1; `of` > 0 independent trials."""
    ends = sps.binomtest(hits, of).proportion_ci(confidence, method="wilson")
    return float(ends.low), float(ends.high)


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided p of the exact sign test: how likely is a split so uneven if both sides are preferred equally often. None
    without decided pairs. Ties are left out; pairs are taken as independent, which those of one group may not be."""
    return float(sps.binomtest(wins, wins + losses).pvalue) if wins + losses else None


def paired_difference(
    a: Sequence[float], b: Sequence[float], groups: Sequence[str], confidence: float = 0.95
) -> dict[str, Any]:
    """`estimate` of a - b, pair by pair, with the two-sided p of the paired t test on group means.

    p is None with fewer than two groups; with no spread at all it is 1 for a difference of zero and 0 otherwise.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    out = estimate(differences, groups, confidence)
    means = _group_means(differences, groups)
    out["p"] = None
    if len(means) > 1:
        spread = float(means.std(ddof=1))
        if spread == 0:
            out["p"] = 1.0 if means[0] == 0 else 0.0
        else:
            out["p"] = float(sps.ttest_1samp(means, 0.0).pvalue)
    return out
