"""Recorded numbers written for people: metrics.json and run.json as words and table cells.

Computes no statistics. What was not measured is written "–" with its reason and never as 0. Used by the report, the cards
and the terminal alike, so that the three never disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsc_hub.system.progress import duration

ABSENT = "–"
SCORE_TITLES = {"reward": "reward", "second": "second scorer", "third": "third scorer"}
ARM_NAMES = {
    "base": "base",
    "self_critique": "self-critique",
    "best_of_n": "best of n",
    "distilled": "distilled",
    "distilled_self_critique": "distilled + self-critique",
}


# -- numbers in words


def measured(value: float | None) -> bool:
    """Is there a number? None and NaN both mean that there is none."""
    return value is not None and not math.isnan(value)


def number(value: float | None, digits: int = 2) -> str:
    """`0.31`, `−0.05`, `–` if not measured. What is not zero never looks like zero: 0.0004 stays `0.0004`."""
    if not measured(value):
        return ABSENT
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{value:.1g}" if value else f"{0:.{digits}f}"
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """`12,345`; `–` if not counted."""
    return f"{value:,.0f}" if measured(value) else ABSENT


def percent(value: float | None, digits: int = 0) -> str:
    """A share as per cent: `30 %`; `–` if not measured."""
    return f"{100 * value:.{digits}f} %" if measured(value) else ABSENT


def sampling_cost(sampling: Mapping[str, Any]) -> str:
    """What the chains cost, in a line: tokens, speed, prefix cache, time, processor hours, scoring, retries."""
    told = [f"{count(sampling['new_tokens'])} tokens written, {count(sampling['prompt_tokens'])} read"]
    if measured(rate := sampling.get("cache_rate")):
        told[0] += f" ({percent(rate)} from the prefix cache)"
    told.append(f"{count(sampling['tokens_per_s'])} tokens/s")
    if measured(sampling["seconds"]):
        told.append(duration(sampling["seconds"]))
    if measured(hours := sampling.get("processor_hours")):
        told.append(f"{number(hours)} {sampling['processors']} hours")
    if sampling.get("scoring_s"):
        told.append(f"scorers worked {duration(sampling['scoring_s'])} beside it")
    if "retries" in sampling:
        told.append(f"sent again: {', '.join(f'{n} {why}' for why, n in sampling['retries'].items()) or 'nothing'}")
    return "; ".join(told)


def p_value(p: float | None) -> str:
    """`p 0.012`, `p < 0.001`, `p –`."""
    if not measured(p):
        return f"p {ABSENT}"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def interval(estimate: Mapping[str, Any]) -> str:
    """`0.31 (0.20 to 0.42)`; `0.31 (no interval: too few groups)` without bounds; `– (not measured)` without a mean.

    A recorded `reason` stands in the place of ours.
    """
    reason = estimate.get("reason")
    if not measured(estimate["mean"]):
        return f"{ABSENT} ({reason or 'not measured'})"
    if not (measured(estimate["low"]) and measured(estimate["high"])):
        return f"{number(estimate['mean'])} (no interval: {reason or 'too few groups'})"
    return f"{number(estimate['mean'])} ({number(estimate['low'])} to {number(estimate['high'])})"


def shares(estimate: Mapping[str, Any], signed: bool = False) -> str:
    """A share, or with `signed` a difference of shares, with its interval: `12 % (6 to 22)`; reasons as in `interval`."""
    if not (measured(estimate["mean"]) and measured(estimate["low"]) and measured(estimate["high"])):
        return interval(estimate)
    low, high = (number(100 * estimate[k], 0) for k in ("low", "high"))
    return f"{number(100 * estimate['mean'], 0)} {'points' if signed else '%'} ({low} to {high})"


def score_names(evaluation: Mapping[str, Any]) -> list[str]:
    """The scores that were recorded, the reward first."""
    return [s for s in SCORE_TITLES if s in evaluation["scores"]]


def arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm)


def difference_name(key: str) -> str:
    """`distilled - base` as it is written in metrics.json, for people."""
    return " − ".join(arm_name(a) for a in key.split(" - "))


def model_name(model: Mapping[str, Any]) -> str:
    """The model's id; of a path its last part."""
    return (
        model["id"]
        if model["id"].count("/") == 1 and not model["id"].startswith(("/", ".", "~"))
        else model["id"].rstrip("/").split("/")[-1]
    )


def model_source(model: Mapping[str, Any]) -> str:
    """Where the base model came from, without the path: a folder of one machine says nothing to a reader elsewhere."""
    source = model["source"]
    is_path = source.startswith(("/", ".", "~", "\\")) or ":\\" in source or ":/" in source or source.count("/") > 1
    return "a local folder" if is_path else source


# -- the verdict


@dataclass(frozen=True)
class Verdict:
    """One comparison in one sentence. `kind` is what the interval allows to be said."""

    kind: Literal["better", "worse", "unclear", "unmeasured"]
    sentence: str


def compare(key: str, difference: Mapping[str, Any], score: Mapping[str, Any], confidence: float) -> Verdict:
    """What the difference `one - other` says about a score. It is a difference only if the interval leaves out zero and
    p, adjusted after Holm for its family, is at most 1 - confidence."""
    one, other = (arm_name(a) for a in key.split(" - "))
    subject, name = one[:1].upper() + one[1:], score["name"]
    mean, low, high = difference["mean"], difference["low"], difference["high"]
    if not measured(mean):
        return Verdict(
            "unmeasured",
            f"Not measured: {one} against {other} on {name} ({difference.get('reason') or 'no reason recorded'}).",
        )
    if not (measured(low) and measured(high)):
        return Verdict(
            "unmeasured",
            f"{subject} minus {other} on {name} is {number(mean)}, without an interval: no difference can be claimed.",
        )
    p = difference["p_holm"]
    if low <= 0 <= high or not measured(p) or p > 1 - confidence:
        return Verdict(
            "unclear",
            f"No difference shown between {one} and {other} on {name}: "
            f"{_evidence(mean, low, high, difference, confidence)}.",
        )
    if mean < 0:  # told as a positive amount, so that "by" reads right; the bounds change places with their signs
        mean, low, high = -mean, -high, -low
    if (difference["mean"] > 0) == score["higher_is_better"]:
        return Verdict(
            "better", f"{subject} beats {other} on {name} by {_evidence(mean, low, high, difference, confidence)}."
        )
    return Verdict(
        "worse", f"{subject} is worse than {other} on {name} by {_evidence(mean, low, high, difference, confidence)}."
    )


def _evidence(mean: float, low: float, high: float, difference: Mapping[str, Any], confidence: float) -> str:
    missing = (difference.get("if_missing_worst"), difference.get("if_missing_best"))
    bounds = (
        f"; with what is unscored counted as worst {number(missing[0])}, as best {number(missing[1])}"
        if all(map(measured, missing))
        else ""
    )
    return (
        f"{number(mean)} ({100 * confidence:g} % interval {number(low)} to {number(high)}, {p_value(difference['p_holm'])} after Holm; "
        f"{count(difference['n'])} pairs of answers in {count(difference['groups'])} groups{bounds})"
    )


def verdicts(metrics: Mapping[str, Any]) -> list[Verdict]:
    """The headline (distilled against the baseline, on the reward), then the same on the second scorer if there is."""
    evaluation = metrics["evaluation"]
    differences = evaluation["differences"]
    key = next((k for k in differences if k.startswith("distilled - ")), next(iter(differences), None))
    if key is None:
        return [Verdict("unmeasured", "No comparison was made: the evaluation has one arm only.")]
    scores = evaluation["scores"]
    return [
        compare(key, differences[key][s], scores[s], evaluation["confidence"])
        for s in score_names(evaluation)
        if s in differences[key]
    ]


def headline(metrics: Mapping[str, Any]) -> str:
    """The verdict in one plain sentence, and one more for each other scorer that does not follow the reward."""
    (_, first), *others = zip(SCORE_TITLES.values(), verdicts(metrics), strict=False)
    apart = [f" The {title} does not follow: {v.sentence}" for title, v in others if v.kind != first.kind]
    return first.sentence + "".join(apart)


# -- what people said


def blind_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The blind comparison in sentences: counts, win rate with interval and p, what to hold against it. None: no lines."""
    if "blind" not in metrics:
        return []
    b = metrics["blind"]
    one, rate, level = b["judges"] == 1, b["win_rate"], f"{100 * b['confidence']:g} %"
    low, high = rate["low"], rate["high"]
    if measured(low) and measured(high):
        within = f"{level} interval over groups {percent(low)} to {percent(high)}"
    else:
        within = f"no interval: {rate.get('reason') or 'too few groups'}"
    decided = b["distilled"] + b["base"]
    out = [
        f"Blind comparison by {count(b['judges'])} {'person' if one else 'people'}: of {many(b['prompts'], 'prompt')} in "
        f"{many(b['groups'], 'group')}, the distilled answer was preferred on {count(b['distilled'])}, the base's on "
        f"{count(b['base'])}, neither on {count(b['tie'])}."
        + ("" if one else f" {count(b['verdicts'])} verdicts; a prompt counts with the mean of its judges."),
        f"Win rate of distilled, ties as half: {percent(rate['mean'])} ({within}). Of the {count(decided)} decided: "
        f"{percent(b['share_decided'])}, exact sign test {p_value(b['p'])}, which takes prompts as independent.",
        f"Who judged was not checked: the {'judge is' if one else 'judges are'} counted by the names given, and not "
        "necessarily independent of whoever made this.",
    ]
    if b["outdated"]:
        out.append(f"Not counted: {many(b['outdated'], 'verdict')} on answers that have changed since.")
    return out


def many(n: int, what: str) -> str:
    return f"{count(n)} {what}{'' if n == 1 else 's'}"


# -- what the numbers do not say


def caveats(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """What a careful reader would hold against these numbers, one sentence or two each, from recorded facts only."""
    evaluation, chain = metrics["evaluation"], facts["recipe"]["chain"]
    rule = {
        "improve": "With the rule 'improve' it is a hill climb.",
        "always": "With the rule 'always' nothing is rejected for its reward: it is plain self-critique.",
        "metropolis": f"The rule 'metropolis' at T = {chain['temperature']:g} does not mend that.",
    }[chain["acceptance"]]
    out = [
        "Critique-and-revise is not a reversible proposal, so the chain does not sample p(x|c)·exp(r(x)/T) exactly: "
        f"it is a heuristic sampler. {rule}"
    ]
    if "second" in evaluation["scores"]:
        out.append(
            "The reward that is reported also chose the training data, so part of a gain on it may be gaming. "
            f"Look at the second scorer, {evaluation['scores']['second']['name']}, which chose nothing"
            + (
                f", and at the third, {evaluation['scores']['third']['name']}."
                if "third" in evaluation["scores"]
                else "."
            )
        )
    else:
        out.append(
            "The reward that is reported also chose the training data, and no second scorer was recorded: "
            "a gain cannot be told from gaming the reward."
        )
    arms = evaluation["arms"]
    out += [
        *_side_effects(arms),
        *_left_out(arms),
        *_stripped(arms),
        *_uncompared(metrics),
        *test_set_sentences(metrics),
    ]
    out.append(
        "Intervals and p are over groups, not prompts: prompts of one group are alike and do not count as independent. "
        f"p is of a sign-flip permutation test on group means, adjusted after Holm{families(evaluation)}."
    )
    out += _too_small(metrics)
    out.append(f"Arms were served on: {evaluation['served_on']}. Numbers on other weights may differ.")
    out.append(
        "All answers are a model's. They may be wrong, and the scorers measure one property of a text, "
        "not whether it is true or useful."
    )
    return out


def families(evaluation: Mapping[str, Any]) -> str:
    """Which p are adjusted for which."""
    primary = evaluation.get("primary")
    if not primary:
        return " for all the differences of scores shown"
    named = " and ".join(SCORE_TITLES[s] for s in primary["scores"])
    return (
        f": {difference_name(primary['difference'])} on {named}, named beforehand, for itself, "
        "and all other differences of scores for each other"
    )


def _too_small(metrics: Mapping[str, Any]) -> list[str]:
    """How small a difference could have been found, where none was."""
    out = []
    for s, title in SCORE_TITLES.items():
        d = metrics["evaluation"]["differences"].get("distilled - base")
        if d and s in d and d[s]["detectable"] and measured(d[s]["low"]) and d[s]["low"] <= 0 <= d[s]["high"]:
            out.append(
                f"With {d[s]['groups']} groups a difference of {number(d[s]['detectable'])} on the {title} would have been "
                "found four times in five; a smaller one may well be there."
            )
    return out


def _side_effects(arms: Mapping[str, Any]) -> list[str]:
    """What got worse between base and distilled besides the scores: running on, and answers that are not clean."""
    if not {"base", "distilled"} <= set(arms):
        return []
    out = []
    before, after = (arms[a]["stops_by_itself"] for a in ("base", "distilled"))
    if measured(before) and measured(after) and after < before:
        told = f"{percent(after)} against {percent(before)} of answers"
        out.append(f"The distilled model ends by itself less often than the base ({told}); the rest is cut off.")
    before, after = (arms[a].get("defects") for a in ("base", "distilled"))
    if measured(before) and measured(after) and after > before:
        told = f"{percent(after)} against {percent(before)}"
        out.append(
            f"More of the distilled model's answers are not clean than of the base's ({told}): "
            "empty, cut off, repeating themselves, copying the critique or talking about the conversation."
        )
    return out


def _left_out(arms: Mapping[str, Any]) -> list[str]:
    missing = [
        f"{arm_name(arm)} {a['reward']['unscored']} unscored and {a['reward']['failed']} failed"
        for arm, a in arms.items()
        if a["reward"]["unscored"] or a["reward"]["failed"]
    ]
    return [f"Left out of the means, and not counted as zero: {'; '.join(missing)}."] if missing else []


def _stripped(arms: Mapping[str, Any]) -> list[str]:
    if not any(a.get("stripped") for a in arms.values()):
        return []
    cut = ", ".join(f"{arm_name(arm)} {count(a['stripped'])}" for arm, a in arms.items())
    return [
        f"Before anything was scored, openings that talk about the task were cut off the answers of all arms alike: {cut}."
    ]


def _uncompared(metrics: Mapping[str, Any]) -> list[str]:
    """Rows that were kept without a comparison."""
    if not (n := sum(metrics.get("dataset", {}).get("uncompared", {}).values())):
        return []
    rows = sum(metrics["dataset"]["sft"].values())
    return [
        f"{count(n)} of {count(rows)} training rows were never compared with another clean text: their first answer was not clean "
        "(or not scored), and the first clean revision was kept."
    ]


def test_set_sentences(metrics: Mapping[str, Any]) -> list[str]:
    if metrics["evaluation"]["split"] != "test":
        split = metrics["evaluation"]["split"]
        return [f"These numbers are of the {split} split, which choices may have been made on; they flatter."]
    if "test_set" not in metrics:
        return ["How often this test set was scored before is not recorded."]
    n = metrics["test_set"]["adapters_scored"]
    if not measured(n):
        return ["How often this test set was scored before is not recorded."]
    told = "1 adapter has" if n == 1 else f"{n} adapters have"
    name = metrics["test_set"]["id"]
    return [f"{told} been scored on this test set ({name}); every further look makes a gain by chance likelier."]


# What templates call these by.
FILTERS = {
    "score_names": score_names,
    "number": number,
    "count": count,
    "percent": percent,
    "interval": interval,
    "sampling_cost": sampling_cost,
    "families": families,
    "duration": lambda seconds: duration(seconds) if measured(seconds) else ABSENT,
}
