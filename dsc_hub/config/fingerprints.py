"""A fingerprint per stage: equal fingerprints mean equal inputs."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_hub.config.recipe import SCORERS, Recipe, all_scorers
from dsc_hub.config.stages import STAGES, Inputs
from dsc_hub.system.hashing import digest


def stage_fingerprints(recipe: Recipe, identity: Mapping[str, str]) -> dict[str, str]:
    """Return a fingerprint per stage, each chained to the previous one: equal fingerprints mean equal inputs.

    `identity` identifies what the recipe only names: `prompts` (hash of the files' content), `model`, and the places of
    `all_scorers` (commit or checksum; "" for a second or third scorer that the recipe does not have).
    """
    inputs = Inputs(
        recipe.model_dump(mode="json", exclude_defaults=True),
        identity,
        tuple(identity[place] for place in all_scorers(recipe) if place not in SCORERS.values()),
        recipe.seed,
        recipe.name,
        recipe.description,
    )
    out: dict[str, str] = {}
    previous = ""
    for stage in STAGES:
        previous = out[stage.name] = digest(previous, [stage.version, *stage.inputs(inputs)])
    return out
