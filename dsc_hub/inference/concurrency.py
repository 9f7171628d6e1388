"""Concurrency limit of one server: measured, or fixed.

The limit is doubled as long as that increases the tokens per second. It is lowered when the server reports overload
(rests.py tells it from refusals that have nothing to do with the load) to the number of requests that it was seen to
carry, and then rises back to its former value, the faster the longer nothing is refused. No clock and no I/O: callers
pass results and times.
"""

from __future__ import annotations

from typing import Literal

# First values of `auto`: of any server, which may have a few slots only, and of one that is known to take many requests
# at once (vLLM, SGLang): with vLLM on two cores 256 in flight gave 1.12 times the tokens per second of 128.
FIRST, FIRST_OF_MANY = 128, 256
SLOW = 100.0  # tokens per second of a server on a slow CPU; a first value must not make its requests time out
MOST = 1024  # maximum of `auto`
GROWTH = 1.05  # minimum throughput gain of a doubled limit, as a factor
LEAST_S = 5.0  # minimum duration of a measurement, in seconds
USED = 0.9  # share of the limit that must be in flight, else the measurement is discarded
BACK = 0.7  # factor by which the limit is lowered if nothing shows what the server can carry
RISE = 0.05  # share of the limit by which it rises after as many requests as the limit; twice as much each time
MOST_ROUNDS = 32  # a limit that rose in vain rises again after twice as many requests, and so on up to this factor


def first_of_many(most_tokens: int, timeout_s: float) -> int:
    """Return the first value of `auto` at a server that takes many requests, of up to `most_tokens` new tokens."""
    return FIRST_OF_MANY if FIRST_OF_MANY * most_tokens <= SLOW * timeout_s else FIRST


class ConcurrencyLimit:
    """Concurrency limit of a server: `now` is the current value, `wanted` is "auto" or a fixed number.

    `first` is the value at which "auto" begins.

    Overload lowers either kind and ends the growth; afterwards the limit rises back to its former value.
    """

    def __init__(self, wanted: int | Literal["auto"], first: int = FIRST) -> None:
        self.now = first if wanted == "auto" else wanted
        self._grows = wanted == "auto"
        self._before = (self.now, 0.0)  # the best limit so far, and its tokens per second
        self._most, self._rise_share = self.now, RISE
        self._rounds, self._risen = 1, False  # so many times the limit are answered before it rises
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

    def refused(self) -> None:
        """Record a request refused for overload."""
        self._refusals += 1

    def lower(self, carried: int) -> None:
        """Lower the limit of an overloaded server to the number of requests that it carries."""
        self._most, self._rise_share, self._grows = max(self._most, self.now), RISE, False
        if self._risen:  # too much again
            self._rounds, self._risen = min(MOST_ROUNDS, 2 * self._rounds), False
        self.now = max(1, min(self.now, carried))
        self._restart()

    def _rise(self) -> None:
        if self.now < self._most:
            self._requests += 1
            if self._requests >= self._rounds * self.now and self._refusals > self._requests:
                self._restart()  # it is full
            elif self._requests >= self._rounds * self.now:
                self.now = min(self._most, self.now + max(1, int(self._rise_share * self.now)))
                self._rise_share = min(1.0, 2 * self._rise_share)
                if self._risen:  # the last rise was not too much
                    self._rounds = max(1, self._rounds // 2)
                self._risen = True
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
        self._requests, self._refusals, self._tokens, self._since = 0, 0, 0, 0.0
