"""Damaged files of a run are told in a line that says which and what to do; none is a traceback, and none passes for a number."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsc_hub.cli import screens
from dsc_hub.cli.main import cli
from dsc_hub.data import table_files
from dsc_hub.errors import DscError, RunError
from dsc_hub.evaluation import blind, compare
from dsc_hub.inference import base_model, chat_template
from dsc_hub.pipeline import import_reference, resolve
from dsc_hub.pipeline.context import record
from dsc_hub.report import cards, page, tables
from dsc_hub.runs import metrics_schema, verdict
from dsc_hub.runs.jsonl import JsonlFile
from dsc_hub.runs.lookup import find_run
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_object, write_json
from tests import fixture_run
from tests.conftest import ROOT


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value, objects and lists included."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, v in inside:
        yield (*at, key)
        yield from paths(v, (*at, key))


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    value = copy.deepcopy(value)
    node = value
    for key in path[:-1]:
        node = node[key]
    if to is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = to
    return value


def looked_at(metrics: Any) -> None:
    """All that is shown of a run's numbers."""
    m = metrics_schema.Metrics.model_validate(metrics)
    tables.closing_table(m.evaluation, m.blind)
    for table in (tables.detail_table, tables.side_effect_table, tables.cost_table):
        table(m.evaluation)
    if c := m.evaluation.claim:
        verdict.verdict_of([(x.name, x.verdict) for x in c.criteria], c.answers)
        tables.claim_table(m.evaluation)
    if m.sampling:
        page.step_rows(m.sampling.steps)


@pytest.mark.parametrize(
    "to", [..., None, "x", [], {}, 1e400], ids=["gone", "null", "text", "list", "object", "infinite"]
)
def test_whatever_of_the_numbers_is_damaged_it_is_refused_or_can_be_shown(tmp_path: Path, to: Any):
    run = fixture_run.write(tmp_path)
    good = run.metrics
    passed, places = 0, list(paths(good))[:: 1 if to is ... else 5]
    for path in places:
        bad = changed(good, path, to)
        if metrics_schema.schema_problems(bad) or "evaluation" not in bad:
            continue
        passed += 1
        looked_at(bad)  # what the description lets through must not fail here
    assert passed < len(places) / 2 and metrics_schema.schema_problems(good) == []


@pytest.mark.parametrize(
    ("path", "to", "told"),
    [
        (("schema",), 2, "is of schema 2, this dsc reads 4"),
        (("schema",), ..., "is of schema None"),
        (("evaluation", "arms", "base"), ..., "difference 'self_critique - base' is of arms that are not there"),
        (("evaluation", "scores"), ..., "evaluation.scores: Field required"),
        (("evaluation", "arms", "base", "reward", "mean"), "x", "evaluation.arms.base.reward.mean"),
        (("sampling",), "x", "sampling: "),
        (("sampling", "last_step"), None, "sampling.last_step"),
        (("blind",), "x", "blind: "),
        (("blind",), None, "blind is null"),
        (("nonsense",), 1, "nonsense: "),
        (("evaluation", "arms", "base", "second"), None, "arm 'base' has no second"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_way_out(tmp_path: Path, path, to, told: str):
    run = fixture_run.write(tmp_path)
    write_json(run["metrics.json"], changed(run.metrics, path, to))
    other = fixture_run.write(tmp_path / "other")
    for look in (
        screens.numbers,
        screens.claim,
        lambda r: compare.compare_runs([other, r]),
        page.build_page,
        cards.build_cards,
    ):
        with pytest.raises(RunError) as e:
            look(run)
        assert told in str(e.value) and str(run["metrics.json"]) in str(e.value) and e.value.hint


@pytest.mark.parametrize(
    "row",
    ["[1]", "null", "{}", '"x"', "{", {"text": None}, {"reward": "x"}, {"sample": "x"}, {"arm": "somebody"}],
    ids=str,
)
def test_damaged_answers_are_told_by_their_line(tmp_path: Path, row: Any):
    run, other = fixture_run.write(tmp_path / "run"), fixture_run.write(tmp_path / "other")
    lines = run["evaluation/answers.jsonl"].read_text().splitlines()
    lines[2] = row if isinstance(row, str) else json.dumps(json.loads(lines[2]) | row)
    run["evaluation/answers.jsonl"].write_text("\n".join(lines) + "\n")
    before = run["report.html"].write_text("the old one")
    for look in (lambda r: compare.compare_runs([other, r]), page.build_page, cards.build_cards, blind.read_pairs):
        with pytest.raises(RunError, match=r"answers\.jsonl (line 3 is damaged|doesn't hold)") as e:
            look(run)
        assert "evaluation.done.json" in e.value.hint
    assert run["report.html"].stat().st_size == before  # nothing half-made stands in the place of the old report


@pytest.mark.parametrize("how", ["missing", "empty", "torn"])
def test_fewer_answers_than_were_counted_are_told(tmp_path: Path, how: str):
    run = fixture_run.write(tmp_path / "run")
    file = run["evaluation/answers.jsonl"]
    {
        "missing": file.unlink,
        "empty": lambda: file.write_text(""),
        "torn": lambda: file.write_bytes(file.read_bytes()[:-1]),
    }[how]()
    other = fixture_run.write(tmp_path / "other")
    for look in (lambda r: compare.compare_runs([other, r]), page.build_page, cards.build_cards):
        with pytest.raises(RunError, match="doesn't hold the answers that metrics.json counts"):
            look(run)


def test_damaged_chains_prompts_and_verdicts_are_told_by_their_line(tmp_path: Path):
    run = fixture_run.write(tmp_path)
    for file, row, marker in (
        ("chains.jsonl", "[1]", "sampling.done.json"),
        ("chains.jsonl", '{"prompt_id": "a"}', "sampling.done.json"),
        ("prompts.jsonl", '{"id": "a", "text": "b", "group": "c", "split": "d"}', "prompts.done.json"),
    ):
        good = run[file].read_text()
        run[file].write_text(good + row + "\n")
        with pytest.raises(RunError, match=rf"{file} line \d+ is damaged") as e:
            cards.build_cards(run)
        assert str(run[marker]) in e.value.hint
        run[file].write_text(good)
    run[blind.JUDGEMENTS].write_text('{"won": 5}\n')
    with pytest.raises(RunError, match=r"blind\.jsonl line 1 is damaged") as e:
        blind.read_verdicts(run)
    assert "Remove that line" in e.value.hint and ".done.json" not in e.value.hint


@pytest.mark.parametrize("facts", [{}, {"recipe": {}}, {"recipe": 5}, {"identity": None}], ids=str)
def test_a_damaged_run_json_is_told_when_the_run_is_looked_for(tmp_path: Path, facts: dict[str, Any]):
    run = fixture_run.write(tmp_path)
    write_json(run["run.json"], run.raw_facts | facts if "identity" in facts else facts)
    with pytest.raises(RunError, match=r"run\.json is damaged: (recipe|identity)"):
        find_run(str(tmp_path), tmp_path)


def test_the_folder_of_a_recipes_runs_means_the_newest_of_them(tmp_path: Path):
    run = fixture_run.write(tmp_path / "runs" / "quickstart" / "0123456789ab")
    assert find_run(str(tmp_path / "runs" / "quickstart"), tmp_path / "elsewhere").folder == run.folder
    with pytest.raises(DscError, match="neither a run folder"):
        find_run(str(tmp_path / "runs"), tmp_path / "elsewhere")


# -- where it is printed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fixture_run.write(tmp_path_factory.mktemp("finished"))


def dsc(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{sys.executable}" -m dsc_hub {line}'],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        encoding="latin-1",
        timeout=60,
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_where_a_sign_is_missing_another_stands_for_it(finished: Run, encoding: str):
    done = dsc(f"show {finished.folder}", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "-0.05 (" in done.stdout and "distilled - base" in done.stdout


def test_whoever_calls_a_verb_from_python_is_not_killed_by_a_broken_pipe_later(finished: Run):
    before = signal.getsignal(signal.SIGPIPE)
    for words in (["show"], ["check"], ["check", "--json"]):
        assert CliRunner().invoke(cli, [*words, str(finished.folder)]).exit_code in (0, 1)
    assert signal.getsignal(signal.SIGPIPE) == before == signal.SIG_IGN


def test_a_closed_output_and_a_reader_that_leaves_are_no_bugs(finished: Run):
    assert dsc(f"check {finished.folder} >&-").returncode == 1  # the claim doesn't hold, and that is all it means
    gone = dsc(f"check {finished.folder} --json | true")
    assert gone.returncode == 141 and "Traceback" not in gone.stderr


@pytest.mark.parametrize("columns", ["60", "80", "130"])
def test_no_number_and_no_name_is_cut_on_a_narrow_terminal(finished: Run, columns: str):
    for verb in ("show", "check", f"compare {fixture_run.write(finished.folder / 'other').folder}"):
        done = dsc(f"{verb} {finished.folder}", COLUMNS=columns, PYTHONIOENCODING="utf-8")
        assert done.stdout and "\N{HORIZONTAL ELLIPSIS}".encode().decode("latin-1") not in done.stdout


def test_a_run_whose_history_is_lost_gets_no_invented_one(tmp_path: Path, recipe_file: Path):
    context = resolve.resolve_recipe(str(recipe_file), [], tmp_path / "runs")
    context.run.finish("prompts", context.fingerprints["prompts"], 1.0, {})
    with pytest.raises(RunError, match=r"run\.json is missing, but these stages are finished: prompts"):
        record(context)
    assert not context.run["run.json"].exists()


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
READERS = {
    "rows": lambda file: list(JsonlFile(file)),
    "config.json of a model": lambda file: base_model.config_of(file.parent),
    "chat template": lambda file: chat_template.load_template(file.parent),
    "tokenizer_config.json": lambda file: base_model.has_chat_template(file.parent),
    "an object": read_object,
    "a table": lambda file: list(table_files.read_table(file)),
    "rows of the reference": import_reference.read_result_rows,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", [DEEP, "{", "\udcff", "[1]"])
def test_json_that_is_damaged_or_nested_too_deeply_is_an_error_that_names_the_file(
    tmp_path: Path, reader: str, text: str
):
    name = {"config.json of a model": "config.json", "rows": "chains.jsonl"}.get(reader, "tokenizer_config.json")
    (tmp_path / name).write_text(text, errors="surrogateescape")
    if reader == "rows" and not text.endswith("\n"):
        (tmp_path / name).write_text(text + "\n", errors="surrogateescape")
    with pytest.raises(DscError, match=name):
        READERS[reader](tmp_path / name)
