"""Statistics: estimates with intervals, paired tests, and p values for tables and cards.

The unit is the split group (film, topic), not the row: several phrasings of one film are correlated, and treating them
as independent gives false positives. So values are averaged within a group first; intervals and a sign-flip test use
the group means. Rates are treated likewise: one verdict per group in McNemar's test, and Wilson's interval for the
effective number of trials. Coverage of the intervals and false-positive rates of the tests were simulated, for normal,
skewed and bounded values and for groups of equal and of unequal size: `python -m pytest -m long -s
tests/test_simulation.py`, figures in docs/concepts/numbers.md.

A missing value is None, never zero; this includes numbers for which there are too few groups. Everything is
deterministic: random resampling is seeded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import scipy  # imports scipy.stats at its first use: a second that short commands don't have

Floats = Sequence[float] | np.ndarray
Groups = Sequence[Hashable] | np.ndarray  # names, or 64-bit integers
Bounds = tuple[float | None, float | None]  # lowest and highest possible value; None: no limit
BATCH = 256  # resamples held in memory at once
RESAMPLES = 2**14  # resamples of the sign-flip test, which is exact up to 14 groups
BOOTSTRAP_RESAMPLES = 2000
# Minimum spread of a resample, as a fraction of the sample's: with nearly equal values the studentised mean diverges.
LEAST_SPREAD = 0.2
FEW_GROUPS = 10  # up to this number, the bootstrap's excess over t counts twice
LEAST_GROUPS = 6  # with fewer, a two-sided sign-flip test cannot go below 0.05, and intervals are unreliable
ROUNDING = 1e-12  # relative
RESAMPLE_TO = 5000  # groups; with more, the mean is normal to all digits shown, and resampling would take hours
POWER = 0.8  # power for the minimum detectable difference
CLAIM_GROUPS = 7  # with fewer, the sign-flip p of two scores can't both be 0.05 after Holm: 2 * 2 / 2**6 = 0.0625
ASSUMED_ICC = 0.3  # intraclass correlation assumed for rare events, for which it cannot be estimated ...
ASSUMED_EVENTS = 4  # ... and the weight of that assumption, in events
UNBOUNDED: Bounds = (None, None)
# Rule that makes intervals of means; metrics.json records it. 1: they could reach beyond all groups.
INTERVALS = 2
_intervals = ContextVar("intervals", default=INTERVALS)


@contextmanager
def intervals_by(rule: int) -> Iterator[None]:
    """Make intervals of means by an earlier rule, 1..INTERVALS, as verification of older numbers needs."""
    token = _intervals.set(rule)
    try:
        yield
    finally:
        _intervals.reset(token)


def interval_rule() -> int:
    """Return the rule that intervals of means are made by now."""
    return _intervals.get()


def _group_means(values: Floats, groups: Groups) -> np.ndarray:
    """Return the means of the groups, in order of their first occurrence."""
    if isinstance(groups, np.ndarray):  # integers for many rows: avoids one object per row
        _, first, index = np.unique(groups, return_index=True, return_inverse=True)
        index = np.argsort(np.argsort(first))[index]
    else:
        number: dict[Hashable, int] = {}
        index = np.array([number.setdefault(group, len(number)) for group in groups], dtype=np.int64)
    sums = np.bincount(index, weights=np.asarray(values, dtype=float))
    return sums / np.bincount(index)


def too_few(groups: int) -> str:
    """Return the reason why this number of groups gives no interval."""
    return f"{groups} group{'' if groups == 1 else 's'}; an interval needs {LEAST_GROUPS}"


def estimate(values: Floats, groups: Groups, confidence: float = 0.95, bounds: Bounds = UNBOUNDED) -> dict[str, Any]:
    """Return the mean of group means with its interval: {mean, low, high, n, groups}, and `reason` without an interval.

    `bounds` is the range of the values; the interval is clipped to it. Missing numbers are None: the mean without
    values, low and high with fewer than LEAST_GROUPS groups or if all group means are equal (an interval of zero width
    would claim too much).
    """
    return _clipped(_unclipped(len(values), _group_means(values, groups), confidence), bounds)


def _unclipped(n: int, means: np.ndarray, confidence: float) -> dict[str, Any]:
    """Return the `estimate` of `n` values with these group means, before it is clipped to their range."""
    out: dict[str, Any] = {"mean": None, "low": None, "high": None, "n": n, "groups": len(means)}
    if not len(means):
        return out
    out["mean"] = float(means.mean())
    if len(means) < LEAST_GROUPS:
        return out | {"reason": too_few(len(means))}
    if _spread(means) == 0:
        return out | {"reason": "all groups are alike"}
    low, high = mean_interval(means, confidence)
    return out | {"low": low, "high": high}


def _clipped(estimate: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    return estimate | {end: _clip(estimate[end], bounds) for end in ("low", "high") if estimate[end] is not None}


def _clip(value: float, bounds: Bounds) -> float:
    low, high = bounds
    return min(max(value, -math.inf if low is None else low), math.inf if high is None else high)


def mean_interval(means: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean of at least two different values.

    It is the t interval, extended on each side by the excess of the studentised bootstrap over it, times the factor
    1 + (FEW_GROUPS / n)^2, at most 2, but no farther than the values themselves reach.

    The t interval undercovers skewed values (86 % with 12 groups of counts). The studentised bootstrap follows the skew
    (B. Efron, Canad. J. Statist. 9, 1981; P. Hall, Ann. Statist. 16, 1988), but undercovers symmetric values with long
    tails. The spread of a resample is at least LEAST_SPREAD of the sample's. A few groups contain too little of a long
    tail for resamples to show it, hence the factor. Alternatives tried at 12 groups: no factor (heavy tails 91.8 %,
    differences 90.5 %), 1 + 18 / n (95.4 %, but counts 97.0 %, and 2.4 times as wide as t). tests/test_simulation.py
    has the figures. Without the last limit seven values gave intervals of 1.4 to 2.2 times t's width; with it 1.3 to
    1.5, and coverage falls by at most 1.3 points (exponential, 95.3 to 94.0 %), from 12 values on by none.
    """
    n = len(means)
    mean, spread = float(means.mean()), float(means.std(ddof=1))
    error = spread / math.sqrt(n)
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1))
    below, above = half, half
    if n <= RESAMPLE_TO:
        ratios = np.concatenate([_studentised(means, weights, mean, spread) for weights in _resamples(n)])
        lower, upper = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
        factor = 1 + min(1.0, FEW_GROUPS / n) ** 2
        below += factor * max(0.0, float(upper) - half)
        above += factor * max(0.0, -float(lower) - half)
    if interval_rule() == 1:
        return mean - below * error, mean + above * error
    low = min(mean - half * error, max(mean - below * error, float(means.min())))
    high = max(mean + half * error, min(mean + above * error, float(means.max())))
    return low, high


def _studentised(means: np.ndarray, weights: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """Return (resampled mean - mean) / its standard error for each resample.

    `weights` [resamples, n] holds how often each value is drawn.
    """
    n = len(means)
    centred = means - mean
    resampled = weights @ centred / n
    variance = np.maximum(weights @ centred**2 / n - resampled**2, 0.0) * n / (n - 1)
    t: np.ndarray = resampled * math.sqrt(n) / np.maximum(np.sqrt(variance), LEAST_SPREAD * spread)
    return t


def _resamples(n: int) -> list[np.ndarray]:
    """Return bootstrap resamples of n values as counts, in batches; always the same ones for a given n."""
    return _drawn(n) if n <= BATCH else _draw(n)


def _draw(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    sizes = [min(BATCH, BOOTSTRAP_RESAMPLES - start) for start in range(0, BOOTSTRAP_RESAMPLES, BATCH)]
    return [rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float) for size in sizes]


_drawn = lru_cache(maxsize=8)(_draw)


def paired_difference(
    a: Floats, b: Floats, groups: Groups, confidence: float = 0.95, bounds: Bounds = UNBOUNDED
) -> dict[str, Any]:
    """Return the `estimate` of a - b over pairs, with tests. Values in the metric's unit, `bounds` their range.

    p: two-sided sign-flip permutation test on group means; p_t: paired t test on the same. None with fewer than
    LEAST_GROUPS groups.
    effect: mean over standard deviation of the group means (Cohen's d_z); None if they are all equal.
    wins, ties, losses: pairs with a above, equal to, below b.
    detectable: the true difference with which this interval leaves out zero with probability POWER; None without an
    interval.
    """
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    means = _group_means(differences, groups)
    out = _unclipped(len(differences), means, confidence)
    spread, enough = _spread(means), len(means) >= LEAST_GROUPS
    tests = {
        "p": sign_flip(means) if enough else None,
        "p_t": _t_test(means, spread) if enough else None,
        "effect": float(means.mean()) / spread if spread else None,
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
        "detectable": None,
    }
    if out["low"] is not None:
        half = max(out["mean"] - out["low"], out["high"] - out["mean"])
        error = spread / math.sqrt(len(means))
        tests["detectable"] = detectable(spread, len(means), critical=half / error)
    widest = None if None in bounds else float(bounds[1] - bounds[0])  # type: ignore[operator]
    return _clipped(out, UNBOUNDED if widest is None else (-widest, widest)) | tests


def _spread(means: np.ndarray) -> float:
    """Return the standard deviation of group means; 0 if they differ only by rounding, which is no real difference."""
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return spread if spread > ROUNDING * max(1.0, float(np.abs(means).max(initial=0.0))) else 0.0


def sign_flip(means: np.ndarray) -> float | None:
    """Return the two-sided p of the sign-flip permutation test of mean zero; None with fewer than two groups.

    Exact up to 14 groups, then from RESAMPLES random flips; above RESAMPLE_TO groups from the normal approximation of
    the flips' sum. With fewer than six groups p cannot go below 0.05, whatever the data.
    """
    if len(means) < 2:
        return None
    if np.abs(means).max() <= ROUNDING:  # 0.1 + 0.2 - 0.3 in every group is no difference
        return 1.0
    if len(means) > RESAMPLE_TO:
        size = float(np.sqrt((means**2).sum()))
        return float(2 * scipy.stats.norm.sf(abs(means.sum()) / size)) if size else 1.0
    return float(
        scipy.stats.permutation_test(
            (means,),
            _mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=BATCH,
            rng=np.random.default_rng(0),
        ).pvalue
    )


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(x.mean(axis=axis))


def _t_test(means: np.ndarray, spread: float) -> float | None:
    """Return the p of the t test of mean zero; without spread, 1 for a mean of zero, else None."""
    if len(means) < 2:
        return None
    if spread == 0:
        return 1.0 if abs(means[0]) <= ROUNDING else None
    return float(scipy.stats.ttest_1samp(means, 0.0).pvalue)


def detectable(
    spread: float, groups: int, confidence: float = 0.95, power: float = POWER, critical: float | None = None
) -> float | None:
    """Return the smallest true mean whose two-sided interval leaves out zero with probability `power`.

    `spread`: standard deviation of the group means, in their unit. `critical`: half width of the interval in standard
    errors; by default that of t at `confidence`. Uses the noncentral t distribution. None with fewer than two groups; 0
    without spread.
    """
    if groups < 2:
        return None
    df = groups - 1
    # scipy.special and not scipy.stats, which takes a second to import: `dsc plan` calls this.
    half = float(scipy.special.stdtrit(df, (1 + confidence) / 2)) if critical is None else critical

    def power_at(noncentrality: float) -> float:
        right, wrong = scipy.special.nctdtr(df, noncentrality, [half, -half])
        return float(1 - right + np.nan_to_num(wrong))  # NaN if it is practically zero

    upper = 2.0
    while power_at(upper) < power:
        upper *= 2
    return float(scipy.optimize.brentq(lambda x: power_at(x) - power, 0.0, upper)) * spread / math.sqrt(groups)


# -- rates


def rate(hits: Sequence[bool], groups: Sequence[str], confidence: float = 0.95) -> dict[str, Any]:
    """Return the share of hits (mean of the groups' shares) with Wilson's interval at the effective sample size.

    The result is {mean, low, high, n, groups, effective_n}. effective_n = k / (ICC + (1 - ICC) mean(1 / n_i)) for k
    groups of n_i rows, from the variance of a mean of group shares, for groups of any sizes; times (z / t)**2 with t of
    k - 1 degrees of freedom, since the ICC is estimated from k groups (Korn and Graubard, Survey Methodology 24, 1998).
    The ICC is that of a one-way analysis of variance, at least 0; for rare events it is poorly determined, so it is
    shrunk towards ASSUMED_ICC with the weight of ASSUMED_EVENTS events. With one row per group effective_n is n. None
    without rows; no interval with fewer than LEAST_GROUPS groups.
    """
    n, names = len(hits), len(set(groups))
    out: dict[str, Any] = {"mean": None, "low": None, "high": None, "n": n, "groups": names, "effective_n": None}
    if not n:
        return out
    out["mean"] = share = float(_group_means([float(h) for h in hits], groups).mean())
    if names < LEAST_GROUPS:
        return out | {"reason": too_few(names)}
    effective: float = n
    if n > names:
        z, t = scipy.stats.norm.ppf((1 + confidence) / 2), scipy.stats.t.ppf((1 + confidence) / 2, names - 1)
        icc = _icc(hits, groups)
        effective = names / (icc + (1 - icc) * _mean_inverse_size(groups)) * float(z / t) ** 2
    low, high = wilson(share * effective, effective, confidence)
    return out | {"low": low, "high": high, "effective_n": effective}


def _mean_inverse_size(groups: Groups) -> float:
    """Return mean(1 / n_i) for groups of n_i rows."""
    return float(np.mean(1 / np.unique(np.asarray(groups), return_counts=True)[1]))


def _icc(hits: Sequence[bool], groups: Sequence[str]) -> float:
    """Return the intraclass correlation of hits, 0..1, by one-way analysis of variance, shrunk towards ASSUMED_ICC.

    It measures how alike the rows of a group are. Needs two groups and more rows than groups.
    """
    by_group: dict[str, list[float]] = defaultdict(list)
    for hit, group in zip(hits, groups, strict=True):
        by_group[group].append(float(hit))
    n, k = len(hits), len(by_group)
    total = sum(map(float, hits))
    events = min(total, n - total)
    if not events:
        return ASSUMED_ICC
    mean = total / n
    between = sum(len(v) * (float(np.mean(v)) - mean) ** 2 for v in by_group.values()) / (k - 1)
    within = sum((x - float(np.mean(v))) ** 2 for v in by_group.values() for x in v) / (n - k)
    size = (n - sum(len(v) ** 2 for v in by_group.values()) / n) / (k - 1)
    observed = min(1.0, max(0.0, (between - within) / (between + (size - 1) * within)))
    return (events * observed + ASSUMED_EVENTS * ASSUMED_ICC) / (events + ASSUMED_EVENTS)


def rate_difference(
    a: Sequence[bool], b: Sequence[bool], groups: Sequence[str], confidence: float = 0.95
) -> dict[str, Any]:
    """Return the share of a minus the share of b, paired: {mean, low, high, n, groups, wins, ties, losses, p}.

    The interval is Newcombe's hybrid of the two shares' intervals (`rate`), with the correlation of the group shares,
    corrected for continuity if it is positive (R. G. Newcombe, Statist. Med. 17, 1998, method 10; with several pairs
    per group the correction is that of their mean). It stays within -1..1 and has a positive width even if no pair
    differs. With one pair per group, a rate of one half and all differing pairs on one side it covers only 91 to 92 %.
    p is that of the exact McNemar test with one verdict per group (which of a and b had more hits); with one pair per
    group this is McNemar's test itself. Counting every pair would treat phrasings of one film as independent. None with
    fewer than LEAST_GROUPS groups.

    wins, ties, losses: groups with more, as many, fewer hits in a.
    """
    one, other = rate(a, groups, confidence), rate(b, groups, confidence)
    first, second = (_group_means([float(x) for x in side], groups) for side in (a, b))
    wins, losses = int((first > second).sum()), int((first < second).sum())
    out = {key: one[key] for key in ("mean", "low", "high", "n", "groups")} | {"p": None}
    out |= {"wins": wins, "ties": len(first) - wins - losses, "losses": losses}
    if one["mean"] is None:
        return out
    out["mean"] = one["mean"] - other["mean"]
    if one["low"] is None:
        return out | {"reason": one["reason"]}
    spread = _spread(first) * _spread(second)
    together = float(((first - first.mean()) * (second - second.mean())).sum())
    if together > 0:
        together = max(0.0, together - 0.5 * _mean_inverse_size(groups))
    phi = together / (len(first) - 1) / spread if spread else 0.0
    below = _hypotenuse(one["mean"] - one["low"], other["high"] - other["mean"], phi)
    above = _hypotenuse(one["high"] - one["mean"], other["mean"] - other["low"], phi)
    out |= {"low": max(-1.0, out["mean"] - below), "high": min(1.0, out["mean"] + above)}
    return out | {"p": sign_test(wins, losses) if wins + losses else 1.0}


def _hypotenuse(x: float, y: float, correlation: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))


def wilson(hits: float, of: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share hits/of, both ends in 0..1; `of` > 0 trials (E. B. Wilson, JASA 22, 1927)."""
    z = float(scipy.stats.norm.ppf((1 + confidence) / 2))
    share = hits / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    # For 0 hits and for all hits the ends are exact, except for rounding.
    return 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == of else min(1.0, centre + half)


def sign_test(wins: int, losses: int) -> float | None:
    """Return the two-sided p of the exact sign test (McNemar's test of decided pairs); None without decided pairs.

    It is the probability of a split at least this uneven if both sides are equally likely. Ties are left out; pairs are
    treated as independent.
    """
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else None


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the p values adjusted for their family by Holm's step-down method (Scand. J. Statist. 6, 1979).

    A None stays None and is not part of the family.
    """
    ranked = sorted((p, name) for name, p in p_values.items() if p is not None)
    out: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for i, (p, name) in enumerate(ranked):
        highest = max(highest, min(1.0, p * (len(ranked) - i)))
        out[name] = highest
    return out


PRIMARY_SCORES = ("reward", "second")


def adjust_scores(
    differences: Mapping[str, Mapping[str, dict[str, Any]]], primary: str | None
) -> dict[str, Any] | None:
    """Add `p_holm` to every difference of scores, in two families; return {difference, scores} of the primary one.

    The first family has the scores of the comparison `primary` that were named in advance (reward and second scorer),
    the second all others. So a further arm does not affect the primary comparison. None without a primary comparison.
    """
    named = {s: d for s, d in differences.get(primary or "", {}).items() if s in PRIMARY_SCORES}
    rest = {
        pair: {s: d for s, d in by_score.items() if pair != primary or s not in named}
        for pair, by_score in differences.items()
    }
    adjust({str(primary): named})
    adjust(rest)
    return {"difference": primary, "scores": list(named)} if named else None


def adjust(differences: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Add `p_holm` to every difference: its p adjusted for the family of all differences."""
    flat = {(pair, name): d for pair, by_name in differences.items() for name, d in by_name.items()}
    adjusted = holm({f"{pair}\0{name}": d["p"] for (pair, name), d in flat.items()})
    for (pair, name), d in flat.items():
        d["p_holm"] = adjusted[f"{pair}\0{name}"]


# -- single numbers


def group_mean(values: Floats, groups: Groups) -> float | None:
    """Return the mean of the groups' means; None without values."""
    return float(_group_means(values, groups).mean()) if len(values) else None


def spread_of_groups(values: Floats, groups: Groups) -> float:
    """Return the standard deviation of the groups' means, in the unit of the values; 0 with fewer than two groups."""
    return _spread(_group_means(values, groups)) if len(values) else 0.0


def jackknife(whole: float, replicates: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Return the interval of a statistic that is not a mean: {mean, low, high, groups}; `mean` is the statistic itself.

    `replicates` are the values of the statistic with one group (or block of groups) left out at a time. Standard error
    by the delete-one jackknife, interval by t with n - 1 degrees of freedom for n replicates (B. Efron, C. Stein, Ann.
    Statist. 9, 1981). No interval with fewer than LEAST_GROUPS replicates.
    """
    n = len(replicates)
    out: dict[str, Any] = {"mean": whole, "low": None, "high": None, "groups": n}
    if n < LEAST_GROUPS:
        return out | {"reason": too_few(n)}
    error = math.sqrt((n - 1) / n * float(((np.asarray(replicates) - np.mean(replicates)) ** 2).sum()))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return out | {"low": whole - half, "high": whole + half}
