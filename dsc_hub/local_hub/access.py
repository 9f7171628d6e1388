"""Who is asking, and which repos they may see and change.

A namespace belongs to the user of that name. Public repos can be read by anyone who reaches the port, private ones only
by their namespace; a repo that may not be seen is answered exactly like one that does not exist. A token may have fewer
rights than its user: the role `read`, or the role `fineGrained` with the namespaces and repos that it may write to.
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
    """The name of the user whose token came with the request; None without one, 401 with a wrong one."""
    token = _token(request)
    if token is None:
        return None
    user: str | None = request.app.state.users.get(token)
    if user is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return user


def rights(request: Request) -> dict[str, Any]:
    """What the token of the request may do, as the Hub tells it: its role and, of a fine-grained one, its scopes."""
    told: dict[str, Any] = request.app.state.rights.get(_token(request), {"role": "write"})
    return told


def may_write(request: Request, repo_type: str, repo_id: str) -> bool:
    """May the request change a repo of this id, whether it exists or not? 401 without a token."""
    granted = rights(request)
    if not owns(signed_in(request), repo_id) or granted["role"] == "read":
        return False
    if granted["role"] != "fineGrained":
        return True
    writing = [s["entity"] for s in granted["fineGrained"]["scoped"] if "repo.write" in s["permissions"]]
    namespace = repo_id.split("/", maxsplit=1)[0]
    return any(e["name"] == (repo_id if e["type"] == repo_type else namespace) for e in writing)


def signed_in(request: Request) -> str:
    """The name of the user; 401 without a token."""
    user = caller(request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    return user


def may_read(user: str | None, repo: Repo) -> bool:
    meta = repo.meta()
    return not meta["private"] or owns(user, meta["id"])


def visible_repos(request: Request, repo_type: str) -> list[Repo]:
    """The repos of a type that the caller may see."""
    user, visible = caller(request), []
    for repo in store_of(request).repos(repo_type):
        try:
            if may_read(user, repo):
                visible.append(repo)
        except Refusal:
            continue  # deleted while we were listing, or damaged
    return visible


def owns(user: str | None, repo_id: str) -> bool:
    return user is not None and repo_id.split("/", maxsplit=1)[0] == user


def readable(request: Request) -> Repo:
    """The repo that the route names, if the caller may see it."""
    params = request.path_params
    return find(request, params.get("type", "model"), f"{params['ns']}/{params['name']}")


def downloadable(request: Request) -> Repo:
    """The repo that the route names, if the caller may have its files: a gated one is seen by all and read by its owner
    (nobody else can ask for access here)."""
    repo = readable(request)
    if repo.meta().get("gated") and not owns(caller(request), repo.meta()["id"]):
        raise Refusal(403, "Access to this repository is restricted: ask its owner", "GatedRepo")
    return repo


def writable(request: Request) -> Repo:
    """The repo that the route names, if the caller may change it."""
    return for_writing(request, readable(request))


def find(request: Request, repo_type: str, repo_id: str) -> Repo:
    """A repo that the caller may see. Hidden and missing ones look the same: 404, or 401 without a token."""
    user = caller(request)
    repo = store_of(request).repo(repo_type, repo_id)
    if repo is None or not may_read(user, repo):
        if user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")
    return repo


def for_writing(request: Request, repo: Repo) -> Repo:
    """The same repo, if the caller may change it."""
    if not may_write(request, repo.type, repo.meta()["id"]):
        raise Refusal(403, "You don't have the rights to write to this repo: Authorization error.")
    return repo


def _token(request: Request) -> str | None:
    """The token that came with the request; None if nothing that could be one did."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if not scheme:
        return None
    # A browser's login box sends Basic. It is taken for reading only: a browser repeats it on its own, so a foreign
    # page could otherwise make it change something.
    if scheme.lower() == "basic" and request.method in ("GET", "HEAD"):
        return _password(value.strip())
    return value.strip()


def _password(basic: str) -> str:
    try:
        return base64.b64decode(basic, validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
