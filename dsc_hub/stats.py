"""Every number with an interval that a table or a card may print.

The unit is the split group (film, topic), not the row: several phrasings of one film are correlated, and counting them as
independent makes false alarms (`python -m pytest -m long tests/test_simulation.py`). So values are averaged within a group
first; a t interval and a sign-flip test are taken over the group means, from 40 groups on a bootstrap beside them. Rates
are treated alike: one verdict a group in McNemar's test, and Wilson's interval for as many trials as the groups are worth.

Absent is not zero: what too few groups can't tell is None. Everything is deterministic: random resampling is seeded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize
from scipy import stats as sps

Floats = Sequence[float] | np.ndarray
Groups = Sequence[Hashable] | np.ndarray  # names, or numbers of 64 bits
BATCH = 256  # resamples held in memory at once
RESAMPLES = 2**14  # of the sign-flip test, which is exact up to 14 groups, and of the bootstrap
BOOTSTRAP_FROM = 40  # groups; with 14 of them BCa gives about 9 % false alarms
ROUNDING = 1e-12  # relative
RESAMPLE_TO = 5000  # groups; with more the mean is normal to all digits shown, and resampling would take hours
POWER = 0.8  # of the minimum detectable difference


def _group_means(values: Floats, groups: Groups) -> np.ndarray:
    """Means of the groups, in the order in which these come first."""
    if isinstance(groups, np.ndarray):  # numbers, of many rows: without an object for each
        _, first, which = np.unique(groups, return_index=True, return_inverse=True)
        which = np.argsort(np.argsort(first))[which]
    else:
        number: dict[Hashable, int] = {}
        which = np.array([number.setdefault(group, len(number)) for group in groups], dtype=np.int64)
    sums = np.bincount(which, weights=np.asarray(values, dtype=float))
    return sums / np.bincount(which)


def estimate(values: Floats, groups: Groups, confidence: float = 0.95) -> dict[str, Any]:
    """Mean of group means with a t interval: {mean, low, high, n, groups}, from BOOTSTRAP_FROM groups on with `bootstrap`
    beside it: {low, high, method}. Absent numbers are None: mean without values, low and high with fewer than two groups.
    """
    means = _group_means(values, groups)
    out: dict[str, Any] = {"mean": None, "low": None, "high": None, "n": len(values), "groups": len(means)}
    if len(means):
        out["mean"] = float(means.mean())
    if len(means) > 1:
        half = float(sps.t.ppf((1 + confidence) / 2, len(means) - 1)) * _spread(means) / math.sqrt(len(means))
        out |= {"low": out["mean"] - half, "high": out["mean"] + half}
    if BOOTSTRAP_FROM <= len(means) <= RESAMPLE_TO:
        out["bootstrap"] = bootstrap(means, confidence)
    return out


def bootstrap(means: np.ndarray, confidence: float = 0.95) -> dict[str, Any]:
    """Bootstrap interval of the mean over groups: BCa, or percentile where BCa is degenerate (all alike, or nearly)."""
    if means.std() > 0:
        for method in ("BCa", "percentile"):
            with np.errstate(all="ignore"):
                found = sps.bootstrap(
                    (means,),
                    np.mean,
                    n_resamples=RESAMPLES,
                    confidence_level=confidence,
                    method=method,
                    batch=BATCH,
                    rng=np.random.default_rng(0),
                ).confidence_interval
            if np.isfinite([found.low, found.high]).all():
                return {"low": float(found.low), "high": float(found.high), "method": method}
    return {"low": float(means.mean()), "high": float(means.mean()), "method": "percentile"}


def paired_difference(a: Floats, b: Floats, groups: Groups, confidence: float = 0.95) -> dict[str, Any]:
    """`estimate` of a - b, pair by pair, and what it means. Values in the metric's unit.

    p: two-sided sign-flip permutation test on group means; p_t: paired t test on the same. None with fewer than two groups.
    effect: mean over standard deviation of the group means (Cohen's d_z); None where they are all alike.
    wins, ties, losses: pairs with a above, at, below b.
    detectable: the difference that this many groups of this spread would show (two-sided at `confidence`) with probability
    POWER; None with fewer than two groups.
    """
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    out = estimate(differences, groups, confidence)
    means = _group_means(differences, groups)
    spread = _spread(means)
    return out | {
        "p": sign_flip(means),
        "p_t": _t_test(means, spread),
        "effect": float(means.mean()) / spread if spread else None,
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
        "detectable": detectable(spread, len(means), confidence),
    }


def paired_rows(
    a: Mapping[Any, Mapping[str, Any]],
    b: Mapping[Any, Mapping[str, Any]],
    column: str,
    column_of_b: str | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """`paired_difference` of two arms' answers, {prompt and sample: row with `group` and scores}, on one score: over the keys
    that both have and that both have scored. `column_of_b`: what the score is called in b, if not `column`."""
    other = column_of_b or column
    both = [k for k in sorted(a) if k in b and a[k][column] is not None and b[k][other] is not None]
    return paired_difference(
        [a[k][column] for k in both], [b[k][other] for k in both], [a[k]["group"] for k in both], confidence
    )


def _spread(means: np.ndarray) -> float:
    """Standard deviation of group means; 0 where they differ by rounding alone, which would pass for a sure difference."""
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return spread if spread > ROUNDING * max(1.0, float(np.abs(means).max(initial=0.0))) else 0.0


def sign_flip(means: np.ndarray) -> float | None:
    """Two-sided p of the sign-flip permutation test of mean zero: exact up to 14 groups, else of RESAMPLES random flips.

    With fewer than six groups it can't go below 0.05, whatever the data. None with fewer than two. With more than RESAMPLE_TO
    groups, the normal distribution that the flips' sum has then.
    """
    if len(means) < 2:
        return None
    if len(means) > RESAMPLE_TO:
        size = float(np.sqrt((means**2).sum()))
        return float(2 * sps.norm.sf(abs(means.sum()) / size)) if size else 1.0
    return float(
        sps.permutation_test(
            (means,),
            _mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=BATCH,
            rng=np.random.default_rng(0),
        ).pvalue
    )


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis=axis)


def _t_test(means: np.ndarray, spread: float) -> float | None:
    """p of the t test of mean zero; with no spread at all it is 1 for a mean of zero and 0 otherwise."""
    if len(means) < 2:
        return None
    if spread == 0:
        return 1.0 if abs(means[0]) <= ROUNDING else 0.0
    return float(sps.ttest_1samp(means, 0.0).pvalue)


def detectable(spread: float, groups: int, confidence: float = 0.95, power: float = POWER) -> float | None:
    """The smallest true mean that a two-sided t test at 1 - `confidence` finds with probability `power`.

    `spread`: standard deviation of the group means, in their unit. By the noncentral t distribution. None with fewer than
    two groups; 0 without spread.
    """
    if groups < 2:
        return None
    df = groups - 1
    critical = sps.t.ppf((1 + confidence) / 2, df)

    def found(noncentrality: float) -> float:
        wrong_side = sps.nct.cdf(-critical, df, noncentrality)  # scipy has NaN where it is as good as zero
        return float(sps.nct.sf(critical, df, noncentrality) + np.nan_to_num(wrong_side))

    upper = 2.0
    while found(upper) < power:
        upper *= 2
    return float(optimize.brentq(lambda x: found(x) - power, 0.0, upper)) * spread / math.sqrt(groups)


# -- rates


def rate(hits: Sequence[bool], groups: Sequence[str], confidence: float = 0.95) -> dict[str, Any]:
    """Share of hits, as the mean of the groups' shares, with Wilson's interval for as many trials as the groups are worth:
    {mean, low, high, n, groups, effective_n}.

    effective_n = n / (1 + (m - 1) * ICC) with m = n / groups (Kish's design effect; the ICC by one-way analysis of variance,
    at least 0; where all rows are alike it is unknown and taken as 1), times (z / t)**2 with t of groups - 1 degrees of
    freedom, since the design effect is an estimate from so many groups (Korn and Graubard, Survey Methodology 24, 1998).
    With one row a group it is n. None without rows; no interval where several rows are all of one group.
    """
    n, names = len(hits), len(set(groups))
    if not n:
        return {"mean": None, "low": None, "high": None, "n": 0, "groups": 0, "effective_n": None}
    share = float(_group_means([float(h) for h in hits], groups).mean())
    worth: float = n
    if n > names:
        if names < 2:
            told = {"low": None, "high": None, "reason": "one group"}
            return {"mean": share, "n": n, "groups": 1, "effective_n": None} | told
        z, t = sps.norm.ppf((1 + confidence) / 2), sps.t.ppf((1 + confidence) / 2, names - 1)
        worth = n / (1 + (n / names - 1) * _icc(hits, groups)) * float(z / t) ** 2
    low, high = wilson(share * worth, worth, confidence)
    return {"mean": share, "low": low, "high": high, "n": n, "groups": names, "effective_n": worth}


def _icc(values: Sequence[float], groups: Sequence[str]) -> float:
    """Intraclass correlation by one-way analysis of variance, 0..1: how alike the rows of a group are. Needs two groups and
    more rows than groups."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        by_group[group].append(float(value))
    n, k = len(values), len(by_group)
    if len(set(map(float, values))) == 1:
        return 1.0
    mean = float(np.mean(values))
    between = sum(len(v) * (float(np.mean(v)) - mean) ** 2 for v in by_group.values()) / (k - 1)
    within = sum((x - float(np.mean(v))) ** 2 for v in by_group.values() for x in v) / (n - k)
    size = (n - sum(len(v) ** 2 for v in by_group.values()) / n) / (k - 1)
    return min(1.0, max(0.0, (between - within) / (between + (size - 1) * within)))


def rate_difference(
    a: Sequence[bool], b: Sequence[bool], groups: Sequence[str], confidence: float = 0.95
) -> dict[str, Any]:
    """Share of a minus share of b, paired: a t interval over groups within -1..1, and p of the exact McNemar test with one
    verdict a group (in which of a and b had more hits). With one pair a group this is McNemar's test itself; counting every
    pair instead would take phrasings of one film for independent. Where all groups agree there is no interval: a t interval
    of no width would claim too much.

    wins, ties, losses: groups with more, as many, fewer hits in a.
    """
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    out = estimate(differences, groups, confidence)
    means = _group_means(differences, groups)
    wins, losses = int((means > 0).sum()), int((means < 0).sum())
    out |= {"wins": wins, "ties": len(means) - wins - losses, "losses": losses}
    if out["low"] is not None:
        alike = out["low"] == out["high"]
        ends = {"low": None, "high": None, "reason": "all groups agree"}
        out |= ends if alike else {"low": max(-1.0, out["low"]), "high": min(1.0, out["high"])}
    p = sign_test(wins, losses) if wins + losses else 1.0
    return out | {"p": None if len(means) < 2 else p}


def wilson(hits: float, of: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share hits/of, both ends in 0..1; `of` > 0 trials (E. B. Wilson, JASA 22, 1927)."""
    z = float(sps.norm.ppf((1 + confidence) / 2))
    share = hits / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    # At 0 and at all the ends are exact, but for rounding.
    return 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == of else min(1.0, centre + half)


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided p of the exact sign test (McNemar's, of decided pairs): how likely is a split so uneven if both sides are
    preferred equally often. None without decided pairs. Ties are left out; pairs are taken as independent."""
    return float(sps.binomtest(wins, wins + losses).pvalue) if wins + losses else None


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """p values adjusted for the family they stand in: Holm's step-down (Scand. J. Statist. 6, 1979). A None stays one and
    is no member of the family."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    out: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for i, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - i)))
        out[name] = highest
    return out


def adjust(differences: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Add `p_holm` to every difference: its p adjusted for the family of all of them."""
    flat = {(pair, name): d for pair, by_name in differences.items() for name, d in by_name.items()}
    adjusted = holm({f"{pair}\0{name}": d["p"] for (pair, name), d in flat.items()})
    for (pair, name), d in flat.items():
        d["p_holm"] = adjusted[f"{pair}\0{name}"]
