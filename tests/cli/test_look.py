"""Commands that look at runs: list, remove, watch, report of a run folder; and those about the installation."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dsc_hub.cli import base, installation
from dsc_hub.cli.main import cli
from dsc_hub.cli.tables import grid_page
from dsc_hub.cli.watch import screen
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.pipeline.grid import GridRow
from dsc_hub.runs.live import Watched, current
from dsc_hub.runs.metrics_schema import Metrics
from dsc_hub.runs.overview import is_running, summaries
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_json
from tests import fixture_run


def run_with(folder: Path, started_at: str, **distill) -> Run:
    facts = fixture_run.facts()
    facts["recipe"]["distill"] |= distill
    return fixture_run.write(folder, run_facts=facts | {"started_at": started_at})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for n, seed in enumerate((None, 2, 3)):
        run_with(folder / "quickstart" / f"run{n}", f"2026-11-2{n}T10:00:00Z", seed=seed)
    return folder


def test_runs_are_listed_newest_first_with_what_differs(runs: Path):
    found = summaries(runs)
    assert [s.folder.name for s in found] == ["run2", "run1", "run0"]
    assert [s.differs for s in found] == [("distill.seed=3",), ("distill.seed=2",), ()]
    assert {s.state for s in found} == {"evaluated"} and found[0].verdict == "fails"
    assert found[0].bytes == sum(p.stat().st_size for p in found[0].folder.rglob("*") if p.is_file())
    done = CliRunner().invoke(cli, ["runs", "--runs", str(runs)])
    assert done.exit_code == 0 and "distill.seed=3" in done.output
    as_json = json.loads(CliRunner().invoke(cli, ["runs", "--runs", str(runs), "--json"]).output)
    assert [row["recipe"] for row in as_json] == ["quickstart"] * 3


def test_a_run_that_goes_on_was_stopped_or_is_damaged_is_told_apart(runs: Path):
    first, second, third = (Run(runs / "quickstart" / f"run{n}") for n in range(3))
    second["evaluation.done.json"].unlink()
    third["run.json"].write_text("{")
    with first.lock():
        states = {s.folder.name: s.state for s in summaries(runs, "quickstart")}
        assert is_running(first)
    assert states["run0"] == "running" and states["run1"] == "stopped before prompts"
    assert states["run2"].startswith("damaged: ")
    assert not is_running(first)


def test_no_runs_is_said(tmp_path: Path):
    assert "no runs in" in CliRunner().invoke(cli, ["runs", "--runs", str(tmp_path / "none")]).output


def test_runs_are_removed_when_it_is_agreed_and_nobody_works_on_them(runs: Path):
    folder = runs / "quickstart" / "run1"
    invoke = CliRunner().invoke
    assert isinstance(invoke(cli, ["runs", "remove", str(folder)], input="n\n").exception, ConfigError)
    with Run(folder).lock():
        assert isinstance(invoke(cli, ["runs", "remove", str(folder), "--yes"]).exception, RunError)
    error = invoke(cli, ["runs", "remove", str(folder), str(runs), "--yes"]).exception
    assert isinstance(error, ConfigError) and error.problems == (str(runs),) and folder.exists()
    assert invoke(cli, ["runs", "remove", str(folder), "--yes"]).exit_code == 0
    assert not folder.exists() and len(summaries(runs)) == 2


def test_watching_reads_what_is_appended(tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    rows = run["chains.jsonl"].read_bytes()
    half = rows.index(b"\n", len(rows) // 2) + 1
    run["chains.jsonl"].write_bytes(rows[: half - 5])  # the last row is being written
    write_json(run["prompts.done.json"], {})
    watched = Watched(run, run)
    first = watched.look()
    run["chains.jsonl"].write_bytes(rows)
    second = watched.look()
    assert 0 < first.chains < second.chains == rows.count(b"\n")
    each = run.facts.recipe.chain.chains_per_prompt
    assert second.planned == each * len(run["prompts.jsonl"].read_text().splitlines())
    chains = [json.loads(line) for line in rows.splitlines()]
    assert second.proposals == sum(len(c["steps"]) for c in chains)
    assert second.accepted == sum(not s["rejected"] for c in chains for s in c["steps"])
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(screen(run, second))
    text = console.export_text()
    assert f"{second.chains} of {second.planned}" in text and "reward so far" in text and "first answer" in text


def test_of_a_run_in_rounds_the_last_round_is_watched(tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    for n in (1, 2):
        fixture_run.write(run["rounds"] / str(n))
    assert current(run).folder.name == "2"
    write_json(run["sampling.done.json"], {})
    assert current(run).folder == run.folder


def test_the_report_of_a_run_folder_needs_no_recipe_and_says_what_is_missing(tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    run["log.txt"].write_text("2026-11-29 10:00:00  sampling  3 of 512 chains <b>\n")
    done = CliRunner().invoke(cli, ["report", str(run.folder), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["plots"] == 7
    page = run["report.html"].read_text()
    assert "This run is not finished" in page and "3 of 512 chains &lt;b&gt;" in page
    assert "Missing: prompts, sampling, dataset, distill" in page


def test_every_command_is_in_a_section_of_the_help():
    named = [name for names in base.SECTIONS.values() for name in names]
    assert sorted(named) == sorted(cli.commands) and len(set(named)) == len(named)


def test_what_a_bug_report_needs_holds_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:geheim@proxy.example:3128")
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "somebody" / "dsc"))
    text = CliRunner().invoke(cli, ["env", "--json"]).output
    assert "secret" not in text and "geheim" not in text and "somebody" not in text
    found = json.loads(text)
    assert found["variables"]["HF_TOKEN"] == "set" and found["variables"]["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert found["variables"]["DSC_HUB_HOME"] == "~/dsc" and "torch" in found["libraries"]
    assert set(installation.SECRETS) & set(found["variables"]) == {"HF_TOKEN"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_completes_commands(shell: str, dsc):
    script = dsc("completion", shell, code=0).stdout
    assert "_DSC_COMPLETE" in script
    asked = {"_DSC_COMPLETE": f"{shell}_complete", "COMP_WORDS": "dsc ver"}
    asked["COMP_CWORD"] = "ver" if shell == "fish" else "1"
    assert "verify" in dsc(**asked).stdout


def test_quiet_says_results_only(dsc):
    loud = dsc("plan", "no-such-recipe", code=2).stderr
    assert loud and dsc("--quiet", "plan", "no-such-recipe", code=2).stderr == loud  # errors are no progress
    assert dsc("--quiet", "recipes", "copy", "quickstart", "mine", code=0).stdout


def test_no_color_is_heeded(dsc):
    fixture_run.write(dsc.work / "runs" / "quickstart" / "one")
    forced = {"FORCE_COLOR": "1", "COLUMNS": "120"}
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")
    show = ("check", "quickstart")
    assert colour.search(dsc(*show, code=1, **forced).stdout)
    assert not colour.search(dsc(*show, code=1, NO_COLOR="1", **forced).stdout)


def test_a_comparison_is_a_page_too(runs: Path, tmp_path: Path):
    folders = [str(runs / "quickstart" / name) for name in ("run0", "run1")]
    page = tmp_path / "compared.html"
    done = CliRunner().invoke(cli, ["compare", *folders, "--page", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.count("<table>") >= 2 and "<svg" in text and "quickstart/run1" in text
    assert "script-src" not in text and "default-src 'none'" in text


def test_a_grid_is_a_page_too_and_its_values_are_escaped(tmp_path: Path):
    evaluation = Metrics.model_validate(fixture_run.metrics()).evaluation
    difference = evaluation.differences["distilled - base"]
    arms = {name: {"reward": arm.reward} for name, arm in evaluation.arms.items()}
    rows = [
        GridRow(
            set={"chain.critique": "<b>kind</b>", "chain.steps": n},
            run=tmp_path,
            error="",
            sampling=None,
            rows=10 * n,
            arms=arms,
            difference=difference,
            claim="holds",
        )
        for n in (1, 2)
    ]
    grid_page(tmp_path / "grid.html", rows)
    text = (tmp_path / "grid.html").read_text()
    assert "&lt;b&gt;kind&lt;/b&gt;" in text and "<b>kind" not in text and text.count("<svg") == 2
