"""A fingerprint per stage: equal fingerprints mean equal inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc_hub.config.recipe import SCORERS, Recipe, all_scorers
from dsc_hub.config.stages import STAGES
from dsc_hub.system.hashing import digest


def stage_fingerprints(recipe: Recipe, identity: Mapping[str, str]) -> dict[str, str]:
    """A fingerprint per stage, each chained to the one before: equal fingerprints mean equal inputs.

    `identity` holds what the recipe only names: `prompts` (hash of the files' content), `model`, and the places of `all_scorers`
    (commit or checksum; "" for a second or third scorer that isn't there). How fast the work is done (concurrency, memory, batches of a scorer) is left out;
    the number of training processes is in, for it multiplies the batch.

    Settings at their defaults are left out, so that a dsc with a new setting goes on with what an older one did. The number at the
    head of each stage goes up when a default, or what the stage does, changes.
    """
    r = recipe.model_dump(mode="json", exclude_defaults=True)

    def of(section: str, *left_out: str) -> dict[str, Any]:
        return {k: v for k, v in (r.get(section) or {}).items() if k not in left_out}

    # Context is in: it decides which prompts fit. Endpoints are in: another server may hold another model.
    serving = {k: v for k, v in of("serving").items() if k in ("context", "endpoints", "served_model")}
    reward, second, third = (of(key, "batch_size") for key in SCORERS.values())
    more = [identity[place] for place in all_scorers(recipe) if place not in SCORERS.values()]
    own: dict[str, Any] = {
        "prompts": [3, of("prompts"), identity["prompts"], recipe.seed],
        "sampling": [
            5,
            identity["model"],
            of("chain"),
            of("hygiene"),
            of("generation"),
            serving,
            reward,
            identity["reward"],
            *more,
        ],
        "dataset": [3, of("dataset")],
        "distill": [2, of("distill")],
        "evaluation": [8, of("evaluation"), second, identity["second_scorer"], third, identity["third_scorer"]],
        "report": [3, recipe.name, recipe.description],
        "cards": [3, of("publish"), of("model")],
        "publish": [1],
    }
    out: dict[str, str] = {}
    before = ""
    for stage in STAGES:
        before = out[stage] = digest(before, own[stage])
    return out
