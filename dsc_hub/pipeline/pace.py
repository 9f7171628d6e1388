"""How long stages took on this machine, and how long one may take then: measurements in, a range of seconds out.

A single speed misleads: few requests don't fill the engine, starts take their time, and a run beside other work is
slow. So the last few measurements of each stage are kept, and an estimate is a range that says what it rests on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsc_hub.inference.concurrency import FIRST
from dsc_hub.system import cache

FILE = "pace.json"
KEPT = 8  # measurements of each stage
LEAST_TOKENS = 1000  # new tokens; a speed measured on fewer says little
# Of the base's speed, at which an adapter answers on a CPU, where no evaluation was measured yet.
SLOWEST_ADAPTER = 0.15


@dataclass(frozen=True, slots=True)
class Pace:
    """One stage as it went: `requests` made, how many could be `at_once` (chains, or answers), `new_tokens` of all,
    seconds of generating, and of everything else (starts of engines, scorers)."""

    stage: str
    requests: int
    at_once: int
    new_tokens: int
    generating_s: float
    other_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.generating_s


def remember(model_identity: str, pace: Pace) -> None:
    """Keep a measurement; the oldest of the stage beyond KEPT goes. One of few tokens is not kept."""
    if pace.new_tokens < LEAST_TOKENS or pace.generating_s <= 0:
        return
    before = known(model_identity)
    rest = [p for p in before if p.stage != pace.stage]
    same = [p for p in before if p.stage == pace.stage]
    cache.remember_value(FILE, model_identity, [asdict(p) for p in (*rest, *same[1 - KEPT :], pace)])


def known(model_identity: str) -> list[Pace]:
    """The measurements of this model on this machine, the oldest first. Damaged ones are as good as none: it is a
    cache."""
    out = []
    rows = cache.recall_value(FILE, model_identity)
    for row in rows if isinstance(rows, list) else ():
        try:
            pace = Pace(**row)
            sound = pace.new_tokens > 0 and pace.generating_s > 0 and pace.requests > 0 and pace.at_once > 0
        except TypeError:
            continue
        if sound:
            out.append(pace)
    return out


def fastest(paces: Sequence[Pace]) -> float | None:
    """New tokens a second of the quickest sampling; None where none was measured."""
    return max((p.tokens_per_s for p in paces if p.stage == "sampling"), default=None)


def expect(
    paces: Sequence[Pace], stage: str, requests: int, at_once: int, max_new_tokens: int, starts: int
) -> dict[str, Any] | None:
    """{low, high} in seconds, {slow, fast} in tokens a second, that a stage may take; None where nothing was measured.

    low: answers as short as any seen, at the quickest speed, and the quickest start; high: answers of full length, at
    the middle speed (so one run beside other work doesn't count as usual), and the slowest start. Where fewer requests
    can be made at once than when a speed was measured, it may be less in proportion, and where more, more. `starts`: of
    engines, where the stage itself was never measured and sampling's start stands for each; more than one means that an
    adapter is asked on a CPU.
    """
    same = [p for p in paces if p.stage == stage]
    seen = same or [p for p in paces if p.stage == "sampling"]
    if not seen or not requests:
        return None
    at_once = min(at_once, FIRST)
    ratios = [at_once / min(p.at_once, FIRST) for p in seen]
    fast = max(p.tokens_per_s * max(1.0, r) for p, r in zip(seen, ratios, strict=True))
    slow = statistics.median_low(p.tokens_per_s * min(1.0, r) for p, r in zip(seen, ratios, strict=True))
    slow *= 1 if same or starts == 1 else SLOWEST_ADAPTER
    others, times = [p.other_s for p in seen], 1 if same else starts
    shortest = min(max_new_tokens, *(p.new_tokens / p.requests for p in seen))
    return {
        "low": requests * shortest / fast + times * min(others),
        "high": requests * max_new_tokens / slow + times * max(others),
        "slow": slow,
        "fast": fast,
    }
