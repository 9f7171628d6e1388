"""Formatting of recorded numbers as words and table cells. An unmeasured value is written "–", never 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from dsc_hub.acceptance import RULES
from dsc_hub.config.arms import ARMS
from dsc_hub.config.sampling import API, ChainConfig
from dsc_hub.runs.facts import ModelFacts, ServerFacts
from dsc_hub.runs.metrics_schema import Estimate, Evaluation, Sampling, ScoreName
from dsc_hub.system.progress import duration

ABSENT = "–"
SCORE_TITLES: dict[ScoreName, str] = {"reward": "reward", "second": "second scorer", "third": "third scorer"}


def measured(value: float | None) -> TypeGuard[float]:
    """Return whether there is a number: not None and not NaN."""
    return value is not None and not math.isnan(value)


def number(value: float | None, digits: int = 2) -> str:
    """Format `0.31`, `−0.05`, or `–` if not measured. Nonzero values never look like zero: 0.0004 stays `0.0004`."""
    if not measured(value):
        return ABSENT
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{value:.1g}" if value else f"{0:.{digits}f}"
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """Format `12,345`, or `–` if not counted."""
    return f"{value:,.0f}" if measured(value) else ABSENT


def megabytes(size: float) -> str:
    """Format bytes as `0.4 MB`, `123 MB` or `4.5 GB`."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def percent(value: float | None, digits: int = 0) -> str:
    """Format a share as per cent: `30 %`, or `–` if not measured."""
    return f"{100 * value:.{digits}f} %" if measured(value) else ABSENT


def sampling_cost(sampling: Sampling) -> str:
    """Format the cost of the chains as one line: tokens, speed, cache rate, time, processor hours, scoring, retries."""
    parts = [f"{count(sampling.new_tokens)} tokens written, {count(sampling.prompt_tokens)} read"]
    if measured(rate := sampling.cache_rate):
        parts[0] += f" ({percent(rate)} from the prefix cache)"
    parts.append(f"{count(sampling.tokens_per_s)} tokens/s")
    if measured(sampling.seconds):
        parts.append(duration(sampling.seconds))
    if measured(hours := sampling.processor_hours):
        parts.append(f"{number(hours)} {sampling.processors} hours")
    if sampling.scoring_s:
        parts.append(f"scorers worked {duration(sampling.scoring_s)} beside it")
    if sampling.retries is not None:
        parts.append(f"sent again: {', '.join(f'{n} {why}' for why, n in sampling.retries.items()) or 'nothing'}")
    if measured(sampling.cost_usd):
        parts.append(money(sampling.cost_usd))
    return "; ".join(parts)


def money(usd: float | None) -> str:
    """Format `12.30 USD`, small amounts with two digits that count (`0.0042 USD`), or `–` without a price."""
    if not measured(usd):
        return ABSENT
    digits = 2 if usd >= 0.1 or usd == 0 else 1 - math.floor(math.log10(usd))
    return f"{usd:,.{digits}f} USD"


def unset_parameters(servers: Sequence[ServerFacts]) -> str:
    """Return a sentence, with a leading space, about parameters that servers did not take; "" without one that matters.

    These are parameters that the recipe sets to another value than the usual default.
    """
    parts = [f"{s.shown_model} ({s.place}) used its own {' and '.join(s.changes)}" for s in servers if s.changes]
    return f". Not as the recipe says: {'; '.join(parts)}, which could not be set at its server" if parts else ""


def p_value(p: float | None) -> str:
    """Format `p 0.012`, `p < 0.001`, or `p –`."""
    if not measured(p):
        return f"p {ABSENT}"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def interval(estimate: Estimate) -> str:
    """Format `0.31 (0.20 to 0.42)`, `0.31 (no interval: too few groups)`, or `– (not measured)` without a mean.

    A recorded `reason` replaces the default one.
    """
    if not measured(estimate.mean):
        return f"{ABSENT} ({estimate.reason or 'not measured'})"
    if not (measured(estimate.low) and measured(estimate.high)):
        return f"{number(estimate.mean)} (no interval: {estimate.reason or 'too few groups'})"
    return f"{number(estimate.mean)} ({number(estimate.low)} to {number(estimate.high)})"


def shares(estimate: Estimate, signed: bool = False) -> str:
    """Format a share, or with `signed` a difference of shares, as `12 % (6 to 22)`; reasons as in `interval`."""
    if not (measured(estimate.mean) and measured(estimate.low) and measured(estimate.high)):
        return interval(estimate)
    low, high = (number(100 * end, 0) for end in (estimate.low, estimate.high))
    return f"{number(100 * estimate.mean, 0)} {'points' if signed else '%'} ({low} to {high})"


def arm_name(arm: str) -> str:
    return ARMS[arm].title if arm in ARMS else arm


def difference_name(key: str) -> str:
    """Format a key of metrics.json such as `distilled - base` for display."""
    return " − ".join(arm_name(a) for a in key.split(" - "))


def model_name(model: ModelFacts) -> str:
    """Return the model's id, or the last part of a path."""
    return str(
        model.id
        if model.id.count("/") == 1 and not model.id.startswith(("/", ".", "~"))
        else model.id.rstrip("/").split("/")[-1]
    )


def model_source(model: ModelFacts) -> str:
    """Return the source of the base model without local paths, which mean nothing to other readers."""
    source = model.source
    if source.startswith(API):
        return source
    is_path = source.startswith(("/", ".", "~", "\\")) or ":\\" in source or ":/" in source or source.count("/") > 1
    return "a local folder" if is_path else source


def model_origin(model: ModelFacts) -> str:
    """Format where a model's weights are from: source, commit, note and licence. No local path."""
    parts = [f"{model_name(model)} from {model_source(model)}", f" at {model.commit}" * bool(model.commit)]
    return "".join([*parts, f" ({model.note})" * bool(model.note)])


def many(n: int, what: str) -> str:
    return f"{count(n)} {what}{'' if n == 1 else 's'}"


def acceptance_meaning(chain: ChainConfig) -> str:
    """When the chain's rule keeps a revision, in words; `chain` is the recipe's section."""
    return RULES[chain.acceptance].meaning.format(temperature=chain.temperature)


def families(evaluation: Evaluation) -> str:
    """Describe the families of the Holm adjustment."""
    primary = evaluation.primary
    if not primary:
        return " for all the differences of scores shown"
    named = " and ".join(SCORE_TITLES[s] for s in primary.scores)
    return (
        f" in two families: {difference_name(primary.difference)} on {named}, the question asked beforehand; "
        "and all other differences of scores"
    )


# Names of the filters in templates.
FILTERS = {
    "number": number,
    "count": count,
    "percent": percent,
    "interval": interval,
    "money": money,
    "unset_parameters": unset_parameters,
    "sampling_cost": sampling_cost,
    "acceptance_meaning": acceptance_meaning,
    "families": families,
    "origin": model_origin,
    "source": model_source,
    "model_name": model_name,
    "duration": lambda seconds: duration(seconds) if measured(seconds) else ABSENT,
}
