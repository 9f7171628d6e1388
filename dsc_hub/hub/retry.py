"""Retries of requests to a Hub: temporary errors are retried, and every wait has a limit.

The client has no timeout. It retries some requests itself (uploads and listings: five times, 1 to 8 seconds apart, or
as long as the Hub requests), others never. `with_retries` is for requests that it sends once.
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
PAUSE_S = 1.0  # before the second attempt; doubled before each further one, plus a random part
LONGEST_PAUSE_S = 300.0  # if a server requests more, the request fails at once
REPLY_S = 120.0  # maximum seconds without a byte received or sent
WORK_IS_KEPT = "What is there already is kept: the same command goes on from it."
GO_ON = f"Tried {TRIES} times. {WORK_IS_KEPT}"
PASSING = frozenset({408, 409, 412, 429, 500, 502, 503, 504})  # status codes after which a retry may succeed


Result = TypeVar("Result")
Passing = HfHubHTTPError | LocalEntryNotFoundError | httpx2.TransportError | json.JSONDecodeError


def with_retries(what: str, attempt: Callable[[], Result], tries: int = TRIES, reply_s: float | None = None) -> Result:
    """Return the result of `attempt`, called up to `tries` times while it fails with temporary errors.

    `reply_s` is the longest wait for a byte, in seconds; by default REPLY_S.
    """
    for number in range(1, tries + 1):
        try:
            with bounded(REPLY_S if reply_s is None else reply_s, LONGEST_PAUSE_S):
                return attempt()
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, json.JSONDecodeError) as e:
            if number == tries or not _may_pass(e):
                raise
            pause = _pause(number, e)
            say(f"{what}: {_reason(e)}; attempt {number + 1} of {tries} in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _may_pass(error: Passing) -> bool:
    if isinstance(error, LocalEntryNotFoundError):  # raised by the client if the request for a file failed
        return not constants.is_offline_mode()
    if isinstance(error, (httpx2.TransportError, json.JSONDecodeError)):  # no JSON: an error page of a proxy
        return True
    return error.response is not None and error.response.status_code in PASSING


def _pause(number: int, error: Passing) -> float:
    """Return the seconds before the next attempt: as requested by the server, or exponential backoff; with jitter."""
    response = getattr(error, "response", None)
    requested = (asked_wait(response) if response is not None else None) or 0.0
    backoff: float = PAUSE_S * 2 ** (number - 1) * (1 + random.random())
    return max(min(LONGEST_PAUSE_S, backoff), requested * (1 + random.random() / 10))


def _reason(error: Passing) -> str:
    if (response := getattr(error, "response", None)) is not None:
        return (
            "somebody else committed in between" if response.status_code == 412 else f"answered {response.status_code}"
        )
    return f"no answer ({type(error).__name__})"


@contextmanager
def bounded(reply_s: float, longest_s: float) -> Iterator[None]:
    """Limit the client's waits while the block runs.

    No request waits longer than `reply_s` seconds for a byte, and a Hub that requests a wait of more than `longest_s`
    seconds causes a HubError.
    """

    def limit(request: httpx2.Request) -> None:
        limits = request.extensions.get("timeout", {})
        filled = {k: reply_s if limits.get(k) is None else limits[k] for k in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": filled}

    def refuse(response: httpx2.Response) -> None:
        wait_s = asked_wait(response) if response.status_code >= 400 else None
        if wait_s is not None and wait_s > longest_s:
            raise HubError(
                f"{response.request.url.host} answered {response.status_code} and asks to wait for {duration(wait_s)}",
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
    """Return the seconds that a response requests to wait before the next request; None if it requests none."""
    limits = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # not a date, or one without time zone
        return None
