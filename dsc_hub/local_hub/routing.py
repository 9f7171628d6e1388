"""Parsing of addresses: quoted parts, repo types, and the two addresses of a repo."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .store import REPO_TYPES

Handler = Callable[[Request], Response | Awaitable[Response]]


class RawPath:
    """Middleware that routes on the raw path: revisions and branch names contain %2F, which must not split them."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("latin-1")}
        await self.app(scope, receive, send)


class _Part(Convertor[str]):
    """One quoted part of an address: a name, or a revision that may contain %2F."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return value


class _Rest(_Part):
    """The rest of an address: the path of a file."""

    regex = ".+"


class _Kind(_Part):
    """The repo type in an address: `models` stands for `model`."""

    regex = "|".join(f"{t}s" for t in REPO_TYPES)

    def convert(self, value: str) -> str:
        return value.removesuffix("s")


for _key, _convertor in (("kind", _Kind()), ("part", _Part()), ("rest", _Rest())):
    register_url_convertor(_key, _convertor)

PARTS = "{ns:part}/{name:part}"
REPO = "/api/{type:kind}/" + PARTS


def at_repo(path: str, endpoint: Handler, methods: list[str] | None = None) -> list[Route]:
    """Return the routes of an endpoint below a repo's public address. Addresses of models start without a type."""
    typed, model = "/{type:kind}/{ns:part}/{name:part}", "/{ns:part}/{name:part}"
    return [Route(typed + path, endpoint, methods=methods), Route(model + path, endpoint, methods=methods)]
