"""Which failures make a server rest."""

from __future__ import annotations

import random
import time
from email.utils import formatdate

import pytest

from dsc_hub.inference.rests import STREAK, FailureStreak
from dsc_hub.inference.retries import LONGEST_ASKED_S, Again, RequestFailed, Tries, retry_after


def test_a_server_that_refuses_all_that_is_sent_rests():
    streak = FailureStreak()
    assert [streak.failed(streak.send()) for _ in range(STREAK)] == [False] * (STREAK - 1) + [True]


def test_a_full_server_rests_although_it_works_at_what_it_accepted():
    streak = FailureStreak()
    accepted = [streak.send() for _ in range(8)]
    assert [streak.failed(streak.send()) for _ in range(STREAK)] == [False] * (STREAK - 1) + [True]
    streak.answered(accepted[0])  # its place is free again, for one
    streak.resume_early()
    taken = streak.send()
    assert streak.is_trial and not streak.failed(streak.send())
    streak.answered(taken)
    assert not streak.is_trial


def test_a_failure_after_an_early_end_begins_a_rest_at_once():
    streak = FailureStreak()
    accepted = streak.send()
    for _ in range(STREAK):
        streak.failed(streak.send())
    streak.answered(accepted)
    streak.resume_early()
    assert streak.failed(streak.send()) and streak.is_trial
    streak.resume()
    assert [streak.failed(streak.send()) for _ in range(STREAK - STREAK // 2)][-2:] == [False, True]


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_refusals_at_random_make_no_server_rest(share: float):
    streak, dice, in_flight = FailureStreak(), random.Random(3), []
    for _ in range(20_000):
        number = streak.send()
        if dice.random() < share:
            assert not streak.failed(number)
        else:
            in_flight.append(number)
        if len(in_flight) > 100:
            streak.answered(in_flight.pop(dice.randrange(100)))


def test_a_burst_of_which_half_is_refused_before_any_answer_makes_no_server_rest():
    streak, numbers = FailureStreak(), []
    numbers = [streak.send() for _ in range(128)]
    assert not any(streak.failed(n) for n in numbers[::2])


def test_failures_as_slow_as_answers_make_a_server_rest_when_none_is_answered():
    streak, dice = FailureStreak(), random.Random(4)
    in_flight = [streak.send() for _ in range(64)]
    failures = 1
    while not streak.failed(in_flight.pop(dice.randrange(64))):
        in_flight.append(streak.send())
        failures += 1
    assert 64 < failures <= 64 + STREAK


def test_a_request_is_tried_for_longer_while_others_are_answered():
    def tries(answered: bool) -> int:
        state, n = Tries[str](0), 0
        with pytest.raises(RequestFailed):
            while True:
                n += 1
                state.count(Again("429", "full", most=10), n if answered else 0)
        return n

    assert (tries(answered=False), tries(answered=True)) == (11, 30)


def test_the_pause_grows_only_while_no_other_request_is_answered():
    state = Tries[str](0)
    alone = [state.pause(Again("429", "full"), False) for _ in range(5)]
    beside = [state.pause(Again("429", "full"), True) for _ in range(5)]
    assert alone[4] > 5 and max(beside) < 1.5


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("2", 2, 2.2),
        ("0", 0.1, 0.11),
        ("-5", 0.1, 0.11),
        ("1e99", LONGEST_ASKED_S, 1.1 * LONGEST_ASKED_S),
        ("inf", 120, 132),
    ],
)
def test_retry_after_is_obeyed_within_limits(value: str, low: float, high: float):
    seconds = retry_after(value)
    assert seconds is not None and low <= seconds <= high + 1e-9


def test_retry_after_may_be_a_date():
    seconds = retry_after(formatdate(time.time() + 30, usegmt=True))
    assert seconds is not None and 25 < seconds < 36
    assert [retry_after(value) for value in ("", "nan", "soon", "Mon, 99 Foo 2026")] == [None] * 4
