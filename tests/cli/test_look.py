"""Commands that look at runs: list, remove, watch, report of a run folder; and those about the installation."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dsc_hub.cli import base, installation
from dsc_hub.cli.main import cli
from dsc_hub.cli.tables import grid_page
from dsc_hub.cli.watch import screen
from dsc_hub.config.recipe_files import load_recipe_file
from dsc_hub.config.stages import BY_NAME, NAMES
from dsc_hub.data.prompts import load_prompts
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.pipeline.grid import GridRow
from dsc_hub.pipeline.resolve import resolve_recipe
from dsc_hub.runs.live import Watched, current
from dsc_hub.runs.lookup import current_run, find_run, names_run
from dsc_hub.runs.metrics_schema import Metrics
from dsc_hub.runs.overview import is_running, summaries
from dsc_hub.runs.run import Run
from dsc_hub.runs.test_sets import LEDGER, looks_before, set_id
from dsc_hub.system import progress
from dsc_hub.system.files import write_json
from tests import fixture_run
from tests.conftest import ROOT


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
    assert states["run0"] == "running" and states["run1"] == "stopped at evaluation"
    assert states["run2"].startswith("damaged: ")
    assert not is_running(first)


def test_a_value_that_is_null_is_a_difference(tmp_path: Path):
    for n, seed in enumerate((5, 5, None)):
        run_with(tmp_path / "quickstart" / f"run{n}", f"2026-11-2{n}T10:00:00Z", seed=seed)
    assert [s.differs for s in summaries(tmp_path)] == [("distill.seed=null",), (), ()]


def test_a_run_json_of_another_form_is_damaged_and_no_traceback(runs: Path):
    write_json(runs / "quickstart" / "run0" / "run.json", {"recipe": "x"})
    (runs / "quickstart" / "run1" / "run.json").write_text("{")
    assert len(summaries(runs)) == 3
    assert current_run("quickstart", runs).folder.name == "run2"


def test_the_run_that_is_worked_on_is_watched_though_another_was_started_later(runs: Path):
    first = Run(runs / "quickstart" / "run0")
    assert current_run("quickstart", runs).folder.name == "run2"
    with first.lock():
        assert current_run("quickstart", runs).folder == first.folder
        assert current_run(str(runs / "quickstart"), runs).folder == first.folder


def test_a_run_is_named_by_its_folder_its_folders_name_or_its_recipe(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    newest = runs / "quickstart" / "run2"
    (runs / "quickstart" / "run1").rename(runs / "quickstart" / "0a1b2c3d4e5f")
    recipe = tmp_path / "quickstart.yaml"
    recipe.write_text("name: quickstart\n")
    for reference in (str(newest), "quickstart", str(runs / "quickstart"), str(recipe)):
        assert find_run(reference, runs).folder.resolve() == newest
    for name in ("0a1b2c", "0a1b2c3d4e5f", "quickstart/0a1b2c3d4e5f"):
        assert find_run(name, runs).folder.name == "0a1b2c3d4e5f"
    assert find_run("run0", runs).folder.name == "run0"  # a whole name may be short
    run_with(runs / "other" / "0a1b2c999999", "2026-11-20T10:00:00Z")
    (tmp_path / "seed.yaml").write_text("name: quickstart\ndistill: {seed: 2}\n")  # that of 0a1b2c3d4e5f
    assert find_run(str(tmp_path / "seed.yaml"), runs).folder.name == "0a1b2c3d4e5f"
    assert "no run has its settings" not in capsys.readouterr().err
    (tmp_path / "seed.yaml").write_text("name: quickstart\ndistill: {seed: 7}\n")
    assert find_run(str(tmp_path / "seed.yaml"), runs).folder.resolve() == newest
    assert "no run has its settings; the nearest differs in distill.seed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'0a1b2c' may be 2 runs") as e:
        find_run("0a1b2c", runs)
    assert str(runs / "other" / "0a1b2c999999") in e.value.hint
    shutil.rmtree(runs / "other")
    assert names_run("0a1b2c", runs) and not names_run("0a1b", runs) and not names_run(str(recipe), runs)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("name: &a quickstart\ndescription: *a\n")
    assert find_run("mine", runs).folder.resolve() == newest
    # A name means its newest run, though a folder of that name has a recipe with the settings of an older one.
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "recipe.yaml").write_text("name: quickstart\ndistill: {seed: 2}\n")
    assert find_run("quickstart", runs).folder.resolve() == newest
    assert find_run(str(recipe), Path("elsewhere")).folder.resolve() == newest  # its runs lie beside it
    for wrong, told in (
        ("quickstrat", "Did you mean 'quickstart'?"),
        ("0a1b", "Runs of these recipes are there: quickstart."),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"a recipe with a run in {runs}")) as e:
            find_run(wrong, runs)
        assert e.value.hint == told


def test_in_another_folder_it_is_said_where_the_runs_are(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    place = runs.parent / "own"
    runs = runs.rename(place.mkdir() or place / "runs")
    (place / "quickstart.yaml").write_text((ROOT / "recipes" / "quickstart" / "recipe.yaml").read_text())
    for file in (ROOT / "recipes" / "quickstart").glob("*.txt"):
        (place / file.name).write_bytes(file.read_bytes())
    (place / "desk").mkdir()
    for here, folder in (("desk", "../runs"), ("..", "own/runs")):
        monkeypatch.chdir(place / here)
        with pytest.raises(ConfigError) as e:
            find_run("quickstart", Path("runs"))
        assert e.value.hint == f"There are runs of 'quickstart' in {folder}: --runs {folder}"
        resolve_recipe(str(place / "quickstart.yaml"), ["publish.to=none"], Path("runs"))
        assert f"--runs {runs} goes on with them" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.chdir(place)
    resolve_recipe("quickstart.yaml", ["publish.to=none"], Path("runs"))
    assert "goes on with them" not in capsys.readouterr().err


def test_options_of_the_group_hold_for_its_list(runs: Path):
    done = CliRunner().invoke(cli, ["runs", "--runs", str(runs), "--json", "list"])
    assert len(json.loads(done.output)) == 3


def test_no_runs_is_said(tmp_path: Path):
    assert "no runs in" in CliRunner().invoke(cli, ["runs", "--runs", str(tmp_path / "none")]).output


def test_runs_are_removed_when_it_is_agreed_and_nobody_works_on_them(runs: Path):
    folder = runs / "quickstart" / "run1"
    invoke = CliRunner().invoke
    assert isinstance(invoke(cli, ["runs", "remove", str(folder)], input="n\n").exception, ConfigError)
    with Run(folder).lock():
        assert isinstance(invoke(cli, ["runs", "remove", str(folder), "--yes"]).exception, RunError)
    error = invoke(cli, ["runs", "remove", str(folder), str(runs), "--yes"]).exception
    assert isinstance(error, ConfigError) and str(runs) in error.problems[0] and folder.exists()
    link = runs / "link"
    link.symlink_to(folder)
    error = invoke(cli, ["runs", "remove", str(link), "--yes"]).exception
    assert isinstance(error, ConfigError) and "a link" in error.problems[0] and folder.exists()
    link.unlink()
    assert invoke(cli, ["runs", "remove", str(folder), f"{folder}/", "--yes"]).exit_code == 0
    assert not folder.exists() and len(summaries(runs)) == 2


def test_watching_reads_what_is_appended(tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    rows = run["chains.jsonl"].read_bytes()
    half = rows.index(b"\n", len(rows) // 2) + 1
    run["chains.jsonl"].write_bytes(rows[: half - 5])  # the last row is being written
    for stage in ("sampling", "dataset", "distill", "evaluation"):
        run.unfinish(stage)
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
    run["chains.jsonl"].write_bytes(rows[:half])  # sampled anew
    assert watched.look().chains == first.chains + 1
    with run["chains.jsonl"].open("ab") as file:
        file.write(b"{not json}\n")
    with pytest.raises(RunError, match="not JSON"):
        watched.look()
    assert f"{second.chains} of {second.planned}" in text and "reward so far" in text and "first answer" in text


@pytest.mark.parametrize("damage", [b"{not json}", b'{"prompt_id": 3}'])
def test_a_damaged_row_of_a_watched_run_is_told_by_its_own_line(tmp_path: Path, damage: bytes):
    run = fixture_run.write(tmp_path / "run")
    rows = run["chains.jsonl"].read_bytes().splitlines(keepends=True)
    run["chains.jsonl"].write_bytes(b"".join([*rows[:2], damage + b"\n", *rows[2:]]))
    with pytest.raises(RunError, match=r"chains\.jsonl line 3 is damaged"):
        Watched(run, run).look()


def test_of_a_run_in_rounds_the_last_round_is_watched(tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    for n in (1, 2):
        fixture_run.write(run["rounds"] / str(n))
    run.unfinish("sampling")
    assert current(run).folder.name == "2"
    write_json(run["sampling.done.json"], {})
    assert current(run).folder == run.folder


def test_the_report_of_a_run_folder_needs_no_recipe_and_says_what_is_missing(tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    run["log.txt"].write_text("2026-11-29 10:00:00  sampling  3 of 512 chains <b>\n")
    for stage in ("distill", "evaluation"):  # a stage before them is done again: what they measured is of before
        run.unfinish(stage)
    done = CliRunner().invoke(cli, ["report", str(run.folder), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["plots"] == 4
    page = run["report.html"].read_text()
    assert "This run is not finished" in page and "3 of 512 chains &lt;b&gt;" in page
    assert "Missing: distill, evaluation" in page and "Not evaluated" in page and "The chains" in page


def test_a_packaged_name_with_runs_means_the_newest_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fingerprints = {stage: f"{n:012x}" for n, stage in enumerate(NAMES)}
    for n in range(2):
        facts = fixture_run.facts() | {"started_at": f"2026-11-2{n}T10:00:00Z", "fingerprints": fingerprints}
        run = fixture_run.write(tmp_path / "runs" / "quickstart" / f"run{n}", run_facts=facts)
        for stage in NAMES[:5]:
            for name in BY_NAME[stage].files:
                if not run[name].exists():
                    run[name].mkdir(parents=True)
            write_json(run[f"{stage}.done.json"], {"fingerprint": fingerprints[stage], "result": {}})
    (tmp_path / "quickstart").mkdir()  # a folder of that name changes nothing
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["report", "quickstart", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["run"] == "runs/quickstart/run1"
    older, newest = Run(tmp_path / "runs/quickstart/run0"), Run(tmp_path / "runs/quickstart/run1")
    assert newest["report.html"].is_file() and not older["report.html"].is_file()
    # It is evaluated, so that it has cards now, and can be published.
    assert newest["cards"].is_dir() and newest.is_done("report", fingerprints["report"])
    assert newest.is_done("cards", fingerprints["cards"]) and "report" in newest.metrics["stages"]
    # Done before: the page is written anew, and what was published stays so.
    write_json(newest["publish.done.json"], {"fingerprint": fingerprints["publish"], "result": {}})
    assert CliRunner().invoke(cli, ["report", "quickstart"]).exit_code == 0
    assert newest.marker("publish") and newest.marker("cards")
    # With an override it is the recipe, whose run is another one.
    told = CliRunner().invoke(cli, ["report", "quickstart", "seed=9"])
    assert isinstance(told.exception, RunError) and "not done" in str(told.exception)


def test_every_command_is_in_a_section_of_the_help():
    named = [name for names in base.SECTIONS.values() for name in names]
    assert sorted(named) == sorted(cli.commands) and len(set(named)) == len(named)


def test_what_a_bug_report_needs_holds_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://ann:geheim@proxy.example:3128")
    monkeypatch.setenv("http_proxy", "ann:geheim@proxy.example:3128")  # without a scheme, as often
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "somebody" / "dsc"))
    text = CliRunner().invoke(cli, ["env", "--json"]).output
    assert "secret" not in text and "geheim" not in text and "somebody" not in text
    found = json.loads(text)
    assert found["variables"]["HF_TOKEN"] == "set" and found["variables"]["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert found["variables"]["http_proxy"] == "proxy.example:3128"
    assert found["variables"]["DSC_HUB_HOME"] == "~/dsc" and "torch" in found["libraries"]
    assert set(installation.SECRETS) & set(found["variables"]) == {"HF_TOKEN"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_completes_commands(shell: str, dsc):
    script = dsc("completion", shell, code=0).stdout
    assert "_DSC_COMPLETE" in script
    asked = {"_DSC_COMPLETE": f"{shell}_complete", "COMP_WORDS": "dsc ver"}
    asked["COMP_CWORD"] = "ver" if shell == "fish" else "1"
    assert "verify" in dsc(**asked).stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dsc plan qu", "quickstart"),
        ("dsc show qu", "quickstart"),
        ("dsc run quickstart chain.st", "chain.steps="),
        ("dsc run quickstart chain.acceptance=", "chain.acceptance=improve"),
        ("dsc run quickstart publish.to=l", "publish.to=local"),
    ],
)
def test_completion_knows_recipes_runs_keys_and_values(dsc, line: str, expected: str):
    fixture_run.write(dsc.work / "runs" / "quickstart" / "one")
    asked = {"_DSC_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    assert expected in [word.partition(",")[2] for word in dsc(**asked).stdout.splitlines()]


def test_quiet_says_results_and_errors_only(dsc, recipe_file: Path, server: str):
    words = ("sample", str(recipe_file), f"serving.endpoints=[{server}]", "evaluation.arms=[base]")
    done = dsc("--quiet", *words, "--json", code=0)
    assert done.stderr == "" and json.loads(done.stdout)["stage"] == "sampling"
    assert "sampling" in dsc(*words, "seed=2", code=0).stderr
    assert "no-such-recipe" in dsc("--quiet", "plan", "no-such-recipe", code=2).stderr


def test_the_progress_line_is_quiet_too_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    for quiet, said in ((True, ""), (False, "1 of 2\n")):
        monkeypatch.setattr(progress.console, "quiet", quiet)
        with progress.moving_line() as line:
            line.show("1 of 2")
        assert capsys.readouterr().err == said


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
    for words in ("quickstart/run1: distill.seed=2", "is not shown to differ from that of quickstart/run0 on"):
        assert words in text and words in " ".join(done.output.split())
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


def test_the_plan_says_how_often_the_test_prompts_were_scored(dsc, recipe_file: Path):
    plan = ("plan", str(recipe_file), "--json")
    assert json.loads(dsc(*plan, code=0).stdout)["looks"] == 0
    prompts, _ = load_prompts(load_recipe_file(recipe_file).prompts, recipe_file.parent, 0, "")
    ids = [p.id for p in prompts if p.split == "test"]
    test_set = set_id(ids)
    (dsc.work / "runs").mkdir(exist_ok=True)
    write_json(dsc.work / "runs" / LEDGER, {test_set: {"adapters": ["a", "b"], "unordered": 0}})
    assert json.loads(dsc(*plan, code=0).stdout)["looks"] == 2
    assert "2 other adapters were scored on these test prompts before" in dsc(*plan[:2], code=0).stdout
    assert [looks_before(dsc.work / "runs", ids, own) for own in ("a", "b", "c", None)] == [0, 1, 2, 2]
    for other in ("evaluation.split=validation", "evaluation.arms=[base]", "seed=4"):
        assert json.loads(dsc(*plan, other, code=0).stdout)["looks"] == 0
