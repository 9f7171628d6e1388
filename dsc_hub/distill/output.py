"""What a training prints: what it trains on, a progress line, how it ended."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsc_hub.distill.config import Plan
from dsc_hub.distill.launcher import PROGRESS
from dsc_hub.distill.preflight import TrainingData
from dsc_hub.errors import RunError
from dsc_hub.runs.metrics_schema import Training
from dsc_hub.runs.run import Run
from dsc_hub.system.progress import Line, Meter, duration, say


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Callback that shows the trainer's events as a progress line; a non-finite loss ends the training."""

    def __init__(self, line: Line | None, objective: str) -> None:
        self.objective = objective
        self.line, self.loss, self.meter, self.before = line, "", Meter(0), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.before = state.global_step  # steps of earlier sessions
        self.meter = Meter(state.max_steps - self.before)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {state.global_step}",
                f"Lower distill.{self.objective}.learning_rate, or set distill.{self.objective}.max_grad_norm.",
            )
        self.loss = f"  loss {loss:.3g}"
        self._show(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.done = state.global_step - self.before
        self._show(args, state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._print(f"{PROGRESS}{state.global_step}/{state.max_steps}  validation")

    def _show(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self.meter.done:
            return
        rate = self.meter.done / max(1e-9, time.monotonic() - self.meter.started)
        self._print(
            f"{PROGRESS}{state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2g}/{state.num_train_epochs}"
            f"{self.loss}  {rate:.2g} step/s{self.meter.left()}"
        )

    def _print(self, text: str) -> None:
        if self.line is not None:
            self.line.show(text)


def say_start(
    data: TrainingData,
    plan: Plan,
    quantization: str,
    dtype: torch.dtype,
    trainable: int,
    total: int,
    args: TrainingArguments,
) -> None:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    say(
        f"distill  {plan.objective}, {data.rows} rows, {data.validation_rows} for validation; "
        f"{data.trained_tokens_per_epoch} of "
        f"{data.tokens_per_epoch} tokens trained an epoch; longest row {data.longest} tokens, none cut"
    )
    say(
        f"distill  {plan.method}, quantization {quantization}, {str(dtype).removeprefix('torch.')} "
        f"on {args.device.type}, {args.world_size} "
        f"process{'es' if args.world_size > 1 else ''}; "
        f"{trainable:,} of {total:,} parameters trained; {batch} rows a step"
    )
    row = data.first_row
    first = next(n for n, token in enumerate(row) if token.trained)
    before, after = "".join(t.text for t in row[max(0, first - 6) : first]), row[first:]
    end = "".join(t.text for t in after[-3:])
    say(
        f"distill  mask of row 1: {first} tokens not trained, up to {before!r}; "
        f"{len(after)} trained, from {after[0].text!r} to {end!r}"
    )
    if data.prompt_rerendered:
        say(
            f"distill  the chat template renders the prompt of {data.prompt_rerendered} rows "
            "otherwise once an answer follows: "
            "the model is trained on a beginning that it does not see in generation"
        )


def say_end(run: Run, training: Training) -> None:
    def shown(loss: float | None) -> str:
        return "none" if loss is None else f"{loss:.3g}"

    say(
        f"distill  {training.steps} steps in {duration(training.seconds)}; "
        f"loss {shown(training.first_loss)} -> {shown(training.final_loss)}, "
        f"validation {shown(training.validation_loss)}"
        + (f", reward {training.validation_reward:.3f}" if training.validation_reward is not None else "")
        + (f"; kept: step {training.best_step}" if training.best_step is not None else "")
        + f" -> {run['adapter']}"
    )
