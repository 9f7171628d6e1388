"""Stated quotas of a server: requests and tokens a minute, spread evenly. No clock and no I/O in `StatedQuota`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsc_hub.records import Message, Tool

MINUTE_S = 60.0
CHECKED_EVERY_S = 0.5  # a wait is interrupted so often, to see whether the user has stopped the run
PROMPT_LETTERS_PER_TOKEN = 3  # of a prompt, until the server tells its tokens


@dataclass
class StatedQuota:
    """When the next request may be sent. None: no limit.

    A request uses its share of each quota from the time when it is sent; the next one waits until that has passed. So
    no minute has more requests than stated, nor more tokens, as far as these were known before.
    """

    requests_per_minute: int | None
    tokens_per_minute: int | None
    _requests_free_at: float = 0.0
    _tokens_free_at: float = 0.0

    def wait_s(self, now: float) -> float:
        """Return the seconds until a request may be sent."""
        return max(0.0, self._requests_free_at - now, self._tokens_free_at - now)

    def send(self, now: float, tokens: int) -> None:
        """Record a request that is sent, with the tokens that it may use at most."""
        if self.requests_per_minute:
            self._requests_free_at = max(now, self._requests_free_at) + MINUTE_S / self.requests_per_minute
        if self.tokens_per_minute:
            self._tokens_free_at = max(now, self._tokens_free_at) + MINUTE_S * tokens / self.tokens_per_minute

    def settle(self, expected: int, used: int) -> None:
        """Correct the tokens of a request to those that it used."""
        if self.tokens_per_minute:
            self._tokens_free_at += MINUTE_S * (used - expected) / self.tokens_per_minute


@dataclass
class Pacer:
    """Lets requests to one server through in the order in which they come, as its quota allows."""

    quota: StatedQuota
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def wait(self, tokens: int, raise_if_stopped: Callable[[], None]) -> None:
        """Wait until a request with so many tokens may be sent; raises what `raise_if_stopped` raises meanwhile."""
        async with self._turn:
            while (left := self.quota.wait_s(time.monotonic())) > 0:
                await asyncio.sleep(min(left, CHECKED_EVERY_S))
                raise_if_stopped()
            self.quota.send(time.monotonic(), tokens)


def expected_tokens(messages: Sequence[Message], tools: Sequence[Tool], max_new_tokens: int) -> int:
    """Return the tokens of a request, estimated before it is sent: its text, its tools, and the longest answer."""
    letters = sum(len(m["content"]) for m in messages) + (len(json.dumps(list(tools))) if tools else 0)
    return letters // PROMPT_LETTERS_PER_TOKEN + max_new_tokens
