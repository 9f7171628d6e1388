"""Criteria of the claim that distilled is better than base, their verdicts, and the overall verdict. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc_hub import sample_size, stats
from dsc_hub.config.sampling import HygieneConfig
from dsc_hub.runs.metrics_schema import ClaimVerdict, Criterion, CriterionVerdict

LEAST_CONFIDENCE = 0.95

BETTER = {"reward": "better on the reward", "second": "better on the second scorer"}  # score -> its criterion

Row = Mapping[str, Any]  # an estimate as `stats` makes it, or what a score is


@dataclass(frozen=True, slots=True)
class Setting:
    """Conditions of the evaluation that the criteria depend on.

    `split` of the prompts, `samples` (answers per prompt), `confidence` of all intervals, `trained_here` (whether this
    run trained the adapter), `look` (position of the adapter among those scored on this test set; 1: the first; None:
    unknown), the recipe's `hygiene` section, and `unreadable`, the measures that know only another language than the
    prompts', with the reason.
    """

    split: str
    samples: int = 1
    confidence: float = 0.95
    trained_here: bool = True
    look: int | None = None
    hygiene: HygieneConfig = HygieneConfig()
    unreadable: Mapping[str, str] = field(default_factory=dict)


def verdict_of(criteria: Iterable[tuple[str, str]], answers: int) -> ClaimVerdict:
    """Return the overall verdict of all criteria, given as (name, verdict).

    "fails" if a criterion failed; "holds" if none is undecided, the criteria on the scores are met and answers were
    compared; else "not enough data".
    """
    verdicts = dict(criteria)
    if "failed" in verdicts.values():
        return "fails"
    is_better = answers > 0 and all(verdicts.get(name) == "met" for name in BETTER.values())
    return "holds" if is_better and "undecided" not in verdicts.values() else "not enough data"


def is_within(value: float, at_least: float | None, at_most: float | None) -> bool:
    """Return whether a value lies between its limits, and on neither of them."""
    return (at_least is None or value > at_least) and (at_most is None or value < at_most)


def within_limits(
    name: str,
    estimate: Row,
    confidence: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    note: str = "",
    repeated: Callable[[int], Row] | None = None,
    **more: Any,
) -> Criterion:
    """Return a criterion judged by its interval {mean, low, high, groups, reason}.

    "met" if the interval lies within the limits, "failed" if it lies wholly outside one of them, else "undecided".
    `repeated(m)` is the estimate from m times the groups (see `sample_size.groups_needed`).
    """
    value, low, high = (estimate[k] for k in ("mean", "low", "high"))
    if value is None or low is None or high is None:
        reason = estimate.get("reason") or ("nothing was measured" if value is None else "there is no interval")
        note = "; ".join(filter(None, (note, reason)))
        verdict: CriterionVerdict = "unmeasured" if value is None else "undecided"
        return Criterion(name=name, verdict=verdict, value=value, at_least=at_least, at_most=at_most, note=note, **more)
    is_met = (at_least is None or low >= at_least) and (at_most is None or high <= at_most)
    is_failed = (at_least is not None and high < at_least) or (at_most is not None and low > at_most)
    verdict = "met" if is_met else "failed" if is_failed else "undecided"
    needed = None
    if verdict == "undecided" and is_within(value, at_least, at_most):
        limits = [limit for limit in (at_least, at_most) if limit is not None]
        each = [sample_size.groups_needed(estimate, limit, confidence, repeated=repeated) for limit in limits]
        needed = None if None in each else max(n for n in each if n is not None)
    return Criterion(
        name=name,
        verdict=verdict,
        value=value,
        low=low,
        high=high,
        at_least=at_least,
        at_most=at_most,
        groups_needed=needed,
        note=note,
        **more,
    )


def _upwards(difference: Row, score: Row) -> dict[str, Any]:
    """Return the difference, negated if lower scores are better, so that positive means better."""
    if score.get("higher_is_better", True):
        return dict(difference)
    mean, low, high = (None if difference[k] is None else -difference[k] for k in ("mean", "high", "low"))
    return dict(difference) | {"mean": mean, "low": low, "high": high}


def better(
    name: str, difference: Row | None, score: Row, setting: Setting, repeated: Callable[[int], Row] | None = None
) -> Criterion:
    """Return the criterion "distilled beats base" for a score of BETTER.

    It is met if the interval excludes zero and the Holm-adjusted p is at most `1 - confidence`. `repeated`: as in
    `within_limits`, of the difference as it is better.
    """
    label = BETTER[name]
    if difference is None:
        return Criterion(
            name=label, verdict="unmeasured", note="there is no second scorer" if name == "second" else "not measured"
        )
    if setting.confidence < LEAST_CONFIDENCE:
        return Criterion(name=label, verdict="unmeasured", note=_loose(setting))
    upwards = _upwards(difference, score)
    criterion = within_limits(label, upwards, setting.confidence, at_least=0.0, repeated=repeated)
    if criterion.verdict != "met":
        return criterion
    if criterion.low == 0:  # `within_limits` accepts an interval that touches its limit
        return criterion.model_copy(update={"verdict": "undecided"})
    p = difference.get("p_holm")
    if p is not None and p > 1 - setting.confidence:
        groups = difference.get("groups") or stats.CLAIM_GROUPS
        few = (
            f"; with fewer than {stats.CLAIM_GROUPS} groups it can't be smaller" if groups < stats.CLAIM_GROUPS else ""
        )
        needed = sample_size.groups_for_p(difference["p"], p, groups, setting.confidence)
        update = {
            "verdict": "undecided",
            "note": f"p {p:.3f} after Holm for both scores{few}",
            "groups_needed": needed,
        }
        return criterion.model_copy(update=update)
    return criterion


def _loose(setting: Setting) -> str:
    return f"the interval is at {setting.confidence:.0%}, the claim needs {LEAST_CONFIDENCE:.0%}"


def first_look(setting: Setting) -> Criterion:
    """Return the criterion "first adapter scored on this test set"."""
    name = "first look at this test set"
    if setting.split != "test":
        return Criterion(name=name, verdict="unmeasured", note="these are not test prompts")
    if setting.look is None:
        return Criterion(name=name, verdict="undecided", note="how often this test set was scored before is not known")
    if setting.look == 1:
        return Criterion(name=name, verdict="met", note="no other adapter was scored on it before")
    before = "1 other adapter was" if setting.look == 2 else f"{setting.look - 1} other adapters were"
    return Criterion(name=name, verdict="undecided", note=f"{before} scored on it before: take other test prompts")
