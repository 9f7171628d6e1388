"""Locks, on file systems with locks of the kernel and without."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsc_hub.errors import RunError
from dsc_hub.runs.run import Run
from dsc_hub.system import locks
from dsc_hub.system.locks import locked

HOLDS = """
import errno, fcntl, os, sys, time
from pathlib import Path
from dsc_hub.system.locks import locked
if sys.argv[2] != "0":
    def none(*_):
        raise OSError(int(sys.argv[2]), "no locks here")
    fcntl.flock = none
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture
def _no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    number: int = request.param

    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "LOOKS_AGAIN_S", 0.05)
    if number:
        monkeypatch.setattr(fcntl, "flock", none)


def holder(path: Path, number: int) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(path), str(number)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


@pytest.mark.parametrize(("_no_locks", "number"), [(n, n) for n in (0, *WITHOUT)], indirect=["_no_locks"])
@pytest.mark.usefixtures("_no_locks")
def test_a_second_process_waits_until_the_first_one_is_gone_however_it_ends(tmp_path: Path, number: int):
    path, waits = tmp_path / "x.lock", []
    child = holder(path, number)
    threading.Timer(0.5, child.kill).start()  # it can't clean up
    started = time.monotonic()
    with locked(path, waits.append):
        assert time.monotonic() - started > 0.3
    child.wait()
    assert waits == ([f"process {child.pid}, see {path}.held"] if number else [""])
    with locked(path, waits.append):  # nothing is left over
        pass
    assert len(waits) == 1 and not path.with_name("x.lock.held").exists()


@pytest.mark.parametrize("_no_locks", [0, errno.ENOSYS], indirect=True)
@pytest.mark.usefixtures("_no_locks")
def test_threads_exclude_each_other(tmp_path: Path):
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with locked(tmp_path / "x.lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (inside, most) == (0, 1)


@pytest.mark.parametrize("_no_locks", [errno.ENOSYS], indirect=True)
@pytest.mark.usefixtures("_no_locks")
def test_a_run_folder_without_locks_says_who_has_it(tmp_path: Path):
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(RunError) as error, Run(tmp_path / "run").lock():
        pass
    assert f"in use by process {os.getpid()}, see {run.folder}/lock.held" in str(error.value)
    assert "If it is gone, remove that file" in str(error.value)
    elsewhere = {"host": f"not-{socket.gethostname()}", "pid": 1, "started": 1.0}
    run["lock.held"].write_text(json.dumps(elsewhere))
    with pytest.raises(RunError, match=f"in use by process 1 on not-{socket.gethostname()}"), run.lock():
        pass
    run["lock.held"].write_text(json.dumps(elsewhere | {"host": socket.gethostname(), "pid": 2**22 + 1}))
    with run.lock():  # that process is gone
        pass
    assert not run["lock.held"].exists()


@pytest.mark.parametrize("_no_locks", [0], indirect=True)
@pytest.mark.usefixtures("_no_locks")
def test_removing_the_lock_file_lets_nobody_in(tmp_path: Path):
    run = Run(tmp_path / "run")
    with run.lock():
        run["lock"].unlink()
        with pytest.raises(RunError, match="in use by another process"), Run(tmp_path / "run").lock():
            pass
    with run.lock():
        pass


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOLCK])
def test_a_file_system_that_locks_no_folders_locks_the_file(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
):
    flock = fcntl.flock

    def of_files(descriptor: int, how: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(number, os.strerror(number))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", of_files)
    with Run(tmp_path).lock(), pytest.raises(RunError, match="in use"), Run(tmp_path).lock():
        pass


@pytest.fixture(autouse=True)
def _ends_in_time() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 30
