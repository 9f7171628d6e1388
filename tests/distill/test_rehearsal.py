"""What training would refuse after hours of sampling is refused before: one step on a one-layer model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.recipe_files import load_recipe_file
from dsc_hub.distill import launcher
from dsc_hub.distill.rehearsal import rehearse, size_of
from dsc_hub.errors import ConfigError, DataError


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe_file(recipe_file)


def changed(recipe: Recipe, **section: object) -> Recipe:
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update=section)})


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("has_validation", [True, False])
def test_what_trains_passes_and_leaves_nothing(recipe: Recipe, base: Path, tmp_path: Path, method, has_validation):
    files = sorted(p.name for p in base.iterdir())
    rehearse(changed(recipe, method=method, sft={"num_train_epochs": 3, "packing": True}), base, has_validation)
    assert sorted(p.name for p in base.iterdir()) == files


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sft": {"padding_free": True}}, "padding_free"),
        ({"sft": {"lr_scheduler_type": "cosine_with_min_lr"}}, "min_lr"),
        ({"sft": {"use_liger_kernel": True}}, "liger"),
        ({"sft": {"router_aux_loss_coef": 0.1}}, "Mixture-of-Experts"),
        ({"sft": {"optim": "galore_adamw"}}, "galore"),
        ({"lora": {"target_modules": "lm_head"}}, "lm_head"),
        ({"lora": {"target_modules": ["nothing"]}}, "target_modules"),
        ({"sft": {"loss_type": "of my own"}}, "loss"),
    ],
)
def test_what_training_would_refuse_is_refused(recipe: Recipe, base: Path, section, message):
    with pytest.raises(ConfigError) as error:
        rehearse(changed(recipe, **section), base, has_validation=True)
    assert message in str(error.value)


def test_a_system_text_that_leaves_no_room_is_refused(recipe: Recipe, base: Path):
    crowded = recipe.model_copy(update={"chain": recipe.chain.model_copy(update={"system": "Be brief. " * 900})})
    with pytest.raises(DataError, match=r"longer than serving\.context"):
        rehearse(crowded, base, has_validation=True)


def test_in_a_child_it_needs_no_weights_and_what_passed_is_remembered(
    recipe: Recipe, base: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))
    folder = tmp_path / "without weights"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert launcher.rehearse_in_child(recipe, folder, True).problems == []
    (problem,) = launcher.rehearse_in_child(changed(recipe, sft={"padding_free": True}), folder, True).problems
    assert "padding_free" in problem
    wrong = changed(recipe, lora={"target_modules": ["nothing"]})
    assert "target_modules" in launcher.rehearse_in_child(wrong, folder, True).problems[0]
    monkeypatch.setattr(subprocess, "run", None)
    assert launcher.rehearse_in_child(recipe, folder, True).problems == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(TypeError):  # another model: it would run again
        launcher.rehearse_in_child(recipe, folder, True)


def test_a_rehearsal_that_takes_too_much_says_nothing_about_the_training(
    recipe: Recipe, base: Path, tmp_path, monkeypatch
):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    size = size_of(recipe, base)
    printed = f"{size.model_dump_json()}\n{launcher.REHEARSES}\n"

    def killed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -9, printed, "")

    def slow(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 1, output=printed.encode())

    for child in (killed, slow):
        monkeypatch.setattr(subprocess, "run", child)
        assert launcher.rehearse_in_child(recipe, base, True) == ([], size)


def test_a_base_that_is_quantised_already_is_refused_by_the_plan(dsc, recipe_file: Path, base: Path, tmp_path: Path):
    folder = tmp_path / "gptq"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    done = dsc("plan", str(recipe_file), f"model.source={folder}", code=2)
    assert "quantised already (gptq)" in done.stderr and "name the model that they were made from" in done.stderr
