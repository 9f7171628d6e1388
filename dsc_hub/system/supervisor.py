"""Run a command, and end it with all its descendants when we are told to or when our parent is gone.

    python -m dsc_hub.system.supervisor COMMAND ...      standard input: a pipe that the parent holds open and never writes to

The pipe is closed by the kernel however the parent dies, SIGKILL included; that is the signal to clean up. As a
"subreaper" the keeper inherits orphaned descendants, so that engine processes in sessions of their own are found too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRACE_S = 8.0
_PR_SET_CHILD_SUBREAPER = 36


def descendants(pid: int) -> list[int]:
    """All living descendants of a process, deepest last."""
    out: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(c) for c in task.read_text().split()]
        except OSError:  # ended while we looked
            continue
        for child in children:
            out += [child, *descendants(child)]
    return out


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _end_all() -> None:
    """TERM to every descendant, time to go in peace, then KILL until none is left."""
    me = os.getpid()
    _signal_all(descendants(me), signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while _alive(me) and time.monotonic() < deadline:
        time.sleep(0.05)
    while left := _alive(me):
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.05)


def _alive(me: int) -> list[int]:
    while True:  # collect those who ended, so that the dead don't count as living
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return []
        if pid == 0:
            return descendants(me)


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    signal.signal(signal.SIGINT, lambda *_: told.set())

    def watch_parent() -> None:
        while os.read(0, 1):
            pass
        told.set()

    threading.Thread(target=watch_parent, daemon=True).start()
    while not told.wait(0.1) and child.poll() is None:
        pass
    code = child.returncode
    _end_all()
    return code if code is not None and code >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
