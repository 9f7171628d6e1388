"""Checkpoints of a training: what was trained is kept on disk, and the same command goes on from it.

A checkpoint is a folder that the trainer writes (adapter, optimizer, scheduler, random states, step). A marker with the
hash of each file is written last, so that a half-written or damaged one is noticed and the one before it is taken. The
marker also names what the training depends on: a checkpoint of other rows or settings is never used. Checkpoints are
removed when the adapter is in place.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsc_hub.distill import plugin
from dsc_hub.distill.config import BY_OBJECTIVE
from dsc_hub.distill.launcher import CHECKPOINT_BYTES
from dsc_hub.distill.validation import BEST
from dsc_hub.errors import RunError
from dsc_hub.runs.run import Run
from dsc_hub.system import launch, machine
from dsc_hub.system.files import read_object, write_json
from dsc_hub.system.hashing import digest, file_hash
from dsc_hub.system.locks import locked
from dsc_hub.system.progress import say

CHECKPOINTS = "checkpoints"  # in the run folder
MARKER = "checkpoint.done.json"
EVERY_S = 300.0  # seconds between two checkpoints
KEPT = 2


def training_identity(run: Run, world_size: int, dtype: str) -> str:
    """Return a hash of what the steps of a training depend on.

    That is the stage's fingerprint, the rows, the number of processes (the order of the rows depends on it), whether
    they divide the model, the dtype of the products, and the versions of the libraries.
    """
    config = BY_OBJECTIVE[run.facts.recipe.distill.objective].rows
    rows = [file_hash(path) for path in sorted((run["dataset"] / config).glob("*.parquet"))]
    divided = plugin.is_divided()
    return digest(run.facts.fingerprints.get("distill"), rows, world_size, divided, dtype, machine.versions())


def newest(run: Run, identity: str) -> Path | None:
    """Return the newest whole checkpoint of this training, or None. Says why others are left out."""
    for folder in sorted(run[CHECKPOINTS].glob("checkpoint-*"), key=_step, reverse=True):
        if problem := _problem(folder, identity):
            if launch.rank() == 0:
                say(f"distill  {folder.name} is not used: {problem}")
        else:
            return folder
    return None


def trained_s(folder: Path | None) -> float:
    """Return the seconds that were trained up to a checkpoint; 0 without one."""
    return float(read_object(folder / MARKER)["trained_s"]) if folder else 0.0


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _problem(folder: Path, identity: str) -> str:
    """Return why a checkpoint can't be used; "" if it can."""
    if not (folder / MARKER).is_file():
        return "it was not written to its end"
    try:
        marker = read_object(folder / MARKER)
    except RunError:
        return f"{MARKER} is damaged"
    if marker.get("identity") != identity:
        return "it is of other rows, settings, versions or processes"
    files = marker.get("files")
    if not isinstance(files, dict) or not isinstance(marker.get("trained_s"), (int, float)):
        return f"{MARKER} is damaged"
    changed = [name for name, sha256 in files.items() if not _is_whole(folder / name, sha256)]
    return f"{', '.join(changed)} was changed" if changed else ""


def _is_whole(path: Path, sha256: Any) -> bool:
    return path.is_file() and file_hash(path) == sha256


def check_space(run: Run, trainable: int) -> None:
    """RunError if the disk has no room for the checkpoints of an adapter with so many parameters."""
    needed = trainable * CHECKPOINT_BYTES
    taken = sum(p.stat().st_size for p in run[CHECKPOINTS].rglob("*") if p.is_file())  # by those of an earlier session
    free = shutil.disk_usage(run.folder).free
    if free + taken < needed:
        raise RunError(
            f"{free / 1e9:.2f} GB are free at {run.folder}, the checkpoints of this training need "
            f"{needed / 1e9:.2f} GB",
            "Free some, or choose another place with --runs.",
        )


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Callback that saves a checkpoint every EVERY_S seconds, and one before a training ends for a signal.

    `before_s` are the seconds trained in earlier sessions. `is_broken_off` says that the training ended for a signal.
    """

    def __init__(self, identity: str, before_s: float) -> None:
        self.identity, self.before_s = identity, before_s
        self.started = self.saved_at = time.monotonic()
        self.ending = threading.Event()
        self.is_broken_off = self.waits_for_validation = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = self.saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # the adapter is about to be written
            return
        is_ending, is_due = _agreed(args.device, self.ending.is_set(), time.monotonic() - self.saved_at >= EVERY_S)
        if is_ending:
            self.is_broken_off = control.should_training_stop = True
            control.should_evaluate = False  # it may take longer than the time until the processes are killed
        # At the end of an epoch that is validated, the checkpoint has to know of the validation.
        at_end_of_epoch = args.eval_strategy == "epoch" and state.epoch is not None and state.epoch % 1 == 0
        self.waits_for_validation = is_due and at_end_of_epoch and not is_ending
        control.should_save = is_ending or (is_due and not at_end_of_epoch)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.is_broken_off:
            control.should_evaluate = False
        elif self.waits_for_validation and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved_at = time.monotonic()
        if args.world_size > 1:  # each process writes its own random state
            torch.distributed.barrier()
        if not args.should_save:  # not the main process
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if (best := folder.with_name(BEST)).is_file():
            (folder / BEST).unlink(missing_ok=True)  # of a process that was killed before the marker
            try:
                os.link(best, folder / BEST)
            except OSError:  # a file system without links
                shutil.copyfile(best, folder / BEST)
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
        files = {p.relative_to(folder).as_posix(): file_hash(p) for p in paths}
        trained_s = round(self.before_s + self.saved_at - self.started, 2)
        write_json(folder / MARKER, {"identity": self.identity, "trained_s": trained_s, "files": files})
        self._prune(folder.parent)

    def _prune(self, folder: Path) -> None:
        """Remove all checkpoints but the last whole ones of this training."""
        newest_first = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
        whole = [p for p in newest_first if (p / MARKER).is_file() and self.identity in (p / MARKER).read_text()]
        for old in newest_first:
            if old not in whole[:KEPT]:
                shutil.rmtree(old, ignore_errors=True)


def _agreed(device: torch.device, *flags: bool) -> list[bool]:
    """Return which flags are set in any of the training processes: all of them must do the same."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(counts)
    return [bool(n) for n in counts.tolist()]


def keep_dtypes(trainer: Any) -> None:
    """Let the adapter have its dtype again after a checkpoint is loaded: peft would go on in float32."""
    load = trainer._load_from_checkpoint

    def load_and_restore(path: str, model: Any = None) -> None:
        dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
        load(path, model)
        for name, p in trainer.model.named_parameters():
            if name in dtypes:
                p.data = p.data.to(dtypes[name])

    trainer._load_from_checkpoint = load_and_restore


@contextmanager
def alone(run: Run) -> Iterator[None]:
    """Wait until no other process trains in this run folder.

    A training whose `dsc run` was killed ends its step and writes a checkpoint, while the folder's own lock is free.
    """
    waits = "distill  waits: a training of this run that was told to end is still at its last step"
    with locked(run["distill.lock"], on_wait=lambda _: say(waits)):
        yield


@contextmanager
def on_termination(checkpoints: Checkpoints) -> Iterator[None]:
    """Let SIGTERM end the training after the step that it falls into, with a checkpoint."""

    def end(*_: object) -> None:
        checkpoints.ending.set()

    before = signal.signal(signal.SIGTERM, end) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
