"""Several processes of an outer launcher: one does the stages, all train, and none waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsc_hub.distill import launcher, ranks
from dsc_hub.errors import RunError
from dsc_hub.system.launch import local_world_size, rank, world_size
from tests.conftest import ROOT
from tests.distill.tiny import make_run, row

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dsc_hub"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, seconds in (("BEAT_S", 0.05), ("LOST_AFTER_S", 1.0), ("NOT_SEEN_AFTER_S", 0.5), ("SETTLE_S", 0.0)):
        monkeypatch.setattr(ranks, name, seconds)
    yield


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (3, 8, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2, 2)),
        ({"RANK": "", "WORLD_SIZE": "all"}, (0, 1, 1)),
    ],
)
def test_ranks_are_read_as_the_launchers_write_them(environment, expected):
    assert (rank(environment), world_size(environment), local_world_size(environment)) == expected


def following(runs: Path, codes: list[int], trained: list[Path], code: int = 0) -> threading.Thread:
    """A process of rank 1, as a thread, that has begun to wait."""

    def work(run: Path) -> None:
        trained.append(run)
        if code:
            raise RunError("out of memory")

    def rank_1() -> None:
        try:
            codes.append(ranks.follow(runs, work))
        except RunError as e:
            assert e.message == "out of memory"
            codes.append(2)

    thread = threading.Thread(target=rank_1)
    thread.start()
    time.sleep(0.1)
    return thread


@pytest.mark.parametrize("code", [0, 2])
def test_the_others_take_part_in_the_training_of_the_main_process(tmp_path: Path, code: int, monkeypatch):
    codes, trained = [], []
    with ranks.lead(tmp_path):
        thread = following(tmp_path, codes, trained, code)
        assert ranks.leads() and not trained
        monkeypatch.setattr(ranks, "launch", lambda run, joins: (thread.join(5), "numbers")[1])
        assert ranks.train_together(ranks.Run(tmp_path / "run")) == "numbers"
        assert codes == [code] and trained == [tmp_path / "run"]
    assert not ranks.leads()


def test_without_a_training_they_end_with_the_main_process(tmp_path: Path):
    codes, trained = [], []
    with ranks.lead(tmp_path):
        thread = following(tmp_path, codes, trained)
    thread.join(5)
    assert codes == [0] and not trained


def test_a_main_process_that_was_quicker_than_they_could_look_is_seen(tmp_path: Path):
    """The stages were done before, so it had ended when another process of the launch read the status first."""
    with ranks.lead(tmp_path):
        pass
    assert ranks.follow(tmp_path, lambda run: None) == 0


def test_when_the_main_process_fails_they_end_too(tmp_path: Path):
    codes, trained = [], []
    with pytest.raises(RunError), ranks.lead(tmp_path):
        thread = following(tmp_path, codes, trained)
        raise RunError("no")
    thread.join(5)
    assert codes == [2] and not trained


def test_what_another_launch_left_is_not_taken_for_the_main_process(tmp_path: Path, monkeypatch):
    with ranks.lead(tmp_path):
        pass
    monkeypatch.setattr(ranks.machine, "process_started", lambda: time.time() + 0.01)  # after it was written
    assert json.loads(ranks.status_file(tmp_path).read_text())["state"] == ranks.TRAINED
    with pytest.raises(RunError, match=r"(?s)no sign of the main process.*one shared folder"):
        ranks.follow(tmp_path)


def test_a_main_process_that_is_gone_is_noticed(tmp_path: Path):
    raised = []

    def wait() -> None:
        with pytest.raises(RunError, match="gave no sign for") as e:
            ranks.follow(tmp_path)
        raised.append(e)

    with ranks.lead(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        ranks.BEAT_S = 3.0  # it hangs
        thread.join(10)
    assert raised


def test_a_training_that_nobody_leads_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="do not know of this training"):
        ranks.train_together(ranks.Run(tmp_path))


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Two processes need two cores, of which a test process side by side with others may have one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def work(all_cores, dsc, recipe_file: Path, base: Path, server: str) -> tuple[list[str], dict[str, str], Path]:
    """A run that is ready to be trained: the words that name it, the environment, and its folder."""
    words = [
        str(recipe_file),
        f"model.source={base}",
        f"serving.endpoints=[{server}]",
        "distill.sft={max_steps: 2, per_device_train_batch_size: 2}",
        "distill.processes=2",
        "evaluation.arms=[base]",
    ]
    dsc("sample", *words, code=0)
    dsc("dataset", *words, code=0)
    (run,) = (dsc.work / "runs" / "little").iterdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    home = {"DSC_HUB_HOME": str(run.parents[2] / "home"), "PYTHONPATH": str(ROOT)}
    return words, kept | home, run


def torchrun(verb: str, words: list[str], environment: dict[str, str], run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, verb, *words], cwd=run.parents[2], env=environment, capture_output=True, text=True, timeout=300
    )


def test_two_processes_of_torchrun_train_together_and_only_one_does_the_rest(work):
    words, environment, run = work
    done = torchrun("distill", words, environment, run)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "adapter" / "summary.json").read_text())["world_size"] == 2
    assert done.stderr.count("-> runs/little/") == 1, done.stderr  # the closing line of the stage
    # without naming the number: it is the launcher's, and so is the run folder
    again = torchrun("distill", [w for w in words if not w.startswith("distill.processes")], environment, run)
    assert again.returncode == 0 and again.stderr.count("distill: done before") == 1, again.stderr


def test_what_is_wrong_is_said_once_and_ends_all(work):
    words, environment, run = work
    started = time.monotonic()
    done = torchrun("distill", [*words, "distill.lora={r: 0}"], environment, run)
    assert done.returncode != 0 and done.stderr.count("must be at least 1, got 0") == 1, done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.long
def test_two_processes_of_batch_4_learn_as_one_of_batch_8(all_cores, tmp_path: Path, base: Path):
    """Twenty steps in float32 without dropout: the loss of each differs by at most 1 %."""
    losses = {}
    for processes in (1, 2):
        settings = {
            "max_steps": 20,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 8 // processes,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
        }
        rows = [row(n, f"Answer {n}. ") for n in range(48)]
        run = make_run(
            tmp_path / str(processes),
            base,
            rows,
            method="lora",
            sft=settings,
            lora={"lora_dropout": 0.0},
            processes=processes,
        )
        assert launcher.launch(run).world_size == processes
        log = [json.loads(line) for line in (run["adapter"] / "training_log.jsonl").read_text().splitlines()]
        losses[processes] = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses[1]) == len(losses[2]) == 20 and losses[1][-1] < 0.95 * losses[1][0]
    differences = [abs(b - a) / a for a, b in zip(losses[1], losses[2], strict=True)]
    print(f"largest difference of a step's loss: {max(differences):.2%}")
    assert max(differences) <= 0.01
