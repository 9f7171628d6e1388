"""The processes of a vLLM server, below a supervisor; they may import vLLM before the server's arguments are known.

On a CPU importing is two thirds of a start. A run begins it while it converts models and checks the recipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsc_hub.inference.vllm_start import LATER

START = "dsc_hub.inference.vllm_start"  # of a server on a CPU


@dataclass(frozen=True)
class VllmProcess:
    """A supervised process of vLLM. Its output is in `log`, from the byte `log_from` on."""

    supervisor: subprocess.Popen[bytes]
    environment: Mapping[str, str] = field(repr=False)  # with the key
    log: Path
    log_from: int

    @property
    def exit_code(self) -> int | None:
        """The exit code of the server's own process, if it has ended."""
        return self.supervisor.poll()

    def end(self) -> None:
        """Close the pipe, so that the supervisor ends its command and all descendants. Kill the rest if that hangs."""
        if self.supervisor.stdin:
            with contextlib.suppress(BrokenPipeError):  # of what was not written
                self.supervisor.stdin.close()
        try:
            self.supervisor.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.supervisor.pid, signal.SIGKILL)
            self.supervisor.wait()


_early: VllmProcess | None = None  # has imported vLLM, or does so now, and waits for the arguments of a server
_lock = threading.Lock()  # of _early


def start_process(command: Sequence[str], environment: Mapping[str, str], log: Path) -> VllmProcess:
    """Start a server (`vllm.vllm_command`), in the process that has imported vLLM if there is one for it."""
    if early := _take():
        fits = early.log == log and _without_key(early.environment) == _without_key(environment) and START in command
        if fits and early.exit_code is None:
            arguments = command[command.index(START) + 1 :]
            _write(early, json.dumps({"arguments": arguments, "api_key": environment["VLLM_API_KEY"]}))
            return early
        early.end()
    return _begin(command, environment, log)


@contextlib.contextmanager
def importing_early(environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """Import vLLM on a CPU while the block works. The first server that is started in the block goes on from there.

    It must have the same log and, but for the key, the same environment; another one, which is compiled or has cores
    of its own, starts as ever. While such a process waits, no other one is started.
    """
    global _early
    with _lock:
        mine, is_new = None, not log.exists()
        if not _early:
            mine = _early = _begin([sys.executable, "-m", START, LATER], environment, log, "--pass-input")
    try:
        yield
    finally:
        if mine and _take(mine):  # no server was started
            mine.end()
            if is_new:
                log.unlink(missing_ok=True)


def _take(only: VllmProcess | None = None) -> VllmProcess | None:
    """Return the process that waits for arguments, if it is `only` (None: any), so that nobody else gets it."""
    global _early
    with _lock:
        if only and _early is not only:
            return None
        taken, _early = _early, None
        return taken


def _begin(command: Sequence[str], environment: Mapping[str, str], log: Path, *options: str) -> VllmProcess:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        log_from = out.tell()  # anything before belongs to an earlier process
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "dsc_hub.system.supervisor", *options, *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=environment,
        )
    return VllmProcess(supervisor, environment, log, log_from)


def _write(process: VllmProcess, line: str) -> None:
    assert process.supervisor.stdin
    with contextlib.suppress(BrokenPipeError):  # it is ending: `exit_code` will say so
        process.supervisor.stdin.write(line.encode() + b"\n")
        process.supervisor.stdin.flush()


def _without_key(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != "VLLM_API_KEY"}
