"""A training that is killed or told to end goes on from its last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsc_hub.distill import checkpoints
from dsc_hub.distill import train as distill_train
from dsc_hub.errors import RunError
from dsc_hub.runs.run import Run
from dsc_hub.system import machine
from tests.distill.tiny import QUICK, make_run, row

STEPS = 12
# A step takes a tenth of a second, so that a signal falls between two of them; a checkpoint after each.
SLOW = """
import sys, time
from dsc_hub.distill import checkpoints, train
from dsc_hub.system import machine
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_begin(self, *args, **more):
        time.sleep(0.1)

checkpoints.EVERY_S = float(sys.argv[2])
if len(sys.argv) > 3:
    machine.cpu_dtype = lambda: sys.argv[3]
train.progress.PLAIN_EVERY_S = 0
real = train.ProgressCallback
train.ProgressCallback = lambda *about: type("Both", (real, Slow), {})(*about)
sys.exit(train.main(sys.argv[1:2]))
"""


def run_of(folder: Path, base: Path, steps: int = STEPS) -> Run:
    rows, validation = [row(n) for n in range(16)], [row(n) for n in range(20, 23)]
    sft = {**QUICK, "max_steps": steps, "per_device_train_batch_size": 2}
    return make_run(folder, base, rows=rows, validation=validation, sft=sft, lora={"lora_dropout": 0.1})


def losses(run: Run) -> list[float]:
    lines = (run["adapter"] / "training_log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def start(run: Run, every_s: float = 0.0, *dtype: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(run.folder), str(every_s), *dtype]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def saved(run: Run) -> list[int]:
    return sorted(
        int(p.parent.name.split("-")[1]) for p in run[checkpoints.CHECKPOINTS].glob(f"*/{checkpoints.MARKER}")
    )


def identity_of(run: Run, processes: int = 1) -> str:
    return checkpoints.training_identity(run, processes, f"torch.{machine.cpu_dtype()}")


def wait_for_step(run: Run, step: int, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not (steps := saved(run)) or steps[-1] < step:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Run:
    """The training that nothing interrupts."""
    run = run_of(tmp_path_factory.mktemp("whole") / "run", base)
    distill_train.train(run)
    return run


def test_a_killed_training_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path, base: Path, whole: Run):
    run = run_of(tmp_path / "run", base)
    child = start(run)
    wait_for_step(run, 4, child)
    child.kill()
    child.wait()
    before = saved(run)[-1]
    assert not run["adapter"].exists() and len(saved(run)) <= checkpoints.KEPT + 1  # killed before it removed one
    child = start(run)
    told, _ = child.communicate(timeout=240)
    assert child.returncode == 0 and f"goes on from checkpoint-{before}" in told, told
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4) and len(losses(run)) == STEPS
    summary, uninterrupted = (json.loads((r["adapter"] / "summary.json").read_text()) for r in (run, whole))
    assert summary["validation_loss"] == pytest.approx(uninterrupted["validation_loss"], rel=1e-4)
    assert (summary["steps"], summary["first_loss"]) == (STEPS, pytest.approx(uninterrupted["first_loss"], rel=1e-4))
    assert not run[checkpoints.CHECKPOINTS].exists()  # the adapter is in place


def test_in_bfloat16_too_the_adapter_keeps_its_dtype(tmp_path: Path, base: Path):
    """peft loads the adapter of a checkpoint as float32, whatever it was trained in."""
    whole, killed = (run_of(tmp_path / name, base) for name in ("whole", "killed"))
    told, _ = start(whole, 0.0, "bfloat16").communicate(timeout=240)
    child = start(killed, 0.0, "bfloat16")
    wait_for_step(killed, 4, child)
    child.kill()
    child.wait()
    told, _ = start(killed, 0.0, "bfloat16").communicate(timeout=240)
    assert "goes on from" in told and losses(killed) == losses(whole), told
    sizes = [(run["adapter"] / "adapter_model.safetensors").stat().st_size for run in (whole, killed)]
    assert sizes[0] == sizes[1]


def test_a_training_whose_parent_is_gone_still_writes_its_checkpoint(tmp_path: Path, base: Path):
    """Nobody reads what it prints any more, and it is told to end."""
    run = run_of(tmp_path / "run", base)
    child = start(run, 1e9)
    for line in child.stdout:
        if line.startswith("distill  step 3/"):
            break
    child.stdout.close()
    child.send_signal(signal.SIGTERM)
    child.wait(timeout=240)
    assert saved(run) and not run["adapter"].exists()


def test_sigterm_ends_it_after_the_step_with_a_checkpoint(tmp_path: Path, base: Path, whole: Run):
    run = run_of(tmp_path / "run", base)
    child = start(run, every_s=1e9)
    for line in child.stdout:
        if line.startswith("distill  step 3/"):
            break
    child.send_signal(signal.SIGTERM)
    told, _ = child.communicate(timeout=240)
    assert child.returncode == 143, told
    (step,) = saved(run)
    assert 3 <= step < STEPS and not run["adapter"].exists()
    distill_train.train(run)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize(
    "damage",
    [
        "half",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("adapter_model.safetensors", "optimizer.pt")),
        pytest.param(checkpoints.MARKER, marks=pytest.mark.long),
    ],
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_taken(
    tmp_path: Path, base: Path, whole: Run, damage: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    run = run_of(tmp_path / "run", base)
    child = start(run)
    wait_for_step(run, 5, child)
    child.kill()
    child.wait()
    older, newer = saved(run)[-2:]
    folder = run[checkpoints.CHECKPOINTS] / f"checkpoint-{newer}"
    if damage == "half":
        (folder / checkpoints.MARKER).unlink()
    else:
        data = bytearray((folder / damage).read_bytes())
        data[len(data) // 2] ^= 0xFF
        (folder / damage).write_bytes(data)
    identity = identity_of(run)
    assert checkpoints.newest(run, identity) == run[checkpoints.CHECKPOINTS] / f"checkpoint-{older}"
    assert f"checkpoint-{newer} is not used" in capsys.readouterr().err
    if damage == "optimizer.pt":
        distill_train.train(run)
        assert losses(run) == pytest.approx(losses(whole), rel=1e-4)


def test_a_checkpoint_of_other_rows_settings_or_processes_is_not_used(tmp_path: Path, base: Path, capsys):
    run = run_of(tmp_path / "run", base)
    child = start(run)
    wait_for_step(run, 2, child)
    child.kill()
    child.wait()
    identity = identity_of(run)
    assert checkpoints.newest(run, identity) is not None
    assert checkpoints.newest(run, identity_of(run, 2)) is None
    assert "is of other rows, settings, versions or processes" in capsys.readouterr().err
    file = run["dataset/sft/train-00000-of-00001.parquet"]
    file.write_bytes((run["dataset/sft/validation-00000-of-00001.parquet"]).read_bytes())
    assert checkpoints.newest(run, identity_of(run)) is None
    run.add_facts(fingerprints={"distill": "another"})
    assert identity_of(run) != identity


def test_a_disk_without_room_for_checkpoints_is_said_before_the_first_step(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    run = run_of(tmp_path / "run", base)
    with pytest.raises(RunError, match="the checkpoints of this training need"):
        distill_train.train(run)
    assert not run["adapter"].exists()


@pytest.mark.long
def test_two_processes_save_and_go_on_together(tmp_path: Path, base: Path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)

    def start_two(run: Run) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, str(script), str(run.folder), "0"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    runs = [run_of(tmp_path / name, base) for name in ("whole", "ended")]
    told, _ = start_two(runs[0]).communicate(timeout=400)
    assert (runs[0]["adapter"]).exists(), told
    child = start_two(runs[1])
    wait_for_step(runs[1], 3, child)
    child.send_signal(signal.SIGTERM)  # the launcher passes it on to both
    child.communicate(timeout=400)
    assert saved(runs[1]) and not runs[1]["adapter"].exists()
    told, _ = start_two(runs[1]).communicate(timeout=400)
    assert "goes on from checkpoint-" in told and losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-3), told


@pytest.mark.long
def test_killed_at_ten_random_moments_the_loss_curve_is_the_uninterrupted_one(tmp_path: Path, base: Path):
    steps, chance = 200, random.Random(7)
    whole, run = (run_of(tmp_path / name, base, steps) for name in ("whole", "killed"))
    distill_train.train(whole)
    stopped_at = []
    for _ in range(10):
        child = start(run)
        wait_for_step(run, (saved(run) or [0])[-1] + 1, child)
        time.sleep(chance.uniform(0, 1.5))
        child.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
        child.wait()
        stopped_at.append(saved(run)[-1])
    distill_train.train(run)
    worst = max(abs(a - b) / b for a, b in zip(losses(run), losses(whole), strict=True))
    print(f"\nkilled at steps {stopped_at} of {steps}; the loss of a step differs by at most {worst:.1e} of itself")
    assert worst <= 1e-4
