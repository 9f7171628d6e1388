"""Training in separate processes: `launch` starts `python -m dsc_hub.distill.train RUN` under accelerate and waits.

The parent does not import torch, so it stays small while the children train; their memory is released when they end.
Their output is written to the run's distill.log and shown to the user as lines and a progress line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.text import Text

from dsc_hub import errors
from dsc_hub.config.recipe import Recipe, reward_terms, servers
from dsc_hub.config.training import DistillConfig
from dsc_hub.distill import plugin
from dsc_hub.distill.memory import TrainingSize
from dsc_hub.errors import ConfigError, DscError, RunError
from dsc_hub.runs.metrics_schema import Training
from dsc_hub.runs.run import Run
from dsc_hub.system import cache, machine, progress
from dsc_hub.system.endings import shown_ending
from dsc_hub.system.files import packaged_folder, read_json
from dsc_hub.system.hashing import digest
from dsc_hub.system.launch import local_world_size, rank, uses_cpu

# Variable with the path of the file to which a training process writes its final DscError: accelerate and torchrun
# replace every exit code by 1 and drop messages.
ERROR_FILE = "DSC_DISTILL_ERROR_FILE"
DEFAULT_RANK = 16  # of the LoRA
# On disk, for each parameter of the adapter: three checkpoints of weights and two moments of AdamW, in 16 bytes.
CHECKPOINT_BYTES = 3 * 16
STEP_GRACE_S = 120  # seconds for the end of a step, which a checkpoint is made of, before the processes are killed
PROGRESS = "distill  step "  # prefix of the progress line
LOG = "distill.log"
KNOWN_GOOD = "distill_checked.json"  # in dsc's cache
REHEARSES = "rehearses"  # what a check prints when it begins to train
_SHAPES_TRAINING = ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
# Limits of a settings check: a library may open a value that looks like a file and read it to the end.
CHECKED_WITHIN_S, CHECKED_IN_BYTES = 300, 8 << 30
# Beside Intel's OpenMP: it spins for 1 ms only, and freed memory is kept instead of being unmapped, and zeroed by the
# kernel at its next use. On two cores a step takes 0.76 of the time; beside a busy process 0.94 (spinning 5 ms: 1.3).
_CPU_ENVIRONMENT = {"KMP_BLOCKTIME": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
_NO_MEMORY = ("MemoryError", "bad_alloc", "can't allocate memory", "Cannot allocate memory")
_KEPT_LINES = 15


def launch(run: Run, joins: bool = False) -> Training:
    """Train in processes started by accelerate; returns what adapter/summary.json holds.

    `distill.launch` names a configuration of accelerate; without it, the packaged one for this machine and
    `distill.processes` is used. With `joins`, only the part of this process of a launcher is started: the launcher's
    other processes have to start theirs. A DscError of the training is raised again here; RunError with the last lines
    of output if the process died otherwise. Ctrl-C, or the end of this process, ends the training.
    """
    section = run.facts.recipe.distill
    if problems := tracker_problems(section):
        raise ConfigError(problems[0])
    if joins:
        launch_part(run.folder, LOG)
    else:
        environment = _child_environment(section.processes, is_on_cpu(section)) | _keys(run.facts.recipe)
        _run(_command(run, section), environment, run[LOG])
    training = Training.model_validate(read_json(run["adapter"] / "summary.json"))
    if training.world_size != section.processes:
        raise RunError(
            f"asked for {section.processes} training processes, got {training.world_size}", f"See {run[LOG]}."
        )
    return training


def launch_part(run_folder: Path, log: str = "") -> None:
    """Run the training process that belongs to this process of a launcher; errors as in `launch`.

    `log`: name of the log in the run folder; "": distill.RANK.log.
    """
    command = [sys.executable, "-m", "dsc_hub.distill.train", str(run_folder)]
    on_cpu = not machine.visible_gpus() or uses_cpu()
    environment = _for_training(machine.for_child(os.environ, of_launcher=True), local_world_size(), on_cpu)
    environment |= _keys(Run(run_folder).facts.recipe)
    _run(command, environment, run_folder / (log or f"distill.{rank()}.log"))


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run training processes to their end, under a supervisor."""
    supervisor = [sys.executable, "-m", "dsc_hub.system.supervisor", "--grace", str(STEP_GRACE_S)]
    with tempfile.TemporaryDirectory(prefix="dsc-") as folder:
        error_file = Path(folder) / "error.json"
        code, last = _stream([*supervisor, *command], environment | {ERROR_FILE: str(error_file)}, log)
        if error_file.is_file():
            raise _error(json.loads(error_file.read_text(encoding="utf-8")))
    if code:
        tail = "\n  ".join(["", *last]) if last else ""
        raise RunError(
            f"the training process failed ({shown_ending(code)}); its last lines:{tail or ' none'}",
            f"All it printed is in {log}.",
        )


def configuration(launch: str) -> Path:
    """Return the accelerate configuration that `distill.launch` names; ConfigError if there is none."""
    packaged = _packaged(launch)
    if re.fullmatch(r"\w+", launch) and packaged.is_file():
        return packaged
    if not (path := Path(launch).expanduser()).is_file():
        names = ", ".join(sorted(p.stem for p in packaged.parent.glob("*.yaml")))
        raise ConfigError(
            f"distill.launch: accelerate configuration {launch} not found",
            f"Name one of {names}, or write a file with `accelerate config --config_file FILE`.",
        )
    return path


def processes_of(launch: str, recipe: Recipe) -> int:
    """Return the number of processes that an accelerate configuration starts; ConfigError if they can't train."""
    path = configuration(launch)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        processes, machines = int(settings.get("num_processes", 1)), int(settings.get("num_machines", 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, ValueError) as e:
        raise ConfigError(
            f"distill.launch: {path} is no configuration of accelerate: {str(e).splitlines()[0]}",
            "Write one with `accelerate config --config_file FILE`.",
        ) from None
    if machines > 1:
        raise ConfigError(
            f"distill.launch: {path} is for {machines} machines, and this command starts processes on one",
            f"Start it on each: accelerate launch --config_file {path} --machine_rank N -m dsc_hub run RECIPE",
        )
    plugin.check_configuration(recipe, settings)
    return processes


def tracker_problems(section: DistillConfig) -> list[str]:
    """Return a problem if the tracker that the section names is not installed."""
    tracker = section.report_to
    if tracker == "none" or importlib.util.find_spec(tracker) is not None:
        return []
    return [f"distill.report_to: {tracker} is not installed; `pip install {tracker}`"]


class Checked(NamedTuple):
    """The problems of training with a recipe, and its shapes (None if they could not be worked out)."""

    problems: list[str]
    size: TrainingSize | None = None


def check_in_child(section: DistillConfig) -> list[str]:
    """Return the problems that the training libraries find in a recipe's `distill` section.

    The check runs in its own process and takes seconds; it is skipped if the same library versions accepted the section
    before. ConfigError if it exceeds its limits of time or memory.
    """
    about = digest(section.model_dump(mode="json"), machine.versions())
    return tracker_problems(section) or _check(about, {"section": section, "recipe": None}).problems


def rehearse_in_child(recipe: Recipe, model_folder: Path, has_validation: bool) -> Checked:
    """Return the problems of training with this recipe, from one step on a one-layer model with made-up rows.

    `model_folder` needs no weights. As `check_in_child`; but a rehearsal that takes too much time or memory says
    nothing about the training.
    """
    texts = [(model_folder / name).read_text("utf-8") for name in _SHAPES_TRAINING if (model_folder / name).is_file()]
    told = recipe.model_dump(mode="json", include={"distill", "seed"}) | {"system": recipe.chain.system}
    about = digest(told, texts, has_validation, machine.versions())
    given = {"section": recipe.distill, "recipe": recipe, "folder": model_folder, "has_validation": has_validation}
    return _check(about, given)


def _check(about: str, given: dict[str, Any]) -> Checked:
    if known := cache.recall_value(KNOWN_GOOD, about):
        return Checked([], TrainingSize.model_validate(known) if isinstance(known, dict) else None)
    environment = _child_environment(1, on_cpu=True) | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    limits = f"within {CHECKED_WITHIN_S} s and {CHECKED_IN_BYTES >> 30} GiB of memory"
    endless = ConfigError(
        f"the libraries that train did not come to an end {limits} with the settings of `distill` as they are",
        "A setting that names a file, or a pattern, may be why: take those out that are not numbers or names.",
    )
    try:
        child = subprocess.run(
            [sys.executable, "-m", "dsc_hub.distill.rehearsal", str(CHECKED_IN_BYTES)],
            input=json.dumps(
                given, default=lambda v: v.model_dump(mode="json") if hasattr(v, "model_dump") else str(v)
            ),
            capture_output=True,
            text=True,
            env=environment,
            timeout=CHECKED_WITHIN_S,
        )
    except subprocess.TimeoutExpired as e:
        size, rehearses, _ = _answer((e.stdout or b"").decode())
        if rehearses:
            return Checked([], size)
        raise endless from None
    size, rehearses, problem = _answer(child.stdout)
    if child.returncode < 0 or (child.returncode and any(sign in child.stderr for sign in _NO_MEMORY)):
        if rehearses:
            return Checked([], size)
        raise endless
    if child.returncode:
        raise RuntimeError(f"checking the distill section failed:\n{child.stderr[-4000:]}")
    if problem.strip():
        error = _error(json.loads(problem))
        problems = list(error.problems) if isinstance(error, ConfigError) and error.problems else [error.message]
        return Checked(problems, size)
    cache.remember_value(KNOWN_GOOD, about, size.model_dump() if size else True)
    return Checked([], size)


def _answer(out: str) -> tuple[TrainingSize | None, bool, str]:
    """Return what the child printed: the shapes, whether it began to rehearse, and the problem as JSON ("": none)."""
    shapes, rehearses, problem = out.rpartition(REHEARSES)
    return (TrainingSize.model_validate_json(shapes) if rehearses else None), bool(rehearses), problem


def _command(run: Run, section: DistillConfig) -> list[str]:
    """Return the launch command. It always names a configuration: without one, accelerate uses the user's default."""
    worker, processes = ["-m", "dsc_hub.distill.train", str(run.folder)], section.processes
    # Without --quiet, accelerate adds its own traceback to every failure of its child. Port 0 is a free one: with its
    # default, two trainings on a machine meet at one port.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0"]
    if section.launch is not None and not (processes > 1 and _is_for_cpu(section.launch)):
        return [*accelerate, "--config_file", str(configuration(section.launch)), *worker]
    gpus = len(machine.visible_gpus())
    # Set explicitly: accelerate's default is one thread per process.
    threads = str(max(1, machine.cores() // processes))
    if processes == 1:
        name = "one_gpu" if gpus else "one_cpu"
        return [*accelerate, "--config_file", str(_packaged(name)), "--num_cpu_threads_per_process", threads, *worker]
    if not gpus or section.launch is not None:
        # accelerate starts only one process on the CPU, whatever the configuration, unless mpirun is installed.
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


def is_on_cpu(section: DistillConfig) -> bool:
    """Return whether the processes that `_command` starts train on the CPU."""
    return not machine.visible_gpus() or (section.launch is not None and _is_for_cpu(section.launch))


def _is_for_cpu(launch: str) -> bool:
    settings = yaml.safe_load(configuration(launch).read_text(encoding="utf-8"))
    return bool(settings.get("use_cpu")) or settings.get("distributed_type") == "MULTI_CPU"


def _packaged(name: str) -> Path:
    return packaged_folder("recipes") / "accelerate" / f"{name}.yaml"


def _child_environment(processes: int, on_cpu: bool) -> dict[str, str]:
    """Return the environment without an outer launcher's variables: its rank would make the children wait for peers."""
    return _for_training(machine.for_child(os.environ), processes, on_cpu)


def _keys(recipe: Recipe) -> dict[str, str]:
    """Return the keys that a training needs: of servers that score validation answers, and of the tracker."""
    names = {"WANDB_API_KEY"} if recipe.distill.report_to == "wandb" else set()
    if recipe.distill.validation_prompts:
        terms = reward_terms(recipe, "reward")
        names |= {server.key_name for server in servers(recipe) if server.place in terms}
    return {name: os.environ[name] for name in names if name in os.environ}


def _for_training(environment: dict[str, str], processes: int, on_cpu: bool) -> dict[str, str]:
    """Return the environment for one of `processes` training processes on this machine."""
    environment["PYTHONUNBUFFERED"] = "1"
    # accelerate sets its own value (see `_command`); torchrun defaults to one thread per process, with a long warning.
    environment["OMP_NUM_THREADS"] = str(max(1, machine.cores() // processes))
    # OpenMP threads spin while they wait for each other; beside another busy process, steps get many times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if on_cpu:
        environment = _CPU_ENVIRONMENT | environment | machine.openmp_preload(environment)
    # torchrun kills its workers after 30 s by default, which may be less than a step and its checkpoint.
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(STEP_GRACE_S - 10)
    # trl sends telemetry by default; a run must not send anything that its user did not request.
    environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return environment


def _stream(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, list[str]]:
    """Run a command to the end and show its output line by line; return the exit code and the last lines."""
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    # A new session, so that Ctrl-C reaches only the supervisor, from this process, and not each process separately.
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
        child.stdin.close()  # makes the supervisor end all its descendants
        child.wait()
        child.stdout.close()


def _error(record: dict[str, Any]) -> DscError:
    kind = getattr(errors, record["kind"], RunError)
    if kind is ConfigError:
        return ConfigError(record["message"], record["hint"], record["problems"])
    error: DscError = kind(record["message"], record["hint"])
    return error


def shown_error(error: DscError) -> str:
    """Return the error as JSON for `ERROR_FILE`."""
    return json.dumps(
        {
            "kind": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "problems": list(getattr(error, "problems", ())),
        }
    )
