"""Arms of the base and of the teacher, which do not depend on the adapter, are reused from a run with their inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from dsc_hub.config.arms import ADAPTER, ARMS, TEACHER, model_files, models_of
from dsc_hub.config.models import is_at_endpoints
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.training import quantization
from dsc_hub.records import Answer
from dsc_hub.runs.reuse import copy_files
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_object, write_json
from dsc_hub.system.hashing import digest


def reusable_models(recipe: Recipe) -> list[str | None]:
    """Return the models of the recipe's arms whose answers do not depend on the adapter."""
    return [model for model in models_of(recipe.evaluation.arms) if model != ADAPTER]


def marker_of(model: str | None) -> str:
    """Return the file that is written when a model's arms are complete: their digest, and nats of neutral texts."""
    return f"evaluation/{model or 'base'}_arms.json"


def arms_digest(recipe: Recipe, model: str | None, sampling: str, student: str = "") -> str:
    """Return the digest of everything that the answers of the base (None) or of the teacher depend on.

    That is the fingerprint of the sampling stage (`sampling`: model, prompts, chain, generation and reward), the
    evaluation settings and, for the base, the `student`'s identity ("": there is none) and the served weights (training
    determines their quantisation).
    """
    e, arms = recipe.evaluation, recipe.evaluation.arms
    names = [name for name in ARMS if name in arms and ARMS[name].model == model]
    if model == TEACHER:
        return digest(sampling, e.samples, e.split, e.temperature, names, TEACHER)
    is_rounded = ADAPTER in models_of(arms) and e.weights == "rounded"
    weights = quantization(recipe.distill) if is_rounded else None
    more = [student] if student else []
    if recipe.serving.endpoints and not is_at_endpoints(recipe, model):
        more.append("on a server of ours")
    return digest(sampling, e.samples, e.split, e.temperature, names, weights, *more)


def adopt_arms(run: Run, model: str | None, inputs: str, siblings: Iterable[Run]) -> str:
    """Copy a model's complete arms from a sibling run, if this run has none; return the sibling's name, or ""."""
    files = (*model_files(model), marker_of(model))  # the first one is written last: without it, nothing was reused
    if run[files[0]].exists():
        return ""
    for source in siblings:
        if source.folder != run.folder and finished_arms(source, model, inputs) is not None:
            run["evaluation"].mkdir(exist_ok=True)
            copy_files(run, source, files)
            return source.folder.name
    return ""


def finished_arms(run: Run, model: str | None, inputs: str) -> dict[str, dict[str, float]] | None:
    """Return the nats of neutral texts by arm if this run has a model's complete arms with this digest; else None."""
    if not (run[marker_of(model)].is_file() and run[model_files(model)[0]].is_file()):
        return None
    recorded = read_object(run[marker_of(model)])
    return recorded["neutral"] if recorded.get("digest") == inputs else None


def finish_arms(
    run: Run,
    recipe: Recipe,
    model: str | None,
    inputs: str,
    answers: Iterable[Answer],
    prompts: int,
    neutral: Mapping[str, Mapping[str, float]],
) -> None:
    """Write the marker of a model's arms if they are complete, that is, if each has all samples of all `prompts`."""
    each = prompts * recipe.evaluation.samples
    names = [name for name in recipe.evaluation.arms if ARMS[name].model == model]
    counts = Counter(a.arm for a in answers)
    if names and all(counts[name] == each for name in names):
        measured = {name: dict(neutral[name]) for name in names if name in neutral}
        write_json(run[marker_of(model)], {"digest": inputs, "neutral": measured})
