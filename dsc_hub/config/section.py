"""The base of the recipe's sections, and the checks of values that several of them share."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    field_validator,
)

from dsc_hub.acceptance import RULES
from dsc_hub.config import messages
from dsc_hub.config.arms import ARMS
from dsc_hub.config.stages import NAMES

# Names from the tables: pydantic rejects all others. A type checker can't evaluate such a Literal and sees `str`.
if TYPE_CHECKING:
    ArmName = str
    RuleName = str
    StageName = str
else:
    ArmName = Literal[tuple(ARMS)]
    RuleName = Literal[tuple(RULES)]
    StageName = Literal[NAMES]


def placeholders(allowed: str) -> AfterValidator:
    """Return a check of a text: it has no word in braces that is nearly one of these placeholders, given with spaces.

    Other braces are text, as in LaTeX, code and JSON.
    """
    names = sorted(allowed.split())

    def check(text: str) -> str:
        for word in sorted(set(re.findall(r"\{(\w+)\}", text)) - set(names)):
            if close := difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.7):
                known = ", ".join(f"{{{n}}}" for n in names)
                raise ValueError(f"unknown placeholder {{{word}}}; did you mean {{{close[0]}}}? Known here: {known}")
        return text

    return AfterValidator(check)


def text_or_texts(allowed: str) -> BeforeValidator:
    """Accept a text, or a list of texts, which becomes a tuple; a list of one is that text. Each as `placeholders`."""
    one = placeholders(allowed).func

    def check(value: Any) -> Any:
        texts = value if isinstance(value, (list, tuple)) else (value,)
        if not texts:
            raise ValueError("should be a text, or a list of texts, got an empty list")
        for number, text in enumerate(texts, 1):
            which = f"text {number} of {len(texts)}: " if len(texts) > 1 else ""
            if not isinstance(text, str):
                raise ValueError(f"{which}should be a text, or a list of texts, got {text!r:.60}")
            if not text.strip():
                raise ValueError(f"{which}should not be empty")
            try:
                one(text)  # type: ignore[call-arg]
            except ValueError as e:
                raise ValueError(f"{which}{e}") from None
        return texts[0] if len(texts) == 1 else tuple(texts)

    return BeforeValidator(check)


def each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names; ValueError if one stands there twice."""
    if len(set(names)) < len(names):
        raise ValueError(f"each only once, got {', '.join(names)}")
    return names


def seconds_given(value: Any) -> Any:
    """Return a number of seconds; ValueError for true and false, which YAML takes for numbers."""
    return messages.no_switch(value, float)


def auto_or(most: int, several: bool = False) -> BeforeValidator:
    """Accept auto or a whole number; with `several` also a list of these."""

    def one(value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise ValueError(f"should be a whole number from 1 to {most}, or auto, got {value!r:.60}")
        return value

    def check(value: Any) -> Any:
        return tuple(map(one, value)) if several and isinstance(value, (list, tuple)) else one(value)

    return BeforeValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return messages.no_switch(value, cls.model_fields[str(info.field_name)].annotation)
