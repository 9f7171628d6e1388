"""Bodies of chat requests: what each holds, and what is left out or renamed for a server that does not take it. Pure.

Servers of others differ. Some call the length `max_completion_tokens`, some have no seed, some take `temperature` or
`top_p` but not both. A `RequestForm` says how one server takes our parameters. `next_form` reads a refusal and returns
the form to try next; external.py sends the trials.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsc_hub.config.serving import GenerationConfig
from dsc_hub.system.files import parse_json

# Our parameter -> the name under which it is sent; None: it is not sent. A parameter that is missing keeps its name.
RequestForm = Mapping[str, str | None]

LENGTH, TEMPERATURE, TOP_P, SEED = "max_tokens", "temperature", "top_p", "seed"
# Other names of a parameter, tried in this order. A parameter without a name that the server takes is left out, but
# never the length: answers would have no limit.
NAMES: dict[str, tuple[str, ...]] = {
    LENGTH: ("max_completion_tokens",),
    TEMPERATURE: (),
    TOP_P: (),
    SEED: ("random_seed",),
}
API_DEFAULTS = {TEMPERATURE: 1.0, TOP_P: 1.0}  # values at which leaving a parameter out changes nothing
_REFUSING = (400, 422, 501)  # status codes of a request that holds what the server does not take
SHORTEST_KEY = 6  # characters; a shorter key ("none") is an ordinary word and is not masked
LONGEST_MESSAGE = 300  # characters

# Words by which servers refuse a parameter as such. Without them it is its value that is wrong (too large, say), which
# the user has to change.
_REFUSED = re.compile(
    r"unsupported|not (?:currently )?support|(?:isn|aren|doesn|don)['’]t support|unknown|unrecogni[sz]ed"
    r"|unexpected|not permitted|forbidden|not allowed|not available|not accepted|deprecated|no longer|only the default"
    r"|cannot both|can(?:no|')t be (?:used|set|specified)|mutually exclusive|only one of|cannot find field"
    r"|additional propert",
    re.IGNORECASE,
)
_BOTH = re.compile(r"\bboth\b|mutually exclusive|only one of", re.IGNORECASE)


def generation_parameters(settings: GenerationConfig, seed: int = 0) -> dict[str, Any]:
    """Return the parameters of each chat request, by our names."""
    return {
        SEED: seed,
        TEMPERATURE: settings.temperature,
        TOP_P: settings.top_p,
        LENGTH: settings.most_tokens,
    }


def chat_body(
    model: str,
    messages: Sequence[Mapping[str, str]],
    parameters: Mapping[str, Any],
    form: RequestForm,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the body of a chat completion: our `parameters` in the form of the server, and `extra` as it is."""
    body: dict[str, Any] = {"model": model, "messages": messages}
    for name, value in parameters.items():
        if (sent_as := form.get(name, name)) is not None:
            body[sent_as] = value
    return {**body, **extra}


def next_form(
    status: int, data: bytes, form: RequestForm, parameters: Mapping[str, Any]
) -> dict[str, str | None] | None:
    """Return the form to try after a refusal: without what it names, or with that under another name.

    None if the refusal is about something else, or if nothing is left to try.
    """
    if status not in _REFUSING:
        return None
    text = data.decode("utf-8", "replace")
    if not _REFUSED.search(text):
        return None
    sent = {name: sent_as for name in parameters if (sent_as := form.get(name, name))}
    fields = _fields(data)
    # A field of the error says exactly what was refused; its text may name other parameters, or repeat the request.
    refused = [n for n, sent_as in sent.items() if sent_as in fields]
    refused = refused or [n for n, sent_as in sent.items() if _is_named(sent_as, text)]
    if {TEMPERATURE, TOP_P} <= sent.keys() and set(refused) & {TEMPERATURE, TOP_P} and _BOTH.search(text):
        refused = [_less_needed(parameters)]
    out = dict(form)
    for name in refused:
        rest = _names_after(name, sent[name])
        if not rest and name == LENGTH:
            return None
        out[name] = rest[0] if rest else None
    return out if out != dict(form) else None


def alternatives(
    status: int, data: bytes, form: RequestForm, parameters: Mapping[str, Any], extra: Mapping[str, Any]
) -> Iterator[RequestForm]:
    """Yield forms that differ by one parameter, to try after a refusal that names none ("extra fields not permitted").

    Nothing for a refusal that is not about parameters, or that names one of ours or of `extra`.
    """
    text = data.decode("utf-8", "replace")
    if status not in _REFUSING or not _REFUSED.search(text):
        return
    if any(_is_named(name, text) for name in (*parameters, *filter(None, form.values()), *extra)):
        return
    for name in (SEED, TOP_P, LENGTH, TEMPERATURE):
        if name in parameters and form.get(name, name) is not None:
            rest = _names_after(name, form.get(name, name))
            if rest:
                yield dict(form) | {name: rest[0]}
            if name != LENGTH:
                yield dict(form) | {name: None}


def changes_sampling(form: RequestForm, parameters: Mapping[str, Any]) -> list[str]:
    """Return the parameters that are left out and whose value would have mattered: temperature, top_p."""
    return [
        name
        for name, neutral in API_DEFAULTS.items()
        if name in parameters and form.get(name, name) is None and parameters[name] != neutral
    ]


def error_message(data: bytes, key: str) -> str:
    """Return the message of an error body in any of the usual formats, with the key masked (some servers repeat it)."""
    text = data.decode("utf-8", "replace")
    try:
        value = json.loads(text)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        value = value.get("error", value)
        text = str(value.get("message") or value) if isinstance(value, dict) else str(value)
    except (ValueError, AttributeError, RecursionError):
        pass
    return mask(" ".join(text.split()), key)[:LONGEST_MESSAGE]


def mask(text: str, key: str) -> str:
    """Return a text with the key replaced."""
    return text.replace(key, "[the key]") if len(key) >= SHORTEST_KEY else text


def _fields(data: bytes) -> set[str]:
    """Return the names in an error's fields `param` (a text) and `loc` (a path, as pydantic gives it), at any depth."""
    try:
        pending, names = [parse_json(data)], set[str]()
    except ValueError:
        return set()
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            param, path = value.get("param"), value.get("loc")
            names |= {param} if isinstance(param, str) else set()
            names |= {path[-1]} if isinstance(path, list) and path and isinstance(path[-1], str) else set()
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return names


def _is_named(parameter: str, text: str) -> bool:
    """Return whether an error names a parameter, as a word of its own: not as a part of another one's name."""
    return re.search(rf"(?<![\w-]){re.escape(parameter)}(?![\w-])", text) is not None


def _names_after(name: str, sent_as: str | None) -> tuple[str, ...]:
    names = (name, *NAMES[name])
    return names[names.index(sent_as) + 1 :] if sent_as in names else ()


def _less_needed(parameters: Mapping[str, Any]) -> str:
    """Return which of temperature and top_p to leave out: the one whose value changes nothing, else top_p."""
    is_plain = parameters[TEMPERATURE] == API_DEFAULTS[TEMPERATURE] and parameters[TOP_P] != API_DEFAULTS[TOP_P]
    return TEMPERATURE if is_plain else TOP_P
