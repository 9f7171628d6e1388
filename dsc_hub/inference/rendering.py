"""The server's own rendering of a conversation, compared with the model's chat template before anything is sampled.

Training renders rows with the template in the model's folder. A server may render otherwise: with a tokenizer of its
own (Mistral's tekken), a template given on its command line, or without the recipe's settings. vLLM shows its rendering
at `/tokenize`; of a server without that route nothing is said.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from pathlib import Path

from dsc_hub.chain.chain import exchange, system_turn
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.serving import TEMPLATE_SETTINGS
from dsc_hub.errors import ServingError
from dsc_hub.inference.chat_template import Refused, load_template
from dsc_hub.inference.http import open_url
from dsc_hub.inference.servers import Endpoint
from dsc_hub.records import Message
from dsc_hub.system.files import parse_json

_SHOWN = 160  # characters of each rendering in the message, from a little before the first difference
_BEFORE = 40


def check_rendering(endpoints: Iterable[Endpoint], folder: Path, recipe: Recipe) -> None:
    """Compare how each server and the template in `folder` render a short chain.

    ServingError with both if they differ. Nothing is compared without tokenizer.json.
    """
    from tokenizers import Tokenizer

    if not (file := folder / "tokenizer.json").is_file():
        return
    messages = [
        *system_turn(recipe.chain.system),
        {"role": "user", "content": "Say it."},
        *exchange("It is said.", "Say it again."),
    ]
    settings = recipe.generation.template_settings
    try:
        expected = load_template(folder).render(messages, add_generation_prompt=True, **settings)
    except Refused:
        return  # `dsc plan` says so; a run that goes on anyway gets the server's own words
    tokenizer = Tokenizer.from_file(str(file))
    ids = tokenizer.encode(expected, add_special_tokens=False).ids
    for endpoint in endpoints:
        theirs = _tokens_at(endpoint, messages, settings)
        if theirs is not None and theirs != ids:
            shown = tokenizer.decode(theirs, skip_special_tokens=False)
            raise ServingError(
                f"the server at {endpoint.url} renders conversations otherwise than the chat template in {folder}, with"
                f" which rows are trained; the server: {_around(shown, expected)}; the template: "
                f"{_around(expected, shown)}",
                "Serve the model with that template and its own tokenizer, or let model.source name a folder with the "
                f"server's; settings of the template belong into generation.extra.{TEMPLATE_SETTINGS}.",
            )


def _tokens_at(endpoint: Endpoint, messages: Sequence[Message], settings: dict[str, object]) -> list[int] | None:
    """Return the tokens of the server's prompt; None if it does not show them."""
    body = {"model": endpoint.model, "messages": list(messages), "add_generation_prompt": True}
    if settings:
        body[TEMPLATE_SETTINGS] = settings
    headers = {"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": "application/json"}
    url = f"{endpoint.url.removesuffix('/v1')}/tokenize"
    try:
        with open_url(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout_s=20) as answer:
            tokens = parse_json(answer.read())["tokens"]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None
    is_ids = isinstance(tokens, list) and all(isinstance(t, int) and 0 <= t < 1 << 31 for t in tokens)
    return tokens if is_ids and tokens else None


def _around(text: str, other: str) -> str:
    """Return the part of a rendering in which it differs from the other, quoted."""
    start = max(0, len(os.path.commonprefix([text, other])) - _BEFORE)
    return repr(text[start : start + _SHOWN])
