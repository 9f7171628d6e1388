"""Quota of one server: how many requests and tokens it still allows, learned from the headers of its replies.

`x-ratelimit-limit-requests`, `-remaining-requests` and `-reset-requests`, and the same for tokens, as OpenAI and many
others send them. Until the reset no more is sent than what remains. Where a quota is refilled little by little, waiting
for the reset costs nothing: what was refilled meanwhile is sent at once. No clock and no I/O: callers pass headers and
times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

UNITS = ("requests", "tokens")
LONGEST_PACED_S = 120.0  # longer windows (a day) do not pace: their refusals say when to come back
SMOOTHING = 0.1  # weight of a request's tokens in the running mean
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@dataclass
class _Allowance:
    """What remains of a unit until `resets_at`, counted from when `spent` of it had been sent."""

    limit: float
    remaining: float
    spent: float
    resets_at: float
    window_s: float


class Quota:
    """Requests and tokens of a server that its headers limit; without such headers there is no limit."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(UNITS, 0.0)
        self._allowances: dict[str, _Allowance] = {}
        self._tokens_per_request = 0.0

    def spend(self) -> None:
        """Count a request that is about to be sent."""
        self._spent["requests"] += 1
        self._spent["tokens"] += self._tokens_per_request

    @property
    def spent(self) -> Mapping[str, float]:
        """What has been sent so far; pass the value from when a request was sent to `report` with its reply."""
        return dict(self._spent)

    def used(self, tokens: int) -> None:
        """Record the tokens of an answered request, prompt included."""
        mean = self._tokens_per_request
        self._tokens_per_request = mean + SMOOTHING * (tokens - mean) if mean else float(tokens)

    def report(self, headers: Mapping[str, str], spent: Mapping[str, float], at: float) -> None:
        """Take over the headers of a reply to a request sent at the time `at` in seconds, when `spent` was sent."""
        if "x-ratelimit-remaining-requests" not in headers and "x-ratelimit-remaining-tokens" not in headers:
            return
        for unit in UNITS:
            remaining, limit = (
                _number(headers.get(f"x-ratelimit-{name}-{unit}", "")) for name in ("remaining", "limit")
            )
            reset_s = _duration(headers.get(f"x-ratelimit-reset-{unit}", ""))
            if remaining is None or reset_s is None or reset_s > LONGEST_PACED_S:
                continue
            old = self._allowances.get(unit)
            if old is not None and at < old.resets_at and spent[unit] < old.spent:
                continue  # it overtook the reply to a later request
            window_s = max(reset_s, old.window_s if old else 0.0)
            limit = remaining if limit is None else max(limit, remaining)
            self._allowances[unit] = _Allowance(limit, remaining, spent[unit], at + reset_s, window_s)

    def wait_s(self, at: float) -> float:
        """Return the seconds until the next request may be sent; 0 if it may be sent now."""
        waits = [0.0]
        for unit, allowance in self._allowances.items():
            if at >= allowance.resets_at:  # a new window, of which no reply has reported yet
                allowance.remaining, allowance.spent = allowance.limit, self._spent[unit]
                allowance.resets_at = at + max(allowance.window_s, 1.0)
            left = allowance.remaining - (self._spent[unit] - allowance.spent)
            needed = 1.0 if unit == "requests" else self._tokens_per_request
            if left < needed and left < allowance.limit:
                waits.append(allowance.resets_at - at)
        return max(waits)


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _duration(value: str) -> float | None:
    """Return the seconds of "1m30s", "250ms" or a plain number; None for anything else."""
    if (number := _number(value)) is not None:
        return number
    parts = _DURATION.findall(value)
    if not parts or "".join(n + unit for n, unit in parts) != value:
        return None
    return sum(float(n) * _SECONDS[unit] for n, unit in parts)
