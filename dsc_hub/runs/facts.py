"""run.json: what is checked before its facts are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


class _Generation(BaseModel):
    temperature: float


class _Evaluation(BaseModel):
    confidence: float
    temperature: float | None = None


class _Recipe(BaseModel):
    name: str
    seed: int
    generation: _Generation
    evaluation: _Evaluation


class _Facts(BaseModel):
    """What of run.json is needed to look at a finished run; the whole recipe is checked by whoever goes on with it."""

    recipe: _Recipe
    identity: dict[str, str | None]
    model: dict[str, Any]


def facts_problems(facts: Mapping[str, Any]) -> list[str]:
    """What is wrong with a run.json, `where: what` each; empty if a run can be looked at with it."""
    try:
        _Facts.model_validate(facts)
    except ValidationError as e:
        return [f"{'.'.join(map(str, err['loc']))}: {err['msg']}" for err in e.errors()]
    return []
