"""How many requests a server should have at once: found by trying, or fixed.

A level is doubled as long as that brings more tokens a second. It falls when the server says that it is too much (429, 503), once
for all requests that it refuses together, and rises again little by little to where it was. Without clock and I/O: what was done and
when is told to it.
"""

from __future__ import annotations

import math
from typing import Literal

FIRST, MOST = 128, 1024  # where `auto` begins, and beyond what it never goes
GROWTH = 1.05  # throughput that a doubled level must bring, as a factor
LEAST_S = 5.0  # that a measurement takes
USED = 0.9  # share of the level that must be in flight, or the measurement says nothing about it
BACK = 0.7  # factor by which it falls
RISE = 0.05  # of the level: by so much it rises again after as many requests as it is


class ConcurrencyLimit:
    """`now` is the level. `wanted`: "auto", or a fixed number. A refusal lowers either and ends the growth; then it climbs back to
    where it was."""

    def __init__(self, wanted: int | Literal["auto"]) -> None:
        self.now = FIRST if wanted == "auto" else wanted
        self._grows = wanted == "auto"
        self._before = (self.now, 0.0)  # the best level so far, and its tokens a second
        self._most, self._fell = self.now, -math.inf
        self._restart()

    def done(self, tokens: int, in_flight: int, at: float) -> None:
        """A request gave so many tokens; so many were in flight, itself included; `at` in seconds."""
        if not self._grows:
            self._rise()
            return
        if in_flight < USED * self.now:
            self._restart()
            return
        self._requests += 1
        if self._requests <= self.now:  # those in flight were begun at the level before
            self._since = at
            return
        self._tokens += tokens
        if self._requests >= 3 * self.now and at - self._since >= LEAST_S:
            self._judge(self._tokens / (at - self._since))

    def too_much(self, sent: float, at: float) -> None:
        """The server refused a request for the load that it had; it was sent and answered at these times, in seconds."""
        if sent < self._fell:  # it has fallen for that load
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
