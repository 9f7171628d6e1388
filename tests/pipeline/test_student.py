"""A student: whose weights are fetched, whose tokenizer measures, and a teacher of which only the name is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dsc_hub.config import recipe_files
from dsc_hub.config.stages import NAMES
from dsc_hub.errors import ConfigError, ModelError, RunError
from dsc_hub.hub import client
from dsc_hub.inference import base_model
from dsc_hub.pipeline import fetch, preflight, run, session
from dsc_hub.pipeline.context import RunContext, record, set_owner
from dsc_hub.pipeline.resolve import resolve_recipe
from dsc_hub.records import Prompt
from dsc_hub.runs.facts import RunFacts
from dsc_hub.system.files import write_json

API = "model={source: 'api:big', license: null}"


def model_folder(folder: Path, positions: int = 8192) -> Path:
    """What is read of a model before its weights are loaded; one token a word."""
    folder.mkdir()
    write_json(folder / "config.json", {"max_position_embeddings": positions})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "small")


@pytest.fixture
def resolve(recipe_file: Path, tmp_path: Path, student: Path):
    def context(*overrides: str) -> RunContext:
        return resolve_recipe(str(recipe_file), [f"student.source={student}", *overrides], tmp_path / "runs")

    return context


def test_weights_are_fetched_for_the_stages_that_load_them_alone(resolve, tmp_path: Path, student: Path):
    teacher = model_folder(tmp_path / "large")
    context = resolve(f"model.source={teacher}")
    with context.run.lock():
        record(context)
        set_owner(context, None, ["prompts", "dataset"])
        assert (context.run.facts.model.folder, context.run.facts.base.folder) == (None, None)
        set_owner(context, None, ["sampling"])
        assert (context.run.facts.model.folder, context.run.facts.base.folder) == (str(teacher), None)
        set_owner(context, None, ["distill"])  # keeps what is known of the other
        facts = context.run.facts
    assert (facts.model.folder, facts.base.folder) == (str(teacher), str(student))
    assert (facts.model.id, facts.base.id) == ("large", "small") and facts.student == facts.base
    assert "the adapter names small" in facts.base.note and "the adapter" not in facts.model.note
    assert facts.identity["student"] == context.base.identity == f"{student}@{context.base.commit}"


def test_a_teacher_behind_an_api_is_a_name_and_never_loaded(resolve):
    context = resolve(API, "serving.endpoints=[http://127.0.0.1:9/v1]")
    with context.run.lock():
        record(context)
        set_owner(context, None, NAMES)
        facts = context.run.facts
    assert facts.identity["model"] == "api:big" and facts.model.id == "big" and facts.model.folder is None
    assert facts.model.license is None and (facts.model.commit, facts.base.folder is None) == ("", False)
    with pytest.raises(ModelError, match="has no weights"):
        base_model.materialize(context.model)
    with pytest.raises(RunError, match="not recorded as a folder"):
        facts.model.weights  # noqa: B018


def test_run_json_of_before_has_no_student_and_its_model_is_the_base(tmp_path: Path, recipe_file: Path):
    context = resolve_recipe(str(recipe_file), [f"model.source={model_folder(tmp_path / 'm')}"], tmp_path / "runs")
    with context.run.lock():
        record(context)
    raw = json.loads(context.run["run.json"].read_text())
    assert "student" not in raw and "student" not in raw["identity"]
    facts = RunFacts.model_validate(raw)
    assert facts.student is None and facts.base == facts.model and context.base is context.model


def test_chains_are_written_by_an_api_of_which_nothing_is_here(resolve, start, monkeypatch):
    monkeypatch.setattr(base_model, "materialize", lambda *_: pytest.fail("nothing of the teacher may be fetched"))
    bodies: list[dict] = []
    server = start(models=["other", "big"], bodies=bodies, others=False)
    context = resolve(API, f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]")
    with context.run.lock():
        record(context)
        set_owner(context, None, ["sampling"])
        for stage in ("prompts", "sampling", "dataset"):
            run.run_stage(context, stage)
    assert {body["model"] for body in bodies} == {"big"}
    assert context.run.result("sampling")["failed"] == 0 and context.run.result("dataset")["sft"]["train"] > 0
    published = {name: context.run.raw_facts[name] for name in ("model", "student", "identity")}
    assert str(server.server_port) not in json.dumps(published)


def test_a_server_of_ours_is_not_limited_by_numbers_for_the_recipe_s_servers(resolve, start):
    from dsc_hub.inference.servers import Endpoint

    urls = [f"http://127.0.0.1:{start(models=['big']).server_port}/v1" for _ in range(2)]
    context = resolve(API, f"serving.endpoints=[{', '.join(urls)}]", "serving.concurrency=[3, 4]")
    theirs = [Endpoint(url, "big", "k") for url in urls]
    ours = [Endpoint("http://127.0.0.1:1/v1", "base", "k", restart=lambda: None)]
    assert session.generator_of(context, theirs).concurrency == (3, 4)
    assert session.generator_of(context, ours).concurrency == "auto"
    assert session.processors(context) == (None, None)
    assert session.processors(context, at_endpoints=False)[0] is not None


def test_the_plan_says_who_teaches_and_what_is_not_checked(resolve, tmp_path: Path, capsys):
    preflight._say_who_teaches(resolve(API))
    said = capsys.readouterr().err
    assert "big is known by its name alone" in said and "is not checked" in said
    assert "big writes the rows that small is trained on" in said and "not known here" in said
    preflight._say_who_teaches(resolve(f"model={{source: {model_folder(tmp_path / 'large')}, license: mit}}"))
    said = capsys.readouterr().err
    assert "name alone" not in said and "its licence (mit)" in said


def test_an_api_needs_an_address_and_without_a_student_nothing_can_be_trained(
    resolve, recipe_file: Path, tmp_path: Path, start
):
    (problem,) = preflight._server_problems(resolve(API).recipe, ["sampling", "evaluation"])
    assert "no server is known at which big can be asked" in problem
    endpoints = f"serving.endpoints=[http://127.0.0.1:{start(models=['big']).server_port}/v1]"
    assert list(preflight._server_problems(resolve(API, endpoints).recipe, ["sampling", "evaluation"])) == []
    # What is sampled already needs no server, and so no key.
    assert list(preflight._server_problems(resolve(API).recipe, ["distill"])) == []
    alone = resolve_recipe(str(recipe_file), [API, endpoints], tmp_path / "runs")
    (problem,), need = preflight._check_training(alone, None, [], "publish")
    assert "api:big has no weights to train; name a student" in problem and need is None
    assert preflight._check_training(alone, None, [], "dataset") == ([], None)


@pytest.mark.parametrize(("arms", "runs_chains"), [("base, distilled", False), ("base, self_critique", True)])
def test_each_tokenizer_measures_what_its_model_is_asked(recipe_file: Path, tmp_path: Path, arms, runs_chains):
    recipe = recipe_files.load_recipe_file(
        recipe_file,
        [
            "student.source=org/small",
            f"evaluation.arms=[{arms}, teacher_self_critique]",
            "serving.context=300",
            "generation.max_new_tokens=128",
            "chain.system=Be kind.",
        ],
    )
    prompts = [Prompt("0" * 16, "Tell of film 1.", "film 1", "test")]
    teacher, small = model_folder(tmp_path / "large"), model_folder(tmp_path / "s", positions=256)
    (problem,) = preflight.too_long(recipe, prompts, teacher)
    assert "don't fit a context of 300 tokens; the longest needs 471 with its turns" in problem
    positions, *lengths = preflight.too_long(recipe, prompts, small, "student")
    assert positions == "serving.context: 300 is more than the student's 256 positions"
    assert ["300 tokens of the student; the longest needs 471" in length for length in lengths] == [True] * runs_chains


def test_a_template_is_checked_for_what_its_model_does(recipe_file: Path, tmp_path: Path, capsys):
    teacher, small = model_folder(tmp_path / "large"), model_folder(tmp_path / "s")
    one_turn = "{{ raise_exception('one turn only') if messages | length > 2 else messages[0].content ~ messages[-1].content }}"
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"  # rows have another prompt
    (small / "chat_template.jinja").write_text(one_turn)
    (teacher / "chat_template.jinja").write_text(rewriting)
    overrides = ("student.source=org/small", "evaluation.arms=[base, distilled, teacher]")
    recipe = recipe_files.load_recipe_file(recipe_file, overrides)
    assert preflight.template_problems(recipe, teacher) == preflight.template_problems(recipe, small, "student") == ()
    alone = recipe_files.load_recipe_file(recipe_file)
    assert "so training would show the model another prompt" in preflight.template_problems(alone, teacher)[0]
    chains = recipe_files.load_recipe_file(recipe_file, [overrides[0], "evaluation.arms=[base, self_critique]"])
    (problem,) = preflight.template_problems(chains, small, "student")
    assert problem.startswith("student.source: the model's chat template refuses the conversation of a chain")


def test_an_adapter_of_others_must_lie_on_the_student(resolve, tmp_path: Path, monkeypatch):
    context, folder = resolve(API, "serving.endpoints=[http://127.0.0.1:9/v1]"), tmp_path / "adapter"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/big"})
    monkeypatch.setattr(client, "pull_adapter", lambda repo: (folder, "c0ffee"))
    with pytest.raises(ConfigError, match="trained on 'org/big', and the recipe's model is 'small'"):
        run.evaluate_adapter(context, "hub:a/b")


def test_what_is_fetched_for_a_run_without_a_network_is_what_it_loads(resolve):
    small, big = (base_model.BaseModel(f"org/{name}", f"org/{name}", name, None) for name in ("small", "big"))
    context = replace(resolve(API, "serving.endpoints=[http://127.0.0.1:9/v1]"), student=small)
    assert fetch._models_of_hub(context) == {"student": ("org/small", "small")}
    assert fetch._loads_of_hub(context).keys() == {"student"}
    with_tokenizer = replace(context, model=big)  # at endpoints: nothing but its tokenizer is read
    assert fetch._models_of_hub(with_tokenizer) == {"student": ("org/small", "small")}
    assert fetch._loads_of_hub(with_tokenizer).keys() == {"model", "student"}
    served_here = replace(resolve(API), model=big, student=small)
    assert fetch._models_of_hub(served_here).keys() == {"model", "student"}
