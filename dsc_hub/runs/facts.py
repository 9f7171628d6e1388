"""Validation of run.json before its facts are used."""

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
    """The part of run.json that reading a finished run needs. Code that resumes the run checks the whole recipe."""

    recipe: _Recipe
    identity: dict[str, str | None]
    model: dict[str, Any]


def facts_problems(facts: Mapping[str, Any]) -> list[str]:
    """Return the problems of a run.json as `location: problem` strings; empty if the run is readable."""
    try:
        _Facts.model_validate(facts)
    except ValidationError as e:
        return [f"{'.'.join(map(str, err['loc']))}: {err['msg']}" for err in e.errors()]
    return []
