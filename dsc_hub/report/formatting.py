"""Recorded numbers as words and table cells. What was not measured is written "–" and never as 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from dsc_hub.acceptance import RULES
from dsc_hub.config.arms import ARMS
from dsc_hub.system.progress import duration

ABSENT = "–"
SCORE_TITLES = {"reward": "reward", "second": "second scorer", "third": "third scorer"}


def measured(value: float | None) -> TypeGuard[float]:
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
    return ARMS[arm].title if arm in ARMS else arm


def difference_name(key: str) -> str:
    """`distilled - base` as it is written in metrics.json, for people."""
    return " − ".join(arm_name(a) for a in key.split(" - "))


def model_name(model: Mapping[str, Any]) -> str:
    """The model's id; of a path its last part."""
    return str(
        model["id"]
        if model["id"].count("/") == 1 and not model["id"].startswith(("/", ".", "~"))
        else model["id"].rstrip("/").split("/")[-1]
    )


def model_source(model: Mapping[str, Any]) -> str:
    """Where the base model came from, without the path: a folder of one machine says nothing to a reader elsewhere."""
    source = model["source"]
    is_path = source.startswith(("/", ".", "~", "\\")) or ":\\" in source or ":/" in source or source.count("/") > 1
    return "a local folder" if is_path else source


def many(n: int, what: str) -> str:
    return f"{count(n)} {what}{'' if n == 1 else 's'}"


def acceptance_meaning(chain: Mapping[str, Any]) -> str:
    """When the chain's rule keeps a revision, in words; `chain` is the recipe's section."""
    return RULES[chain["acceptance"]].meaning.format(temperature=chain["temperature"])


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


# What templates call these by.
FILTERS = {
    "score_names": score_names,
    "number": number,
    "count": count,
    "percent": percent,
    "interval": interval,
    "sampling_cost": sampling_cost,
    "acceptance_meaning": acceptance_meaning,
    "families": families,
    "duration": lambda seconds: duration(seconds) if measured(seconds) else ABSENT,
}
