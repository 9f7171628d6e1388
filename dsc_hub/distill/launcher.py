"""Training in processes of its own: `launch` starts `python -m dsc_hub.distill.train RUN` under accelerate and waits for it.

The parent imports no torch, so it stays small while the children train; their memory is free when they end.
What they print goes through: into the run's distill.log whole, to the user as lines and as one that moves.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from rich.text import Text

from dsc_hub import errors
from dsc_hub.errors import ConfigError, DscError, RunError
from dsc_hub.runs.run import Run
from dsc_hub.system import cache, machine, progress
from dsc_hub.system.files import packaged_folder, read_json
from dsc_hub.system.hashing import digest

# Names the file into which a training process puts the DscError that ended it: exit codes and messages don't survive
# accelerate and torchrun, which make 1 of every code.
ERROR_FILE = "DSC_DISTILL_ERROR_FILE"
PROGRESS = "distill  step "  # how the line that moves begins
LOG = "distill.log"
KNOWN_GOOD = "distill_checked.json"  # in dsc's cache
# What a check of settings may take: a library opens what looks like a file, and reads it to its end.
CHECKED_WITHIN_S, CHECKED_IN_BYTES = 300, 8 << 30
_NO_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory", "Cannot allocate memory")
_KEPT_LINES = 15


def launch(run: Run, config_file: Path | None = None) -> dict[str, Any]:
    """Train in processes started by accelerate; returns adapter/summary.json.

    `config_file` is a file of `accelerate config`; without one, the packaged configuration that fits this machine and
    the recipe's `distill.processes`. A DscError of the training is raised here as what it was; RunError with the last
    lines if the process died otherwise. Ctrl-C, or the end of this process, ends the training.
    """
    processes = int(run.facts["recipe"]["distill"]["processes"])
    command = [sys.executable, "-m", "dsc_hub.system.supervisor", *_command(run, config_file, processes)]
    with tempfile.TemporaryDirectory(prefix="dsc-") as folder:
        error_file = Path(folder) / "error.json"
        environment = _environment(processes) | {ERROR_FILE: str(error_file)}
        code, last = _stream(command, environment, run[LOG])
        if error_file.is_file():
            raise _error(json.loads(error_file.read_text(encoding="utf-8")))
    if code:
        tail = "\n  ".join(["", *last]) if last else ""
        raise RunError(
            f"the training process failed with exit code {code}; its last lines:{tail or ' none'}",
            f"All it printed is in {run[LOG]}.",
        )
    summary: dict[str, Any] = read_json(run["adapter"] / "summary.json")
    if config_file is None and summary["world_size"] != processes:
        raise RunError(f"asked for {processes} training processes, got {summary['world_size']}", f"See {run[LOG]}.")
    return summary


def check(section: dict[str, Any]) -> list[str]:
    """What is wrong with a recipe's `distill` section, as the libraries it goes to see it; seconds, in a process of its own, and
    nothing where these versions found nothing wrong with it before. ConfigError if they come to no end."""
    about = digest(section, machine.versions())
    if cache.is_known(KNOWN_GOOD, about):
        return []
    environment = _environment(1) | {"CUDA_VISIBLE_DEVICES": ""}
    limits = f"within {CHECKED_WITHIN_S} s and {CHECKED_IN_BYTES >> 30} GiB of memory"
    endless = ConfigError(
        f"the libraries that train did not come to an end {limits} with distill.sft, lora and quantization as they are",
        "A setting that names a file, or a pattern, may be why: take those out that are not numbers or names.",
    )
    try:
        child = subprocess.run(
            [sys.executable, "-m", "dsc_hub.distill.config", str(CHECKED_IN_BYTES)],
            input=json.dumps(section),
            capture_output=True,
            text=True,
            env=environment,
            timeout=CHECKED_WITHIN_S,
        )
    except subprocess.TimeoutExpired:
        raise endless from None
    if child.returncode < 0 or (child.returncode and any(sign in child.stderr for sign in _NO_MEMORY)):
        raise endless
    if child.returncode:
        raise RuntimeError(f"checking the distill section failed:\n{child.stderr[-4000:]}")
    if child.stdout.strip():
        error = _error(json.loads(child.stdout))
        return list(error.problems) if isinstance(error, ConfigError) else [error.message]
    cache.remember(KNOWN_GOOD, about)
    return []


def _command(run: Run, config_file: Path | None, processes: int) -> list[str]:
    """What starts the training processes. Always with a configuration: without one, accelerate takes the user's own."""
    worker = ["-m", "dsc_hub.distill.train", str(run.folder)]
    # Without --quiet, accelerate adds its own traceback to every failure of its child.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if config_file is not None:
        if not config_file.is_file():
            raise ConfigError(
                f"accelerate configuration {config_file} not found",
                "Write one with `accelerate config --config_file FILE`.",
            )
        return [*accelerate, "--config_file", str(config_file), *worker]
    gpus = len(machine.visible_gpus())
    # Said plainly: accelerate's own default is one thread a process.
    threads = str(max(1, machine.cores() // processes))
    if processes == 1:
        name = "one_gpu" if gpus else "one_cpu"
        return [*accelerate, "--config_file", str(_packaged(name)), "--num_cpu_threads_per_process", threads, *worker]
    if not gpus:
        # accelerate starts one process on the CPU, whatever it is told, unless there is an mpirun.
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            *worker,
        ]
    if gpus < processes:
        raise ConfigError(
            f"distill.processes is {processes}, and {gpus} GPU{'s are' if gpus > 1 else ' is'} visible",
            f"Set distill.processes={gpus}, or give an accelerate configuration for several machines.",
        )
    return [
        *accelerate,
        "--config_file",
        str(_packaged("multi_gpu")),
        "--num_processes",
        str(processes),
        "--num_cpu_threads_per_process",
        threads,
        *worker,
    ]


def _packaged(name: str) -> Path:
    return packaged_folder("recipes") / "accelerate" / f"{name}.yaml"


def _environment(processes: int) -> dict[str, str]:
    """Ours, without what a launcher above us left in it: the children would take its rank and wait for others."""
    environment = machine.for_child(os.environ)
    environment["PYTHONUNBUFFERED"] = "1"
    # accelerate sets its own (see `_command`); torchrun without it gives each process one thread, and a page about it.
    environment["OMP_NUM_THREADS"] = str(max(1, machine.cores() // processes))
    # OpenMP threads spin while they wait for each other; beside another busy process
    # that makes a step many times as long.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # trl reports each training to its makers unless told not to; a run sends nothing that its user did not ask for.
    environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return environment


def _stream(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, list[str]]:
    """Run to the end, showing every line as it comes; the exit code and the last lines."""
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    # A session of its own, so that Ctrl-C reaches the keeper once, from us, and not each process at its own moment.
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as file, progress.moving_line() as line:
            for text in child.stdout:
                file.write(text)
                file.flush()
                text = text.rstrip()
                if text.startswith(PROGRESS):
                    line.show(text)
                elif text:
                    last.append(text)
                    progress.console.print(Text(text))
        return child.wait(), list(last)
    finally:
        child.stdin.close()  # the keeper's sign to end everything below it
        child.wait()
        child.stdout.close()


def _error(record: dict[str, Any]) -> DscError:
    kind = getattr(errors, record["kind"], RunError)
    if kind is ConfigError:
        return ConfigError(record["message"], record["hint"], record["problems"])
    error: DscError = kind(record["message"], record["hint"])
    return error


def shown_error(error: DscError) -> str:
    """The error as JSON for `ERROR_FILE`."""
    return json.dumps(
        {
            "kind": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "problems": list(getattr(error, "problems", ())),
        }
    )


def main_process() -> bool:
    """Are we the one of the training processes that speaks and writes?"""
    return int(re.sub(r"\D", "", os.environ.get("RANK", "")) or 0) == 0
