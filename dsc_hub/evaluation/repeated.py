"""Estimates from a criterion's groups taken several times, from which the number of groups needed is worked out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsc_hub import stats
from dsc_hub.records import Answer, Prompt

Estimate = Callable[[int], Mapping[str, Any]]  # m -> the estimate from m times the groups


@dataclass(frozen=True, slots=True)
class Pairs:
    """Aligned answers of base and distilled to the same prompts and samples, with the prompts."""

    base: Sequence[Answer]
    distilled: Sequence[Answer]
    prompts: Sequence[Prompt]

    @property
    def groups(self) -> list[str]:
        return [p.group for p in self.prompts]


def copies(groups: Sequence[str], times: int) -> list[str]:
    """Return the groups of so many times the rows, each time as other groups."""
    return [f"{group}, {k}" for k in range(times) for group in groups]


def of_mean(values: Sequence[float], groups: Sequence[str], confidence: float) -> Estimate:
    """Return the function from m to the `stats.estimate` of m times the values."""
    return lambda times: stats.estimate([*values] * times, copies(groups, times), confidence)


def of_score(name: str, score: Mapping[str, Any], pairs: Pairs, confidence: float) -> Estimate | None:
    """Return `of_mean` for the difference of a score, positive where distilled is better; None without values."""
    sign = 1 if score.get("higher_is_better", True) else -1
    scored = [
        (sign * (after - before), group)
        for b, d, group in zip(pairs.base, pairs.distilled, pairs.groups, strict=True)
        if (before := b.score(name)) is not None and (after := d.score(name)) is not None
    ]
    return of_mean([value for value, _ in scored], [group for _, group in scored], confidence) if scored else None
