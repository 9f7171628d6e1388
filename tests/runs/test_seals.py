"""What a finished stage wrote is noticed when somebody changes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_hub.cli.main import cli
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.publish.verify_run import verify_run
from dsc_hub.runs import seals
from dsc_hub.runs.reuse import find_reusable
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_json, write_json
from tests import fixture_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = fixture_run.write(tmp_path / "runs" / "r" / "one")
    for name in ("prompts.jsonl", "turns.jsonl"):
        run[name].write_text('{"n": 1}\n{"n": 2}\n')
    run["adapter"].mkdir(exist_ok=True)
    run["adapter/adapter_model.safetensors"].write_bytes(b"weights")
    for stage in ("prompts", "sampling", "distill", "evaluation"):
        run.finish(stage, f"fingerprint of {stage}", 1.0, {"result": {}})
    return run


def a_letter(run: Run) -> None:
    path = run["chains.jsonl"]
    path.write_bytes(path.read_bytes().replace(b"e", b"a", 1))


CHANGES: dict[str, tuple[str, Callable[[Run], None], str]] = {
    "a letter": ("sampling", a_letter, "chains.jsonl was changed"),
    "a line less": ("prompts", lambda run: run["prompts.jsonl"].write_text('{"n": 1}\n'), "prompts.jsonl was changed"),
    "a line twice": (
        "sampling",
        lambda run: run["turns.jsonl"].write_text('{"n": 1}\n' * 3),
        "turns.jsonl was changed",
    ),
    "a file less": ("sampling", lambda run: run["turns.jsonl"].unlink(), "turns.jsonl is gone"),
    "other weights": (
        "distill",
        lambda run: run["adapter/adapter_model.safetensors"].write_bytes(b"others"),
        "adapter/adapter_model.safetensors was changed",
    ),
    "a number": (
        "sampling",
        lambda run: run.add_metrics("sampling", run.metrics["sampling"] | {"chains": 999}),
        "metrics.json, sampling was changed",
    ),
    "a verdict": (
        "evaluation",
        lambda run: run["metrics.json"].write_text(
            run["metrics.json"].read_text().replace('"not enough data"', '"holds"').replace('"fails"', '"holds"')
        ),
        "metrics.json, evaluation was changed",
    ),
    "an answer": (
        "evaluation",
        lambda run: run["evaluation/answers.jsonl"].write_text(run["evaluation/answers.jsonl"].read_text()[:-9] + "\n"),
        "evaluation/answers.jsonl was changed",
    ),
    "a file more": ("distill", lambda run: run["adapter/x.bin"].write_bytes(b""), "adapter/x.bin was added"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_a_stage_wrote_stops_what_builds_on_it(run: Run, name: str):
    stage, change, message = CHANGES[name]
    seals.check(run, ["prompts", "sampling", "distill", "dataset", "evaluation"])
    other = Run(run.folder.with_name("two"))
    assert find_reusable(other, stage, f"fingerprint of {stage}", {}, [run]) is run
    change(run)
    with pytest.raises(RunError, match=f"{message} since the stage '{stage}' was done") as error:
        seals.check(run, ["prompts", "sampling", "distill", "evaluation"])
    assert f"{stage}.done.json" in str(error.value)
    assert find_reusable(other, stage, f"fingerprint of {stage}", {}, [run]) is None
    shown = CliRunner().invoke(cli, ["verify", str(run.folder), "--json"])
    checks = {c["name"]: c for c in json.loads(shown.stdout)["checks"]}
    assert shown.exit_code == 1 and checks[stage]["agrees"] is False and message in checks[stage]["detail"]


def test_what_comes_later_is_no_change(run: Run):
    run["failed.jsonl"].write_text("{}\n")
    run["log.txt"].write_text("more")
    run.add_metrics("stages", {"report": 3.0})
    run["evaluation/blind.jsonl"].write_text("{}\n")
    run["report.html"].write_text("made anew")
    seals.check(run, ["prompts", "sampling", "distill", "evaluation"])
    shown = CliRunner().invoke(cli, ["verify", str(run.folder)])
    assert shown.exit_code == 0 and "All that could be checked agrees" in shown.stdout and "the rest" in shown.stdout


def test_a_recipes_name_means_its_newest_run_and_what_is_here_is_not_looked_for_on_the_hub(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(run.folder.parents[2])
    shown = CliRunner().invoke(cli, ["verify", "r", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["run"] == str(run.folder.relative_to(Path.cwd()))
    for wrong in ("no-such-recipe", "runs", "runs/r/one/metrics.json"):
        shown = CliRunner().invoke(cli, ["verify", wrong])
        assert isinstance(shown.exception, ConfigError), shown.exception


def test_a_run_of_a_version_without_hashes_passes_and_says_so(run: Run):
    marker = run.marker("sampling")
    assert marker is not None
    del marker["files"]
    run["sampling.done.json"].write_text(json.dumps(marker))
    a_letter(run)
    seals.check(run, ["sampling"])
    shown = CliRunner().invoke(cli, ["verify", str(run.folder), "--json"])
    (check,) = [c for c in json.loads(shown.stdout)["checks"] if c["name"] == "sampling"]
    assert check["agrees"] is None and "recorded no hashes" in check["detail"]


def test_what_a_version_did_not_hash_at_all_was_not_added(run: Run):
    for stage in ("sampling", "evaluation"):
        marker = run.marker(stage)
        assert marker is not None
        marker["files"] = {
            n: h for n, h in marker["files"].items() if not n.startswith(("metrics.json", "evaluation/"))
        }
        run[f"{stage}.done.json"].write_text(json.dumps(marker))
    seals.check(run, ["sampling", "evaluation"])


@pytest.mark.parametrize("damage", [{"files": [{}]}, {"files": {"prompts.jsonl": 3}}, {"files": "x"}, {"result": []}])
def test_a_damaged_marker_is_said_and_costs_one_file(tmp_path: Path, damage: dict):
    run = Run(tmp_path)
    run["prompts.jsonl"].write_text("{}\n")
    run.finish("prompts", "f", 0.0, {"result": {}})
    write_json(run["prompts.done.json"], read_json(run["prompts.done.json"]) | damage)
    for look in (lambda: verify_run(run), lambda: run.result("prompts"), lambda: run.is_done("prompts", "f")):
        with pytest.raises(RunError, match=r"prompts\.done\.json is damaged") as e:
            look()
        assert "Remove it" in e.value.hint
