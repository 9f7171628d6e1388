"""Sentences about the claim and the chains, generated from recorded numbers for display, never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsc_hub.config.recipe import Recipe
from dsc_hub.report.formatting import count, many, measured, number, percent
from dsc_hub.runs.metrics_schema import Claim, Criterion, Rounds, Sampling
from dsc_hub.runs.verdict import is_within
from dsc_hub.sample_size import MOST_TIMES

# Kind of each criterion's value, limits and two numbers: a share of answers, a score's difference, words, or a ratio.
SHARES = {
    "as many answers": "answers missing (failed, empty or unscored)",
    "names its subject": "answers that name their subject",
    "no mannerisms": "answers with the phrase that has grown most",
    "no more talk about the conversation": "answers that talk about the conversation",
    "no more repetition": "answers that repeat themselves",
    "no more in another language": "answers in another language",
    "no more unfinished answers": "answers cut off",
}
RATIOS = {"as varied": ("distinct word pairs", 3), "as long": ("words (geometric mean)", 1)}


# -- the claim


MOST_NAMED = 5  # criteria that a sentence names


def claim_sentence(claim: Claim | None) -> str:
    """Return the verdict on the claim "distilled is better than its base" as a sentence; "" if it was not judged."""
    if not claim:
        return ""
    by_verdict: dict[str, list[str]] = {}
    for c in claim.criteria:
        by_verdict.setdefault(c.verdict, []).append(c.name)
    if claim.verdict == "holds":
        left = [
            f"not {word}: {', '.join(by_verdict[key])}"
            for key, word in (("unmeasured", "measured"), ("not judged", "judged"))
            if key in by_verdict
        ]
        return (
            "The claim holds: distilled is better than its base, and what else was looked at stays within its limits"
            + (f" ({'; '.join(left)})." if left else ".")
        )
    undecided = sorted((c for c in claim.criteria if c.verdict == "undecided"), key=_what_it_needs)
    open_too = f" Undecided: {_named([c.name for c in undecided])}." if undecided else ""
    if claim.verdict == "fails":
        failed = _named(by_verdict["failed"])
        return f'The claim "distilled is better than its base" fails on: {failed}.{open_too}'
    missing = [c.name for c in claim.criteria if c.verdict == "unmeasured" and c.name.startswith("better")]
    unmeasured = f" Not measured: {', '.join(missing)}." if missing else ""
    return (
        f'Not enough data to say "distilled is better than its base".{unmeasured}{open_too}{_needed(claim, undecided)}'
    )


def _named(criteria: Sequence[str]) -> str:
    """Name the criteria, of many the first few."""
    more = len(criteria) - MOST_NAMED
    return ", ".join(criteria[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _what_it_needs(c: Criterion) -> tuple[bool, bool, int]:
    """Sort key of undecided criteria: what more groups can't mend, the scores, then the most groups needed first."""
    return not _is_beyond(c), not c.name.startswith("better"), -(c.groups_needed or 0)


def _is_beyond(c: Criterion) -> bool:
    """Return whether what was measured of an undecided criterion lies on the wrong side of its limit."""
    return measured(c.value) and measured(c.low) and not is_within(c.value, c.at_least, c.at_most)


def _needed(claim: Claim, undecided: Sequence[Criterion]) -> str:
    """Return what would decide the undecided criteria, as sentences; "" if that is unknown."""
    needed = [c.groups_needed for c in undecided if measured(c.groups_needed)]
    out = ""
    if needed:
        all_of_them = "it" if len(undecided) == 1 else "them"
        which = all_of_them if len(needed) == len(undecided) else f"{len(needed)} of these {len(undecided)}"
        now = f"; there are {count(claim.groups)}" if measured(claim.groups) else ""
        out = (
            f" If what was seen here is how it is, {count(max(needed))} test groups would decide {which}, four times "
            f"in five{now}."
        )
    if beyond := [c.name for c in undecided if _is_beyond(c)]:
        out += f" Beyond its limit already, so that more groups may show a failure: {_named(beyond)}."
    return out


def criterion_sentence(c: Criterion) -> str:
    """Return a criterion's measured value, its limits, and the number of groups needed, as one sentence."""
    out = [*_quantity(c), *_limits(c)]
    if c.note:
        out.append(c.note)
    if measured(c.groups_needed):
        out.append(f"about {count(c.groups_needed)} groups would be needed")
    elif c.verdict == "undecided" and measured(c.value) and measured(c.low):
        out.append(
            f"more than {MOST_TIMES} times as many groups would be needed"
            if not _is_beyond(c)
            else "what was seen is beyond the limit, so more groups may show a failure"
        )
    return "; ".join(out)


def _quantity(c: Criterion) -> list[str]:
    name, sides = c.name, (c.distilled, c.base)
    if not measured(c.value):
        return []
    if name in SHARES:
        shown = [f"{percent(sides[0], 1)} of {SHARES[name]}, base {percent(sides[1], 1)}"] if measured(sides[1]) else []
        return [*shown, f"difference {_points(c.value)}{_interval(c, lambda x: number(100 * x, 1))}"]
    if name in RATIOS:
        what, digits = RATIOS[name]
        both = f"{what} {number(sides[0], digits)}, base {number(sides[1], digits)}"
        return [f"{both}: {number(c.value)} of it{_interval(c, number)}"]
    return [f"distilled − base {number(c.value, 3)}{_interval(c, lambda x: number(x, 3))}"]


def _interval(c: Criterion, shown: Callable[[float], str]) -> str:
    return f" ({shown(c.low)} to {shown(c.high)})" if measured(c.low) and measured(c.high) else ""


def _points(share: float) -> str:
    return f"{number(100 * share, 1)} points"


def _limits(c: Criterion) -> list[str]:
    shown = _points if c.name in SHARES else number
    low, high = c.at_least, c.at_most
    if measured(low) and measured(high):
        return [f"must lie within {shown(low)} and {shown(high)}"]
    if measured(low):
        return [f"must {'be above' if low == 0 and not c.is_ratio else 'stay above'} {shown(low)}"]
    return [f"must stay below {shown(high)}"] if measured(high) else []


# -- the chains


def last_step_sentence(sampling: Sampling) -> str:
    """Return a sentence about the gain of the last step. It does not predict a further step: `improve` never loses."""
    last, steps = sampling.last_step, len(sampling.steps)
    gain, first_clean = last.gain, last.first_clean
    new = f"gave {count(first_clean)} chains their first clean state" if first_clean else ""
    if not measured(gain.mean):
        return f"Step {steps} {new or 'changed nothing that can be measured'}."
    within = f" ({number(gain.low)} to {number(gain.high)})" if measured(gain.low) else ""
    change = f"{number(gain.mean)}{within}{f' and {new}' if new else ''}"
    return f"Step {steps} changed the reward of the {count(gain.n)} chains that were clean before it by {change}."


def ending_sentence(sampling: Sampling, recipe: Recipe) -> str:
    """Return how a sampling for a number of rows or a budget ended, and what to change if rows are missing; "" if
    neither was asked for.
    """
    rows, budget, chains = recipe.dataset.rows, recipe.budget, many(sampling.chains, "chain")
    wanted = f"the {count(rows)} training rows that are wanted" if rows else ""
    if sampling.ended_by == "rows":
        return f"Sampling ended after {chains}, with {wanted}."
    if sampling.ended_by == "budget" and budget:
        limits = " or ".join(
            part
            for part in (
                f"{count(budget.tokens)} tokens" if budget.tokens else "",
                f"{budget.hours:g} hour{'s' * (budget.hours != 1)}" if budget.hours else "",
            )
            if part
        )
        missing = f", before it had {wanted}; raise budget for more" if rows else ""
        return f"Sampling ended after {chains} with its budget of {limits}{missing}."
    if sampling.ended_by == "chains" and rows:
        return (
            f"Sampling ended after {chains} without {wanted}: each prompt had its "
            f"{recipe.chain.chains_per_prompt}, gave as many rows as it may, or was given up because its chains gave "
            "none. `dsc dataset` says why chains gave no row. Raise chain.chains_per_prompt, add prompts, or loosen "
            "what a row must be (dataset)."
        )
    return ""


def mixing_sentence(sampling: Sampling) -> str:
    """Return a sentence with R-hat and effective sample size of the chains' rewards, or the reason without them."""
    m = sampling.mixing
    if not m.estimable or m.r_hat is None or m.ess is None or m.prompts is None:
        return f"Mixing of the chains: not estimable ({m.reason})."
    return (
        f"Mixing of the chains, over {many(m.prompts, 'prompt')} ({count(m.left_out)} left out): R-hat of the "
        "reward "
        f"{number(m.r_hat.median, 3)} in the median, {number(m.r_hat.highest, 3)} at most, above 1.01 for "
        f"{percent(m.r_hat.above_limit)}; effective sample size {number(m.ess.median, 0)} in the median, "
        f"{number(m.ess.lowest, 0)} at least, of {count(m.draws)} draws."
    )


def rounds_sentence(rounds: Rounds) -> str:
    """Return which round was kept, and why the rounds ended, as a sentence."""
    last = rounds.rounds[-1]
    ended = (
        f"; round {last.round} did not raise the validation reward, so no further one was begun"
        if last.round != rounds.kept and last.round < rounds.planned
        else ""
    )
    return f"The adapter of round {rounds.kept} of {last.round} is kept{ended}."
