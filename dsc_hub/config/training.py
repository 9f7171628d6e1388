"""Sections of the recipe for what is made of the chains: dataset, adapter, its evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from dsc_hub.config.section import ArmName, Section, each_once

# Trainer settings that are reserved for the tool: file locations, uploads, process layout.
OWNED_TRAINER_KEYS = frozenset(
    "output_dir overwrite_output_dir push_to_hub hub_model_id hub_token hub_strategy hub_private_repo report_to"
    " deepspeed fsdp fsdp_config local_rank ddp_backend use_cpu no_cuda bf16 fp16 seed data_seed dataset_text_field"
    " dataset_kwargs completion_only_loss assistant_only_loss eos_token pad_token chat_template_path model_init_kwargs"
    " remove_unused_columns save_strategy logging_dir trackio_space_id trackio_bucket_id trackio_static_space_id"
    " project run_name".split()
)


OBJECTIVES = ("sft", "dpo", "kto")  # of training; each has a section of `distill` with its settings


QUANTIZATION_DEFAULTS: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


class DatasetConfig(Section):
    """Which chains become training rows: a clean final state, at least so good, at least so much better."""

    min_reward: float | None = Field(
        None,
        description=(
            "least reward of the final state. Scores point the way that is wanted: with at most two mentions per 100"
            " words (privacy), it is -2. null: no limit"
        ),
    )
    min_gain: Annotated[float | Literal["auto"] | None, Field(union_mode="left_to_right")] = Field(
        "auto",
        description=(
            "final reward minus the first answer's, strictly above; a dirty first answer counts as -inf, beside an"
            " unscored one there is no gain. auto: 0, but no limit under metropolis, whose draws are from their target"
            " only if none is left out"
        ),
    )
    phrase_limit: int | None = Field(
        None,
        ge=1,
        description=(
            "so many rows of a split may share a phrase of four words (the subject's name is one), those with the "
            "highest reward; the others are left out, so that the model doesn't learn to say the same of everything. "
            "null: all rows"
        ),
    )
    rows_per_prompt: int | None = Field(
        None, ge=1, description="at most so many rows per prompt, those with the highest reward. null: all"
    )
    rows: int | None = Field(
        None,
        ge=1,
        description=(
            "so many training rows are wanted: sampling ends when they are there, and chain.chains_per_prompt is the "
            "most that a prompt gets; with rows_per_prompt, a prompt that has its rows gets no further chain. null: "
            "all chains of all prompts"
        ),
    )


class DistillConfig(Section):
    """Training through trl. `sft`, `dpo`, `kto`, `lora`, `quantization` go straight into SFTConfig, DPOConfig,
    KTOConfig, LoraConfig, BitsAndBytesConfig."""

    method: Literal["qlora", "lora"] = Field("qlora", description="qlora: the base is quantised; lora: it is not")
    objective: Literal["sft", "dpo", "kto"] = Field(
        "sft",
        description=(
            "sft: likelihood of the kept answers; dpo: preference pairs (final over first answer); kto: the same pairs,"
            " each answer by itself as desirable or not. The section of the same name has its settings; the others are"
            " not used"
        ),
    )
    weight_temperature: float | None = Field(
        None,
        gt=0,
        description=(
            "sft only: each row's loss counts exp(reward / T), divided by the mean of all rows; null: all rows count"
            " alike"
        ),
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="of the adapter's first weights, dropout and row order; null: the recipe's seed",
    )
    sft: dict[str, Any] = Field({}, description="arguments of trl's SFTConfig, say learning_rate, num_train_epochs")
    dpo: dict[str, Any] = Field({}, description="arguments of trl's DPOConfig, say beta")
    kto: dict[str, Any] = Field({}, description="arguments of trl's KTOConfig")
    lora: dict[str, Any] = Field({}, description="arguments of peft's LoraConfig, say r, lora_alpha, target_modules")
    quantization: dict[str, Any] = Field({}, description="arguments of BitsAndBytesConfig; default: NF4, double")
    validation_prompts: int | None = Field(
        None,
        ge=1,
        description="answer so many validation prompts at each validation while training and log their mean reward",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "end the training after so many validations without a better one, and keep the best adapter "
            "(load_best_model_at_end of the objective's section; metric_for_best_model is loss or reward)"
        ),
    )
    report_to: Literal["none", "trackio", "tensorboard", "wandb"] = Field(
        "none", description="tracker of the training's curves; trackio and tensorboard write to this machine only"
    )
    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description=(
            "training processes, all machines together: each multiplies the batch of a step. Under a launcher of "
            "several processes, and with `launch`, the number is theirs"
        ),
    )
    launch: str | None = Field(
        None,
        description=(
            "file of `accelerate config` with which training is started, or the name of one in recipes/accelerate; "
            "null: chosen for this machine and `processes`"
        ),
    )

    @model_validator(mode="after")
    def _not_ours(self) -> DistillConfig:
        owned = [
            f"{name}.{key}" for name in OBJECTIVES for key in sorted(OWNED_TRAINER_KEYS & getattr(self, name).keys())
        ]
        if owned:
            raise ValueError(
                f"{owned[0]} is set by dsc itself"
                + (" by distill.report_to" if owned[0].endswith(".report_to") else "")
                + (f" (also: {', '.join(owned[1:])})" if owned[1:] else "")
                + "; remove it"
            )
        if self.weight_temperature is not None and self.objective != "sft":
            raise ValueError(f"weight_temperature: rows are weighted with objective sft only, got {self.objective}")
        four, eight = self.quantization.get("load_in_4bit", True), self.quantization.get("load_in_8bit", False)
        if self.method == "qlora" and not four and not eight:
            raise ValueError("quantization: neither load_in_4bit nor load_in_8bit; method 'lora' trains without")
        return self


class EvaluationConfig(Section):
    """Arms compared on the same prompts with the same seeds; the first is the baseline of the differences."""

    arms: Annotated[tuple[ArmName, ...], AfterValidator(each_once)] = Field(
        ("base", "self_critique", "best_of_n", "distilled"),
        min_length=1,
        description="ways of answering that are compared; the first is the baseline. With a student also teacher",
    )
    samples: int = Field(1, ge=1, le=256, description="answers that each arm gives to each prompt")
    split: Literal["validation", "test"] = Field(
        "test", description="prompts that are answered: validation while you choose settings, test once, in the end"
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=5,
        description=(
            "of every arm; null: generation.temperature. Answers drawn at T < 1 and learned are sharper by nature: "
            "drawing from them at the same T sharpens twice, and variety is lost"
        ),
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of all intervals")
    weights: Literal["rounded", "original"] = Field(
        "rounded",
        description="qlora: all arms run on the base as the adapter was trained on, rounded by the quantisation, or on "
        "the original weights, where a server of the published base and adapter runs",
    )


def quantization(distill: DistillConfig) -> dict[str, Any] | None:
    """Return the BitsAndBytesConfig arguments with which the base is quantised in training.

    Without the compute dtype, which depends on the machine. None if the base is not quantised.
    """
    if distill.method != "qlora":
        return None
    settings = distill.quantization
    return dict(settings) if settings.get("load_in_8bit") else QUANTIZATION_DEFAULTS | settings
