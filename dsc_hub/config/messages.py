"""Readable messages for pydantic's errors in a recipe: the key, the value, and a suggestion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

# What a key with a pattern expects, in words.
_PATTERNS = {
    "metric": "a shipped metric (sentiment, privacy, ...), a file METRIC.py beside the recipe, or a Space USER/NAME",
    "name": "small letters, digits, - and _, at most 64, beginning with a letter or digit",
    "dataset": "a dataset of the Hub as USER/NAME",
    "branch": "a name of a branch: letters, digits, '.', '/', '-' and '_'",
    "tag": "a name of a tag: letters, digits, '.', '-' and '_'",
}


def no_switch(value: Any, hint: Any) -> Any:
    """Return the value; ValueError for a boolean if `hint` is a numeric type (`samples: true` is a typo)."""
    kinds = (hint, *get_args(hint))
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise ValueError(f"should be a number, got {str(value).lower()}")
    return value


def recipe_problems(error: ValidationError, top: type[BaseModel]) -> list[str]:
    """Return one line per error, with its key. `top` is the model that was validated."""
    errors = error.errors()
    # pydantic also reports a list with invalid items as too short: skip these errors.
    wrong_parents = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
    return [_explain(e, top) for e in errors if e["type"] != "too_short" or e["loc"] not in wrong_parents]


def _explain(error: Mapping[str, Any], top: type[BaseModel]) -> str:
    loc = [str(x) for x in error["loc"] if x != "[key]"]
    path = ".".join(loc) or "recipe"
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known_keys = _section_keys(_section(top, loc[:-1]))
        if close := difflib.get_close_matches(loc[-1], known_keys, n=1):
            return f"{path}: unknown key; did you mean '{close[0]}'?"
        return f"{path}: unknown key" + (f"; known: {', '.join(known_keys)}" if known_keys else "")
    if kind == "missing":
        return f"{path}: missing, and it has no default"
    if kind in ("model_type", "model_attributes_type"):
        section = _section(top, loc)
        keys = _section_keys(section)
        if not keys:
            return f"{path}: expected keys with values, got {value!r:.60}"
        first_keys = f"{', '.join(keys[:4])}{', ...' * (len(keys) > 4)}"
        expected = f"{path}: expected a section ({first_keys}), got {value!r:.60}"
        suggestion = _likely_key(section, value)
        if any(key.isdecimal() for key in loc):  # an item of a list has no key on the command line
            return expected + (f"; did you mean {{{suggestion}: {value}}}?" if suggestion else "")
        return expected + (
            f"; did you mean {path}.{suggestion}={value}?" if suggestion else f"; set one as {path}.{keys[0]}=VALUE"
        )
    if kind == "dict_type":
        return f"{path}: expected keys with values, as {path}.KEY=VALUE, got {value!r:.60}"
    if kind in ("tuple_type", "list_type"):
        example = value if isinstance(value, str) and re.fullmatch(r"[\w./:-]{1,40}", value) else "one"
        return f"{path}: expected a list, as [{example}, another], got {value!r:.60}"
    if kind == "string_pattern_mismatch" and (form := _PATTERNS.get(loc[-1] if loc else "")):
        return f"{path}: expected {form}, got {value!r:.80}"
    if kind == "too_short":
        return f"{path}: expected at least one, got an empty list"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^(Input|String) should", "should", message)
    if kind == "value_error":
        return f"{path}: {message}"
    if kind in ("bool_type", "bool_parsing"):
        message = "should be true or false"
    shown = repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    close = []
    if kind in ("literal_error", "enum") and isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall(r"'([^']+)'", str(error["ctx"]["expected"])), n=1)
    return f"{path}: {message}, got {shown[:80]}" + (f"; did you mean '{close[0]}'?" if close else "")


def _section(top: type[BaseModel], loc: Sequence[str]) -> type[BaseModel] | None:
    """Return the section of a recipe at a path of keys and list indices; None if there is no section."""
    section: type[BaseModel] | None = top
    for key in loc:
        if key.isdecimal():  # an item of the preceding list, whose items are of that section
            continue
        field = section.model_fields.get(key) if section else None
        section = next(_models(field.annotation), None) if field else None
    return section


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the section types in a field's type: `A`, `A | None`, `tuple[A, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _section_keys(section: type[BaseModel] | None) -> list[str]:
    return list(section.model_fields) if section else []


def _likely_key(section: type[BaseModel] | None, got: Any) -> str | None:
    """Return the first key of a section for which a word or number given in its place is valid; None if none is."""
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
