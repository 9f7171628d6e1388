"""How the model lies on the processes of a training: whole in each (DDP), or divided among them (FSDP2).

That is chosen by the configuration of accelerate that starts them. Reading it needs no torch, so that what training
would refuse is refused before hours of sampling.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.training import quantization
from dsc_hub.errors import ConfigError
from dsc_hub.system.launch import world_size

_SET = ("true", "1")
# Settings of FSDP with which the adapter could not be saved as peft and vLLM read it.
_UNFIT_OPTIONS = {
    "activation_checkpointing": "it renames the adapter's weights; gradient_checkpointing, the default, does the same",
    "offload_params": "weights on the CPU can't be gathered over the GPUs' connection",
}


def is_divided(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether accelerate divides the model of this process's training among several."""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() in _SET and world_size(environment) > 1


def check_launched(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError if the plugin of the launcher that started this process can't do what the recipe asks for."""

    def is_set(name: str) -> bool:
        return environment.get(name, "").lower() in _SET

    other = next((n for n in ("DEEPSPEED", "MEGATRON_LM") if is_set(f"ACCELERATE_USE_{n}")), "")
    options = {key: is_set(f"FSDP_{key.upper()}") for key in _UNFIT_OPTIONS}
    version = environment.get("FSDP_VERSION", "1") if is_divided(environment) else ""
    _check_plugin(recipe, other, version, [key for key, value in options.items() if value])


def check_configuration(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """ConfigError if the plugin that a configuration of accelerate names can't do what the recipe asks for."""
    kind, options = str(settings.get("distributed_type") or "NO"), settings.get("fsdp_config") or {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"distill.launch: fsdp_config: expected settings, got {options!r:.60}")
    version = str(options.get("fsdp_version", 1)) if kind == "FSDP" else ""
    other = kind if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_") else ""
    _check_plugin(recipe, other, version, [key for key in _UNFIT_OPTIONS if options.get(f"fsdp_{key}")])


def _check_plugin(recipe: Recipe, other: str, fsdp: str, refused: Sequence[str]) -> None:
    """`other` is another plugin than DDP and FSDP, `fsdp` the version of FSDP ("" without), `refused` its settings."""
    if other:
        raise ConfigError(
            f"accelerate is configured for {other}; dsc trains with DDP or FSDP2",
            "recipes/accelerate/fsdp.yaml divides a model among GPUs, as ZeRO-3 does.",
        )
    if not fsdp:
        return
    if fsdp != "2":
        raise ConfigError(
            f"accelerate is configured for version {fsdp} of FSDP; dsc trains with version 2",
            "Set fsdp_version: 2 in its configuration, as in recipes/accelerate/fsdp.yaml.",
        )
    if refused:
        raise ConfigError(f"fsdp_{refused[0]}: {_UNFIT_OPTIONS[refused[0]]}", "Set it to false.")
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
