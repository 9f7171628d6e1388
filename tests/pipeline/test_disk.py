"""What a run writes is added up by file system, and held against what is free there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc_hub.pipeline.disk import DiskNeed, disk_problems

OTHER = Path("/dev/shm")  # a file system of its own on Linux
ALL = 10**18


def test_there_is_a_problem_for_each_file_system_without_room(tmp_path: Path):
    if not OTHER.is_dir() or OTHER.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system alone")
    here, there = tmp_path / "runs" / "deep", OTHER / "nosuch" / "home"
    assert disk_problems([DiskNeed("run folder", here, 10), DiskNeed("rounded weights", there, 10)]) == []
    (problem,) = disk_problems([DiskNeed("run folder", here, 10), DiskNeed("rounded weights", there, ALL)])
    assert f"free at {OTHER}" in problem and "rounded weights" in problem and "run folder:" not in problem
    assert "DSC_HUB_HOME" in problem
    assert len(disk_problems([DiskNeed("run folder", here, ALL), DiskNeed("rounded weights", there, ALL)])) == 2


def test_needs_of_one_file_system_are_added_up(tmp_path: Path):
    import shutil

    half = shutil.disk_usage(tmp_path).free * 3 // 4
    needs = [DiskNeed("run folder", tmp_path / "a", half), DiskNeed("downloads", tmp_path / "b", half)]
    assert disk_problems(needs[:1]) == [] and len(disk_problems(needs)) == 1
