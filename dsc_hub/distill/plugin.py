"""How the model lies on the processes of a training: whole in each (DDP), or divided among them (FSDP2).

That is chosen by the configuration of accelerate that starts them. Reading it needs no torch, so that what training
would refuse is refused before hours of sampling.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.training import quantization
from dsc_hub.errors import ConfigError
from dsc_hub.system.launch import world_size

_SET = ("true", "1")


def is_divided(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether accelerate divides the model of this process's training among several."""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() in _SET and world_size(environment) > 1


def check_launched(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError if the plugin of the launcher that started this process can't do what the recipe asks for."""
    _check(
        recipe,
        deepspeed=environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _SET,
        fsdp=environment.get("FSDP_VERSION", "1") if is_divided(environment) else "",
    )


def check_configuration(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """ConfigError if the plugin that a configuration of accelerate names can't do what the recipe asks for."""
    kind, options = settings.get("distributed_type"), settings.get("fsdp_config") or {}
    _check(
        recipe,
        deepspeed=kind == "DEEPSPEED",
        fsdp=str(options.get("fsdp_version", 1)) if kind == "FSDP" else "",
    )


def _check(recipe: Recipe, *, deepspeed: bool, fsdp: str) -> None:
    """`fsdp` is its version; "" without it."""
    if deepspeed:
        raise ConfigError(
            "accelerate is configured for DeepSpeed; dsc trains with DDP or FSDP2",
            "recipes/accelerate/fsdp.yaml divides a model among GPUs, as ZeRO-3 does.",
        )
    if not fsdp:
        return
    if fsdp != "2":
        raise ConfigError(
            f"accelerate is configured for version {fsdp} of FSDP; dsc trains with version 2",
            "Set fsdp_version: 2 in its configuration, as in recipes/accelerate/fsdp.yaml.",
        )
    if recipe.distill.validation_prompts or recipe.rounds > 1:
        raise ConfigError(
            "rounds, distill.validation_prompts: answers can't be generated while the model is divided (FSDP)",
            "Leave them out: the best adapter can be chosen by its loss.",
        )
    if (quantization(recipe.distill) or {}).get("load_in_8bit"):
        raise ConfigError(
            "distill.quantization: weights of 8 bits can't be divided among GPUs (FSDP)",
            "Use the 4-bit quantization, which is the default, or method: lora.",
        )
