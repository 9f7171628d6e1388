"""Checks of an adapter made by others: can it be scored here, and how was it trained? Loads no weights."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from dsc_hub.config.recipe import DistillConfig
from dsc_hub.config.untrusted import QUANTIZATION
from dsc_hub.errors import ConfigError
from dsc_hub.inference.base_model import BaseModel
from dsc_hub.system import plain_yaml
from dsc_hub.system.files import read_json, read_object

FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_adapter(reference: str, folder: Path, model: BaseModel, published_as: str | None) -> None:
    """Raise ConfigError unless the folder holds a LoRA adapter for the recipe's base model.

    The base model is compared by its Hub id or by the last part of an id. `published_as` is the name of a base model
    that was published from a package: such a base has another owner and name.
    """
    config = read_object(folder / "adapter_config.json")
    rank = config.get("r")
    if config.get("peft_type", "LORA") != "LORA" or not isinstance(rank, int) or rank < 1:
        raise ConfigError(
            f"{reference} is no LoRA adapter (peft_type {config.get('peft_type')!r:.40}, r {rank!r:.40})",
            "vLLM serves LoRA adapters beside their base, and no others.",
        )
    base_name = str(config.get("base_model_name_or_path") or "")
    accepted_names = {_last(name) for name in (model.id, model.source, model.upstream, published_as)} - {""}
    if _last(base_name) not in accepted_names:
        raise ConfigError(
            f"{reference} was trained on '{base_name or 'a base that it does not name'}', and the recipe's model is "
            f"'{model.upstream or model.id}'",
            "Name a recipe with that base model, or override model.source.",
        )


def _last(name: str | None) -> str:
    return (name or "").rstrip("/").rpartition("/")[2].lower()


def trained_how(reference: str, folder: Path) -> DistillConfig:
    """Return method and quantization from the recipe.yaml in the adapter's folder; plain LoRA if there is none.

    Without a recipe it is unknown on which rounding of the base the adapter was trained. A pulled recipe is data:
    nothing else is read from it, and settings that the libraries do not know raise ConfigError.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        return DistillConfig(method="lora")
    try:
        section = plain_yaml.load_plain_yaml(file.read_text(encoding="utf-8"))["distill"]
        if not isinstance(section, dict):
            raise TypeError(f"distill is a {type(section).__name__}")
        settings = {key: section[key] for key in ("method", "quantization") if key in section}
        json.dumps(settings)  # YAML has types such as dates that no setting has
        config = DistillConfig.model_validate(settings)
        if unknown := sorted(config.quantization.keys() - QUANTIZATION):
            raise ValueError(f"quantization.{unknown[0]}")
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as e:
        raise ConfigError(
            f"{reference} has a recipe.yaml that does not say how the adapter was trained: {type(e).__name__}",
            "Ask its owner; an adapter repo without a recipe.yaml is scored as plain LoRA.",
        ) from None
    return config


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank accepts


def max_lora_rank(adapter: Path) -> int:
    """Return the smallest --max-lora-rank that serves an adapter folder, by its adapter_config.json."""
    config = read_json(adapter / "adapter_config.json")
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    return next((r for r in LORA_RANKS if r >= rank), rank)
