"""The local hub as an ASGI application, assembled from the routes of the other modules.

Supported: identity, repos and their settings, refs, commits, plain-HTTP LFS, downloads, listings, collections, gating,
card checks. Not supported: Xet, discussions (a pull request can be opened, not merged), requests for access; each is
refused with a message.
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

from dsc_hub.errors import FULL

from . import access, answers, cards, collections, commits, files, pages, repos
from .limits import HOSTS, LimitBody
from .routing import REPO, RawPath
from .store import Refusal, Store

ANY = ["GET", "POST", "PUT", "PATCH", "DELETE"]
PULLS = "Discussions, and merging pull requests"


def make_app(store: Store, users: dict[str, str], rights: dict[str, dict[str, Any]] | None = None) -> Starlette:
    """Return the application for a store.

    `users` maps a token to the name of its user. `rights` maps a token without full write access to its entry in whoami
    (`role`, `fineGrained`).
    """
    tables = (repos.ROUTES, commits.ROUTES, files.ROUTES, collections.ROUTES, ROUTES, pages.ROUTES)
    # Each handler takes its own exception class; starlette's types require that it accept any exception.
    handlers: dict[Any, Any] = {
        Refusal: answers.refusal_response,
        HTTPException: _no_such_route,
        OSError: _no_space,
    }
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
    """Validate a card's metadata; RepoCard.validate requests plain text and prints it unchanged."""
    errors, warnings = cards.problems(answers.wanted(body, "content"), answers.optional(body, "repoType", "model"))
    status = 400 if errors else 200
    if request.headers.get("accept") == "text/plain":
        lines = [f"- Error: {e}" for e in errors] + [f"- Warning: {w}" for w in warnings]
        return Response("\n".join(lines), status, media_type="text/plain")
    body = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return JSONResponse(body, status)


def nothing(_: Request) -> Response:
    """Return an empty reply to telemetry, which is not stored, and to requests that do not apply to a local hub."""
    return JSONResponse({})


def harnesses(_: Request) -> Response:
    return JSONResponse({"harnesses": {}})


def unsupported(what: str, hint: str = "") -> Callable[[Request], Response]:
    """Return an endpoint that refuses a feature of the real Hub, with a workaround."""

    def endpoint(_: Request) -> Response:
        raise Refusal(501, f"{what}: not available on the local hub.{hint}")

    return endpoint


async def _no_space(request: Request, error: OSError) -> Response:
    """Refuse what does not fit on the disk; any other error is raised."""
    if error.errno not in FULL:
        raise error
    where = f" ({error.filename})" if error.filename else ""
    message = f"No space left on the disk of the local hub{where}. Free some and try again: nothing was changed."
    return answers.refusal_response(request, Refusal(507, message))


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
