"""What is wrong with a recipe in plain words: pydantic's errors with the key, what was got, and what was perhaps meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError


def no_switch(value: Any, hint: Any) -> Any:
    """The value; ValueError for true or false where `hint` is a number's type: `samples: true` is a slip, not one sample."""
    kinds = (hint, *get_args(hint))
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise ValueError(f"should be a number, got {str(value).lower()}")
    return value


def problems(error: ValidationError, top: type[BaseModel]) -> list[str]:
    """One line a problem, by key; `top` is what was to be read."""
    found = error.errors()
    # A list whose items are wrong is told to be empty too.
    wrong_inside = {e["loc"][:n] for e in found for n in range(len(e["loc"]))}
    return [_explain(e, top) for e in found if e["type"] != "too_short" or e["loc"] not in wrong_inside]


def _explain(error: Mapping[str, Any], top: type[BaseModel]) -> str:
    loc = [str(x) for x in error["loc"] if x != "[key]"]
    path = ".".join(loc) or "recipe"
    kind, got = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = _keys(_section(top, loc[:-1]))
        if close := difflib.get_close_matches(loc[-1], known, n=1):
            return f"{path}: unknown key; did you mean '{close[0]}'?"
        return f"{path}: unknown key" + (f"; known: {', '.join(known)}" if known else "")
    if kind == "missing":
        return f"{path}: missing, and it has no default"
    if kind in ("model_type", "model_attributes_type"):
        section = _section(top, loc)
        keys = _keys(section)
        if not keys:
            return f"{path}: expected keys with values, got {got!r:.60}"
        listed = f"{', '.join(keys[:4])}{', ...' * (len(keys) > 4)}"
        expected = f"{path}: expected a section ({listed}), got {got!r:.60}"
        meant = _meant(section, got)
        if any(key.isdecimal() for key in loc):  # an item of a list has no name on the command line
            return expected + (f"; did you mean {{{meant}: {got}}}?" if meant else "")
        return expected + (f"; did you mean {path}.{meant}={got}?" if meant else f"; set one as {path}.{keys[0]}=VALUE")
    if kind == "dict_type":
        return f"{path}: expected keys with values, as {path}.KEY=VALUE, got {got!r:.60}"
    if kind in ("tuple_type", "list_type"):
        example = got if isinstance(got, str) and re.fullmatch(r"[\w./:-]{1,40}", got) else "one"
        return f"{path}: expected a list, as [{example}, another], got {got!r:.60}"
    if kind == "too_short":
        return f"{path}: expected at least one, got an empty list"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^(Input|String) should", "should", message)
    if kind == "value_error":
        return f"{path}: {message}"
    if kind in ("bool_type", "bool_parsing"):
        message = "should be true or false"
    shown = repr(got) if not isinstance(got, (dict, list)) else type(got).__name__
    return f"{path}: {message}, got {shown[:80]}"


def _section(top: type[BaseModel], loc: Sequence[str]) -> type[BaseModel] | None:
    """The section of a recipe at a path of keys and list indices; None if there is no section."""
    section: type[BaseModel] | None = top
    for key in loc:
        if key.isdecimal():  # an item of the list before it, whose items are of that section
            continue
        field = section.model_fields.get(key) if section else None
        section = next(_models(field.annotation), None) if field else None
    return section


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section types in a field's type: `A`, `A | None`, `tuple[A, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _keys(section: type[BaseModel] | None) -> list[str]:
    return list(section.model_fields) if section else []


def _meant(section: type[BaseModel] | None, got: Any) -> str | None:
    """The first key of a section that a word or number given in its place could be meant for."""
    if section is None or isinstance(got, bool) or not isinstance(got, (str, int, float)) or len(str(got)) > 60:
        return None
    for name, field in section.model_fields.items():
        hint: Any = Annotated[field.annotation, field]
        try:
            TypeAdapter(hint).validate_python(got, strict=True)
        except ValidationError:
            continue
        return name
    return None
