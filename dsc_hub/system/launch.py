"""Variables by which launchers (torchrun, accelerate, mpirun) number the processes that they start."""

from __future__ import annotations

import os
from collections.abc import Mapping

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_WORLD_SIZE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


def _first_set(names: tuple[str, ...], environment: Mapping[str, str], default: int) -> int:
    """Return the first of the variables that is a number, as accelerate reads them."""
    return next((int(environment[n]) for n in names if environment.get(n, "").isdecimal()), default)


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return this process's number among those of its launcher, from 0; 0 without a launcher."""
    return _first_set(_RANK, environment, 0)


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes of the launcher on all machines; 1 without a launcher."""
    return _first_set(_WORLD_SIZE, environment, 1)


def local_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes of the launcher on this machine; 1 without a launcher."""
    return _first_set(_LOCAL_WORLD_SIZE, environment, world_size(environment))


def uses_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether accelerate's configuration keeps this process off the GPUs."""
    return environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
