"""Sample size: how many split groups would be enough for a criterion that is undecided."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any

import scipy  # imports scipy.special at its first use

from dsc_hub import stats

MOST_TIMES = 100  # a number of groups needed is given up to so many times those that there are

Interval = Mapping[str, Any]  # {mean, low, high, groups}


def groups_needed(
    estimate: Interval,
    limit: float,
    confidence: float = 0.95,
    power: float = stats.POWER,
    repeated: Callable[[int], Interval] | None = None,
) -> int | None:
    """Return the number of groups for which the interval would lie on its mean's side of `limit`.

    This holds with probability `power` if the true mean is the estimated one. `repeated(m)` is the estimate from m
    times these groups (Wilson's interval of a rare event shrinks with m, not with its root); without one, or without
    its interval, the half width is that of a mean (`_half_of_mean`). None without an interval, and if the mean is so
    near to the limit that more than MOST_TIMES as many groups would be needed: that number says nothing.
    """
    mean, low, high = (estimate[k] for k in ("mean", "low", "high"))
    if mean is None or low is None or high is None or mean == limit:
        return None

    def half(times: int) -> float:
        if times == 1:
            return _half(estimate, limit)
        again = repeated(times) if repeated else None
        if again is None or again["low"] is None:
            return _half_of_mean(estimate, times, confidence)
        return _half(again, limit)

    z = float(scipy.special.ndtri((1 + confidence) / 2))
    aim = abs(mean - limit) / (1 + float(scipy.special.ndtri(power)) / z)
    if half(1) <= aim:  # the interval of a smaller number of groups is not known: that of a mean is near enough
        fewer: float = estimate["groups"] * (half(1) / aim) ** 2
        return max(stats.LEAST_GROUPS, math.ceil(fewer))
    enough = 2
    while half(enough) > aim:
        if enough >= MOST_TIMES:
            return None
        enough = min(2 * enough, MOST_TIMES)
    above = bisect.bisect_left(range(enough), -aim, lo=1, key=lambda times: -half(times))
    wide, narrow = half(above - 1), half(above)
    # Between two multiples of the groups the width follows a power of their number.
    part = math.log(wide / aim) / math.log(wide / narrow) if wide > narrow else 1.0
    needed: float = estimate["groups"] * (above - 1) * (above / (above - 1)) ** part
    return max(stats.LEAST_GROUPS, math.ceil(needed - stats.ROUNDING * needed))


def _half(estimate: Interval, limit: float) -> float:
    """Return how far the interval reaches from its mean towards `limit`."""
    mean, low, high = (float(estimate[k]) for k in ("mean", "low", "high"))
    return mean - low if mean > limit else high - mean


def _half_of_mean(estimate: Interval, times: int, confidence: float) -> float:
    """Return the half width to expect of a mean's interval from so many times the groups.

    It shrinks with the square root of their number and with t's quantile. The interval of a few groups, one of them far
    off, is much wider on one side (`stats.mean_interval`), and that of more groups less so: the mean of both sides
    counts. tests/test_sample_size.py has figures.
    """
    few, many = (float(scipy.special.stdtrit(n * estimate["groups"] - 1, (1 + confidence) / 2)) for n in (1, times))
    return float(estimate["high"] - estimate["low"]) / 2 * many / few / math.sqrt(times)


def groups_for_p(
    p: float, adjusted: float, groups: int, confidence: float = 0.95, power: float = stats.POWER
) -> int | None:
    """Return the number of groups for which an adjusted p would be at most 1 - `confidence`, with probability `power`.

    `p` and `adjusted` are those of `groups` groups, with the estimated difference as the true one. Normal approximation
    of the test; at least `stats.CLAIM_GROUPS`. None if p is 1, or if more than MOST_TIMES as many would be needed.
    """
    if not 0 < p < 1:
        return None
    reached, wanted = (float(-scipy.special.ndtri(x / 2)) for x in (p, (1 - confidence) * p / adjusted))
    times = ((wanted + float(scipy.special.ndtri(power))) / reached) ** 2
    return max(stats.CLAIM_GROUPS, math.ceil(groups * times)) if times <= MOST_TIMES else None
