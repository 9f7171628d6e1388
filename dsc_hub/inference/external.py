"""Servers that somebody else operates: their endpoints, and one real request to each before a run.

`connect` sends a chat completion of the form that the run sends. What the server refuses of it is left out or renamed
(requests.py), for the rest of the process; `connections` tells what was learned, for run.json. The list of models is a
courtesy: it is read to find a name that the recipe does not give, for the text of an error, and to see whether the
server is vLLM or SGLang.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from http.client import HTTPException
from typing import Any

from dsc_hub.chain.chain import exchange, system_turn
from dsc_hub.config.recipe import Recipe, Server, generation_at_evaluation, servers
from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.errors import ConfigError, ServingError
from dsc_hub.inference import replies, requests
from dsc_hub.inference.http import open_url
from dsc_hub.inference.requests import SEED, generation_parameters
from dsc_hub.inference.servers import Endpoint
from dsc_hub.system import addresses
from dsc_hub.system.files import parse_json
from dsc_hub.system.progress import say

LISTING_S = 20.0  # seconds to wait for the list of models
OWNER_S = 5.0  # the same, where only its owner is of interest
TAKING_MANY = {"vllm", "sglang"}  # owners in the lists of models of servers that work at many requests at once
BUSY_TRIES = 4  # requests before a server that is busy, or loads its model, counts as unusable
BUSY_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # pause before the next of them, longer each time, and its maximum
BASE, CRITIC = "serving.endpoints", "chain.critic"  # `Server.place`
SHOWN_NAMES = 8  # of the models that a server lists


@dataclass(frozen=True)
class Connection:
    """What the trial of a server showed. `changes` names left-out parameters whose value would have mattered."""

    place: str  # key of the recipe
    address: str
    model: str
    renamed: Mapping[str, str]  # our parameter -> its name there
    left_out: tuple[str, ...]
    changes: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the trial, by their usual names


# What was learned in this process, by everything that the trial depended on.
_forms: dict[str, requests.RequestForm] = {}
_connections: dict[str, Connection] = {}
_owned: dict[str, bool] = {}  # whether it takes many requests, by address


def external(section: ServingConfig) -> list[Endpoint]:
    """Return the endpoints that a recipe or an override names; `connect` tests them.

    Without `served_model` the only model that the server lists is meant. ServingError: no list, or several models.
    """
    key = key_in(section.api_key_env)
    return [
        Endpoint(
            url,
            section.served_model or _only_model(url, key, section),
            key,
            check=partial(check_up, url, key),
            takes_many=_takes_many(url, key),
        )
        for url in (url.rstrip("/") for url in section.endpoints)
    ]


def key_in(variable: str) -> str:
    """Return the key that a variable holds, "none" without one. ServingError if no header can hold it."""
    key = (os.environ.get(variable) or "none").strip()
    if not (key.isascii() and key.isprintable()):
        raise ServingError(
            f"{variable} holds characters that no key has (a line break, a letter beyond ASCII)",
            "Set it again; a character too many may have been copied along.",
        )
    return key


def connect_base(
    endpoints: Sequence[Endpoint], recipe: Recipe, settings: GenerationConfig | None = None
) -> list[Endpoint]:
    """Return the endpoints of the base model (`external`), tested by `connect`.

    `settings` replaces the recipe's generation section. ServingError for the first one that can't be used.
    """
    settings, section = settings or recipe.generation, recipe.serving
    parameters, messages = generation_parameters(settings), trial_messages(recipe)
    extra = {**settings.extra, **trial_tools(recipe)}
    return [
        connect(
            endpoint,
            Server(BASE, endpoint.url, section.api_key_env, endpoint.model),
            parameters,
            messages,
            extra,
            section.request_timeout_s,
        )
        for endpoint in endpoints
    ]


def critic_endpoint(recipe: Recipe, settings: GenerationConfig | None = None) -> Endpoint | None:
    """Return the tested endpoint of the recipe's critic; None without a critic. Errors as in `connect_base`."""
    critic = recipe.chain.critic
    if critic is None:
        return None
    if not critic.endpoint:
        raise ConfigError(
            f"chain.critic: no endpoint is known at which {critic.model} can be asked",
            "Give one: chain.critic.endpoint=http://host:8000/v1",
        )
    server = Server(CRITIC, critic.endpoint, critic.api_key_env, critic.model)
    endpoint = endpoint_of(server)
    endpoint = replace(endpoint, extra=critic.extra, takes_many=_takes_many(endpoint.url, endpoint.api_key))
    parameters = generation_parameters(settings or recipe.generation)
    extra = {**critic.extra, **trial_tools(recipe)}
    return connect(endpoint, server, parameters, trial_messages(recipe), extra, recipe.serving.request_timeout_s)


def endpoint_of(server: Server) -> Endpoint:
    """Return the endpoint of a server whose model is named."""
    url, key = server.address.rstrip("/"), key_in(server.key_name)
    return Endpoint(url, str(server.model), key, check=partial(check_up, url, key))


def trial_messages(recipe: Recipe) -> list[dict[str, str]]:
    """Return a short conversation of the form of a chain's: system text, prompt, answer, request."""
    return [
        *system_turn(recipe.chain.system),
        {"role": "user", "content": "Say yes."},
        *exchange("Yes.", "Say it again."),
    ]


def trial_tools(recipe: Recipe) -> dict[str, Any]:
    """Return the parameters of a request with tools, with a made-up one; {} if the prompts have none."""
    if not recipe.prompts.tools_column:
        return {}
    function = {"name": "look_up", "description": "Look a word up.", "parameters": {"type": "object", "properties": {}}}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "none"}


def connect(
    endpoint: Endpoint,
    server: Server,
    parameters: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]],
    extra: Mapping[str, Any],
    timeout_s: float,
) -> Endpoint:
    """Return the endpoint with the form of requests that its server takes, after one real request of that form.

    A server that was tested with the same parameters in this process is not asked again. ServingError if there is no
    answer: it names the key, the address, what the server said, and what to do.
    """
    about = [endpoint.url, endpoint.model, endpoint.api_key, {**parameters, SEED: 0}, extra, messages]
    cached = json.dumps(about, sort_keys=True, default=str)
    if (form := _forms.get(cached)) is None:
        form = _form_of(endpoint, server, parameters, messages, extra, timeout_s)
        _forms[cached] = form
        renamed = {name: sent_as for name, sent_as in form.items() if sent_as}
        left_out = tuple(name for name, sent_as in form.items() if sent_as is None)
        changes = tuple(requests.changes_sampling(form, parameters))
        _connections[cached] = Connection(
            server.place, endpoint.url, endpoint.model, renamed, left_out, changes, {**parameters, SEED: 0}
        )
        _say_what_was_learned(_connections[cached], parameters)
    return replace(endpoint, form=form)


def connections(recipe: Recipe) -> list[Connection]:
    """Return what this process has learned of the recipe's servers, one entry a server; those of others are left out.

    Of a server that was tested with several settings (chains and evaluation), all that was learned is put together.
    """
    out = []
    for server in servers(recipe):
        address, known = server.address.rstrip("/"), list(_connections.values())
        of_server = [
            c for c in known if c.address == address and server.model in (None, c.model) and _is_of(c, server, recipe)
        ]
        if of_server:
            out.append(replace(reduce(_together, of_server), place=server.place))
    return out


def _is_of(learned: Connection, server: Server, recipe: Recipe) -> bool:
    """Return whether a trial was of a request that this recipe sends to the server in this role."""
    if server.place not in (BASE, CRITIC):
        return learned.place not in (BASE, CRITIC)
    used = (recipe.generation, generation_at_evaluation(recipe))
    sent = [{**generation_parameters(settings), SEED: 0} for settings in used]
    return learned.place in (BASE, CRITIC) and learned.parameters in sent


def _together(one: Connection, other: Connection) -> Connection:
    left_out = tuple(dict.fromkeys((*one.left_out, *other.left_out)))
    changes = tuple(dict.fromkeys((*one.changes, *other.changes)))
    return replace(one, renamed={**one.renamed, **other.renamed}, left_out=left_out, changes=changes)


def _say_what_was_learned(learned: Connection, parameters: Mapping[str, Any]) -> None:
    where = f"{learned.place}  {learned.model} at {addresses.host(learned.address)}"
    for name, sent_as in learned.renamed.items():
        say(f"{where} does not take {name}; it is sent as {sent_as}")
    for name in learned.left_out:
        if name in learned.changes:
            effect = f"answers are drawn with the server's own {name}, NOT with {parameters[name]:g}"
        elif name == SEED:
            effect = "the same request may get another answer"
        else:
            effect = f"its value of {parameters[name]:g} is the default"
        say(f"{where} does not take {name}; it is left out: {effect}")


def _form_of(
    endpoint: Endpoint,
    server: Server,
    parameters: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]],
    extra: Mapping[str, Any],
    timeout_s: float,
) -> requests.RequestForm:
    """Return the form that the server takes, after an answered request; ServingError without an answer."""
    body = partial(requests.chat_body, endpoint.model, messages, parameters, extra=extra)
    form: requests.RequestForm = {}
    while True:
        status, data = _ask(endpoint, server, body(form=form), timeout_s)
        if status < 300:
            _check_answer(endpoint, server, data)
            return form
        following = requests.next_form(status, data, form, parameters)
        if following is None:
            break
        form = following
    for other in requests.alternatives(status, data, form, parameters, extra):
        answered, data_of_other = _ask(endpoint, server, body(form=other), timeout_s)
        if answered < 300:
            _check_answer(endpoint, server, data_of_other)
            return other
    raise _refusal(endpoint, server, status, data)


def _ask(endpoint: Endpoint, server: Server, body: Mapping[str, Any], timeout_s: float) -> tuple[int, bytes]:
    """Send a chat completion; return status and body of the reply. Waits for a server that is busy. ServingError."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", json.dumps(body).encode(), headers)
    for tries in range(1, BUSY_TRIES + 1):
        wait = min(LONGEST_WAIT_S, BUSY_WAIT_S * 2**tries)
        try:
            with open_url(request, timeout_s) as answer:
                return int(answer.status), answer.read()
        except urllib.error.HTTPError as e:
            status, data = e.code, _body_of(e)
            if tries == BUSY_TRIES or not (status in (408, 409, 429) or status >= 500 and status != 501):
                return status, data
            asked = e.headers.get("Retry-After") or ""
            wait = min(LONGEST_WAIT_S, float(asked)) if asked.isdecimal() else wait
        except TimeoutError:
            raise _unreachable(endpoint, server, f"no answer in {timeout_s:g} s") from None
        except (OSError, HTTPException, ValueError) as e:
            reason = getattr(e, "reason", e)
            if tries == BUSY_TRIES or isinstance(reason, (ConnectionRefusedError, TimeoutError, ValueError)):
                raise _unreachable(endpoint, server, str(reason) or type(reason).__name__) from None
        time.sleep(wait * random.uniform(1.0, 1.25))
    raise AssertionError("the last try returns or raises")


def _body_of(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, HTTPException):
        return b""


def _check_answer(endpoint: Endpoint, server: Server, data: bytes) -> None:
    """ServingError if an answer is none that a run could use (`replies`)."""
    try:
        replies.chat_reply(replies.parse_object(data))
    except replies.BadReply as e:
        raise ServingError(
            f"{_where(endpoint, server)} sent {requests.mask(str(e), endpoint.api_key)}",
            "Is the address the one that /chat/completions follows? It mostly ends with /v1.",
        ) from None


def _where(endpoint: Endpoint, server: Server) -> str:
    return f"{server.place}: {endpoint.model} at {endpoint.url}"


def _unreachable(endpoint: Endpoint, server: Server, reason: str) -> ServingError:
    return ServingError(
        f"{_where(endpoint, server)} can't be used: {requests.mask(reason, endpoint.api_key)}",
        "Is the server up, and is the address like http://host:8000/v1?",
    )


def _refusal(endpoint: Endpoint, server: Server, status: int, data: bytes) -> ServingError:
    """Return the error for a refused trial: the address, the key's variable, what the server said, what to do."""
    said = requests.error_message(data, endpoint.api_key) or "nothing"
    key = f"with the key in {server.key_name}" if os.environ.get(server.key_name) else f"{server.key_name} is not set"
    return ServingError(
        f"{_where(endpoint, server)} answered {status} to a chat completion ({key}); it said: {said}",
        _advice(endpoint, server, status, data),
    )


def _advice(endpoint: Endpoint, server: Server, status: int, data: bytes) -> str:
    model_key = {BASE: "serving.served_model", CRITIC: "chain.critic.model"}.get(server.place, "the option model")
    if status in (401, 403):
        return f"Put its key into {server.key_name}, or name another variable with api_key_env; may it use this model?"
    if status == 402:
        return "Check the account that the key belongs to."
    if status == 429 or status >= 500:
        return f"It was asked {BUSY_TRIES} times. Run the same command again later, or look at its quota and its log."
    names = _listed(endpoint.url, endpoint.api_key)
    if names is not None and endpoint.model not in names:
        listed = ", ".join(names[:SHOWN_NAMES]) + (" ..." if len(names) > SHOWN_NAMES else "")
        return f"It lists {listed or 'no model'}: name one with {model_key}."
    if status in (404, 405):
        return f"The address ends with /v1, and {model_key} is the model's name there."
    extra = {BASE: "generation.extra", CRITIC: "chain.critic.extra"}.get(server.place)
    remove = f" If it is one of {extra}, remove it there." if extra else ""
    return f"Change the value that it names in the recipe, or {model_key}.{remove}"


# -- the list of models


def _only_model(url: str, key: str, section: ServingConfig) -> str:
    """Return the name of the only model that a server lists. ServingError: no list, none, or several."""
    names = _names_at(url, key, section)
    if len(names) == 1:
        return names[0]
    raise ServingError(
        f"endpoint {url} serves {', '.join(names[:SHOWN_NAMES]) or 'nothing that it lists'}",
        "Name the model with serving.served_model.",
    )


def listed(endpoint: Endpoint) -> list[str]:
    """Return the names of the models that a server lists; none if it has no such list."""
    return _listed(endpoint.url, endpoint.api_key) or []


def _listed(url: str, key: str) -> list[str] | None:
    """Return the names of the models that a server lists; None if it has no such list."""
    try:
        return _read_names(url, key)
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return None


def _takes_many(url: str, key: str) -> bool:
    """Return whether a server's list of models names vLLM or SGLang as owner; it is asked once in a process."""
    if url not in _owned:
        try:
            owners = {row.get("owned_by") for row in _read_models(url, key, OWNER_S) if isinstance(row, dict)}
        except (OSError, HTTPException, ValueError, TypeError, AttributeError):
            owners = set()
        _owned[url] = not owners.isdisjoint(TAKING_MANY)
    return _owned[url]


def _read_names(url: str, key: str) -> list[str]:
    """Return the names in the answer to /models: of OpenAI's form, a bare list, or of plain names."""
    return [row if isinstance(row, str) else str(row.get("id") or row["name"]) for row in _read_models(url, key)]


def _read_models(url: str, key: str, timeout_s: float = LISTING_S) -> list[Any]:
    """Return the entries of the answer to /models."""
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    with open_url(request, timeout_s=timeout_s) as answer:
        try:
            value = parse_json(answer.read())
        except ValueError:
            raise TypeError("no list of models") from None
    rows = value if isinstance(value, list) else value.get("data", value.get("models"))
    if not isinstance(rows, list):
        raise TypeError("no list of models")
    return rows


def _names_at(url: str, key: str, section: ServingConfig) -> list[str]:
    """Return the names of the served models. ServingError, with what to do, if they can't be read."""
    try:
        return _read_names(url, key)
    except urllib.error.HTTPError as e:
        said = requests.error_message(_body_of(e), key)
        name = "Name the model with serving.served_model: its list of models can't be read."
        hint = f"Put its key into {section.api_key_env}." if e.code in (401, 403) else name
        raise ServingError(f"endpoint {url} answered {e.code} {e.reason} to /models: {said}", hint) from None
    except (KeyError, TypeError, AttributeError):
        raise ServingError(
            f"endpoint {url} answers to /models with something else than a list of models",
            "Name the model with serving.served_model.",
        ) from None
    except (OSError, HTTPException, ValueError) as e:
        raise ServingError(
            f"endpoint {url} can't be used: {requests.mask(str(getattr(e, 'reason', e)), key)}",
            "Is the server up, and is the address like http://host:8000/v1?",
        ) from None


def check_up(url: str, key: str) -> None:
    """Raise ServingError if nothing answers at an address, or only a proxy in front of it (5xx).

    Whatever else a server says to a request for its list of models, it is there.
    """
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with open_url(request, timeout_s=LISTING_S) as answer:
            answer.read()
    except urllib.error.HTTPError as e:
        if e.code >= 500 and e.code != 501:
            raise ServingError(f"endpoint {url} answered {e.code} {e.reason} to /models") from None
    except (OSError, HTTPException, ValueError) as e:
        raise ServingError(
            f"endpoint {url} can't be used: {requests.mask(str(getattr(e, 'reason', e)), key)}",
            "Is the server up, and is the address like http://host:8000/v1?",
        ) from None
