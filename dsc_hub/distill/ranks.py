"""A run that a launcher started in several processes: `accelerate launch --config_file F -m dsc_hub run RECIPE`.

The main process (rank 0) runs the stages. The others wait, without torch, a GPU or a process group, until it trains;
then each process starts its part of the training as a child with the launcher's own variables, so that the processes
and the plugin (DDP, FSDP, DeepSpeed) are those of F. After the training only the main process goes on.

They meet through a status file in the folder of the runs, which the main process renews every few seconds. A file that
is not renewed is a leftover of another launch, or of a main process that is gone. Several machines need one shared
folder of runs.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsc_hub.distill.launcher import launch, launch_part
from dsc_hub.errors import DscError, RunError
from dsc_hub.runs.metrics_schema import Training
from dsc_hub.runs.run import Run
from dsc_hub.system import machine
from dsc_hub.system.files import read_object, write_json
from dsc_hub.system.launch import rank, world_size

BEAT_S = 1.0  # between renewals of the status
LOST_AFTER_S = 120.0  # without renewal; network file systems show changes late
NOT_SEEN_AFTER_S = 600.0  # from the start, without any sign of the main process
SETTLE_S = 10.0  # the main process prints its own error before the others end with theirs

PREPARING, TRAINING, TRAINED, FAILED = "preparing", "training", "trained", "failed"


def status_file(runs: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the status file of this launch, by the address at which its processes meet."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
    launch = [environment.get(name, "") for name in names] + [str(world_size(environment))]
    return runs / f".launch-{hashlib.sha256(' '.join(launch).encode()).hexdigest()[:12]}.json"


@contextmanager
def lead(runs: Path) -> Iterator[None]:
    """Publish the status of this main process to the others of its launch, until the block ends."""
    status = _Status(status_file(runs))
    try:
        yield
    except BaseException:
        status.end(FAILED)
        raise
    else:
        status.end(TRAINED)


class _Status:
    """The main process's side of the status file, renewed by a thread."""

    def __init__(self, path: Path) -> None:
        self._path, self._stopped, self._lock, self._beat = path, threading.Event(), threading.Lock(), 0
        self.announce(PREPARING)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        _current.append(self)

    def announce(self, state: str, run: str = "") -> None:
        with self._lock:
            self._state = {"state": state, "run": run}
            self._write()

    def _write(self) -> None:
        self._beat += 1
        write_json(self._path, self._state | {"beat": f"{os.getpid()} {self._beat}", "at": time.time()})

    def _renew(self) -> None:
        while not self._stopped.wait(BEAT_S):
            with self._lock:
                self._write()

    def end(self, state: str) -> None:
        self._stopped.set()
        self._thread.join()
        _current.remove(self)
        self.announce(state)  # stays: others may not have read it yet


_current: list[_Status] = []  # of this process: none, or one


def leads() -> bool:
    """Return whether other processes of a launch follow this one."""
    return bool(_current)


def train_together(run: Run) -> Training:
    """Train in all processes of the launch; called in the main one. RunError if nobody leads the others."""
    if not _current:
        raise RunError(
            f"this is one of {world_size()} processes of a launcher, and the others do not know of this training",
            "Start the run with `accelerate launch ... -m dsc_hub run RECIPE`, or one process alone.",
        )
    _current[0].announce(TRAINING, str(run.folder.resolve()))
    training = launch(run, joins=True)
    _current[0].announce(TRAINED)
    return training


def follow(runs: Path, work: Callable[[Path], object] = launch_part) -> int:
    """Wait for the main process's training, take part in it, and return the exit code. Only for ranks above 0.

    `work` trains in a run folder. RunError if the main process can't be seen, or is gone; the error of `work`, if the
    main process does not fail, too, and says why.
    """
    path, started = status_file(runs), time.monotonic()
    seen: dict[str, Any] = read_object(path) if path.is_file() else {}  # until it changes: another launch's
    if seen.get("at", 0.0) >= machine.process_started():  # of this launch: the main process may even be done already
        seen = {}
    alive, changed = False, started
    while True:
        time.sleep(BEAT_S / 2)
        now = _read_status(path)
        if now is not None and now.get("beat") != seen.get("beat"):
            alive, changed, seen = True, time.monotonic(), now
            if now["state"] == TRAINED:
                return 0
            if now["state"] == FAILED:
                time.sleep(SETTLE_S)
                return 2
            if now["state"] == TRAINING:
                try:
                    work(Path(now["run"]))
                except DscError:
                    time.sleep(SETTLE_S)
                    raise
                return 0
        waited = time.monotonic() - changed
        if not alive and waited > NOT_SEEN_AFTER_S:
            raise RunError(
                f"process {rank()} of {world_size()} saw no sign of the main process in {runs.resolve()} for"
                f" {waited:.0f} s",
                "Several machines need one shared folder of runs: name it with --runs, the same on each.",
            )
        if alive and waited > LOST_AFTER_S:
            raise RunError(
                f"the main process gave no sign for {waited:.0f} s", f"Its messages say why; see also {path}."
            )


def _read_status(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path)
    except DscError:  # missing, or replaced while a network file system served the old one
        return None
