"""Every command in the documentation runs: here as it stands, in another test, or not at all for a stated reason.

Here means: in a folder with the recipe of "Your own task", a finished run and a scripted server, in the order below. Words
of the documentation that stand for something of the reader's are replaced; what a recipe would ask of vLLM is asked of the
scripted server.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests import fixture_run
from tests.conftest import ROOT
from tests.docs.test_docs import DOCS, blocks, commands

SERVED = "'serving.endpoints=[{server}]'"
LITTLE = "evaluation.arms=[base] prompts.limit=12"
# Documented command -> what is run, and in brackets the exit codes that are fine.
HERE = {
    "dsc recipes copy quickstart mine": "dsc recipes copy quickstart films",
    "dsc plan mine": "dsc plan mine/recipe.yaml",
    "dsc plan mine/recipe.yaml": "dsc plan mine/recipe.yaml",
    "dsc try mine -n 8": f"dsc try mine/recipe.yaml -n 8 {SERVED}",
    "dsc try mine/recipe.yaml -n 8": f"dsc try mine/recipe.yaml -n 8 {SERVED}",
    "dsc sample RECIPE --shard 1/2": f"dsc sample mine --shard 1/2 {SERVED} {LITTLE}",
    "dsc sample RECIPE --shard 2/2": f"dsc sample mine --shard 2/2 {SERVED} {LITTLE}",
    "dsc merge recipe.yaml": f"dsc merge mine {SERVED} {LITTLE}",
    "dsc sample RECIPE 'serving.endpoints=[http://FIRST:8000/v1]'": f"dsc sample mine {SERVED} {LITTLE} seed=1",
    "dsc runs": "dsc runs",
    "dsc watch mine": "dsc watch kind-reviews",
    "dsc report kind-reviews --open": "dsc report kind-reviews --open",
    "dsc show RUN": "dsc show runs/quickstart/0a1b2c3d4e5f",
    "dsc check RUN": "dsc check runs/quickstart/0a1b2c3d4e5f [0, 1]",
    "dsc check kind-reviews": "dsc check runs/quickstart/0a1b2c3d4e5f [0, 1]",
    "dsc compare RUN_A RUN_B": "dsc compare runs/quickstart/0a1b2c3d4e5f runs/quickstart/1a1b2c3d4e5f",
    "dsc runs remove runs/RECIPE/FINGERPRINT": "dsc runs remove --yes runs/quickstart/1a1b2c3d4e5f",
    "dsc score brevity.py texts.txt": "dsc score brevity.py texts.txt",
    "dsc score privacy texts.txt --scorer spacy model=fr_core_news_sm": (
        "dsc score privacy texts.txt --scorer spacy model=fr_core_news_sm"
    ),
    "dsc plan RECIPE 'serving.endpoints=[https://api.example.com/v1]' serving.served_model=NAME": (
        f"dsc plan mine {SERVED} 'serving.price={{{{input: 0.5, output: 1.5}}}}' evaluation.arms=[base]"
    ),
}
WHOLE, STUDENT, CLI = "tests/e2e/test_whole.py::", "tests/e2e/test_student.py::", "tests/cli/test_cli.py::"
OFFLINE = "tests/hub/test_offline.py::test_what_was_fetched_is_planned_sampled_and_scored_without_a_network"
SHARDS = "tests/runs/test_shards.py::test_shards_from_other_machines_are_named_by_their_folders"
VERBS = "tests/publish/test_pull_and_verify.py::test_the_verbs"
# Documented command -> the test that runs it.
ELSEWHERE = {
    "dsc run mine": WHOLE + "test_every_stage_left_its_marker_and_its_numbers",
    "dsc run mine/recipe.yaml": WHOLE + "test_every_stage_left_its_marker_and_its_numbers",
    "dsc run recipe.yaml": WHOLE + "test_every_stage_left_its_marker_and_its_numbers",
    "dsc run RECIPE": WHOLE + "test_every_stage_left_its_marker_and_its_numbers",
    "dsc run RECIPE publish.to=local": WHOLE + "test_the_closing_screen_has_table_times_addresses_and_the_report",
    "dsc run RECIPE 'serving.endpoints=[http://127.0.0.1:8000/v1]'": STUDENT
    + "test_servers_without_the_adapter_write_the_chains_and_ours_answers_for_both_sides",
    "dsc run RECIPE 'generation.extra={top_k: 20, chat_template_kwargs: {enable_thinking: false}}'": (
        "tests/inference/test_replicas.py::test_further_parameters_are_sent_as_they_are_and_ours_are_not_to_be_set"
    ),
    "dsc plan RECIPE 'serving.endpoints=[https://api.example.com/v1]'": STUDENT
    + "test_a_model_behind_an_api_teaches_a_small_one",
    "dsc run RECIPE 'serving.endpoints=[https://api.example.com/v1]' serving.concurrency=16": STUDENT
    + "test_a_model_behind_an_api_teaches_a_small_one",
    "dsc fetch RECIPE": OFFLINE,
    "dsc fetch recipe.yaml": OFFLINE,
    "dsc merge RECIPE FOLDER...": SHARDS,
    "dsc merge hub:USER/REPO FOLDER...": SHARDS,
    "dsc hub serve": WHOLE + "test_others_pull_what_was_published_with_the_public_clients_and_the_model_answers",
    "dsc pull   USER/REPO[@REV]": VERBS,
    "dsc verify USER/REPO[@REV]": WHOLE + "test_what_was_published_agrees_with_itself",
    "dsc run    hub:USER/REPO[@REV]": WHOLE + "test_the_recipe_in_the_dataset_repo_can_be_planned_from_the_hub",
    "dsc recipes adopt FOLDER": "tests/config/test_origin.py::test_what_was_adopted_is_one_s_own_and_what_comes_after_it_is_not",
    "dsc evaluate RECIPE --adapter hub:USER/REPO@REV": WHOLE
    + "test_somebody_else_scores_the_adapter_from_the_hub_and_finds_the_same",
    "dsc run RECIPE --allow-code USER/brevity@COMMIT": "tests/publish/test_metric_space.py"
    "::test_ones_own_metric_is_published_and_runs_elsewhere_only_where_it_is_allowed",
    "dsc score judge texts.jsonl": "tests/metrics/test_judge.py::test_the_judge_in_the_documentation_works",
    "dsc grid grid.yaml --page grid.html": "tests/pipeline/test_grid.py"
    "::test_a_grid_runs_every_combination_and_shows_one_table",
    "dsc grid GRID.yaml": "tests/pipeline/test_grid.py::test_a_grid_runs_every_combination_and_shows_one_table",
    "dsc compare RUN RUN RUN": "tests/evaluation/test_compare.py"
    "::test_the_spread_between_trainings_is_over_runs_that_differ_in_their_seed_only",
}
# Documented command -> why nothing runs it.
NOT_RUN = {"dsc run RECIPE distill.processes=4": "four GPUs; two processes train in tests/distill/test_divided.py"}


def bare(line: str) -> str:
    """A documented command without its comment."""
    return re.split(r"\s#\s|\s{2,}#", line)[0].split(" && ")[0].strip()


def key_of(line: str) -> str:
    """The entry of the tables that a documented command belongs to: the longest one that it begins with."""
    fitting = [key for key in (*HERE, *ELSEWHERE, *NOT_RUN) if bare(line) == key or bare(line).startswith(key + " ")]
    assert fitting, f"no entry says how `{bare(line)}` is run"
    return max(fitting, key=len)


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_each_documented_command_is_run_or_says_why_not(page: str, line: str):
    key = key_of(line)
    if test := ELSEWHERE.get(key):
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or f"def {name}(" in (ROOT / file).read_text(), test


def test_no_entry_is_of_a_command_that_has_left_the_documentation():
    assert {key_of(line) for _, line in commands()} == {*HERE, *ELSEWHERE, *NOT_RUN}


@pytest.fixture
def desk(dsc, server: str) -> Path:
    """A folder as the reader has it: their recipe and prompts, a metric, texts, two finished runs."""
    work: Path = dsc.work
    recipe, _ = blocks(DOCS / "howto" / "own-task.md", "yaml")
    (table,) = (b for b in blocks(DOCS / "howto" / "own-task.md", "text") if b.startswith("prompt,product"))
    (work / "mine").mkdir()
    (work / "mine" / "recipe.yaml").write_text(recipe)
    more = [f"Write a short review of the product number {n}.,product {n}" for n in range(40)]
    (work / "mine" / "prompts.csv").write_text(table + "\n".join(more) + "\n")
    (metric,) = (b for b in blocks(DOCS / "howto" / "own-metric.md", "python") if "Measurement" in b)
    (work / "brevity.py").write_text(metric)
    (work / "texts.txt").write_text("Short.\nA longer text than that one.\n")
    for name in ("0a1b2c3d4e5f", "1a1b2c3d4e5f"):
        fixture_run.write(work / "runs" / "quickstart" / name)
    return work


@pytest.mark.timeout(900)
def test_the_commands_of_the_documentation_run_one_after_the_other(dsc, desk: Path, server: str, tmp_path: Path):
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\nexit 0\n")
    browser.chmod(0o755)
    for line in dict.fromkeys(HERE.values()):
        words, codes = re.sub(r" \[([\d, ]+)\]$", "", line), re.search(r" \[([\d, ]+)\]$", line)
        fine = [int(n) for n in codes[1].split(",")] if codes else [0]
        done = dsc(*shlex.split(words.format(server=server))[1:], BROWSER=str(browser))
        assert done.returncode in fine, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
    assert (desk / "films" / "recipe.yaml").is_file() and not (desk / "runs" / "quickstart" / "1a1b2c3d4e5f").exists()
