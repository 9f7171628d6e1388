"""So many at once: places, standing aside, levels that are found, and Ctrl-C once and twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.inference.concurrency import FIRST, MOST, ConcurrencyLimit
from dsc_hub.inference.task_pool import TaskPool
from tests.conftest import ROOT


def run_jobs(most: Any, jobs: Any) -> list[Any]:
    async def go() -> list[Any]:
        flow = TaskPool(most)
        return [result async for result in flow.over((lambda job=job: job(flow)) for job in jobs)]

    return asyncio.run(go())


def test_every_result_comes_and_never_more_than_so_many_run():
    now, seen = 0, []

    async def job(flow: TaskPool) -> int:
        nonlocal now
        now += 1
        seen.append(now)
        await asyncio.sleep(0.001)
        now -= 1
        return 1

    assert sum(run_jobs(lambda: 7, [job] * 100)) == 100 and max(seen) == 7


def test_whoever_stands_aside_gives_its_place_to_others_and_gets_one_back():
    asking, aside, most_asking, most_open = 0, 0, 0, 0

    async def job(flow: TaskPool) -> None:
        nonlocal asking, aside, most_asking, most_open
        for _ in range(3):
            asking += 1
            most_asking = max(most_asking, asking)
            await asyncio.sleep(0.001)
            asking -= 1
            aside += 1
            async with flow.aside():
                most_open = max(most_open, asking + aside)
                await asyncio.sleep(0.005)
                aside -= 1

    assert len(run_jobs(lambda: 4, [job] * 60)) == 60
    assert most_asking <= 4 and 4 < most_open <= 16  # four times as many are begun at most


def test_the_first_error_ends_all_and_is_told():
    ended = []

    async def long(flow: TaskPool) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(1)

    async def bad(flow: TaskPool) -> None:
        await asyncio.sleep(0.01)
        raise ZeroDivisionError

    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        run_jobs(lambda: 3, [long, long, bad])
    assert ended == [1, 1] and time.monotonic() - started < 5


def test_a_level_that_rises_by_itself_is_used():
    level, most = 1, 0
    now = 0

    async def job(flow: TaskPool) -> None:
        nonlocal level, now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.2)
        level = 10
        now -= 1

    run_jobs(lambda: level, [job] * 30)
    assert most == 10


# -- a level that is found by trying


def settled(speed: Any, requests: int = 200_000) -> ConcurrencyLimit:
    """A level after so many requests to a server that gives `speed(level)` tokens a second."""
    level, at = ConcurrencyLimit("auto"), 0.0
    for _ in range(requests):
        at += 100 / speed(level.now)
        level.done(100, level.now, at)
    return level


@pytest.mark.parametrize(
    ("best", "found"),
    [(100, FIRST), (FIRST, FIRST), (256, 256), (400, 512), (100_000, MOST)],
)
def test_a_level_grows_as_long_as_that_brings_something(best: int, found: int):
    assert settled(lambda level: 10.0 * min(level, best)).now == found


def test_a_level_that_makes_it_slower_is_taken_back():
    assert settled(lambda level: 1000.0 if level <= 256 else 600.0).now == FIRST
    assert settled(lambda level: 4.0 * level if level <= 256 else 600.0).now == 256


def test_a_level_that_is_not_in_use_is_not_judged_and_a_fixed_one_stays():
    level = ConcurrencyLimit("auto")
    for n in range(10_000):
        level.done(100, 10, n * 0.01)
    assert level.now == FIRST
    fixed = ConcurrencyLimit(7)
    for n in range(10_000):
        fixed.done(100, 7, n * 0.01)
    assert fixed.now == 7


def test_a_level_falls_to_what_is_carried_and_comes_back_faster_and_faster():
    level = ConcurrencyLimit(100)
    level.lower(49)
    assert level.now == 49
    for n in range(48):
        level.done(100, 49, 4.0 + n)
    assert level.now == 49
    at, levels = 60.0, [level.now]
    while level.now < 100:
        level.done(100, level.now, at := at + 1)
        levels += [level.now] if level.now != levels[-1] else []
    assert levels == [49, 51, 56, 67, 93, 100]
    level.lower(0)
    assert level.now == 1
    level.lower(50)
    assert level.now == 1


def test_a_level_does_not_rise_while_more_is_refused_than_answered():
    level = ConcurrencyLimit(100)
    level.lower(8)
    for n in range(800):
        level.refused()
        level.refused()
        level.done(100, 8, float(n))
    assert level.now == 8
    for n in range(9):
        level.done(100, 8, float(n))
    assert level.now == 9


def test_a_level_that_rises_in_vain_rises_more_and_more_seldom():
    level, requests, rises = ConcurrencyLimit(100), 0, []
    level.lower(8)
    for _ in range(6):
        while level.now == 8:
            level.done(100, 8, float(requests := requests + 1))
        rises.append(requests)
        level.lower(8)
    waits = [b - a for a, b in zip([0, *rises], rises, strict=False)]
    assert waits == [8, 16, 32, 64, 128, 256]


# -- Ctrl-C

INTERRUPTED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.conftest import ScriptedModel, length_score
from tests.sampling.test_sample import setup
from dsc_hub.sampling import sample
run, r, some = setup(Path(sys.argv[1]), Path(sys.argv[2]), "chain.chains_per_prompt=6", "serving.concurrency=8")
asked = 0
class Slow(ScriptedModel):
    async def __call__(self, messages, seed):
        global asked
        asked += 1
        return await super().__call__(messages, seed)
tally = asyncio.run(sample.sample(run, r, some, Slow(float(sys.argv[3])), length_score))
print(tally.interrupted, asked, tally.meter.done)
"""


def interrupted(recipe_file: Path, folder: Path, times: int, pause: float) -> tuple[list[str], str, float]:
    """What is printed at the end and the turns on disk at the first Ctrl-C, what is said, and the seconds from then to the end."""
    command = [sys.executable, "-c", INTERRUPTED.format(root=str(ROOT)), str(recipe_file), str(folder), str(pause)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path, deadline = folder / "turns.jsonl", time.monotonic() + 60
    while (not path.is_file() or path.read_bytes().count(b"\n") < 16) and time.monotonic() < deadline:
        time.sleep(0.005)
    before = path.read_bytes().count(b"\n")
    started = time.monotonic()
    for _ in range(times):
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return [*out.split(), str(before)], err, time.monotonic() - started


def test_ctrl_c_once_finishes_what_is_in_flight_and_asks_for_nothing_new(recipe_file: Path, tmp_path: Path):
    (was, asked, done, before), said, _ = interrupted(recipe_file, tmp_path / "run", 1, 0.3)
    assert was == "True" and asked == done  # every request that was made has its row
    assert "finishing the 8 requests in flight" in said
    assert int(asked) <= int(before) + 2 * 8  # in flight then, and what was begun until the signal came
    assert len((tmp_path / "run" / "turns.jsonl").read_text().splitlines()) == int(done) < 14 * 6 * 5


def test_ctrl_c_twice_stops_now_and_keeps_what_is_on_disk(recipe_file: Path, tmp_path: Path):
    (was, asked, done, _), _, seconds = interrupted(recipe_file, tmp_path / "run", 2, 2.0)
    assert was == "True" and int(asked) > int(done) >= 16 and seconds < 1.5
    rows = [json.loads(line) for line in (tmp_path / "run" / "turns.jsonl").read_text().splitlines()]
    assert len(rows) == int(done)


def test_after_ctrl_c_the_command_says_how_to_go_on_and_does(recipe_file: Path, dsc, home: Path):
    from tests.scripted_server import make_server

    server = make_server(pause=0.1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [
        "sample",
        str(recipe_file),
        f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]",
        "serving.concurrency=4",
    ]
    env = {**os.environ, "DSC_HUB_HOME": str(home), "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "dsc_hub", *words], cwd=dsc.work, env=env, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any(dsc.work.glob("runs/*/*/chains.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and "what is finished is kept; the same command goes on from there" in said
    (run,) = dsc.work.glob("runs/*/*")
    sessions = [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]
    turns = (run / "turns.jsonl").read_text().splitlines()
    assert len(sessions) == 1 and sessions[0]["new_tokens"] == sum(json.loads(t)["new_tokens"] for t in turns)
    dsc(*words, code=0)
    assert (run / "turns.jsonl").read_text().splitlines()[: len(turns)] == turns
    assert json.loads((run / "sampling.done.json").read_text())["result"]["seconds"] is not None
    server.shutdown()


def test_garbage_of_one_pool_is_collected_by_the_time_of_the_next_one():
    """It would be frozen along with the libraries' objects: a process of many pools grew without end."""

    class Node:
        itself: Any

    async def job(flow: TaskPool) -> Any:
        node = Node()
        node.itself = node
        return weakref.ref(node)

    (node,) = run_jobs(lambda: 1, [job])
    run_jobs(lambda: 1, [job])
    assert node() is None
