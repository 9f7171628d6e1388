"""Validation while training: rewards of answers, the best adapter, early stopping, trackers."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trackio.sqlite_storage import SQLiteStorage
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from dsc_hub.config import recipe_files
from dsc_hub.config.training import DistillConfig
from dsc_hub.distill import checkpoints, launcher, validation
from dsc_hub.distill import train as distill_train
from dsc_hub.distill.config import check_section, plan_of
from dsc_hub.distill.model import load_base
from dsc_hub.distill.rehearsal import rehearse
from dsc_hub.errors import ConfigError, MetricError
from dsc_hub.records import Prompt
from dsc_hub.runs.run import Run
from tests.distill.test_checkpoints import losses, start, wait_for_step
from tests.distill.tiny import make_run, row

# So high a learning rate that the validation loss falls at first and rises in the end.
TOO_FAST = {
    "max_steps": 16,
    "eval_steps": 2,
    "eval_strategy": "steps",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
}
OTHER = "Dull beyond words, and two hours too long."


def run_of(folder: Path, base: Path, more_sft: dict[str, object] | None = None, **section: object) -> Run:
    rows, held_out = [row(n) for n in range(16)], [row(n, OTHER) for n in range(20, 24)]
    sft = TOO_FAST | (more_sft or {})
    run = make_run(folder, base, rows=rows, validation=held_out, method="lora", sft=sft, **section)
    prompts = run.rows("prompts.jsonl")
    for n in range(6):
        split = "validation" if n < 4 else "train"
        prompts.append(Prompt(id=f"{n:016x}", text=f"Review film number {n}.", group=f"film {n}", split=split))
    prompts.close()
    return run


def evaluations(run: Run, key: str = "eval_loss") -> dict[int, float]:
    """Return the first value of a metric at each step: the last validation is made again for the kept adapter."""
    out: dict[int, float] = {}
    for entry in map(json.loads, (run["adapter"] / "training_log.jsonl").read_text().splitlines()):
        if key in entry:
            out.setdefault(entry["step"], entry[key])
    return out


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, base: Path):
    run = run_of(tmp_path_factory.mktemp("kept") / "run", base, {"load_best_model_at_end": True})
    return run, distill_train.train(run)


def test_the_adapter_of_the_best_validation_is_kept(kept, base: Path, tmp_path: Path):
    run, training = kept
    by_step = evaluations(run)
    best = min(by_step, key=by_step.get)
    assert best < max(by_step), "the last one is the best: nothing to tell apart"
    assert (training.best_step, training.validation_loss) == (best, pytest.approx(by_step[best], rel=1e-4))
    # It is the adapter that a training up to that step writes.
    shorter = run_of(tmp_path / "shorter", base, {"max_steps": best})
    distill_train.train(shorter)
    weights, expected = (load_file(r["adapter"] / "adapter_model.safetensors") for r in (run, shorter))
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name])


def test_without_it_the_last_adapter_is_kept(tmp_path: Path, base: Path, kept):
    run = run_of(tmp_path / "run", base)
    training = distill_train.train(run)
    assert training.best_step is None
    assert training.validation_loss > kept[1].validation_loss
    assert evaluations(run) == pytest.approx(evaluations(kept[0]))


def test_a_training_that_gets_no_better_ends(tmp_path: Path, base: Path, kept):
    run = run_of(tmp_path / "run", base, patience=2)
    training = distill_train.train(run)
    assert training.best_step == kept[1].best_step
    assert training.steps == training.best_step + 2 * TOO_FAST["eval_steps"] < TOO_FAST["max_steps"]


def test_killed_after_the_best_step_it_goes_on_and_keeps_the_same(tmp_path: Path, base: Path, kept):
    run = run_of(tmp_path / "run", base, {"load_best_model_at_end": True})
    child = start(run)
    wait_for_step(run, kept[1].best_step + 2, child)
    child.kill()
    child.wait()
    (run[checkpoints.CHECKPOINTS] / validation.BEST).write_bytes(b"of another training")
    training = distill_train.train(run)
    assert losses(run) == pytest.approx(losses(kept[0]), rel=1e-3)
    assert training.best_step == kept[1].best_step
    weights, expected = (load_file(r["adapter"] / "adapter_model.safetensors") for r in (run, kept[0]))
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-4)


EACH_EPOCH = {"eval_strategy": "epoch", "eval_steps": None, "num_train_epochs": 3, "max_steps": -1}


@pytest.mark.parametrize("ending", [pytest.param("told", marks=pytest.mark.long), "killed"])
def test_the_validation_of_an_epoch_at_whose_end_a_training_stops_is_not_lost(
    tmp_path: Path, base: Path, monkeypatch, ending: str
):
    """Told to end, it leaves the validation out, which may take long; killed, it has saved after the validation."""
    sft = EACH_EPOCH | {"load_best_model_at_end": True}
    # Without dropout: a validation draws a number from the generator that dropout draws from.
    lora = {"lora_dropout": 0.0}
    whole, stopped = (run_of(tmp_path / name, base, sft, lora=lora) for name in ("whole", "stopped"))
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    expected = distill_train.train(whole)
    assert sorted(evaluations(whole)) == [8, 16, 24]

    class Stops(checkpoints.Checkpoints):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == 16 and ending == "told":
                self.ending.set()
            super().on_step_end(args, state, control, **more)

        def on_epoch_begin(self, args, state, control, **more):
            if state.global_step == 16 and ending == "killed":
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "Checkpoints", Stops)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            distill_train.train(stopped)
    assert not stopped["adapter"].exists()
    training = distill_train.train(stopped)
    assert evaluations(stopped) == pytest.approx(evaluations(whole), rel=1e-3)
    assert (training.best_step, training.steps) == (expected.best_step, 24)


def test_a_best_adapter_that_lies_in_a_checkpoint_s_folder_already_is_replaced(tmp_path: Path, base: Path, monkeypatch):
    run = run_of(tmp_path / "run", base, {"load_best_model_at_end": True, "max_steps": 6})
    left = run[checkpoints.CHECKPOINTS] / "checkpoint-4"
    left.mkdir(parents=True)
    (left / validation.BEST).write_bytes(b"of a process that was killed")
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    assert distill_train.train(run).steps == 6


def test_a_value_that_is_no_number_is_never_the_best(tmp_path: Path):
    callback = validation.BestAdapter(tmp_path / "checkpoints", "reward", patience=1)
    state, control, model = TrainerState(global_step=5), TrainerControl(), torch.nn.Linear(2, 2)
    for metrics in ({"eval_reward": float("nan")}, {"eval_loss": 1.0}):
        callback.on_evaluate(_args(), state, control, metrics, model)
    assert state.best_metric is None and control.should_training_stop


def _args():
    class Main:
        process_index = 0

    return Main()


# -- the reward of answers


def test_the_reward_of_answers_to_validation_prompts_is_logged(tmp_path: Path, base: Path):
    sft = {"eval_steps": 8, "load_best_model_at_end": True, "metric_for_best_model": "reward"}
    run = run_of(tmp_path / "run", base, sft, validation_prompts=3)
    training = distill_train.train(run)
    rewards = evaluations(run, "eval_reward")
    assert sorted(rewards) == [8, 16] and all(-1 <= r <= 1 for r in rewards.values())
    best = max(rewards, key=rewards.get)
    assert training.best_step == best and training.validation_reward == pytest.approx(rewards[best])


def test_without_validation_rows_the_reward_is_measured_once_at_the_end(tmp_path: Path, base: Path, capsys):
    run = run_of(tmp_path / "run", base, {"max_steps": 2}, validation_prompts=3, patience=2)
    for file in (run["dataset"] / "sft").glob("validation-*"):
        file.unlink()
    training = distill_train.train(run)
    assert (training.validation_rows, training.validation_loss, training.best_step) == (0, None, None)
    assert -1 <= training.validation_reward <= 1 and evaluations(run, "eval_reward") == {2: training.validation_reward}
    assert "without validation rows nothing is validated while training" in capsys.readouterr().err


def test_measuring_the_reward_does_not_change_the_training(tmp_path: Path, base: Path):
    """Dropout would draw other numbers after a generation that uses the training's own."""
    lora = {"lora_dropout": 0.3}
    runs = [
        run_of(tmp_path / str(count), base, {"max_steps": 6}, validation_prompts=count, lora=lora)
        for count in (None, 2)
    ]
    for run in runs:
        distill_train.train(run)
    assert losses(runs[0]) == losses(runs[1])


def test_a_validation_does_not_change_the_steps_after_it_on_a_quantised_base(tmp_path: Path, base: Path):
    """On CPUs with AVX512-BF16 bitsandbytes would use a kernel without gradients from the first validation on."""
    losses = {}
    for strategy, more in (("no", {}), ("steps", {"eval_strategy": "steps", "eval_steps": 2})):
        sft = {"max_steps": 6, "learning_rate": 0.01, "max_grad_norm": 0.0} | more
        rows, held_out = [row(n) for n in range(16)], [row(n, OTHER) for n in range(20, 24)]
        lora = {"lora_dropout": 0.0}
        run = make_run(tmp_path / strategy, base, rows=rows, validation=held_out, sft=sft, lora=lora)
        distill_train.train(run)
        log = map(json.loads, (run["adapter"] / "training_log.jsonl").read_text().splitlines())
        losses[strategy] = [(e["loss"], e["grad_norm"]) for e in log if "grad_norm" in e]
    assert len(losses["no"]) == 6 and losses["steps"] == losses["no"]


def test_no_layer_changes_its_kernel_for_a_validation(base: Path):
    """The same on CPUs without those instructions, where the losses would agree in any case."""
    plan = plan_of(DistillConfig())
    args = type("Args", (), {"use_cpu": True, "local_process_index": 0})()
    model, _ = load_base(plan, base, torch.float32, args)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_the_answers_are_those_of_the_model_as_published(tmp_path: Path, base: Path, kept):
    """Greedy answers in a padded batch are those of one prompt at a time."""
    run, _ = kept
    recipe = run.facts.recipe.model_copy(
        update={"generation": run.facts.recipe.generation.model_copy(update={"temperature": 0.0, "max_new_tokens": 12})}
    )
    tokenizer = distill_train.tokenizer_of(base)
    reward = validation.ValidationReward(run, recipe, tokenizer, count=4)
    assert [p.id for p in reward.prompts] == [f"{n:016x}" for n in range(4)]  # validation only, by id
    prompts = [*reward.prompts[:3], Prompt(id="f" * 16, text="Short.", group="g", split="validation")]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run["adapter"])
    together = reward._answers(model.eval(), prompts)
    assert together == [reward._answers(model, [p])[0] for p in prompts]


# -- settings


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sft": {"metric_for_best_model": "accuracy", "load_best_model_at_end": True}}, "expected loss or reward"),
        ({"sft": {"metric_for_best_model": "reward"}, "patience": 2}, "needs distill.validation_prompts"),
        (
            {"sft": {"metric_for_best_model": "eval_reward", "load_best_model_at_end": True}},
            "needs distill.validation_prompts",
        ),
        ({"sft": {"eval_steps": 5}}, "eval_steps: has no effect without eval_strategy: steps"),
        ({"sft": {"metric_for_best_model": "loss"}}, "no effect without load_best_model_at_end"),
        ({"sft": {"load_best_model_at_end": False}, "patience": 2}, "distill.patience: needs"),
        ({"sft": {"eval_strategy": "no"}, "patience": 2}, "no validation to choose by"),
        (
            {"sft": {"lr_scheduler_type": "reduce_lr_on_plateau", "load_best_model_at_end": True}},
            "reduce_lr_on_plateau keeps a best value of its own",
        ),
        ({"dpo": {"greater_is_better": True}}, "follows from metric_for_best_model"),
    ],
)
def test_settings_without_effect_are_refused(section, message):
    with pytest.raises(ConfigError) as error:
        check_section(DistillConfig.model_validate(section))
    assert message in str(error.value)


def test_patience_and_answers_bring_a_validation_an_epoch():
    assert plan_of(DistillConfig(patience=2)).best == "loss"
    assert plan_of(DistillConfig(patience=2)).settings["eval_strategy"] == "epoch"
    assert plan_of(DistillConfig(validation_prompts=2)).settings["eval_strategy"] == "epoch"
    plain = plan_of(DistillConfig())
    assert plain.best is None and "eval_strategy" not in plain.settings
    on_reward = DistillConfig(patience=2, validation_prompts=2, sft={"metric_for_best_model": "eval_reward"})
    assert plan_of(on_reward).best == "reward"


@pytest.mark.parametrize("setting", ["patience=2", "validation_prompts=4", "sft.load_best_model_at_end=true"])
def test_without_validation_prompts_nothing_can_be_chosen(recipe_file: Path, setting: str):
    split = "prompts.split={train: 0.8, validation: 0, test: 0.2}"
    with pytest.raises(ConfigError, match="need validation prompts"):
        recipe_files.load_recipe_file(recipe_file, [f"distill.{setting}", split])


def test_what_chooses_the_best_passes_the_rehearsal(recipe_file: Path, base: Path):
    settings = ["distill.patience=2", "distill.validation_prompts=4", "distill.sft.metric_for_best_model=reward"]
    rehearse(recipe_files.load_recipe_file(recipe_file, settings), base, has_validation=True)


# -- trackers


def test_curves_are_written_for_trackio_on_this_machine_only(tmp_path: Path, base: Path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/public-space")
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/elsewhere")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    run = run_of(tmp_path / "run", base, {"max_steps": 2}, report_to="trackio")
    distill_train.train(run)
    second = run_of(tmp_path / "other" / "rounds" / "2", base, {"max_steps": 2}, report_to="trackio")
    distill_train.train(second)
    assert [p.name for p in (tmp_path / "trackio").glob("*.db")] == ["quickstart.db"]
    assert sorted(SQLiteStorage.get_runs("quickstart")) == ["other round 2", "run"]  # each training is one curve
    logged = SQLiteStorage.get_logs("quickstart", "run")
    assert {"train/loss", "eval/loss"} <= {key for entry in logged for key in entry}


def test_a_tracker_that_is_not_installed_is_said_by_the_plan(monkeypatch):
    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    (problem,) = launcher.check_in_child(DistillConfig(report_to="wandb"))
    assert "wandb is not installed" in problem


def test_plan_and_the_stage_itself_refuse_a_tracker_that_is_not_installed(dsc, recipe_file: Path, base: Path):
    words = (str(recipe_file), f"model.source={base}", "publish.to=none", "distill.report_to=tensorboard")
    assert (
        "distill.report_to: tensorboard is not installed; `pip install tensorboard`"
        in dsc("plan", *words, code=2).stderr
    )


def test_a_training_gets_the_keys_that_its_recipe_names_and_no_others(recipe_file: Path, monkeypatch):
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"secret {name}")
    judge = "reward={metric: judge, scorer: rating, options: {endpoint: 'http://127.0.0.1:1/v1', model: m, "
    judge += "instruction: 'Kind? {answer}', api_key_env: JUDGE_API_KEY}}"
    plain = recipe_files.load_recipe_file(recipe_file, [judge])
    answered = recipe_files.load_recipe_file(recipe_file, [judge, "distill.validation_prompts=2"])
    tracked = recipe_files.load_recipe_file(recipe_file, ["distill.report_to=wandb"])
    assert launcher._keys(plain) == {}
    assert set(launcher._keys(answered)) == {"JUDGE_API_KEY"} and set(launcher._keys(tracked)) == {"WANDB_API_KEY"}


def test_a_bare_no_of_yaml_is_the_strategy_no():
    assert plan_of(DistillConfig(sft={"eval_strategy": False})).settings["eval_strategy"] == "no"


@pytest.mark.long
def test_two_processes_agree_on_the_best_adapter_and_on_the_end(tmp_path: Path, base: Path):
    """Only the main process answers; both have to stop at the same step, and go on with the same adapter."""
    sft = {"load_best_model_at_end": True, "metric_for_best_model": "reward", "per_device_train_batch_size": 1}
    run = run_of(tmp_path / "run", base, sft, validation_prompts=3, patience=2, processes=2)
    training = launcher.launch(run)
    rewards = evaluations(run, "eval_reward")
    assert training.world_size == 2 and training.best_step == max(rewards, key=rewards.get)
    assert training.validation_reward == pytest.approx(rewards[training.best_step])
    later = [step for step in rewards if step > training.best_step]
    assert len(later) == 2 or training.steps == TOO_FAST["max_steps"]


def test_only_the_first_process_loads_the_reward(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path / "run", base)
    recipe = run.facts.recipe
    missing = recipe.reward.model_copy(update={"scorer": str(tmp_path / "no classifier")})
    recipe = recipe.model_copy(update={"reward": missing})
    monkeypatch.setenv("RANK", "1")
    assert len(validation.ValidationReward(run, recipe, None, 4).prompts) == 4
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(MetricError, match="can't be loaded"):
        validation.ValidationReward(run, recipe, None, 4)
