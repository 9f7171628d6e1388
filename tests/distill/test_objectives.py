"""What training minimises: weighted likelihood, preference pairs, desirable and undesirable answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsc_hub.config import recipe_files
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.recipe import chain_seed, training_seed
from dsc_hub.config.training import DistillConfig
from dsc_hub.distill import checkpoints
from dsc_hub.distill import train as distill_train
from dsc_hub.distill.config import check_section
from dsc_hub.distill.rehearsal import rehearse
from dsc_hub.distill.rows import training_rows, unpaired
from dsc_hub.distill.trainers import effective_rows, row_weights
from dsc_hub.errors import ConfigError, DataError
from dsc_hub.runs.run import Run
from tests.distill.test_checkpoints import losses, start, wait_for_step
from tests.distill.tiny import make_run, pair, row

ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 1e-3}
LONGER = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
}


def pairs_run(folder: Path, base: Path, objective: str, pairs: int = 12, **settings: object) -> Run:
    return make_run(
        folder,
        base,
        rows=[pair(n) for n in range(pairs)],
        validation=[pair(n) for n in range(20, 24)],
        config="preference",
        method="lora",
        objective=objective,
        **{objective: LONGER | settings},
    )


def log(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run["adapter"] / "training_log.jsonl").read_text().splitlines()]


# -- weights of rows


def test_weights_are_the_exponential_of_the_reward_with_mean_one():
    assert row_weights([0.0, 1.0], temperature=1.0) == pytest.approx([2 / (1 + math.e), 2 * math.e / (1 + math.e)])
    assert row_weights([5.0, 5.0, 5.0], temperature=0.1) == pytest.approx([1, 1, 1])
    huge = row_weights([1e6, 0.0], temperature=0.01)  # no overflow
    assert huge == pytest.approx([2, 0])
    assert sum(row_weights([-3, 0.2, 7.5], 0.7)) == pytest.approx(3)


def test_effective_rows_lie_between_one_and_all():
    assert effective_rows([1.0] * 8) == pytest.approx(8)
    assert effective_rows([8.0, 0, 0, 0, 0, 0, 0, 0]) == pytest.approx(1)


def test_the_loss_of_a_step_is_the_weighted_sum_over_its_tokens(tmp_path: Path, base: Path):
    """Calculated by hand from each row's own likelihood under the base: the first step starts there."""
    rows = [row(n) | {"reward": n / 6} for n in range(6)]
    run = make_run(tmp_path / "run", base, rows=rows, method="lora", sft=ONE_STEP, weight_temperature=0.5)
    plain = make_run(tmp_path / "plain", base, rows=rows, method="lora", sft=ONE_STEP)
    training, unweighted = distill_train.train(run), distill_train.train(plain)

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).float()
    sums, tokens = [], 0
    for r in rows:
        prompt = tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(r["prompt"] + r["completion"], return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nats = -logits[range(len(ids) - 1), ids[1:]][len(prompt) - 1 :]
        sums.append(float(nats.sum()))
        tokens += len(nats)
    weights = row_weights([r["reward"] for r in rows], 0.5)
    expected = sum(w * s for w, s in zip(weights, sums, strict=True)) / tokens
    assert training.first_loss == pytest.approx(expected, rel=2e-3)
    assert unweighted.first_loss == pytest.approx(sum(sums) / tokens, rel=2e-3)
    assert abs(expected - sum(sums) / tokens) > 0.01 * expected  # the two can be told apart
    assert training.weight_temperature == 0.5
    assert training.effective_rows == pytest.approx(effective_rows(weights), abs=0.05)
    assert (unweighted.weight_temperature, unweighted.effective_rows) == (None, None)


def test_alike_rewards_train_as_without_weights(tmp_path: Path, base: Path):
    sft = {"num_train_epochs": 2, "learning_rate": 0.01}
    validation = [row(n) for n in range(20, 23)]
    runs = [
        make_run(tmp_path / str(t), base, validation=validation, sft=sft, weight_temperature=t) for t in (None, 0.3)
    ]
    first, second = (distill_train.train(run) for run in runs)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert first.validation_loss == pytest.approx(second.validation_loss, rel=1e-4)


def test_a_row_without_a_reward_can_not_be_weighted(tmp_path: Path, base: Path):
    rows = [row(n) | {"reward": None if n == 3 else 0.5} for n in range(6)]
    with pytest.raises(DataError, match="has no reward"):
        distill_train.train(make_run(tmp_path / "run", base, rows=rows, weight_temperature=0.5))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"objective": "dpo", "weight_temperature": 1}, "objective sft only"),
        ({"objective": "dpo", "dpo": {"output_dir": "/tmp"}}, "dpo.output_dir is set by dsc itself"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig.model_validate(section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weight_temperature": 1, "sft": {"packing": True}}, "packed batch"),
        ({"weight_temperature": 1, "sft": {"loss_type": "dft"}}, "plain loss"),
        ({"objective": "kto", "kto": {"per_device_train_batch_size": 1}}, "at least 2"),
        ({"objective": "dpo", "dpo": {"betta": 0.2}}, "distill.dpo.betta: unknown key; did you mean 'beta'?"),
        ({"objective": "sft", "dpo": {"betta": 0.2}}, "distill.dpo.betta: unknown key"),
        ({"objective": "dpo", "dpo": {"beta": -0.1}}, "distill.dpo.beta: must be above 0, got -0.1"),
        ({"objective": "kto", "kto": {"beta": 0}}, "distill.kto.beta: must be above 0, got 0"),
        ({"objective": "dpo", "dpo": {"loss_type": 3}}, "distill.dpo.loss_type: should be a valid list"),
        ({"objective": "dpo", "dpo": {"beta": "much"}}, "distill.dpo.beta: should be a valid number"),
    ],
)
def test_settings_that_would_not_train_are_refused(section, message):
    with pytest.raises(ConfigError) as error:
        check_section(DistillConfig.model_validate(section))
    assert message in str(error.value)


# -- preference pairs


def test_dpo_prefers_what_the_reward_preferred(tmp_path: Path, base: Path):
    run = pairs_run(tmp_path / "run", base, "dpo")
    training = distill_train.train(run)
    assert training.first_loss == pytest.approx(math.log(2), rel=1e-3)  # before a step, adapter and base agree
    assert training.validation_loss < 0.5 * math.log(2)
    assert (training.objective, training.rows, training.preference_accuracy) == ("dpo", 12, 1.0)
    margins = [e["rewards/margins"] for e in log(run) if "rewards/margins" in e]
    assert margins[0] == pytest.approx(0, abs=1e-3) and margins[-1] > 0.5


def test_kto_raises_desirable_and_lowers_undesirable_answers(tmp_path: Path, base: Path):
    run = pairs_run(tmp_path / "run", base, "kto")
    training = distill_train.train(run)
    assert (training.objective, training.rows) == ("kto", 24)
    # A batch of one kind has no mean of the other.
    last = [e for e in log(run) if {"rewards/chosen", "rewards/rejected"} <= e.keys()][-1]
    assert last["rewards/chosen"] > 0 > last["rewards/rejected"]
    assert training.validation_loss < training.first_loss


def test_kto_rows_are_mixed_in_a_fixed_order():
    rows = unpaired([pair(n) for n in range(40)], seed=3)
    assert len(rows) == 80 and sum(r["label"] for r in rows) == 40
    assert all(
        r["completion"] == pair(0)["rejected"] if not r["label"] else "warm" in str(r["completion"]) for r in rows
    )
    first_half = sum(r["label"] for r in rows[:40])
    assert 10 < first_half < 30  # trl's own unpairing has all desirable ones first
    assert rows == unpaired([pair(n) for n in range(40)], seed=3) != unpaired([pair(n) for n in range(40)], seed=4)


def test_without_pairs_there_is_nothing_to_prefer(tmp_path: Path, base: Path):
    with pytest.raises(DataError, match="no training row in the dataset's config `preference`"):
        distill_train.train(make_run(tmp_path / "run", base, objective="dpo"))


def test_test_rows_among_the_pairs_are_refused(tmp_path: Path, base: Path):
    run = pairs_run(tmp_path / "run", base, "dpo")
    pq.write_table(pa.Table.from_pylist([pair(1)]), run["dataset"] / "preference" / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="test rows in the training folder"):
        training_rows(run, run.facts.recipe)


@pytest.mark.long
def test_a_killed_dpo_training_goes_on(tmp_path: Path, base: Path):
    whole, killed = (pairs_run(tmp_path / name, base, "dpo", max_steps=8) for name in ("whole", "killed"))
    distill_train.train(whole)
    child = start(killed)
    wait_for_step(killed, 3, child)
    child.kill()
    child.wait()
    distill_train.train(killed)
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-3) and len(losses(killed)) == 8
    assert not killed[checkpoints.CHECKPOINTS].exists()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_what_trains_passes_the_rehearsal_and_what_does_not_is_refused(recipe_file: Path, base: Path, objective: str):
    recipe = recipe_files.load_recipe_file(recipe_file, [f"distill.objective={objective}"])
    rehearse(recipe, base, has_validation=True)
    refused = recipe_files.load_recipe_file(
        recipe_file, [f"distill.objective={objective}", f"distill.{objective}.loss_type=nothing"]
    )
    with pytest.raises(ConfigError, match="training would fail with these settings"):
        rehearse(refused, base, has_validation=True)


# -- seeds and fingerprints


def fingerprints(recipe_file: Path, *overrides: str) -> dict[str, str]:
    recipe = recipe_files.load_recipe_file(recipe_file, list(overrides))
    identity = dict.fromkeys(("prompts", "model", "reward", "second_scorer", "third_scorer", "chain.veto"), "x")
    return stage_fingerprints(recipe, identity)


def first_changed(recipe_file: Path, *overrides: str) -> str | None:
    before, after = fingerprints(recipe_file), fingerprints(recipe_file, *overrides)
    return next((stage for stage in before if before[stage] != after[stage]), None)


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("distill.seed=3", "distill"),
        ("chain.seed=3", "sampling"),
        ("distill.objective=dpo", "distill"),
        ("distill.weight_temperature=0.3", "distill"),
        ("distill.dpo={beta: 0.3}", None),
        ("distill.report_to=tensorboard", None),
        ("distill.patience=3", "distill"),
    ],
)
def test_a_setting_changes_the_stage_that_it_is_for(recipe_file: Path, override: str, stage: str | None):
    assert first_changed(recipe_file, override) == stage


def test_seeds_of_their_own_default_to_the_recipe_s(recipe_file: Path):
    plain = recipe_files.load_recipe_file(recipe_file, ["seed=11"])
    own = recipe_files.load_recipe_file(recipe_file, ["seed=11", "distill.seed=0", "chain.seed=5"])
    assert (training_seed(plain), chain_seed(plain)) == (11, 11)
    assert (training_seed(own), chain_seed(own)) == (0, 5)


def test_another_training_seed_gives_another_adapter(tmp_path: Path, base: Path):
    runs = [make_run(tmp_path / str(seed), base, sft=ONE_STEP, seed=seed) for seed in (None, 7, 8)]
    for run in runs:
        distill_train.train(run)
    weights = [(run["adapter"] / "adapter_model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] != weights[2]  # the recipe's own seed is 7
