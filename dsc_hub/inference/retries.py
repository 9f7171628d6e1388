"""When a request is sent again, where, and after which pause; and the errors that end a try.

Pure but for the jitter: client.py sends and sleeps.
"""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dsc_hub.errors import ServingError

Server = TypeVar("Server")

RETRIES = 5  # per request and reason: 404, 408, 409, 5xx, a lost connection or an unusable reply
TIMEOUTS = 2  # retries after a timeout; fewer, since each try has waited long
TOO_MUCH = {"429", "503"}
REFUSALS = 10  # retries after 429 or 503 while no other request is answered either
TURNS = 20  # refusals of a request while others are answered; after that REFUSALS applies as well
DEATHS = 3  # servers that may become unreachable during a request before the request is blamed
# From this number on, such requests are sent one at a time, so that one of them does not fail all in flight.
SUSPECT = 2
WAIT_S, LONGEST_S = 0.5, 30.0  # pause before a retry, and its maximum; longer each time, with jitter
SHORT_WAITS = 1  # doublings of the pause after 429 or 503 while others are answered
LONGEST_ASKED_S = 120.0  # longest `Retry-After` that is obeyed


class RequestFailed(ServingError):
    """One request can't be done; others may succeed.

    `refused`: the server is up and rejected this request. `others_answered`: right after that, the server answered a
    request that it had answered before, so the cause is this request.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused, self.others_answered = refused, False


class ServerGone(Exception):
    """The server became unreachable, or was given up, during the request."""


class Again(Exception):
    """A request that may succeed on another try. `wait_s`: seconds that the server requests to wait."""

    def __init__(self, reason: str, message: str, wait_s: float | None = None, most: int | None = None) -> None:
        super().__init__(message)
        self.reason, self.wait_s, self.most = reason, wait_s, RETRIES if most is None else most

    @property
    def is_overload(self) -> bool:
        return self.reason in TOO_MUCH


@dataclass
class Tries(Generic[Server]):
    """Tries of one request so far.

    `failed_by`: servers that erred since its last pause, `full`: those that had no room. `refused_by`: servers that
    rejected it for good, with the error.
    """

    answered_before: int  # requests that the pool had answered at the last refusal
    tries: Counter[str] = field(default_factory=Counter)
    refusals: int = 0  # 429 and 503, all of them
    waits: int = 0
    deaths: int = 0
    failed_by: set[Server] = field(default_factory=set)
    full: set[Server] = field(default_factory=set)
    refused_by: dict[Server, RequestFailed] = field(default_factory=dict)

    def avoid(self) -> Collection[Server]:
        """Return the servers that should not get the request while there are others."""
        return self.failed_by | self.refused_by.keys()

    def count(self, error: Again, answered: int) -> bool:
        """Count a failed try; return whether others were answered since the last. RequestFailed after too many."""
        others_answered = answered > self.answered_before
        if error.is_overload and others_answered and self.refusals < TURNS:
            self.tries[error.reason] = 0  # others are served: this one keeps waiting
        self.answered_before = answered
        self.refusals += error.is_overload
        self.tries[error.reason] += 1
        if self.tries[error.reason] > error.most:
            raise RequestFailed(f"{error}, {self.tries[error.reason]} times")
        return others_answered

    def pause(self, error: Again, others_answered: bool) -> float:
        """Return the pause in seconds before the next try at the same servers, and forget where it failed."""
        self.failed_by.clear()
        self.full.clear()
        if error.is_overload and others_answered:  # it is no sign of a server that needs a long rest
            self.waits = min(self.waits, SHORT_WAITS)
        self.waits += 1
        return error.wait_s or backoff(self.waits - 1)


def backoff(doublings: int) -> float:
    """Return a pause in seconds that doubles each time up to a maximum, with jitter."""
    return min(LONGEST_S, WAIT_S * 2.0 ** min(doublings, 30)) * random.uniform(0.75, 1.25)


def retry_after(value: str) -> float | None:
    """Return the seconds of a `Retry-After` header (a number or a date), within limits and with jitter; else None."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    if math.isnan(seconds):
        return None
    return min(LONGEST_ASKED_S, max(0.1, seconds)) * random.uniform(1.0, 1.1)
