"""Sampling for an hour under faults of servers: no row is lost or doubled, memory and descriptors stay flat.

SOAK_S=600 python -m pytest -s -m long tests/sampling/test_soak.py
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from dsc_hub.runs.row_index import chain_key
from dsc_hub.runs.run import Run
from tests.benchmarks.faults import GOOD, Fault, _process, _sample

SECONDS = float(os.environ.get("SOAK_S", "3600"))
pytestmark = [pytest.mark.long, pytest.mark.timeout(round(3 * SECONDS) + 600)]
CHAINS = 200
KINDS = [
    GOOD,
    *(
        Fault(status, share)
        for status in ("429", "500", "503", "closes", "garbage", "null", "400")
        for share in (0.03, 0.1)
    ),
    Fault("503", 0.05, "1"),
    Fault("429", room=16),
]


def resources() -> tuple[int, float]:
    """Return open descriptors and resident memory (MiB) of this process."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def session(kinds: list[Fault], folder: Path, seconds: float, dies: bool) -> str:
    """Sample with servers of these kinds for at most so many seconds; in the middle the first of them `dies`."""
    with ExitStack() as stack:
        servers = [ExitStack() for _ in kinds]
        endpoints = [
            stack.enter_context(own).enter_context(_process(kind, CHAINS))
            for own, kind in zip(servers, kinds, strict=True)
        ]
        work = asyncio.create_task(_sample(endpoints, folder, CHAINS, seconds))
        if dies:
            await asyncio.sleep(1.0)
            servers[0].close()
        return (await work).end


def test_an_hour_of_faults(tmp_path: Path):
    rng, until, measured = random.Random(0), time.monotonic() + SECONDS, []
    ends, failed, sessions, runs = Counter[str](), 0, 0, 0
    while time.monotonic() < until:
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        run, runs, is_last = Run(folder), runs + 1, False
        while not is_last:
            # Sessions are broken off after a while; the last one has a good server, and all the time it needs.
            is_last = rng.random() < 0.4
            kinds = [GOOD] if is_last else rng.sample(KINDS, rng.choice((1, 2, 3)))
            dies = len(kinds) > 1 and rng.random() < 0.3
            end = asyncio.run(session(kinds, folder, 300 if is_last else rng.uniform(0.5, 6), dies))
            assert end == "done" or (not is_last and end.startswith(("over", "exit 2"))), end
            ends["broken off" if end.startswith("over") else end.partition(":")[0]] += 1
            sessions += 1
        chains = Counter(map(chain_key, run.rows("chains.jsonl")))
        turns = Counter((r["prompt_id"], r["chain"], r["step"], r["role"]) for r in run.rows("turns.jsonl"))
        left = {chain_key(row) for row in run.rows("failed.jsonl")}
        assert set(chains.values()) == set(turns.values()) == {1}
        assert len(chains) + len(left) == CHAINS and not left & set(chains)
        failed += len(left)
        measured.append(resources())
    quarter = max(1, len(measured) // 4)
    fds, memory = zip(*measured, strict=True)
    early, late = (statistics.median(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    print(
        f"{runs} runs of {CHAINS} chains in {sessions} sessions ({dict(ends)}), {failed} chains failed in the end; "
        f"{fds[0]} and {fds[-1]} descriptors, {early:.0f} and {late:.0f} MiB"
    )
    assert fds[-1] <= fds[0] + 2
    assert late <= 1.1 * early + 10
