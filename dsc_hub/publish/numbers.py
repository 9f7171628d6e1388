"""Comparison of recorded numbers with those made anew: which are compared, how closely, and how they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dsc_hub import stats

CLOSE = 1e-6  # relative tolerance: other library versions round differently
SHOWN_DIFFERENCES = 3  # number of differences shown per check
# Advice on the number of groups, by last name: later versions advise better on the same numbers.
ADVICE = frozenset({"detectable", "groups_needed"})
# Values that cannot be recomputed from rows, by last name or section.
NOT_RECOMPUTED = frozenset(
    {"seconds", "processor_hours", "processors", "neutral_texts", "served_on", "scores", "cost_usd"}
)
NOT_RECOMPUTED_IN_SAMPLING = frozenset(
    (
        "prompt_tokens new_tokens seconds tokens_per_s cache_rate processor_hours processors scoring_s retries "
        "reused_turns cost_usd ended_by"
    ).split()
)


class NotVerifiable(Exception):
    """Raised if a check lacks its inputs; the message says which."""


class Differs(Exception):
    """Raised if a check disagrees with the published data; the message says how."""


def same(recorded: Any, anew: Any, name: str, left_out: frozenset[str] = frozenset()) -> int:
    """Return how many numbers were compared; Differs with the first differences.

    `left_out`: last names of numbers that are not compared.
    """
    anew = json.loads(json.dumps(anew))  # as it is stored
    pairs = list(_leaves(recorded, anew, name, left_out))
    if differing := [f"{path}: recorded {a!r:.40}, made anew {b!r:.40}" for path, a, b in pairs if not close(a, b)]:
        more = f" and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
        raise Differs(f"{len(differing)} of {len(pairs)} differ: {'; '.join(differing[:SHOWN_DIFFERENCES])}{more}")
    return len(pairs)


def _leaves(a: Any, b: Any, path: str, left_out: frozenset[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield pairs of values at the same location; a value on one side only is paired with None."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b} - left_out):
            yield from _leaves(a.get(key), b.get(key), f"{path}.{key}", left_out)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _leaves(x, y, f"{path}.{i}", left_out)
    else:
        yield path, a, b


def close(a: Any, b: Any) -> bool:
    """Return whether two values are equal, numbers up to CLOSE."""
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-9) if numbers else a == b


def interval_rule(section: Mapping[str, Any]) -> int:
    """Return the rule by which a section's intervals of means were made; NotVerifiable if this dsc lacks it."""
    rule = section.get("intervals", 1)
    if rule not in range(1, stats.INTERVALS + 1):
        raise NotVerifiable("its intervals are by a rule of a later version of dsc_hub; install that one")
    return int(rule)
