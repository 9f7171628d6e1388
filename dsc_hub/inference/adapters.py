"""Checks of an adapter made by others: can it be scored here, and how was it trained? Loads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsc_hub.config.training import DistillConfig
from dsc_hub.config.untrusted import QUANTIZATION
from dsc_hub.errors import ConfigError
from dsc_hub.inference.base_model import BaseModel
from dsc_hub.system import plain_yaml
from dsc_hub.system.files import read_object

WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS)


def check_adapter(reference: str, folder: Path, model: BaseModel, published_as: str | None) -> None:
    """Raise ConfigError unless the folder holds a LoRA adapter for the recipe's base model.

    A base model of the Hub is compared by its whole id, and by its revision where the adapter names a commit. One from
    a package or a folder is compared by the last part of the id: published, it has an owner. `published_as` is the name
    under which the recipe publishes it.
    """
    config = read_object(folder / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        raise ConfigError(
            f"{reference} is no LoRA adapter (peft_type {config.get('peft_type')!r:.40})",
            "vLLM serves LoRA adapters beside their base, and no others.",
        )
    _largest_rank(reference, config)
    base_name = str(config.get("base_model_name_or_path") or "")
    names = {name.rstrip("/").lower() for name in (model.id, model.source, model.upstream, published_as) if name}
    is_on_hub = model.source == model.id
    if not base_name or not (
        base_name.rstrip("/").lower() in names or (not is_on_hub and _last(base_name) in map(_last, names))
    ):
        raise ConfigError(
            f"{reference} was trained on '{base_name or 'a base that it does not name'}', and the recipe's model is "
            f"'{model.upstream or model.id}'",
            "Name a recipe with that base model, or override model.source (student.source, if it has a student).",
        )
    revision = str(config.get("revision") or "")
    if is_on_hub and re.fullmatch(r"[0-9a-f]{40}", revision) and revision != model.commit:
        raise ConfigError(
            f"{reference} was trained on {base_name} at {revision}, and the recipe's model is at {model.commit}",
            f"Score it on the weights that it was trained on: model.revision={revision}",
        )


def _largest_rank(reference: str, config: Mapping[str, Any]) -> int:
    """Return the largest rank that an adapter_config.json names; ConfigError if one is no whole number above 0."""
    pattern = config.get("rank_pattern") or {}
    largest = 0
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [str(pattern)])):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(
                f"{reference} is no LoRA adapter: adapter_config.json has the rank {rank!r:.40}, expected a number",
                "vLLM serves LoRA adapters beside their base, and no others.",
            )
        largest = max(largest, rank)
    return largest


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


def has_effect(adapter: Path) -> bool:
    """Return whether an adapter changes its base at all: some weight of a second factor (lora_B) is not zero."""
    from safetensors import deserialize  # into bytes: numpy has no bfloat16

    weights = deserialize((adapter / WEIGHTS).read_bytes())  # type: ignore[no-untyped-call]
    return any(any(tensor["data"]) for name, tensor in weights if ".lora_B." in name)


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank accepts


def max_lora_rank(adapter: Path) -> int:
    """Return the smallest --max-lora-rank that serves an adapter folder, by its adapter_config.json."""
    rank = _largest_rank(str(adapter), read_object(adapter / "adapter_config.json"))
    return next((r for r in LORA_RANKS if r >= rank), rank)
