"""Conversion of the recipe's `distill` section to the configurations of trl, peft and bitsandbytes, and its checks."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import (
    BitsAndBytesConfig,
)
from trl import SFTConfig

from dsc_hub.config.messages import no_switch
from dsc_hub.config.recipe import OWNED_SFT_KEYS, DistillConfig, quantization
from dsc_hub.distill.launcher import DEFAULT_RANK
from dsc_hub.errors import ConfigError
from dsc_hub.inference.adapters import LORA_RANKS

LORA_DEFAULTS: dict[str, Any] = {
    "r": DEFAULT_RANK,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
}
SFT_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,  # trl's default, 2e-5, is for full fine-tuning
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "packing": False,
}

_NOT_A_PLAIN_ADAPTER = "the adapter could not be served by vLLM or loaded as a plain LoRA; remove it"
_REFUSED_SFT = {
    "trust_remote_code": "a recipe is data and never runs code of others; remove it",
    "load_best_model_at_end": "only the last checkpoints are kept, to go on from; remove it",
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
# A served adapter is added to the published base; any other init changes the base itself.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


class Plan(typing.NamedTuple):
    """The recipe's three sections, merged with the defaults and checked."""

    method: typing.Literal["qlora", "lora"]
    sft: dict[str, Any]
    lora: dict[str, Any]
    quantization: dict[str, Any] | None


def plan_of(section: DistillConfig) -> Plan:
    """Check the keys and types of `distill:`; ConfigError with every problem at once."""
    problems: list[str] = []
    sft_fields = {f for f in SFTConfig.__dataclass_fields__ if SFTConfig.__dataclass_fields__[f].init}
    lora_fields = {f for f in LoraConfig.__dataclass_fields__ if LoraConfig.__dataclass_fields__[f].init}
    bnb_parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters.values()
    bnb_fields = {p.name for p in bnb_parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    refused_sft = _REFUSED_SFT | dict.fromkeys(OWNED_SFT_KEYS, "set by dsc itself; remove it")
    sft = _checked_settings("sft", section.sft, sft_fields, refused_sft, typing.get_type_hints(SFTConfig), problems)
    lora = _checked_settings(
        "lora", section.lora, lora_fields, _REFUSED_LORA, typing.get_type_hints(LoraConfig), problems
    )
    given = _checked_settings("quantization", section.quantization, bnb_fields, _REFUSED_QUANTIZATION, {}, problems)

    if sft.get("packing") and sft.get("packing_strategy", "bfd") != "bfd":
        problems.append("distill.sft.packing_strategy: only 'bfd' keeps rows whole, and the end of an answer with them")
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
    if (kind := given.get("bnb_4bit_quant_type", "nf4")) not in ("nf4", "fp4"):
        problems.append(f"distill.quantization.bnb_4bit_quant_type: expected nf4 or fp4, got {kind!r:.40}")
    if section.method == "lora" and section.quantization:
        problems.append("distill.quantization: has no effect with method 'lora'; remove it, or set method to 'qlora'")
    if problems:
        raise ConfigError(f"distill has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems=problems)

    merged = quantization(section.model_copy(update={"quantization": given}))
    return Plan(section.method, SFT_DEFAULTS | sft, LORA_DEFAULTS | lora, merged)


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
                value = no_switch(value, types[key])
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
        "sft": lambda: SFTConfig(output_dir="unused", use_cpu=True, report_to="none", **plan.sft),
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
