"""An adapter that somebody else made: for which base model, and how it was trained. Reads its own folder, loads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dsc_hub.errors import ConfigError
from dsc_hub.models import BaseModel
from dsc_hub.runs import read_object


def check_base(reference: str, folder: Path, model: BaseModel) -> None:
    """ConfigError unless the adapter names the base model that the recipe means: by its Hub id, or by the last part of one
    (a base that was published from a package has an owner of its own)."""
    named = str(read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    ours = {model.id, model.source, model.upstream}
    if named in ours or named.rpartition("/")[2].lower() in {(o or "").rpartition("/")[2].lower() for o in ours}:
        return
    raise ConfigError(
        f"{reference} was trained on '{named or 'no base it names'}', and the recipe's model is '{model.upstream or model.id}'",
        "Name a recipe with that base model, or override model.source.",
    )


def trained_how(folder: Path) -> dict[str, Any]:
    """`method` and `quantization` of the recipe that lies beside the adapter; plain LoRA where none does, since then it is
    not known on which rounding of the base it was trained. A pulled recipe is data: nothing else is taken from it."""
    try:
        section = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["distill"]
        if section["method"] == "qlora" and isinstance(section.get("quantization", {}), dict):
            return {"method": "qlora", "quantization": section.get("quantization", {})}
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError):
        pass
    return {"method": "lora", "quantization": {}}
