"""Which model each part of a run loads, and where it answers: the one place that says so.

`model` writes the chains. The base is what is trained, and what the adapter lies on: the `student`, or without one
`model` itself. With a student `model` is also called the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from dsc_hub.config.arms import ADAPTER, ARMS, TEACHER, models_of
from dsc_hub.config.recipe import Recipe

Place = Literal["model", "student"]  # section of the recipe that names a model


def base_place(recipe: Recipe) -> Place:
    """Return the section that names the base."""
    return "student" if recipe.student else "model"


def is_at_endpoints(recipe: Recipe, model: str | None) -> bool:
    """Return whether a model of the evaluation (None: the base) answers at `serving.endpoints`, not at a vLLM of ours.

    These have neither the adapter nor the student. Where the adapter is compared with its base, both run on the same
    weights and the same server, so the base is served here, too.
    """
    if not recipe.serving.endpoints or model == ADAPTER:
        return False
    return model == TEACHER or not (recipe.student or ADAPTER in models_of(recipe.evaluation.arms))


def ways_by_model(recipe: Recipe) -> dict[str | None, set[str]]:
    """Return the ways in which each model of the evaluation (None: the base) answers a prompt and sample."""
    ways: dict[str | None, set[str]] = {}
    for arm in (ARMS[name] for name in recipe.evaluation.arms):
        ways.setdefault(arm.model, set()).add(arm.way)
    return ways


def is_priced(recipe: Recipe, model: str | None) -> bool:
    """Return whether `serving.price` is of the server at which a model of the evaluation answers."""
    return not recipe.serving.endpoints or is_at_endpoints(recipe, model)


def runs_chains(recipe: Recipe, place: Place) -> bool:
    """Return whether a model answers, criticises and revises; a student does in arms of the evaluation only."""
    chains = (ARMS[arm].model for arm in recipe.evaluation.arms if ARMS[arm].way == "chain")
    return place == "model" or any(model != TEACHER for model in chains)


def models_by_server(recipe: Recipe) -> list[tuple[str | None, ...]]:
    """Return the models per server start: base and adapter together; a teacher has its own servers."""
    models = models_of(recipe.evaluation.arms)
    trained = tuple(model for model in models if model != TEACHER)
    return [*([trained] if trained else []), *([(TEACHER,)] if TEACHER in models else [])]


def weights_loaded(recipe: Recipe, stages: Iterable[str]) -> set[Place]:
    """Return which models' weights these stages load on this machine: no others are fetched for them."""
    base = base_place(recipe)
    arms = {model for model in models_of(recipe.evaluation.arms) if not is_at_endpoints(recipe, model)}
    of_stage: dict[str, set[Place]] = {
        "sampling": set() if recipe.serving.endpoints else {"model"},
        "distill": {base},
        "evaluation": {"model" if model == TEACHER else base for model in arms},
        "publish": {base} if recipe.publish.base else set(),
    }
    return {place for stage in stages for place in of_stage.get(stage, set())}


def licences(recipe: Recipe, base: str | None) -> tuple[str | None, str | None]:
    """Return the licences of the published dataset and adapter, None: unknown; `base` is that of the base's weights.

    The dataset's is only known if the recipe names it where others have a say in its rows: whoever made the prompts, or
    the model of another licence, or of a provider's terms, that wrote the answers for a student.
    """
    named = recipe.publish.license
    is_own = not (recipe.prompts.dataset or recipe.student or recipe.model.api_name)
    return named or (base if is_own else None), named or base
