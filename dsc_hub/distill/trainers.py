"""The trainers of trl, one for each objective, with the settings that dsc gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from dsc_hub.config.recipe import Recipe, training_seed
from dsc_hub.distill.config import BY_OBJECTIVE, Plan, checked_targets, lora_config
from dsc_hub.distill.preflight import TrainingData
from dsc_hub.errors import ConfigError

WEIGHT = "weight"  # column of a row's weight in the loss


def training_arguments(
    plan: Plan, data: TrainingData, folder: Path, on_cpu: bool, dtype: torch.dtype, recipe: Recipe, run_name: str
) -> TrainingArguments:
    """Return the configuration of the objective's trainer; ConfigError for values that it refuses.

    `run_name` is the name of the run at a tracker, where the recipe's name is the project.
    """
    settings = dict(plan.settings)
    # Recomputing activations saves memory, which is scarce only on GPUs; it costs about a fifth of the time.
    settings.setdefault("gradient_checkpointing", not on_cpu)
    settings.setdefault("dataloader_pin_memory", not on_cpu)
    settings.setdefault("ddp_find_unused_parameters", False)
    # By default NaN losses are left out of the logged mean, so a diverged run would look healthy.
    settings["logging_nan_inf_filter"] = False
    if not data.validation_rows:
        settings["eval_strategy"] = "no"
    # With a limit, trl goes through tokenised rows once more to cut them, and none is too long.
    is_whole = plan.objective == "sft" and not settings.get("packing") and not settings.get("padding_free")
    settings["max_length"] = None if is_whole else data.max_length
    try:
        args = BY_OBJECTIVE[plan.objective].config(
            output_dir=str(folder),
            seed=training_seed(recipe),
            data_seed=training_seed(recipe),
            use_cpu=on_cpu,
            bf16=dtype is torch.bfloat16,
            fp16=False,
            report_to=recipe.distill.report_to,
            run_name=run_name,
            project=recipe.name,
            trackio_static_space_id=False,  # by default a public one would be made with the first push
            push_to_hub=False,
            save_strategy="no",  # `Checkpoints` decides when
            disable_tqdm=True,
            **settings,
        )
    except (TypeError, ValueError) as e:
        raise ConfigError(f"distill.{plan.objective}: {e}") from None
    if args.parallel_mode.value == "not_distributed":
        # One process trains on one device; with more visible GPUs the trainer would try DataParallel, then refuse it.
        args._n_gpu = min(1, args.n_gpu)
    return args


def build_trainer(
    plan: Plan,
    model: Any,
    args: TrainingArguments,
    data: TrainingData,
    weights: Sequence[float],
    tokenizer: Any,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Build the objective's trainer over the checked rows; ConfigError if the target modules do not fit the model.

    `weights` are those of the training rows in the loss; empty: all alike. The reference model of dpo and kto is the
    base without the adapter.
    """
    train, trainer_class = data.train, TRAINERS[plan.objective]
    if weights:
        train, trainer_class = train.add_column(WEIGHT, list(weights)), _WeightedSFTTrainer
    with checked_targets():
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            peft_config=lora_config(plan.lora, model),
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


# -- weights of rows


def row_weights(rewards: Sequence[float], temperature: float) -> list[float]:
    """Return exp(reward / T) of each row, divided by its mean over the rows.

    These are the weights of reward-weighted regression (Peters & Schaal, ICML 2007), and the factor exp(r(x)/T) of the
    target distribution (Gallego, arXiv:2312.01957).
    """
    highest = max(rewards)  # subtracted, so that exp does not overflow
    raw = [math.exp((reward - highest) / temperature) for reward in rewards]
    return [w * len(raw) / sum(raw) for w in raw]


def effective_rows(weights: Sequence[float]) -> float:
    """Return Kish's effective sample size, (sum w)^2 / sum w^2: between 1 and the number of rows."""
    return sum(weights) ** 2 / sum(w * w for w in weights)


class _WeightedSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer in which the loss of a row's tokens is multiplied by the row's weight. Validation is not weighted."""

    data_collator: Any
    _signature_columns: list[str]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        collate = self.data_collator

        def with_weights(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = collate(rows)
            if WEIGHT in rows[0]:
                batch[WEIGHT] = torch.tensor([row[WEIGHT] for row in rows])
            return batch

        self.data_collator = with_weights

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if WEIGHT not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, WEIGHT]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        weight = inputs.pop(WEIGHT, None)
        if weight is None:
            return super().compute_loss(model, inputs, *more, **options)

        def weighted(**batch: Any) -> Any:
            outputs = model(**batch)
            outputs.log_probs = outputs.log_probs * weight[:, None].to(outputs.log_probs)
            return outputs

        return super().compute_loss(weighted, inputs, *more, **options)


TRAINERS = {"sft": SFTTrainer, "dpo": DPOTrainer, "kto": KTOTrainer}
