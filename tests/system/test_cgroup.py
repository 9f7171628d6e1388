"""Limits of containers and jobs on processors and memory, in the layouts of version 1 and 2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from dsc_hub.config.serving import ServingConfig
from dsc_hub.inference import servers
from dsc_hub.inference.vllm import vllm_environment
from dsc_hub.system import cgroup, machine
from dsc_hub.system.cgroup import Limits

GIB = 2**30


def laid_out(folder: Path, groups: str, files: Mapping[str, str]) -> Limits:
    (folder / "cgroup").write_text(groups)
    for name, content in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return cgroup.limits(folder / "mount", folder / "cgroup")


V1 = "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
CASES: dict[str, tuple[str, dict[str, str], Limits]] = {
    "docker, version 2": ("0::/\n", {"cpu.max": "200000 100000", "memory.max": str(8 * GIB)}, Limits(2, 8 * GIB)),
    "no limit, version 2": ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, Limits(None, None)),
    "part of a processor": ("0::/\n", {"cpu.max": "150000 100000"}, Limits(2, None)),
    "less than a processor": ("0::/\n", {"cpu.max": "20000 100000"}, Limits(1, None)),
    "a Slurm step inside of its job": (
        "0::/slurm/job_1/step_0\n",
        {
            "slurm/job_1/step_0/cpu.max": "max 100000",
            "slurm/job_1/cpu.max": "400000 100000",
            "slurm/job_1/memory.max": str(16 * GIB),
            "slurm/memory.max": str(64 * GIB),
        },
        Limits(4, 16 * GIB),
    ),
    "a host's path inside of a container": (
        "0::/../../kubepods/pod1\n",
        {"cpu.max": "300000 100000", "memory.max": str(GIB)},
        Limits(3, GIB),
    ),
    "version 1": (
        V1,
        {
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000",
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            "memory/docker/abc/memory.limit_in_bytes": str(4 * GIB),
        },
        Limits(3, 4 * GIB),
    ),
    "version 1 with the host's path": (
        V1,
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": str(GIB)},
        Limits(2, GIB),
    ),
    "no limit, version 1": (
        V1,
        {
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": str(2**63 - 4096),
        },
        Limits(None, None),
    ),
    "nothing to read": ("", {}, Limits(None, None)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_tightest_limit_of_the_groups_counts(tmp_path: Path, name: str):
    groups, files, expected = CASES[name]
    assert laid_out(tmp_path, groups, files) == expected


def test_a_quota_bounds_threads_replicas_and_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(machine, "vllm_on_cpu", lambda: True)
    assert machine.cores() == 64 and not machine.has_quota()
    monkeypatch.setattr(cgroup, "limits", lambda: Limits(2, 3 * GIB))
    assert machine.cores() == 2 and machine.has_quota() and machine.memory_gib() == 3.0
    environment = vllm_environment(ServingConfig(), True, "key")
    assert environment["OMP_NUM_THREADS"] == "2" and environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert servers.replica_places(ServingConfig(replicas=2)) == [("0",), ("1",)]
    assert vllm_environment(ServingConfig(), True, "key", ["1"])["OMP_NUM_THREADS"] == "1"
