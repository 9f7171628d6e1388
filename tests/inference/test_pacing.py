"""Stated quotas: no minute has more than they allow, and waiting for them can be interrupted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from dsc_hub.config.serving import GenerationConfig
from dsc_hub.inference import pacing
from dsc_hub.inference.client import Generator
from dsc_hub.inference.pacing import MINUTE_S, Pacer, StatedQuota
from tests.conftest import end_of


def sent_at(q: StatedQuota, tokens: list[tuple[int, int]], pause_s: float = 0.0) -> list[float]:
    """When requests with (expected, used) tokens are sent, each as soon as it may, after a pause for its answer."""
    now, times = 0.0, []
    for expected, used in tokens:
        now += q.wait_s(now)
        times.append(now)
        q.send(now, expected)
        now += pause_s
        q.settle(expected, used)
    return times


@pytest.mark.parametrize("limit", [1, 7, 60, 500])
def test_no_minute_has_more_requests_than_stated_and_none_is_wasted(limit: int):
    times = sent_at(StatedQuota(limit, None), [(100, 100)] * (3 * limit))
    for start in times:
        assert sum(start <= t < start + MINUTE_S - 1e-6 for t in times) <= limit
    assert times[-1] == pytest.approx((3 * limit - 1) * MINUTE_S / limit)


def test_tokens_are_those_that_were_used_and_not_those_that_were_feared():
    times = sent_at(StatedQuota(None, 6000), [(1000, 100)] * 600, pause_s=0.001)
    assert times[-1] == pytest.approx(599 * 100 / 6000 * MINUTE_S, rel=0.01)


def test_a_quiet_hour_saves_up_nothing():
    q = StatedQuota(60, None)
    q.send(0.0, 1)
    assert q.wait_s(3600.0) == 0.0
    q.send(3600.0, 1)
    assert q.wait_s(3600.0) == pytest.approx(1.0)


def test_each_server_gets_its_own_quota_in_order(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pacing, "MINUTE_S", 1.0)
    times: list[list[float]] = [[], []]

    def ends() -> list[Any]:
        def seen(i: int) -> Callable[[dict, int], str]:
            return lambda body, before: times[i].append(time.monotonic()) or ""

        return [end_of(start(fault=seen(i))) for i in range(2)]

    async def go() -> None:
        async with Generator(ends(), GenerationConfig(), 20, quota=StatedQuota(20, None)) as g:
            await asyncio.gather(*(g.complete([{"role": "user", "content": f"q{i}"}], i) for i in range(24)))

    asyncio.run(go())
    assert sum(map(len, times)) == 24
    for of_server in times:
        of_server.sort()
        assert of_server[-1] - of_server[0] >= (len(of_server) - 1) / 20 - 0.03  # a pace of 20 a "minute"


def test_who_waits_for_a_quota_is_stopped_at_once(monkeypatch: pytest.MonkeyPatch):
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    async def go() -> None:
        pacer = Pacer(StatedQuota(1, None))
        await pacer.wait(1, stop)  # nothing to wait for
        with pytest.raises(Stop):
            await asyncio.wait_for(pacer.wait(1, stop), 5)

    asyncio.run(go())
