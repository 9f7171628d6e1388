"""A disk that fills up, a folder that can't be written to, a clock that jumps: nothing is lost and nothing half-done passes for done."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsc_hub.errors import disk_error
from dsc_hub.runs.jsonl import JsonlFile
from dsc_hub.sampling import sample
from tests.conftest import ROOT, ScriptedModel, length_score
from tests.sampling.test_sample import setup, sorted_rows

# A limit on the size of files is the one full disk that a test may make: the kernel writes what fits and refuses the rest.
FULL = """
import asyncio, resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.conftest import ScriptedModel, length_score
from tests.sampling.test_sample import setup
from dsc_hub.chain import language
from dsc_hub.sampling import sample
from dsc_hub.errors import disk_error
language.language_of("Il unpacks its model into a file of its own")
run, r, some = setup(Path(sys.argv[1]), Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    asyncio.run(sample.sample(run, r, some, ScriptedModel(0.001), length_score))
except OSError as e:
    print(disk_error(e))
"""


@pytest.mark.parametrize("size", [5_001, 7_777, 12_345])
def test_a_disk_that_fills_up_stops_the_run_and_it_goes_on_when_there_is_room(
    recipe_file: Path, tmp_path: Path, size: int
):
    command = [sys.executable, "-c", FULL.format(root=str(ROOT)), str(recipe_file), str(tmp_path / "run"), str(size)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no space left" in done.stdout and "turns.jsonl" in done.stdout and "what is done is kept" in done.stdout
    assert (tmp_path / "run" / "turns.jsonl").stat().st_size <= size
    run, r, some = setup(recipe_file, tmp_path / "run")
    model = ScriptedModel()
    asyncio.run(sample.sample(run, r, some, model, length_score))
    whole, _, _ = setup(recipe_file, tmp_path / "whole")
    asyncio.run(sample.sample(whole, r, some, ScriptedModel(), length_score))
    for name in ("turns.jsonl", "chains.jsonl"):
        assert sorted_rows(run[name]) == sorted_rows(whole[name])
    assert 0 < len(model.seeds) < len(sorted_rows(whole["turns.jsonl"]))


def test_a_row_that_was_cut_by_a_full_disk_does_not_spoil_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, write = JsonlFile(tmp_path / "a.jsonl"), os.write
    rows.append({"n": 1})

    def full(fd: int, data: bytes) -> int:
        if data.startswith(b"{"):
            return write(fd, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError) as e:
        rows.append({"n": 2})
    assert "no space left on the disk at" in str(disk_error(e.value)) and "a.jsonl" in str(disk_error(e.value))
    monkeypatch.setattr(os, "write", write)
    rows.append({"n": 3})
    rows.close()
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"n":1}\n{"n":3}\n'


def test_a_folder_that_cannot_be_written_to_is_one_message(dsc, recipe_file: Path):
    for place in ("/proc/runs", "/dev/null/runs"):  # a root user may write to any folder but these
        done = dsc("sample", str(recipe_file), "--runs", place, code=2)
        assert "Traceback" not in done.stderr and place.split("/")[1] in done.stderr


def test_a_clock_that_jumps_changes_nothing(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, r, some = setup(recipe_file, tmp_path / "run")
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 + (-1) ** next(jumps) * 86_400.0)
    tally = asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score))
    monkeypatch.undo()
    assert tally.finished == len(some) and 0 <= time.monotonic() - tally.started < 60
    whole, _, _ = setup(recipe_file, tmp_path / "whole")
    asyncio.run(sample.sample(whole, r, some, ScriptedModel(), length_score))
    assert sorted_rows(run["chains.jsonl"]) == sorted_rows(whole["chains.jsonl"])


def test_durations_are_measured_by_the_clock_that_does_not_jump():
    for path in (ROOT / "dsc_hub").glob("*.py"):
        assert "time.time()" not in path.read_text(), path
