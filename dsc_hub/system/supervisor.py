"""Run a command; terminate it and all its descendants on a signal or when the parent process is gone.

    python -m dsc_hub.system.supervisor [--grace SECONDS] [--pass-input] COMMAND ...

`--grace` is the time between TERM and KILL. With `--pass-input` the command gets what the parent writes.

Standard input is a pipe that the parent holds open. The kernel closes the pipe however the parent dies, SIGKILL
included; that triggers the cleanup. As a "subreaper" the supervisor inherits orphaned
descendants, so that engine processes in their own sessions are found too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from dsc_hub.system.endings import BY_SIGNAL

GRACE_S = 8.0
_PR_SET_CHILD_SUBREAPER = 36


def descendants(pid: int) -> list[int]:
    """Return all living descendants of a process, deepest last."""
    out: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(c) for c in task.read_text().split()]
        except OSError:  # the process ended meanwhile
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


def _end_all(grace_s: float) -> None:
    """Send TERM to every descendant, wait up to `grace_s` seconds, then send KILL until none is left."""
    me = os.getpid()
    _signal_all(descendants(me), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while _alive(me) and time.monotonic() < deadline:
        time.sleep(0.05)
    while left := _alive(me):
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.05)


def _alive(me: int) -> list[int]:
    while True:  # reap ended children, so that they do not count as living
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return []
        if pid == 0:
            return descendants(me)


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command, grace_s = sys.argv[1:], GRACE_S
    if command[0] == "--grace":
        grace_s, command = float(command[1]), command[2:]
    if passes_input := command[0] == "--pass-input":
        command = command[1:]
    child = subprocess.Popen(command, stdin=subprocess.PIPE if passes_input else subprocess.DEVNULL)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())

    def watch_parent() -> None:
        while written := os.read(0, 1 << 16):
            if child.stdin:
                with contextlib.suppress(BrokenPipeError):  # the command has ended, which is seen below
                    child.stdin.write(written)
                    child.stdin.flush()
        stop.set()

    threading.Thread(target=watch_parent, daemon=True).start()
    while not stop.wait(0.1) and child.poll() is None:
        pass
    code = child.returncode
    _end_all(grace_s)
    if code is None:  # told to stop
        return 1
    return code if code >= 0 else BY_SIGNAL - code


if __name__ == "__main__":
    sys.exit(main())
