"""Waiting for a Hub, with an end: what may pass is tried again, and no wait is without a limit.

The client has no timeout, and tries some requests again by itself (uploads and listings: five times, 1 to 8 seconds apart, or
as long as the Hub asks), others never. `with_retries` is for what it tries once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers

from dsc_hub.errors import HubError
from dsc_hub.system.progress import duration, say

TRIES = 6
PAUSE_S = 1.0  # before the second attempt; twice as long before each further one, and a random part of it besides
LONGEST_PAUSE_S = 300.0  # a server that asks for more is given up at once
REPLY_S = 120.0  # without a byte from the server, or without it taking one
KEPT = "What is there already is kept: the same command goes on from it."
GO_ON = f"Tried {TRIES} times. {KEPT}"
PASSING = frozenset({408, 409, 412, 429, 500, 502, 503, 504})  # answers after which another attempt makes sense


Answer = TypeVar("Answer")
Passing = HfHubHTTPError | LocalEntryNotFoundError | httpx2.TransportError | json.JSONDecodeError


def with_retries(what: str, attempt: Callable[[], Answer]) -> Answer:
    """The result of `attempt`, made up to TRIES times while what comes in between may pass."""
    for number in range(1, TRIES + 1):
        try:
            with bounded(REPLY_S, LONGEST_PAUSE_S):
                return attempt()
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, json.JSONDecodeError) as e:
            if number == TRIES or not _may_pass(e):
                raise
            pause = _pause(number, e)
            say(f"{what}: {_told(e)}; attempt {number + 1} of {TRIES} in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _may_pass(error: Passing) -> bool:
    if isinstance(error, LocalEntryNotFoundError):  # the client's word for a file that it could not ask for
        return not constants.is_offline_mode()
    if isinstance(error, (httpx2.TransportError, json.JSONDecodeError)):  # no JSON: the page of a proxy
        return True
    return error.response is not None and error.response.status_code in PASSING


def _pause(number: int, error: Passing) -> float:
    """Seconds before the next attempt: what the server asks for, or longer and longer, never in step with others."""
    response = getattr(error, "response", None)
    asked = (asked_wait(response) if response is not None else None) or 0.0
    longer: float = PAUSE_S * 2 ** (number - 1) * (1 + random.random())
    return max(min(LONGEST_PAUSE_S, longer), asked * (1 + random.random() / 10))


def _told(error: Passing) -> str:
    if (response := getattr(error, "response", None)) is not None:
        return (
            "somebody else committed in between" if response.status_code == 412 else f"answered {response.status_code}"
        )
    return f"no answer ({type(error).__name__})"


@contextmanager
def bounded(reply_s: float, longest_s: float) -> Iterator[None]:
    """While the block runs, no request of the client waits longer than `reply_s` seconds for a byte, and a Hub that asks to
    wait for more than `longest_s` seconds is a HubError."""

    def limit(request: httpx2.Request) -> None:
        limits = request.extensions.get("timeout", {})
        filled = {k: reply_s if limits.get(k) is None else limits[k] for k in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": filled}

    def refuse(response: httpx2.Response) -> None:
        asked = asked_wait(response) if response.status_code >= 400 else None
        if asked is not None and asked > longest_s:
            raise HubError(
                f"{response.request.url.host} answered {response.status_code} and asks to wait for {duration(asked)}",
                "Run the same command again after that: what is there already is kept.",
            )

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], limit], "response": [*hooks["response"], refuse]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def asked_wait(response: httpx2.Response) -> float | None:
    """Seconds that an answer asks to wait for before the next request; None if it asks for nothing."""
    limits = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without its zone
        return None
