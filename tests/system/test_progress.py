"""Progress is printed to stderr, and ends no work where nobody can read it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

WORKS = """
from dsc_hub.system import progress
progress.PLAIN_EVERY_S = 0.0
with progress.moving_line() as line:
    for n in range(300):
        progress.say("a line of progress " * 20)
        line.show(f"{n} of 300")
print("all work is done")
"""


def run(**keys: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WORKS], stdout=subprocess.PIPE, text=True, timeout=60, **keys)


def closed_pipe() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


@pytest.mark.parametrize("stderr", [lambda: os.open("/dev/full", os.O_WRONLY), closed_pipe], ids=["full", "closed"])
def test_work_goes_on_where_progress_can_not_be_printed(stderr: Callable[[], int]):
    descriptor = stderr()
    try:
        done = run(stderr=descriptor)
    finally:
        os.close(descriptor)
    assert (done.returncode, done.stdout) == (0, "all work is done\n")


def test_a_reader_that_goes_away_meanwhile_ends_nothing():
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" 2> >(head -n 1 > /dev/null)', sys.executable, WORKS],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "all work is done\n")
    assert "a line of progress" in run(stderr=subprocess.PIPE).stderr
