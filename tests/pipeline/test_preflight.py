"""What `dsc plan` says before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc_hub.config.recipe import Recipe
from dsc_hub.pipeline.preflight import adapter_bytes, say_if_the_model_may_think
from dsc_hub.system.files import write_json
from tests import fixture_run

# SmolLM2-135M: its LoRA of rank 16 has 4,884,480 parameters.
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def test_the_disk_for_checkpoints_is_planned_for_the_adapter_that_will_be_trained(tmp_path: Path):
    assert adapter_bytes(tmp_path, 16) is None  # no config.json
    write_json(tmp_path / "config.json", SMOLLM2)
    assert adapter_bytes(tmp_path, 16) == 4_884_480 * 3 * 16
    assert adapter_bytes(tmp_path, 32) == 2 * 4_884_480 * 3 * 16
    assert adapter_bytes(tmp_path, "16") is None
    write_json(tmp_path / "config.json", SMOLLM2 | {"num_hidden_layers": None})
    assert adapter_bytes(tmp_path, 16) is None


@pytest.mark.parametrize(
    ("template", "extra", "is_said"),
    [
        ("{% if enable_thinking %}<think>{% endif %}", {}, True),
        ("{% if enable_thinking %}<think>{% endif %}", {"chat_template_kwargs": {"enable_thinking": True}}, False),
        ("<|im_start|>assistant\n<think>\n", {"top_k": 3}, True),
        ("<|im_start|>assistant\n", {}, False),
    ],
)
def test_a_template_that_may_think_is_said_unless_the_recipe_decides(tmp_path, capsys, template, extra, is_said):
    recipe = Recipe.model_validate(fixture_run.facts()["recipe"])
    recipe = recipe.model_copy(update={"generation": recipe.generation.model_copy(update={"extra": extra})})
    (tmp_path / "chat_template.jinja").write_text(template)
    say_if_the_model_may_think(recipe, tmp_path)
    assert ("knows thinking" in capsys.readouterr().err) is is_said
