"""Locks for one process at a time, also on file systems that have no locks of the kernel (some Lustre, NFS, Weka)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsc_hub.system.files import parse_json
from dsc_hub.system.machine import process_started

HAS_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
NO_FOLDERS = (*HAS_NO_LOCKS, errno.EBADF, errno.EINVAL, errno.EISDIR)  # NFS locks what is open for writing alone
LOOKS_AGAIN_S = 1.0
STARTED_WITHIN_S = 1.0  # seconds by which the start of a process may be read differently


def _waits(holder: str) -> None:
    """Wait without a word."""


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None] = _waits) -> Iterator[None]:
    """Hold a lock file. If another process or thread holds it, `on_wait` is called before waiting; it may raise.

    The kernel releases the lock when its process dies. The file stays: removing it would free a second lock. Where the
    file system has no locks, a second file names the process that holds it (`on_wait` gets it as text, else ""); if
    that process of this machine is gone, its file no longer counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file, contextlib.ExitStack() as stack:
        try:
            _flock(file.fileno(), on_wait)
        except OSError as e:
            if e.errno not in HAS_NO_LOCKS:
                raise
            stack.enter_context(_named(path.with_name(f"{path.name}.held"), on_wait))
        yield


@contextmanager
def locked_folder(folder: Path, name: str, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file in a folder, and the folder itself: the file could be removed while it is held."""
    with locked(folder / name, on_wait):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                _flock(descriptor, on_wait)
            except OSError as e:
                if e.errno not in NO_FOLDERS:  # the file is locked
                    raise
            yield
        finally:
            os.close(descriptor)


def _flock(descriptor: int, on_wait: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait("")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def _named(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold a file that is made by one process alone, and names it."""
    own = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": process_started()})
    said = False
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(own)
            break
        except FileExistsError:
            holder = _holder(path)
            if holder is None:
                path.unlink(missing_ok=True)
                continue
            if not said:
                on_wait(holder)
                said = True
            time.sleep(LOOKS_AGAIN_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _holder(path: Path) -> str | None:
    """Return who holds a file, in words; None if it was a process of this machine that is gone."""
    try:
        named = parse_json(path.read_text(encoding="utf-8"))
        host, pid, started = str(named["host"]), int(named["pid"]), float(named["started"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):  # it is being written
        return f"unknown, see {path}"
    if host != socket.gethostname():
        return f"process {pid} on {host}, see {path}"
    try:
        is_same = abs(process_started(pid) - started) < STARTED_WITHIN_S
    except OSError:
        return None
    return f"process {pid}, see {path}" if is_same else None
