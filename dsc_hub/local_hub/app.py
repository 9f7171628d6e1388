"""The local hub as an ASGI application: its routes, gathered from the modules that know each subject.

Scope: identity, repos and their settings, refs, commits, plain-HTTP LFS, downloads, listings, collections, gating, card checks.
Not spoken: Xet, discussions (a pull request can be opened, not merged), requests for access; each is refused with a message that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import access, answers, cards, collections, commits, files, pages, repos
from .limits import HOSTS, LimitBody
from .routing import REPO, RawPath
from .store import Refusal, Store

ANY = ["GET", "POST", "PUT", "PATCH", "DELETE"]
PULLS = "Discussions, and merging pull requests"


def make_app(store: Store, users: dict[str, str], rights: dict[str, dict[str, Any]] | None = None) -> Starlette:
    """The application over a store. `users` maps a token to the name of its user, `rights` one that may not write
    everything to what whoami tells of it (`role`, `fineGrained`)."""
    tables = (repos.ROUTES, commits.ROUTES, files.ROUTES, collections.ROUTES, ROUTES, pages.ROUTES)
    # Each takes the class that it is named for; starlette's types ask that it take any exception.
    handlers: dict[Any, Any] = {Refusal: answers.refusal_response, HTTPException: _no_such_route}
    app = Starlette(
        routes=[route for table in tables for route in table],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
            Middleware(LimitBody),
            Middleware(RawPath),
        ],
        exception_handlers=handlers,
    )
    app.state.store, app.state.users, app.state.rights = store, users, {} if rights is None else rights
    return app


def whoami(request: Request) -> Response:
    name = access.signed_in(request)
    token = {"displayName": "local", "createdAt": "2020-01-01T00:00:00.000Z"} | access.rights(request)
    return JSONResponse(
        {
            "type": "user",
            "id": name,
            "name": name,
            "fullname": name,
            "email": f"{name}@localhost.invalid",
            "emailVerified": True,
            "isPro": False,
            "canPay": False,
            "periodEnd": None,
            "avatarUrl": "",
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


@answers.takes_json
def validate_yaml(request: Request, body: dict[str, Any]) -> Response:
    """Check a card's metadata; RepoCard.validate asks for plain text and shows it as it is."""
    errors, warnings = cards.problems(answers.wanted(body, "content"), answers.optional(body, "repoType", "model"))
    status = 400 if errors else 200
    if request.headers.get("accept") == "text/plain":
        lines = [f"- Error: {e}" for e in errors] + [f"- Warning: {w}" for w in warnings]
        return Response("\n".join(lines), status, media_type="text/plain")
    body = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return JSONResponse(body, status)


def nothing(_: Request) -> Response:
    """Questions of the clients to which a local hub has nothing to say, and telemetry, which it does not keep."""
    return JSONResponse({})


def harnesses(_: Request) -> Response:
    return JSONResponse({"harnesses": {}})


def unsupported(what: str, way_out: str = "") -> Callable[[Request], Response]:
    """An endpoint of the real Hub that is missing here, with the way around it."""

    def endpoint(_: Request) -> Response:
        raise Refusal(501, f"{what}: not available on the local hub.{way_out}")

    return endpoint


async def _no_such_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail} on the local hub"
    return answers.refusal_response(request, Refusal(error.status_code, message, headers=dict(error.headers or {})))


ROUTES = [
    Route("/api/whoami-v2", whoami),
    Route("/api/validate-yaml", validate_yaml, methods=["POST"]),
    Route("/api/agent-harnesses", harnesses),
    Route("/api/telemetry/{rest:rest}", nothing, methods=ANY),
    Route("/api/{type:kind}-tags-by-type", nothing),
    Route(
        REPO + "/{direction:part}-token/{rev:part}",
        unsupported("Xet storage", " Set HF_HUB_DISABLE_XET=1 to send files over plain HTTP."),
    ),
    Route(REPO + "/discussions", unsupported(PULLS), methods=ANY),
    Route(REPO + "/discussions/{rest:rest}", unsupported(PULLS), methods=ANY),
]
