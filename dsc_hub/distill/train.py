"""Distillation: train a LoRA adapter on the kept answers of a run, so that one generation replaces the chain.

QLoRA (Dettmers et al., arXiv:2305.14314) with trl, peft and bitsandbytes: the base model is frozen in NF4, the loss
covers only the completion, and rows are rendered with the model's chat template. Two properties are checked on the real
batches before the first step: the prompt is not trained, and the token that ends the answer is. Reads only the run's
recipe and the train and validation rows of the objective (`dataset/sft`, or `dataset/preference` for dpo and kto); test
rows are refused.

`python -m dsc_hub.distill.train RUN` trains; so does `train` in every process that accelerate or torchrun started.
`launcher.launch` is the parent of such processes.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# accelerate sets it on a CPU; with Intel's OpenMP it would bind this process, and what it starts, to one core.
os.environ.pop("KMP_AFFINITY", None)

import datasets
import torch

from dsc_hub.inference.bitsandbytes_import import import_bitsandbytes

import_bitsandbytes()  # before transformers does

from transformers import Trainer
from transformers.utils import logging as transformers_logging

from dsc_hub.config.recipe import Recipe
from dsc_hub.distill import checkpoints, plugin
from dsc_hub.distill.adapter_files import write_adapter
from dsc_hub.distill.config import Plan, plan_of
from dsc_hub.distill.launcher import ERROR_FILE, shown_error
from dsc_hub.distill.mask import check_batches
from dsc_hub.distill.model import adapter_weights, compute_dtype, load_base, widen_adapter
from dsc_hub.distill.output import ProgressCallback, say_end, say_start
from dsc_hub.distill.preflight import TrainingData, check_training
from dsc_hub.distill.tokens import stop_tokens, tokenizer_of
from dsc_hub.distill.trainers import build_trainer, effective_rows, row_weights, training_arguments
from dsc_hub.distill.validation import REWARD, BestAdapter, ValidationReward
from dsc_hub.errors import TERMINATED, DataError, DscError, ModelError, RunError, disk_error
from dsc_hub.runs.metrics_schema import Training
from dsc_hub.runs.run import Run
from dsc_hub.system import progress
from dsc_hub.system.files import write_whole
from dsc_hub.system.launch import rank, uses_cpu, world_size
from dsc_hub.system.progress import Line, moving_line, say

# -- training


def train(run: Run) -> Training:
    """Train the adapter, write `run["adapter"]` and return what adapter/summary.json holds.

    Called in every process of a launcher, or in a single one; only the main process prints and writes. A training that
    was broken off goes on from its last checkpoint. The folder is written atomically. ConfigError, DataError and
    ModelError as in `check_training`; RunError if the training itself fails.
    """
    plugin.check_launched(run.facts.recipe)
    data = check_training(run)
    part = run["adapter"].with_name("adapter.part")
    try:
        with _quiet(), checkpoints.alone(run) if rank() == 0 else nullcontext():
            if rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
            return _train_in_memory(run, data, part)
    except OSError as e:
        raise disk_error(e) or e from e
    finally:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)


def _train_in_memory(run: Run, data: TrainingData, part: Path) -> Training:
    """Train; when the GPU runs out of memory, go on with half of the rows at once (or fewer) and more accumulations.

    The rows of a step stay the same. RunError if there is nothing left to halve; also with several processes, of which
    the others would wait for the one that ran out.
    """
    plan = plan_of(run.facts.recipe.distill)
    while True:
        try:
            return _train(run, plan, data, part)
        except torch.cuda.OutOfMemoryError:
            together = plan.settings["per_device_train_batch_size"]
            smallest = 2 if plan.objective == "kto" else 1  # kto compares the answers of a batch
            fewer = next((n for n in range(together // 2, smallest - 1, -1) if together % n == 0), None)
            if world_size() > 1 or fewer is None:
                raise RunError(
                    f"the GPU ran out of memory in training with {together} rows at once",
                    f"Lower distill.{plan.objective}.per_device_train_batch_size and raise "
                    "gradient_accumulation_steps by as much; their product is what counts.",
                ) from None
            accumulated = together // fewer * plan.settings.get("gradient_accumulation_steps", 1)
            batch = {
                "per_device_train_batch_size": fewer,
                "per_device_eval_batch_size": min(fewer, plan.settings["per_device_eval_batch_size"]),
                "gradient_accumulation_steps": accumulated,
            }
            plan = plan._replace(settings=plan.settings | batch)
            say(
                f"distill  the GPU ran out of memory with {together} rows at once: goes on with {fewer}, {accumulated} "
                "times a step"
            )
        # Outside of the handler: the exception holds the model.
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Prepared:
    """A trainer that is ready to start, and what belongs to it."""

    plan: Plan
    data: TrainingData
    trainer: Trainer
    keeper: checkpoints.Checkpoints
    best: BestAdapter | None
    scoring: ValidationReward | None
    checkpoint: Path | None
    weights: list[float]
    parameters: tuple[int, int]  # trained, all; while the model is not divided yet
    quantization: str
    dtype: torch.dtype


def _train(run: Run, plan: Plan, data: TrainingData, part: Path) -> Training:
    main = rank() == 0
    with moving_line() if main else nullcontext() as line:
        prepared = _prepare(run, plan, data, line)
        trainer, best = prepared.trainer, prepared.best
        if main:
            _say_start(prepared)
        seconds = _fit(prepared)
        best_step = best.restore(trainer) if best else None
        validation = trainer.evaluate() if data.validation_rows else {}
        if prepared.scoring and not data.validation_rows:  # nothing has called it
            prepared.scoring.on_evaluate(trainer.args, trainer.state, trainer.control, validation)
    weights = adapter_weights(trainer.model)
    _check_finite(weights, prepared.plan)
    training = _summary(prepared, run.facts.recipe.distill.weight_temperature, seconds, validation, best_step)
    if main:
        write_adapter(run, trainer, weights, run.facts.base.weights, part, training)
        shutil.rmtree(run[checkpoints.CHECKPOINTS], ignore_errors=True)
        say_end(run, training)
    trainer.accelerator.wait_for_everyone()
    return training


def _prepare(run: Run, plan: Plan, data: TrainingData, line: Line | None) -> _Prepared:
    """Load the model, build the trainer and check its batches against the preflight's result."""
    facts = run.facts
    recipe, folder = facts.recipe, facts.base.weights
    on_cpu = not torch.cuda.is_available() or uses_cpu()
    dtype = compute_dtype(on_cpu)
    weights = _weights(data.rewards, recipe.distill.weight_temperature)
    _prepare_tracker(run, recipe)
    args = training_arguments(plan, data, run[checkpoints.CHECKPOINTS], on_cpu, dtype, recipe, _run_name(run))

    model, quantization = load_base(plan, folder, dtype, args)
    tokenizer = tokenizer_of(folder)
    vocabulary = len(tokenizer)
    identity = checkpoints.training_identity(run, args.world_size, str(dtype))
    checkpoint = checkpoints.newest(run, identity)
    keeper = checkpoints.Checkpoints(identity, checkpoints.trained_s(checkpoint))
    best = BestAdapter(run[checkpoints.CHECKPOINTS], plan.best, recipe.distill.patience) if plan.best else None
    count = recipe.distill.validation_prompts
    scoring = ValidationReward(run, recipe, tokenizer, count) if count else None
    # In this order: the best adapter goes by the reward, and a checkpoint includes the best adapter.
    callbacks = [ProgressCallback(line, plan.objective), *filter(None, (scoring, best)), keeper]
    trainer = build_trainer(plan, model, args, data, weights, tokenizer, callbacks)
    if scoring:
        scoring.trainer = trainer
    if best:
        best.trainer = trainer
    if best and rank() == 0:
        best.go_on_from(checkpoint)
    if dtype is torch.float32:
        widen_adapter(trainer.model)
    check_batches(trainer, stop_tokens(tokenizer, folder), data)
    _check_vocabulary(tokenizer, vocabulary)
    parameters = trainer.model.get_nb_trainable_parameters()
    checkpoints.check_space(run, parameters[0])
    return _Prepared(plan, data, trainer, keeper, best, scoring, checkpoint, weights, parameters, quantization, dtype)


def _say_start(prepared: _Prepared) -> None:
    trainable, total = prepared.parameters
    if prepared.weights:
        worth, rows = effective_rows(prepared.weights), prepared.data.rows
        few = (
            "; a few rows have nearly all of the weight: raise distill.weight_temperature" if 10 * worth < rows else ""
        )
        say(f"distill  rows are weighted by their rewards, and worth {worth:.1f} of {rows} alike{few}")
    if prepared.best and not prepared.data.validation_rows:
        say("distill  without validation rows nothing is validated while training: the last adapter is kept")
    say_start(
        prepared.data, prepared.plan, prepared.quantization, prepared.dtype, trainable, total, prepared.trainer.args
    )
    if prepared.checkpoint:
        say(f"distill  goes on from {prepared.checkpoint.name}")


def _summary(
    prepared: _Prepared,
    weight_temperature: float | None,
    seconds: float,
    validation: Mapping[str, float],
    best_step: int | None,
) -> Training:
    plan, data, trainer = prepared.plan, prepared.data, prepared.trainer
    state, args = trainer.state, trainer.args
    trainable, total = prepared.parameters
    first_loss, final_loss = _first_and_final([e["loss"] for e in state.log_history if "loss" in e])
    return Training(
        rows=data.rows,
        validation_rows=data.validation_rows,
        steps=state.global_step,
        epochs=round(state.epoch or 0.0, 4),
        first_loss=first_loss,
        final_loss=final_loss,
        validation_loss=validation.get("eval_loss"),
        validation_reward=validation.get(REWARD),
        best_step=best_step,
        preference_accuracy=_last_logged(trainer, "eval_rewards/accuracies"),
        seconds=round(seconds, 2),
        seconds_per_step=round(seconds / max(1, state.global_step), 4),
        peak_memory_gib=_peak_memory_gib(args.use_cpu),
        trainable_parameters=trainable,
        total_parameters=total,
        trained_tokens_per_epoch=data.trained_tokens_per_epoch,
        max_length=data.max_length,
        truncated=data.truncated,
        method=plan.method,
        objective=plan.objective,
        weight_temperature=weight_temperature,
        effective_rows=round(effective_rows(prepared.weights), 1) if prepared.weights else None,
        compute_dtype=str(prepared.dtype).removeprefix("torch."),
        quantization=prepared.quantization,
        world_size=args.world_size,
    )


def _run_name(run: Run) -> str:
    """Return the name of a run at a tracker: the start of its fingerprint, in rounds with the round's number."""
    *_, above, middle, last = run.folder.resolve().parts
    return f"{above} round {last}" if middle == "rounds" else last


def _prepare_tracker(run: Run, recipe: Recipe) -> None:
    """Set what the trackers read from the environment: nothing is published that the recipe does not name."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run["tensorboard"])
    os.environ.setdefault("WANDB_PROJECT", recipe.name)
    for name in [n for n in os.environ if n.startswith("TRACKIO_") and n != "TRACKIO_DIR"]:
        del os.environ[name]  # a Space, a server, a webhook: others than this machine
    os.environ.pop("WANDB_LOG_MODEL", None)


def _weights(rewards: Sequence[float | None], temperature: float | None) -> list[float]:
    """Return the weights of the training rows; none without a temperature. DataError for a row without a reward."""
    if temperature is None:
        return []
    known = [reward for reward in rewards if reward is not None]
    if len(known) < len(rewards):
        raise DataError(
            "distill.weight_temperature: a training row has no reward",
            "Leave weight_temperature out, or make the dataset again with `dsc run`.",
        )
    return row_weights(known, temperature)


def _check_vocabulary(tokenizer: Any, before: int) -> None:
    """ModelError if the trainer added tokens."""
    if added := len(tokenizer) - before:
        hint = "Nothing may be resized: choose another base model."
        raise ModelError(f"the trainer added {added} tokens to the vocabulary", hint)


def _fit(prepared: _Prepared) -> float:
    """Train, from a checkpoint if there is one; return the seconds of all sessions. Ends the process for a signal."""
    checkpoints.keep_dtypes(prepared.trainer)
    started = time.monotonic()
    with checkpoints.on_termination(prepared.keeper):
        prepared.trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
    if prepared.keeper.is_broken_off:
        sys.exit(TERMINATED)
    return prepared.keeper.before_s + time.monotonic() - started


def _last_logged(trainer: Trainer, key: str) -> float | None:
    """Return the last value of a metric in the training log: trl adds its own there, not to `evaluate`'s."""
    return next((e[key] for e in reversed(trainer.state.log_history) if key in e), None)


def _first_and_final(losses: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the first loss that was logged, and the mean of the last tenth; None without any."""
    last = losses[-max(1, len(losses) // 10) :]
    return (losses[0], sum(last) / len(last)) if losses else (None, None)


def _check_finite(weights: Mapping[str, torch.Tensor], plan: Plan) -> None:
    """RunError if training left weights of the adapter that are not finite."""
    bad = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if bad:
        raise RunError(
            f"{len(bad)} of the adapter's weights are not finite after training",
            f"Lower distill.{plan.objective}.learning_rate.",
        )


def _peak_memory_gib(on_cpu: bool) -> float:
    """Return the peak memory of this process in GiB: GPU allocations, or resident memory on the CPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    return round(peak / 2**30, 2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars of other libraries."""
    bars, weights = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        if weights:
            transformers_logging.enable_progress_bar()


# -- entry point of the process


def main(arguments: Sequence[str]) -> int:
    """`python -m dsc_hub.distill.train RUN`: return 0, or 2 for an error that the user can fix, printed in one line."""
    if len(arguments) != 1:
        print("usage: python -m dsc_hub.distill.train RUN_FOLDER", file=sys.stderr)
        return 2
    # SystemExit, so that the partial adapter is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    error_file = os.environ.get(ERROR_FILE)
    if error_file:
        progress.PLAIN_EVERY_S = 0.5  # the launcher throttles the output
    try:
        train(Run(Path(arguments[0])))
    except DscError as e:
        if error_file:
            write_whole(Path(error_file), shown_error(e))
        elif rank() == 0:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
