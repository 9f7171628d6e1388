"""Rounds of sampling and training: which rounds are run, what each depends on, which one is kept. Nothing is trained here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config import recipe_files
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.inference.base_model import BaseModel
from dsc_hub.pipeline import rounds
from dsc_hub.pipeline.context import RunContext, record
from dsc_hub.report import cards, page
from dsc_hub.report.sentences import rounds_sentence
from dsc_hub.runs.metrics_schema import Rounds, schema_problems
from dsc_hub.runs.run import Run
from dsc_hub.system.hashing import file_hash
from tests import fixture_run

IDENTITY = dict.fromkeys(("prompts", "model", "reward", "second_scorer", "third_scorer", "chain.veto"), "x")


def context_of(recipe_file: Path, folder: Path, *overrides: str, name: str = "f") -> RunContext:
    recipe = recipe_files.load_recipe_file(recipe_file, ["publish.to=none", *overrides])
    fingerprints = stage_fingerprints(recipe, IDENTITY)
    run = Run(folder / recipe.name / name)
    run.folder.mkdir(parents=True)
    model = BaseModel("package:m", "m", "c", None)
    context = RunContext(recipe, recipe_file, run, folder, model, IDENTITY, fingerprints, "dsc run")
    record(context)
    return context


class Stages:
    """Stands for `run.run_stage`: writes what the stages of a round leave, with the validation reward that is given."""

    def __init__(self, rewards: list[float | None]) -> None:
        self.rewards, self.calls, self.contexts = rewards, [], {}

    def __call__(self, context: RunContext, stage: str) -> None:
        k = int(context.run.folder.name)
        self.contexts[k] = context
        if context.run.is_done(stage, context.fingerprints[stage]):
            return
        self.calls.append((k, stage))
        metrics, result = fixture_run.metrics(), {}
        for name in ("sampling", "dataset", "distill"):
            if stage == name:
                context.run.add_metrics(
                    name, metrics[name] | ({"validation_reward": self.rewards[k - 1]} if name == "distill" else {})
                )
        if stage == "prompts":
            context.run["prompts.jsonl"].write_text("")
        if stage == "sampling":
            for name in ("chains.jsonl", "turns.jsonl"):
                context.run[name].write_text(json.dumps({"round": k}) + "\n")
        if stage == "dataset":
            context.run["dataset/sft"].mkdir(parents=True, exist_ok=True)
        if stage == "distill":
            context.run["adapter"].mkdir(exist_ok=True)
            context.run["adapter/adapter_model.safetensors"].write_text(f"adapter {k}")
            result = {"adapter_sha256": file_hash(context.run["adapter/adapter_model.safetensors"])}
        context.run.finish(stage, context.fingerprints[stage], 1.0, {"result": result})


def run_all(recipe_file: Path, folder: Path, rewards: list[float | None]) -> tuple[RunContext, Stages, Rounds]:
    context = context_of(recipe_file, folder, f"rounds={len(rewards)}")
    stages = Stages(rewards)
    return context, stages, rounds.run_rounds(context, stages)


@pytest.mark.parametrize(
    ("rewards", "run", "kept"),
    [
        ([0.1, 0.3, 0.5], 3, 3),
        ([0.1, 0.3, 0.2, 0.9], 3, 2),  # round 3 did not rise: round 4 is not begun
        ([0.4, 0.4, 0.9], 2, 1),  # as good is not better
        ([0.4, -0.4], 2, 1),
    ],
)
def test_rounds_go_on_while_the_validation_reward_rises(recipe_file, tmp_path, rewards, run: int, kept: int):
    context, stages, found = run_all(recipe_file, tmp_path / "runs", rewards)
    assert (len(found.rounds), found.kept, found.planned) == (run, kept, len(rewards))
    assert [r.validation_reward for r in found.rounds] == rewards[:run]
    assert stages.calls == [(k, s) for k in range(1, run + 1) for s in rounds.STAGES]
    assert json.loads(context.run["chains.jsonl"].read_text()) == {"round": kept}  # the run has those of the best
    assert context.run.metrics["rounds"]["kept"] == kept
    assert rounds.copy_adapter(context.run)["adapter_sha256"] == file_hash(
        context.run["adapter/adapter_model.safetensors"]
    )
    assert context.run["adapter/adapter_model.safetensors"].read_text() == f"adapter {kept}"


def test_the_adapter_of_a_round_samples_the_next(recipe_file, tmp_path):
    _, stages, _ = run_all(recipe_file, tmp_path / "runs", [0.1, 0.2, 0.3])
    adapters = {k: c.adapter and c.adapter.parent.name for k, c in stages.contexts.items()}
    assert adapters == {1: None, 2: "1", 3: "2"}
    assert {c.recipe.rounds for c in stages.contexts.values()} == {1}
    assert {c.recipe.distill.validation_prompts for c in stages.contexts.values()} == {rounds.VALIDATION_PROMPTS}


def test_what_is_done_is_not_repeated(recipe_file, tmp_path):
    context, _, found = run_all(recipe_file, tmp_path / "runs", [0.1, 0.3, 0.2])
    again = Stages([0.1, 0.3, 0.2])
    assert rounds.run_rounds(context, again) == found and again.calls == []


def test_another_adapter_makes_the_next_round_another(recipe_file, tmp_path):
    context, stages, _ = run_all(recipe_file, tmp_path / "runs", [0.1, 0.3])
    first = context.run["rounds/1"]
    result = json.loads((first / "distill.done.json").read_text())
    result["result"]["adapter_sha256"] = "0" * 64
    (first / "distill.done.json").write_text(json.dumps(result))
    context.run["rounds/2/turns.jsonl"].write_text("of the adapter before")
    context.run["rounds/2/failed.jsonl"].write_text("of the adapter before")
    again = Stages([0.1, 0.3])
    rounds.run_rounds(context, again)
    assert again.calls == [(2, s) for s in rounds.STAGES]
    # Its rows would have passed for finished chains of the new one.
    assert not context.run["rounds/2/failed.jsonl"].exists()
    assert json.loads(context.run["rounds/2/turns.jsonl"].read_text()) == {"round": 2}


def test_the_first_round_is_a_run_without_rounds(recipe_file, tmp_path):
    """Its chains and its dataset can be taken over from such a run, and the other way round."""
    _, stages, _ = run_all(recipe_file, tmp_path / "runs", [0.1, 0.3])
    plain = context_of(recipe_file, tmp_path / "plain").fingerprints
    one, two = (stages.contexts[k].fingerprints for k in (1, 2))
    assert [one[s] == plain[s] for s in rounds.STAGES] == [True, True, True, False]  # it measures what plain does not
    assert one["prompts"] == two["prompts"] and not {one[s] for s in rounds.STAGES[1:]} & set(two.values())


def test_a_run_with_rounds_depends_on_how_it_trains_from_its_sampling_on(recipe_file, tmp_path):
    def sampling(*overrides: str) -> str:
        return stage_fingerprints(recipe_files.load_recipe_file(recipe_file, list(overrides)), IDENTITY)["sampling"]

    assert sampling() == sampling("rounds=1") == sampling("distill.sft.max_steps=7")
    assert (
        len({sampling("rounds=2"), sampling("rounds=3"), sampling(), sampling("rounds=2", "dataset.min_reward=0.3")})
        == 4
    )
    assert sampling("rounds=2") != sampling("rounds=2", "distill.sft.max_steps=7")
    assert sampling("rounds=2") == sampling("rounds=2", "distill.report_to=trackio")


def test_only_turns_of_the_base_are_taken_over_by_other_runs(recipe_file, tmp_path):
    """The rows of a run with rounds are those of the round that it kept, which an adapter may have generated."""
    context, _, found = run_all(recipe_file, tmp_path / "runs", [0.1, 0.3])
    assert found.kept == 2
    plain = context_of(recipe_file, tmp_path / "runs", name="plain")
    others = rounds.sampled_by_the_base(plain)
    assert [r.folder for r in others if r.folder != plain.run.folder] == [context.run["rounds/1"]]


def test_a_temperature_that_may_choose_is_in_the_fingerprint(recipe_file):
    def prints(*overrides: str) -> dict[str, str]:
        return stage_fingerprints(recipe_files.load_recipe_file(recipe_file, list(overrides)), IDENTITY)

    cold = "evaluation.temperature=0.1"
    assert prints()["distill"] == prints(cold)["distill"]
    answered = "distill.validation_prompts=4"
    assert prints(answered)["distill"] != prints(answered, cold)["distill"]
    assert prints("rounds=2")["sampling"] != prints("rounds=2", cold)["sampling"]


def test_failed_chains_of_rounds_are_not_retried(recipe_file, dsc):
    refused = dsc("sample", str(recipe_file), "rounds=2", "--retry-failed", code=2)
    assert "later rounds depend on" in refused.stderr


def test_rounds_that_can_not_be_compared_are_an_error(recipe_file, tmp_path):
    with pytest.raises(RunError, match="no answer to a validation prompt of round 1 was scored"):
        run_all(recipe_file, tmp_path / "runs", [None, 0.3])


def test_an_adapter_that_was_changed_since_is_not_taken(recipe_file, tmp_path):
    context, _, found = run_all(recipe_file, tmp_path / "runs", [0.1, 0.3])
    context.run[f"rounds/{found.kept}/adapter/adapter_model.safetensors"].write_text("tampered")
    with pytest.raises(RunError, match="hash has changed"):
        rounds.copy_adapter(context.run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serving.endpoints=[http://127.0.0.1:1/v1]", "don't have the adapters of earlier rounds"),
        ("prompts.split={train: 0.8, validation: 0, test: 0.2}", "need validation prompts"),
        ("reward={metric: mine.py}", "shipped metrics only"),
    ],
)
def test_recipes_that_can_not_go_in_rounds_are_refused(recipe_file, override: str, message: str):
    recipe_files.load_recipe_file(recipe_file, [override])
    with pytest.raises(ConfigError, match=message):
        recipe_files.load_recipe_file(recipe_file, [override, "rounds=2"])


def test_shards_and_launchers_of_several_processes_do_not_go_with_rounds(recipe_file, dsc):
    refused = dsc("sample", str(recipe_file), "rounds=2", "--shard", "1/2", code=2)
    assert "each round samples and trains" in refused.stderr
    launched = dsc("plan", str(recipe_file), "rounds=2", code=2, RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert "distill.launch" in launched.stderr


def metrics_with_rounds() -> dict[str, Any]:
    metrics = fixture_run.metrics()
    estimate = metrics["sampling"]["first_reward"]
    each = [
        {
            "first_reward": estimate,
            "final_reward": estimate,
            "rows": 70 + k,
            "validation_reward": v,
            "seconds": 60.0,
            "round": k,
        }
        for k, v in ((1, 0.41234), (2, 0.25))
    ]
    return metrics | {"rounds": {"planned": 3, "kept": 1, "rounds": each}}


def test_the_whole_story_is_on_cards_and_page(tmp_path):
    run = fixture_run.write(tmp_path / "run", run_metrics=metrics_with_rounds())
    assert schema_problems(run.metrics) == []
    run.finish("evaluation", "f", 1.0, {})
    cards.build_cards(run)
    page.build_page(run)
    sentence = rounds_sentence(Rounds.model_validate(run.metrics["rounds"]))
    assert "round 1 of 2 is kept; round 2 did not raise the validation reward" in sentence
    for text in (
        (run["cards"] / "adapter" / "README.md").read_text(),
        (run["cards"] / "dataset" / "README.md").read_text(),
        run["report.html"].read_text(),
    ):
        assert sentence in text and "0.412" in text and "the adapter of round 1" in text


def left(context: RunContext) -> list[int]:
    return rounds.chains_left(context, 40)


def test_the_plan_counts_what_is_left_of_the_rounds(recipe_file: Path, tmp_path: Path):
    """Of finished rounds nothing, of one that goes on its unfinished chains, of later ones all."""
    context = context_of(recipe_file, tmp_path / "runs", "rounds=3")
    assert left(context) == [40, 40, 40]
    stages = Stages([0.1, 0.3, 0.5])

    class Stopped(Exception):
        pass

    def until(last: tuple[int, str]):
        def run_stage(here: RunContext, stage: str) -> None:
            if (int(here.run.folder.name), stage) == last:
                raise Stopped
            stages(here, stage)

        with pytest.raises(Stopped):
            rounds.run_rounds(context, run_stage)

    until((1, "sampling"))
    assert left(context) == [40, 40, 40]
    first = context.run["rounds/1"]
    (first / "turns.jsonl").write_text("{}\n")
    (first / "chains.jsonl").write_text("{}\n" * 13 + "{torn")
    assert left(context) == [27, 40, 40]
    until((1, "distill"))
    assert left(context) == [40, 40]
    until((2, "sampling"))
    assert left(context) == [40, 40]
    until((3, "sampling"))
    assert left(context) == [40]
    rounds.run_rounds(context, stages)
    assert left(context) == []


def test_rounds_that_no_longer_rise_have_nothing_left(recipe_file: Path, tmp_path: Path):
    context, _, _ = run_all(recipe_file, tmp_path / "runs", [0.4, 0.3, 0.9])
    assert left(context) == []


def test_chains_of_another_run_are_not_left_to_sample(recipe_file: Path, tmp_path: Path):
    folder = tmp_path / "runs"
    plain = context_of(recipe_file, folder, name="plain")
    assert left(plain) == [40]
    (plain.run["turns.jsonl"]).write_text("{}\n")
    (plain.run["chains.jsonl"]).write_text("{}\n" * 5)
    assert left(plain) == [35]
    several = context_of(recipe_file, folder, "rounds=2", name="rounds")
    assert left(several) == [35, 40]  # round 1 goes on from the rows of the other run
    for stage in rounds.STAGES[:2]:
        Stages([0.1])(replace(plain, run=Run(rename(plain.run.folder, "1"))), stage)
        rename(plain.run.folder.parent / "1", "plain")
    assert left(several) == [40] and left(plain) == []


def rename(folder: Path, name: str) -> Path:
    return folder.rename(folder.parent / name)
