"""Concurrency limit of one server: found by measurement, or fixed.

The limit is doubled as long as that increases the tokens per second. It is lowered when the server reports overload
(429, 503), once for all requests that it refuses together, and then rises gradually back to its former value. No clock
and no I/O: callers pass results and times.
"""

from __future__ import annotations

import math
from typing import Literal

FIRST, MOST = 128, 1024  # first value of `auto`, and its maximum
GROWTH = 1.05  # minimum throughput gain of a doubled limit, as a factor
LEAST_S = 5.0  # minimum duration of a measurement, in seconds
USED = 0.9  # share of the limit that must be in flight, else the measurement is discarded
BACK = 0.7  # factor by which the limit is lowered
RISE = 0.05  # share of the limit by which it rises after as many requests as the limit


class ConcurrencyLimit:
    """Concurrency limit of a server: `now` is the current value, `wanted` is "auto" or a fixed number.

    A refusal lowers either kind and ends the growth; afterwards the limit rises back to its former value.
    """

    def __init__(self, wanted: int | Literal["auto"]) -> None:
        self.now = FIRST if wanted == "auto" else wanted
        self._grows = wanted == "auto"
        self._before = (self.now, 0.0)  # the best limit so far, and its tokens per second
        self._most, self._fell = self.now, -math.inf
        self._restart()

    def done(self, tokens: int, in_flight: int, at: float) -> None:
        """Record an answered request: its tokens, requests in flight (itself included), time `at` in seconds."""
        if not self._grows:
            self._rise()
            return
        if in_flight < USED * self.now:
            self._restart()
            return
        self._requests += 1
        if self._requests <= self.now:  # these requests were sent under the previous limit
            self._since = at
            return
        self._tokens += tokens
        if self._requests >= 3 * self.now and at - self._since >= LEAST_S:
            self._judge(self._tokens / (at - self._since))

    def too_much(self, sent: float, at: float) -> None:
        """Record a request refused for overload; `sent` and `at` are the times of request and reply in seconds."""
        if sent < self._fell:  # already lowered for that load
            return
        self._most, self._fell = max(self._most, self.now), at
        self._grows = False
        self.now = max(1, int(self.now * BACK))
        self._restart()

    def _rise(self) -> None:
        if self.now < self._most:
            self._requests += 1
            if self._requests >= self.now:
                self.now = min(self._most, self.now + max(1, int(RISE * self.now)))
                self._restart()

    def _judge(self, speed: float) -> None:
        level, best = self._before
        if speed < best * GROWTH:
            self.now, self._grows = level, False
            return
        self._before = (self.now, speed)
        self.now = min(2 * self.now, MOST)
        self._grows = self.now > self._before[0]
        self._restart()

    def _restart(self) -> None:
        self._requests, self._tokens, self._since = 0, 0, 0.0
