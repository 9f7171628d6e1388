"""Authentication, and which repos a caller may read and change.

A namespace belongs to the user of that name. Public repos are readable by anyone who reaches the port, private ones
only by their namespace; the reply for an unreadable repo is the same as for a missing one. A token may have fewer
permissions than its user: the role `read`, or the role `fineGrained` with the namespaces and repos that it may write
to.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from starlette.requests import Request

from .store import Refusal, Repo, Store


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def caller(request: Request) -> str | None:
    """Return the name of the user of the request's token; None without a token, 401 for an invalid one."""
    token = _token(request)
    if token is None:
        return None
    user: str | None = request.app.state.users.get(token)
    if user is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return user


def rights(request: Request) -> dict[str, Any]:
    """Return the permissions of the request's token in the Hub's format: its role and, if fine-grained, its scopes."""
    permissions: dict[str, Any] = request.app.state.rights.get(_token(request), {"role": "write"})
    return permissions


def may_write(request: Request, repo_type: str, repo_id: str) -> bool:
    """Return whether the request may change a repo of this id, existing or not. 401 without a token."""
    permissions = rights(request)
    if not owns(signed_in(request), repo_id) or permissions["role"] == "read":
        return False
    if permissions["role"] != "fineGrained":
        return True
    entities = [s["entity"] for s in permissions["fineGrained"]["scoped"] if "repo.write" in s["permissions"]]
    namespace = repo_id.split("/", maxsplit=1)[0]
    return any(e["name"] == (repo_id if e["type"] == repo_type else namespace) for e in entities)


def signed_in(request: Request) -> str:
    """Return the name of the user; 401 without a token."""
    user = caller(request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    return user


def may_read(user: str | None, repo: Repo) -> bool:
    meta = repo.meta()
    return not meta["private"] or owns(user, meta["id"])


def visible_repos(request: Request, repo_type: str) -> list[Repo]:
    """Return the repos of a type that the caller may read."""
    user, visible = caller(request), []
    for repo in store_of(request).repos(repo_type):
        try:
            if may_read(user, repo):
                visible.append(repo)
        except Refusal:
            continue  # deleted during the listing, or damaged
    return visible


def owns(user: str | None, repo_id: str) -> bool:
    return user is not None and repo_id.split("/", maxsplit=1)[0] == user


def readable(request: Request) -> Repo:
    """Return the repo of the route if the caller may read it."""
    params = request.path_params
    return find(request, params.get("type", "model"), f"{params['ns']}/{params['name']}")


def downloadable(request: Request) -> Repo:
    """Return the repo of the route if the caller may download its files.

    A gated repo is visible to all; only its owner can download it (requests for access are not supported here).
    """
    repo = readable(request)
    if repo.meta().get("gated") and not owns(caller(request), repo.meta()["id"]):
        raise Refusal(403, "Access to this repository is restricted: ask its owner", "GatedRepo")
    return repo


def writable(request: Request) -> Repo:
    """Return the repo of the route if the caller may change it."""
    return for_writing(request, readable(request))


def find(request: Request, repo_type: str, repo_id: str) -> Repo:
    """Return a repo that the caller may read.

    Hidden and missing repos get the same reply: 404, or 401 without a token.
    """
    user = caller(request)
    repo = store_of(request).repo(repo_type, repo_id)
    if repo is None or not may_read(user, repo):
        if user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")
    return repo


def for_writing(request: Request, repo: Repo) -> Repo:
    """Return the same repo if the caller may change it."""
    if not may_write(request, repo.type, repo.meta()["id"]):
        raise Refusal(403, "You don't have the rights to write to this repo: Authorization error.")
    return repo


def _token(request: Request) -> str | None:
    """Return the token of the request; None without an Authorization header."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if not scheme:
        return None
    # A browser's login dialog sends Basic. It is accepted for reading only: a browser repeats it automatically, so a
    # foreign page could otherwise cause changes.
    if scheme.lower() == "basic" and request.method in ("GET", "HEAD"):
        return _password(value.strip())
    return value.strip()


def _password(basic: str) -> str:
    try:
        return base64.b64decode(basic, validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
