"""An adapter that somebody else made: is it one that can be scored here, and how was it trained? Loads no weights."""

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


def check(reference: str, folder: Path, model: BaseModel, published_as: str | None) -> None:
    """ConfigError unless this is a LoRA adapter for the base model that the recipe means: by its Hub id, or by the last part
    of one (a base that was published from a package has an owner of its own, and the name `published_as`)."""
    config = read_object(folder / "adapter_config.json")
    rank = config.get("r")
    if config.get("peft_type", "LORA") != "LORA" or not isinstance(rank, int) or rank < 1:
        raise ConfigError(
            f"{reference} is no LoRA adapter (peft_type {config.get('peft_type')!r:.40}, r {rank!r:.40})",
            "vLLM serves LoRA adapters beside their base, and no others.",
        )
    named = str(config.get("base_model_name_or_path") or "")
    ours = {_last(name) for name in (model.id, model.source, model.upstream, published_as)} - {""}
    if _last(named) not in ours:
        raise ConfigError(
            f"{reference} was trained on '{named or 'a base that it does not name'}', and the recipe's model is "
            f"'{model.upstream or model.id}'",
            "Name a recipe with that base model, or override model.source.",
        )


def _last(name: str | None) -> str:
    return (name or "").rstrip("/").rpartition("/")[2].lower()


def trained_how(reference: str, folder: Path) -> DistillConfig:
    """Method and quantization by the recipe that lies beside the adapter; plain LoRA where none does, since then it is not
    known on which rounding of the base it was trained.

    A pulled recipe is data: nothing else is taken from it, and what the libraries don't know is a ConfigError.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        return DistillConfig(method="lora")
    try:
        section = plain_yaml.load(file.read_text(encoding="utf-8"))["distill"]
        if not isinstance(section, dict):
            raise TypeError(f"distill is a {type(section).__name__}")
        known = {key: section[key] for key in ("method", "quantization") if key in section}
        json.dumps(known)  # YAML knows dates and the like, which no setting is
        found = DistillConfig.model_validate(known)
        if unknown := sorted(found.quantization.keys() - QUANTIZATION):
            raise ValueError(f"quantization.{unknown[0]}")
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as e:
        raise ConfigError(
            f"{reference} has a recipe.yaml that does not say how the adapter was trained: {type(e).__name__}",
            "Ask its owner; an adapter repo without a recipe.yaml is scored as plain LoRA.",
        ) from None
    return found


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


def max_lora_rank(adapter: Path) -> int:
    """The smallest --max-lora-rank that serves an adapter folder, by its adapter_config.json."""
    config = read_json(adapter / "adapter_config.json")
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    return next((r for r in LORA_RANKS if r >= rank), rank)
