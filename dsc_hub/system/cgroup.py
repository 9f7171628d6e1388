"""Limits of a container or a job on processors and memory: the control groups (version 1 and 2) of this process."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
NO_LIMIT = 2**60  # bytes: version 1 writes the largest page-aligned number for "none"


class Limits(NamedTuple):
    """`cpus` is the quota in processors, rounded up; `memory` is in bytes. None: no limit."""

    cpus: int | None
    memory: int | None


@functools.cache
def limits(mount: Path = MOUNT, groups: Path = GROUPS) -> Limits:
    """Return the tightest limits of the group of this process and of those above it."""
    quotas = [quota for folder in _folders(mount, groups, "cpu") if (quota := _cpus(folder)) is not None]
    sizes = [size for folder in _folders(mount, groups, "memory") if (size := _memory(folder)) is not None]
    return Limits(max(1, math.ceil(min(quotas))) if quotas else None, min(sizes, default=None))


def _folders(mount: Path, groups: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that a controller applies to this process, up to the root.

    In a container the path may be that of the host, which is not mounted: then only the root is there.
    """
    lines = _read(groups).splitlines()
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = mount
        elif controller in controllers.split(","):
            top = next((p for p in (mount / controllers, mount / controller) if p.is_dir()), mount / controller)
        else:
            continue
        inside = top if ".." in path else top / path.strip("/")
        yield from (folder for folder in (inside, *inside.parents) if folder == top or top in folder.parents)


def _cpus(folder: Path) -> float | None:
    quota, period = (_read(folder / "cpu.max").split() + ["max", ""])[:2]
    if quota == "max":
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _memory(folder: Path) -> int | None:
    sizes = [_read(folder / name).strip() for name in ("memory.max", "memory.limit_in_bytes")]
    return next((int(size) for size in sizes if size.isdigit() and int(size) < NO_LIMIT), None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
