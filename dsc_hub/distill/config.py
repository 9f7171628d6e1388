"""Conversion of the recipe's `distill` section to the configurations of trl, peft and bitsandbytes, and its checks."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import DPOConfig, KTOConfig, SFTConfig

from dsc_hub.config.messages import no_switch
from dsc_hub.config.training import OBJECTIVES, OWNED_TRAINER_KEYS, DistillConfig, quantization
from dsc_hub.distill.launcher import DEFAULT_RANK
from dsc_hub.errors import ConfigError
from dsc_hub.inference.adapters import LORA_RANKS

LORA_DEFAULTS: dict[str, Any] = {
    "r": DEFAULT_RANK,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
}
_TRAINER_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
}


@dataclass(frozen=True)
class Objective:
    """What trl needs for an objective of training, and which rows it trains on.

    `rows` is the config of the dataset, `answers` are those of its columns with a loss.
    """

    config: type[TrainingArguments]
    defaults: dict[str, Any]
    rows: str
    answers: tuple[str, ...]


# The learning rates of trl's configurations are for full fine-tuning; an adapter needs about ten times as much.
BY_OBJECTIVE = {
    "sft": Objective(SFTConfig, {"learning_rate": 2e-4, "packing": False}, "sft", ("completion",)),
    "dpo": Objective(DPOConfig, {"learning_rate": 2e-5}, "preference", ("chosen", "rejected")),
    "kto": Objective(KTOConfig, {"learning_rate": 2e-5}, "preference", ("chosen", "rejected")),
}

_NOT_A_PLAIN_ADAPTER = "the adapter could not be served by vLLM or loaded as a plain LoRA; remove it"
_REFUSED = {
    "trust_remote_code": "a recipe is data and never runs code of others; remove it",
    "greater_is_better": "follows from metric_for_best_model; remove it",
    "save_total_limit": "dsc keeps the last two checkpoints, until the adapter is in place; remove it",
    "save_only_model": "a training could not go on from such a checkpoint; remove it",
    "resume_from_checkpoint": "dsc goes on from its own checkpoints by itself; remove it",
    "disable_tqdm": "dsc draws its own progress; remove it",
}
_REFUSED_LORA = {
    **dict.fromkeys(
        [
            "task_type",
            "peft_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "runtime_config",
        ],
        "set by dsc itself; remove it",
    ),
    "modules_to_save": "whole modules beside the adapter are refused by vLLM, and no embedding is resized; remove it",
    **dict.fromkeys(
        [
            "trainable_token_indices",
            "use_dora",
            "lora_bias",
            "layer_replication",
            "alora_invocation_tokens",
            "use_bdlora",
            "use_qalora",
            "target_parameters",
        ],
        _NOT_A_PLAIN_ADAPTER,
    ),
    **dict.fromkeys(
        [
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "monteclora_config",
            "arrow_config",
            "kasa_config",
            "megatron_config",
        ],
        "needs a preparation of its own, which dsc does not make; remove it",
    ),
}
_REFUSED_QUANTIZATION = {"llm_int8_enable_fp32_cpu_offload": "the model lies whole on one device; remove it"}
# Common names of keys that are too different from the key for fuzzy matching.
_MEANT = {
    "rank": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_r": "r",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
}
# Names by which peft means the weights of experts, whatever else has them in a model.
_OF_EXPERTS = frozenset("gate w1 w2 w3 gate_proj up_proj down_proj gate_up_proj".split())
# A served adapter is added to the published base; any other init changes the base itself.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


class Plan(typing.NamedTuple):
    """The recipe's sections, merged with the defaults and checked.

    `settings` are those of the trainer. `best` is the metric by which the best adapter of the validations is kept;
    None: the last adapter.
    """

    method: typing.Literal["qlora", "lora"]
    objective: typing.Literal["sft", "dpo", "kto"]
    settings: dict[str, Any]
    lora: dict[str, Any]
    quantization: dict[str, Any] | None
    best: typing.Literal["loss", "reward"] | None = None


def plan_of(section: DistillConfig) -> Plan:
    """Check the keys and types of `distill:`; ConfigError with every problem at once."""
    problems: list[str] = []
    lora_fields = {f for f in LoraConfig.__dataclass_fields__ if LoraConfig.__dataclass_fields__[f].init}
    bnb_parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters.values()
    bnb_fields = {p.name for p in bnb_parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    refused = _REFUSED | dict.fromkeys(OWNED_TRAINER_KEYS, "set by dsc itself; remove it")
    trainer: dict[str, dict[str, Any]] = {}
    for name in OBJECTIVES:
        config = BY_OBJECTIVE[name].config
        fields = {f.name for f in dataclasses.fields(config) if f.init}
        trainer[name] = _checked_settings(
            name, getattr(section, name), fields, refused, typing.get_type_hints(config), problems
        )
    lora = _checked_settings(
        "lora", section.lora, lora_fields, _REFUSED_LORA, typing.get_type_hints(LoraConfig), problems
    )
    given = _checked_settings("quantization", section.quantization, bnb_fields, _REFUSED_QUANTIZATION, {}, problems)

    sft = trainer["sft"]
    if sft.get("packing") and sft.get("packing_strategy", "bfd") != "bfd":
        problems.append("distill.sft.packing_strategy: only 'bfd' keeps rows whole, and the end of an answer with them")
    if section.weight_temperature is not None:
        if sft.get("packing") or sft.get("padding_free"):
            problems.append(
                "distill.weight_temperature: a packed batch has no single rows to weight; leave packing out"
            )
        if sft.get("loss_type", "nll") != "nll" or sft.get("label_smoothing_factor"):
            problems.append("distill.weight_temperature: needs the plain loss; leave loss_type and label_smoothing out")
    problems += _validation_problems(section, trainer[section.objective])
    for name in ("dpo", "kto"):
        if trainer[name].get("beta", 1) <= 0:
            problems.append(f"distill.{name}.beta: must be above 0, got {trainer[name]['beta']:g}")
    if trainer["kto"].get("per_device_train_batch_size", 2) < 2:
        problems.append("distill.kto.per_device_train_batch_size: at least 2, as answers of one batch are compared")
    problems += _lora_problems(lora)
    if (kind := given.get("bnb_4bit_quant_type", "nf4")) not in ("nf4", "fp4"):
        problems.append(f"distill.quantization.bnb_4bit_quant_type: expected nf4 or fp4, got {kind!r:.40}")
    if section.method == "lora" and section.quantization:
        problems.append("distill.quantization: has no effect with method 'lora'; remove it, or set method to 'qlora'")
    if problems:
        raise ConfigError(f"distill has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems=problems)

    merged = quantization(section.model_copy(update={"quantization": given}))
    settings = _TRAINER_DEFAULTS | BY_OBJECTIVE[section.objective].defaults | trainer[section.objective]
    best = settings.pop("metric_for_best_model", "loss").removeprefix("eval_")
    if not settings.pop("load_best_model_at_end", section.patience is not None):
        best = None
    if best or section.validation_prompts:
        settings.setdefault("eval_strategy", "epoch")
    return Plan(section.method, section.objective, settings, LORA_DEFAULTS | lora, merged, best)


def lora_config(lora: Mapping[str, Any], model: Any) -> LoraConfig:
    """Return peft's configuration of the adapter for a model.

    Where a model keeps its experts in one tensor, peft would read "all-linear" as these tensors, too, and the adapter
    could not be served by vLLM. There it means the linear layers outside the experts.
    """
    targets = lora["target_modules"]
    if targets == "all-linear" and has_fused_experts(model):
        wide = model.get_output_embeddings()
        linear = {n for n, m in model.named_modules() if hasattr(m, "in_features") and m is not wide}
        targets = sorted({name.rpartition(".")[2] for name in linear} - _OF_EXPERTS)
    return LoraConfig(task_type="CAUSAL_LM", **{**lora, "target_modules": targets})


@contextlib.contextmanager
def checked_targets() -> Iterator[None]:
    """Raise peft's error about target modules that a model lacks as a ConfigError that names the key."""
    try:
        yield
    except ValueError as e:
        if "arget modules" in str(e):  # they match no module, or none that fits
            raise ConfigError(f"distill.lora.target_modules: {e}") from None
        raise


def has_fused_experts(model: Any) -> bool:
    """Return whether the model keeps the weights of its experts in one tensor a layer."""
    return any(p.dim() == 3 and "experts" in name for name, p in model.named_parameters())


def _lora_problems(lora: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the settings of an adapter that vLLM has to serve beside its base."""
    problems = []
    if lora.get("init_lora_weights", True) not in _PLAIN_INITS:
        problems.append(
            "distill.lora.init_lora_weights: changes the base model, so the adapter would not fit the published one; "
            "use true, 'gaussian' or 'orthogonal'"
        )
    if lora.get("bias", "none") != "none":
        problems.append(f"distill.lora.bias: {_NOT_A_PLAIN_ADAPTER}")
    if lora.get("r", 1) < 1:
        problems.append(f"distill.lora.r: must be at least 1, got {lora['r']}")
    targets = lora.get("target_modules")
    for name in ("lm_head", "embed_tokens"):
        if isinstance(targets, (list, tuple)) and name in targets:
            problems.append(
                f"distill.lora.target_modules: '{name}' can't be adapted here; "
                "name linear layers, or leave 'all-linear'"
            )
    return problems


def _validation_problems(section: DistillConfig, settings: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the settings of the validations while training."""
    place, out = f"distill.{section.objective}", []
    metric = settings.get("metric_for_best_model")
    if metric is not None and metric.removeprefix("eval_") not in ("loss", "reward"):
        out.append(f"{place}.metric_for_best_model: expected loss or reward, got {metric!r:.40}")
    if metric in ("reward", "eval_reward") and not section.validation_prompts:
        out.append(f"{place}.metric_for_best_model: reward needs distill.validation_prompts")
    if metric is not None and not settings.get("load_best_model_at_end", section.patience is not None):
        out.append(f"{place}.metric_for_best_model: has no effect without load_best_model_at_end")
    if section.patience is not None and not settings.get("load_best_model_at_end", True):
        out.append(f"distill.patience: needs {place}.load_best_model_at_end")
    if settings.get("lr_scheduler_type") == "reduce_lr_on_plateau" and settings.get("load_best_model_at_end"):
        out.append(f"{place}.lr_scheduler_type: reduce_lr_on_plateau keeps a best value of its own; choose another")
    if settings.get("eval_steps") is not None and settings.get("eval_strategy") != "steps":
        out.append(f"{place}.eval_steps: has no effect without eval_strategy: steps")
    validates = section.validation_prompts or section.patience or settings.get("load_best_model_at_end")
    if validates and settings.get("eval_strategy", "epoch") == "no":
        out.append(f"{place}.eval_strategy: there is no validation to choose by; use steps or epoch")
    return out


def _checked_settings(
    name: str,
    given: Mapping[str, Any],
    known: Collection[str],
    refused: Mapping[str, str],
    types: Mapping[str, Any],
    problems: list[str],
) -> dict[str, Any]:
    """Return the section with values of the right type (YAML reads `2e-4` as text); append problems to `problems`."""
    out: dict[str, Any] = {}
    for key, value in given.items():
        where = f"distill.{name}.{key}"
        if key in refused:
            if value not in (None, False, [], {}):  # explicitly off is fine
                problems.append(f"{where}: {refused[key]}")
        elif key not in known:
            alias = _MEANT.get(key)
            close = (
                [alias] if alias in known else difflib.get_close_matches(key, sorted(set(known) - set(refused)), n=1)
            )
            problems.append(f"{where}: unknown key" + (f"; did you mean '{close[0]}'?" if close else ""))
        elif key in types:
            try:
                if key == "eval_strategy" and value is False:
                    value = "no"  # YAML reads a bare no as false
                value = no_switch(value, types[key])
                if types[key] == list[str] and isinstance(value, str):
                    value = [value]
                out[key] = TypeAdapter(types[key], config=_config(types[key])).validate_python(value)
            except ValidationError as e:
                problems.append(f"{where}: {e.errors()[0]['msg'].replace('Input should', 'should')}, got {value!r}")
            except ValueError as e:
                problems.append(f"{where}: {e}")
        else:
            out[key] = value
    return out


def _config(hint: Any) -> ConfigDict | None:
    # pydantic refuses a config for a dataclass type with its own config; none of the scalar keys is one.
    return None if hasattr(hint, "__dataclass_fields__") else ConfigDict(arbitrary_types_allowed=True)


def check_section(section: DistillConfig) -> None:
    """Check keys, types and values of `distill:` by building the configurations of the training; else ConfigError."""
    plan = plan_of(section)
    builders: dict[str, Callable[[], Any]] = {
        plan.objective: (
            lambda: BY_OBJECTIVE[plan.objective].config(
                output_dir="unused", use_cpu=True, report_to="none", **plan.settings
            )
        ),
        "lora": lambda: LoraConfig(task_type="CAUSAL_LM", **plan.lora),
        "quantization": lambda: BitsAndBytesConfig(**(plan.quantization or {})),
    }
    problems = []
    for name, build in builders.items():
        try:
            build()
        except (TypeError, ValueError, AttributeError) as e:
            problems.append(f"distill.{name}: {' '.join(str(e).split())[:300]}")
    ranks = [plan.lora["r"], *(plan.lora.get("rank_pattern") or {}).values()]
    if max(ranks) > LORA_RANKS[-1]:
        problems.append(f"distill.lora.r: vLLM serves ranks up to {LORA_RANKS[-1]}, got {max(ranks)}")
    if problems:
        raise ConfigError(f"distill has {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)
