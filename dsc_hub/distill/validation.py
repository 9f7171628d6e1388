"""Validation while training: the reward of generated answers, the best adapter so far, early stopping."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsc_hub.chain.chain import opening_of
from dsc_hub.chain.thinking import split_thought
from dsc_hub.config.recipe import Recipe, generation_at_evaluation, training_seed
from dsc_hub.config.serving import GenerationConfig
from dsc_hub.distill.model import adapter_weights, set_adapter_weights
from dsc_hub.metrics import loading
from dsc_hub.records import Prompt
from dsc_hub.runs.run import Run
from dsc_hub.system.launch import rank

BEST = "best.safetensors"  # in the folder of the checkpoints, and in each of them
REWARD = "eval_reward"
TOGETHER = 8  # answers generated together


class ValidationReward(TrainerCallback):  # type: ignore[misc]
    """Callback that answers validation prompts at every validation, logs their mean reward, and adds it to the metrics.

    The same seed each time, so that only the adapter differs. Unscored answers are left out; without any scored one
    there is no value. `trainer` has to be set after it is built.
    """

    trainer: Trainer

    def __init__(self, run: Run, recipe: Recipe, tokenizer: Any, count: int) -> None:
        prompts = run.rows("prompts.jsonl").as_type(Prompt)
        self.prompts = sorted((p for p in prompts if p.split == "validation"), key=lambda p: p.id)[:count]
        self.tokenizer, self.system = tokenizer, recipe.chain.system
        self.template_settings = recipe.generation.template_settings
        self.settings, self.seed = generation_at_evaluation(recipe), training_seed(recipe)
        # Only the first process scores: a classifier in each would take its memory for nothing.
        self.score = loading.load_named("reward", recipe, run.facts.identity, run.folder).score if rank() == 0 else None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        values = [self._mean_reward(args) if args.process_index == 0 else None]
        if args.world_size > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        if values[0] is not None:
            metrics[REWARD] = values[0]
            self.trainer.log({REWARD: values[0]})

    def _mean_reward(self, args: TrainingArguments) -> float | None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                texts = [
                    text
                    for start in range(0, len(self.prompts), TOGETHER)
                    for text in self._answers(model, self.prompts[start : start + TOGETHER])
                ]
        finally:
            model.train(was_training)
        assert self.score is not None, "answers are scored where the scorer was loaded"
        rewards = [s.value for s in self.score(texts, self.prompts) if s.value is not None]
        return math.fsum(rewards) / len(rewards) if rewards else None

    def _answers(self, model: Any, prompts: Sequence[Prompt]) -> list[str]:
        ids = [
            self.tokenizer.apply_chat_template(
                opening_of(p, self.system),
                tools=list(p.tools) or None,
                add_generation_prompt=True,
                return_dict=True,
                **self.template_settings,
            )
            for p in prompts
        ]
        batch = self.tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
        out = model.generate(**batch, **_sampling(self.settings), pad_token_id=self.tokenizer.pad_token_id)
        texts: list[str] = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [split_thought(text).text.strip() for text in texts]


def _sampling(settings: GenerationConfig) -> dict[str, Any]:
    """Return the arguments of `generate` for the recipe's settings, without a server's own parameters (`extra`)."""
    if settings.temperature == 0:
        return {"do_sample": False, "max_new_tokens": settings.most_tokens}
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "max_new_tokens": settings.most_tokens,
    }


class BestAdapter(TrainerCallback):  # type: ignore[misc]
    """Callback that keeps the adapter of the best validation on disk and ends a training that gets no better.

    `metric`: "loss" (the lower, the better) or "reward". `patience`: validations without a better one after which the
    training ends; None: never. The best step and value are part of the trainer's state, so a checkpoint has them.
    `trainer` has to be set after it is built.
    """

    trainer: Trainer

    def __init__(self, folder: Path, metric: str, patience: int | None) -> None:
        self.file, self.key, self.patience = folder / BEST, f"eval_{metric}", patience
        self.sign = -1 if metric == "loss" else 1
        self.is_over = False

    def go_on_from(self, checkpoint: Path | None) -> None:
        """Take the best adapter of a checkpoint; without one, none."""
        self.file.unlink(missing_ok=True)
        if checkpoint and (checkpoint / BEST).is_file():
            shutil.copyfile(checkpoint / BEST, self.file)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make up for the validation that a training left out which was told to end at that step."""
        if args.eval_strategy == "epoch":
            was_due = state.epoch is not None and state.epoch % 1 == 0
        else:
            was_due = state.global_step % max(1, int(args.eval_steps or 1)) == 0
        done = {e["step"] for e in state.log_history if "eval_loss" in e}
        if state.global_step and was_due and state.global_step not in done:
            self.trainer.evaluate()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: Any,
        **_: Any,
    ) -> None:
        if self.is_over:  # the validation of the adapter that is kept
            return
        value = metrics.get(self.key)
        if (
            value is not None
            and math.isfinite(value)
            and (state.best_metric is None or self.sign * (value - state.best_metric) > 0)
        ):
            state.best_metric, state.best_global_step = value, state.global_step
            weights = adapter_weights(model)
            if args.process_index == 0:
                self._save(weights, state.global_step)
        elif self.patience is not None:
            later = {e["step"] for e in state.log_history if "eval_loss" in e} - {state.global_step}
            control.should_training_stop |= (
                sum(step > (state.best_global_step or 0) for step in later) + 1 >= self.patience
            )

    def _save(self, weights: dict[str, torch.Tensor], step: int) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        save_file(weights, part, metadata={"step": str(step)})
        os.replace(part, self.file)

    def restore(self, trainer: Trainer) -> int | None:
        """Give the model the best adapter; return its step. None if no validation had a value: the last one stays."""
        self.is_over = True
        trainer.accelerator.wait_for_everyone()
        if trainer.state.best_global_step is None or not self.file.is_file():
            return None
        with safe_open(self.file, framework="pt") as best:
            set_adapter_weights(trainer.model, best.get_tensor)
            return int(best.metadata()["step"])
