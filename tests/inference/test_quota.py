"""Quotas are learned from headers, in all the forms that servers send."""

from __future__ import annotations

import pytest

from dsc_hub.inference.quota import Quota, _duration


def headers(remaining: object, reset: object, limit: object = 10, unit: str = "requests") -> dict[str, str]:
    values = {"remaining": remaining, "reset": reset, "limit": limit}
    return {f"x-ratelimit-{name}-{unit}": str(value) for name, value in values.items()}


def send(quota: Quota, n: int = 1) -> None:
    for _ in range(n):
        quota.spend()


def test_what_remains_is_sent_and_the_rest_waits_for_the_reset():
    quota = Quota()
    send(quota)
    quota.report(headers(9, "6s"), quota.spent, 100.0)
    for _ in range(9):
        assert quota.wait_s(101.0) == 0
        send(quota)
    assert quota.wait_s(101.0) == 5 and quota.wait_s(105.5) == 0.5
    for _ in range(10):  # a new window, of which no reply has reported yet
        assert quota.wait_s(106.0) == 0
        send(quota)
    assert quota.wait_s(107.0) == 5


def test_requests_in_flight_are_counted_and_a_late_reply_changes_nothing():
    quota = Quota()
    send(quota)
    first = quota.spent
    send(quota, 4)
    fifth = quota.spent
    quota.report(headers(5, "6s"), fifth, 100.0)
    quota.report(headers(9, "6s"), first, 99.9)
    send(quota, 5)
    assert quota.wait_s(101.0) == 5


def test_tokens_are_limited_by_the_mean_of_a_request():
    quota = Quota()
    send(quota)
    quota.used(300)
    quota.report(headers(1000, "10s", 2000, "tokens"), quota.spent, 0.0)
    for _ in range(3):
        assert quota.wait_s(1.0) == 0
        send(quota)
    assert quota.wait_s(1.0) == 9
    send(quota)  # a request that needs more than the whole quota is sent alone
    quota.report(headers(100, "10s", 100, "tokens"), quota.spent, 2.0)
    assert quota.wait_s(2.0) == 0


@pytest.mark.parametrize(
    "unusable",
    [
        {},
        headers("many", "6s"),
        headers(-1, "6s"),
        headers("nan", "6s"),
        headers(0, "soon"),
        headers(0, "inf"),
        headers(0, "7h12m"),  # of a day: its refusals say when to come back
        {"x-ratelimit-remaining-requests": "0"},
    ],
)
def test_headers_that_say_nothing_usable_limit_nothing(unusable: dict[str, str]):
    quota = Quota()
    send(quota, 50)
    quota.report(unusable, quota.spent, 0.0)
    assert quota.wait_s(0.0) == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("250ms", 0.25),
        ("1m30.5s", 90.5),
        ("2h", 7200),
        ("12", 12),
        ("1.5", 1.5),
        ("1s ago", None),
    ],
)
def test_durations(text: str, seconds: float | None):
    assert _duration(text) == seconds
