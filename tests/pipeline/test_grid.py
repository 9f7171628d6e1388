"""`dsc grid`, and what runs take from one another: every combination is a run, and nothing is asked for twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config import recipe_files
from dsc_hub.data import prompts
from dsc_hub.errors import ConfigError
from dsc_hub.pipeline import grid
from dsc_hub.records import Turn
from dsc_hub.runs.run import Run
from dsc_hub.sampling import sample
from dsc_hub.system.files import write_json
from tests.cli.test_cli import error
from tests.conftest import ScriptedModel, length_score


def written(folder: Path, text: str) -> Path:
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


def sampled(recipe_file: Path, folder: Path, *overrides: str, others: tuple[Run, ...] = (), **more: Any):
    r = recipe_files.load_recipe_file(recipe_file, overrides)
    some = [p for p in prompts.load_prompts(r.prompts, recipe_file.parent, r.seed)[0] if p.split == "train"]
    folder.mkdir()
    run, model = Run(folder), ScriptedModel()
    write_json(run["run.json"], {"recipe": r.model_dump(mode="json"), "identity": {"model": "m"}})
    known = sample.turns_of_others(run, others)
    tally = asyncio.run(sample.sample(run, r, some, model, length_score, known=known, **more))
    return run, model, tally


def test_combinations_are_all_of_them_in_order(tmp_path: Path):
    g = grid.read_grid(
        written(tmp_path, "{recipe: privacy, vary: {chain.steps: [1, 2], chain.acceptance: [improve, always]}}")
    )
    assert grid.combinations(g) == [
        {"chain.steps": 1, "chain.acceptance": "improve"},
        {"chain.steps": 1, "chain.acceptance": "always"},
        {"chain.steps": 2, "chain.acceptance": "improve"},
        {"chain.steps": 2, "chain.acceptance": "always"},
    ]


def test_chains_of_more_steps_begin_with_the_turns_of_those_with_fewer(recipe_file: Path, tmp_path: Path):
    one, first, _ = sampled(recipe_file, tmp_path / "one", "chain.steps=1")
    two, second, tally = sampled(recipe_file, tmp_path / "two", "chain.steps=2", others=(one,))
    alone, all_of_it, _ = sampled(recipe_file, tmp_path / "alone", "chain.steps=2")
    assert len(second.seeds) == len(all_of_it.seeds) - len(first.seeds) and tally.reused_turns == len(first.seeds)
    assert list(sample.read_chains(two)) == list(sample.read_chains(alone))
    assert len(list(two.rows("turns.jsonl"))) == len(all_of_it.seeds)


@pytest.mark.parametrize(
    ("override", "reused"),
    [
        ("chain.acceptance=always", "something"),
        ("chain.critique=Who is hurt?", "first answers"),
        ("generation.temperature=0.5", "nothing"),
        ("seed=7", "nothing"),
        ("serving.context=1024", "nothing"),
        ("chain.critic={model: other}", "nothing"),
    ],
)
def test_what_is_asked_otherwise_is_asked_anew(recipe_file: Path, tmp_path: Path, override: str, reused: str):
    one, first, _ = sampled(recipe_file, tmp_path / "one")
    other, second, tally = sampled(recipe_file, tmp_path / "two", override, others=(one,))
    chains = len(sample.read_chains(other))
    assert len(second.seeds) + tally.reused_turns == len(first.seeds)
    assert {"nothing": tally.reused_turns == 0, "first answers": tally.reused_turns == chains}.get(
        reused, tally.reused_turns > chains
    )


@pytest.mark.parametrize("damage", ['{"half": ', '{"prompt_id": 1}', "[]"])
@pytest.mark.parametrize("file", ["run.json", "turns.jsonl"])
def test_a_damaged_run_gives_nothing_and_stops_nobody(recipe_file: Path, tmp_path: Path, file: str, damage: str, capfd):
    one, first, _ = sampled(recipe_file, tmp_path / "one")
    one[file].write_text(f"{damage}\n" + (one[file].read_text() if file == "turns.jsonl" else ""))
    _, second, tally = sampled(recipe_file, tmp_path / "two", others=(one,))
    assert len(second.seeds) == len(first.seeds) and tally.reused_turns == 0
    assert "one can't be read" in capfd.readouterr().err


def test_a_critic_of_the_same_name_elsewhere_may_be_another_model(recipe_file: Path, tmp_path: Path):
    critic = "chain.critic={{model: m, endpoint: 'http://{}/v1'}}"
    one, first, _ = sampled(recipe_file, tmp_path / "one", critic.format("a"))
    _, second, tally = sampled(recipe_file, tmp_path / "two", critic.format("b"), others=(one,))
    assert len(second.seeds) == len(first.seeds) and tally.reused_turns == 0


def test_only_the_critiques_are_asked_of_the_critic(recipe_file: Path, tmp_path: Path):
    critic = ScriptedModel()
    run, model, _ = sampled(recipe_file, tmp_path / "one", "chain.steps=2", criticise=critic)
    turns = list(run.rows("turns.jsonl").as_type(Turn))
    assert sorted(critic.seeds) == sorted(t.seed for t in turns if t.role == "critique") and critic.seeds
    assert sorted(model.seeds) == sorted(t.seed for t in turns if t.role != "critique")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "expected a mapping"),
        ("{recipe: privacy}", "vary"),
        ("{recipe: privacy, vary: {}}", "vary"),
        ("{recipe: privacy, vary: {chain.steps: []}}", "one or more different values"),
        ("{recipe: privacy, vary: {chain.steps: [1, 1]}}", "one or more different values"),
        ("{recipe: privacy, vary: {chain.steps: 3}}", "vary"),
        ("{recipe: privacy, vary: {chain.steps: [1]}, last: publish}", "last"),
        ("{recipe: privacy, vary: {chain.steps: [1]}, more: 1}", "more"),
        ("{recipe: privacy, vary: {a.b: [" + ", ".join(map(str, range(300))) + "]}}", "300 combinations"),
        ("{recipe: [", "not valid YAML"),
        ("{name: x, model: {source: y}, prompts: {}}", "is a recipe, expected a grid file"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, told: str):
    with pytest.raises(ConfigError, match=told):
        grid.read_grid(written(tmp_path, text))
    with pytest.raises(ConfigError, match=r"no\.yaml can't be read"):
        grid.read_grid(tmp_path / "no.yaml")


def test_a_grid_runs_every_combination_and_shows_one_table(dsc, recipe_file: Path, server: str):
    text = f"""
recipe: recipe.yaml
fixed: {{serving.endpoints: [{server}], chain.chains_per_prompt: 2}}
vary:
  chain.steps: [1, 2]
  chain.acceptance: [improve, always]
last: dataset
"""
    file = written(recipe_file.parent, text)
    done = dsc("grid", str(file), "--json", code=0)
    rows = json.loads(done.stdout)
    assert [tuple(r["set"].values()) for r in rows] == [(1, "improve"), (1, "always"), (2, "improve"), (2, "always")]
    assert len({r["run"] for r in rows}) == 4 and all(r["error"] == "" and r["arms"] is None for r in rows)
    accepted = [r["sampling"]["accepted"] for r in rows]
    assert 0 < accepted[0] <= accepted[1] and accepted[2] <= accepted[3]
    # Only the first combination asks for first answers; a second step under `improve` goes on from what one step gave.
    chains = 2 * 14
    assert rows[0]["sampling"]["reused_turns"] == 0 and rows[1]["sampling"]["reused_turns"] == 3 * chains
    assert all(r["sampling"]["reused_turns"] >= 3 * chains for r in rows[2:])
    shown = dsc("grid", str(file), code=0, COLUMNS="200")
    assert "chain.acceptance" in shown.stdout and "4 combinations" in shown.stdout
    assert shown.stderr.count("sampling: done before") == 4


def test_cells_are_evaluated_on_validation_unless_the_grid_says_otherwise(tmp_path: Path, recipe_file: Path):
    def split(text: str) -> str:
        g = grid.read_grid(written(tmp_path, text))
        (cell,) = grid.combinations(g)
        return grid._describe_cell(str(recipe_file), g, cell, tmp_path / "runs", ()).recipe.evaluation.split

    assert split("{recipe: r, vary: {chain.steps: [1]}}") == "validation"
    assert split("{recipe: r, vary: {chain.steps: [1]}, fixed: {evaluation.split: test}}") == "test"
    assert split("{recipe: r, vary: {evaluation.split: [test]}}") == "test"
    with pytest.raises(ConfigError, match=r"no prompt in the split 'validation'(?s:.*)fixed: {evaluation.split: test}"):
        split("{recipe: r, vary: {prompts.split: [{train: 0.5, validation: 0, test: 0.5}]}}")


def test_values_of_any_kind_come_through(tmp_path: Path):
    texts = ['Say: "it\'s {answer}"\nand #1, [x]: y', "no", "1_000", "ä"]
    cell = {"chain.critique": texts[0], "chain.system": texts[1], "chain.veto": {"similarity": 0.3}, "seed": 3}
    loaded = recipe_files.load_recipe_file(
        recipe_files.find_recipe("privacy"), grid._overrides(cell | {"description": texts[2]})
    )
    assert (loaded.chain.critique, loaded.chain.system, loaded.description) == (texts[0], "no", "1_000")
    assert loaded.chain.veto.similarity == 0.3 and loaded.seed == 3


def test_a_wrong_combination_is_told_before_anything_runs(dsc, recipe_file: Path, server: str):
    file = written(
        recipe_file.parent,
        f"{{recipe: recipe.yaml, fixed: {{serving.endpoints: [{server}]}}, vary: {{chain.steps: [1, 0]}}}}",
    )
    told = error(dsc("grid", str(file)))
    assert "chain.steps=0" in told and not (dsc.work / "runs").exists()


def test_a_combination_that_can_not_be_finished_does_not_stop_the_others(dsc, recipe_file: Path, server: str):
    text = f"""
recipe: recipe.yaml
fixed: {{serving.endpoints: [{server}]}}
vary: {{dataset.min_reward: [0.99999, null]}}
last: dataset
"""
    done = dsc("grid", str(written(recipe_file.parent, text)), "--json", code=1)
    bad, good = json.loads(done.stdout)
    assert bad["error"] and bad["rows"] is None and bad["sampling"] and not good["error"] and good["rows"] > 0
    assert "taken over" in done.stderr  # the same chains for both
