"""Repos: create, delete, settings, info, listings, auth-check."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import access, answers, cards
from .routing import REPO
from .store import Commit, Entry, Refusal, Repo

# Keys that a listing omits unless requested by `full` or by name.
ONLY_IN_FULL = ("siblings", "cardData", "sha", "config")
# Files that identify the library if the card does not name one; the first existing one decides.
LIBRARY_FILES = {"adapter_config.json": "peft", "config.json": "transformers"}
SORT_KEYS = ("lastModified", "createdAt", "downloads", "likes")


@answers.takes_json
def create(request: Request, body: dict[str, Any]) -> Response:
    user = access.signed_in(request)
    repo_type, repo_id = answers.optional(body, "type", "model"), _repo_id(body, user)
    if not access.may_write(request, repo_type, repo_id):
        namespace = repo_id.split("/")[0]
        raise Refusal(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
    url = answers.repo_url(request, repo_type, repo_id)
    try:
        repo = access.store_of(request).create(
            repo_type, repo_id, user, bool(_asked_private(body)), answers.optional(body, "sdk")
        )
    except Refusal as refusal:
        if refusal.status == 409:  # create_repo(exist_ok=True) reads the address from this reply
            refusal.body = {"url": url}
        raise
    return JSONResponse({"url": url, "name": repo_id, "id": repo.meta()["_id"]})


@answers.takes_json
def delete(request: Request, body: dict[str, Any]) -> Response:
    repo_id = _repo_id(body, access.signed_in(request))
    repo = access.for_writing(request, access.find(request, answers.optional(body, "type", "model"), repo_id))
    access.store_of(request).delete(repo)
    return JSONResponse({})


@answers.takes_json
def settings(request: Request, body: dict[str, Any]) -> Response:
    repo = access.writable(request)
    changes: dict[str, Any] = {}
    if (private := _asked_private(body)) is not None:
        changes["private"] = private
    if "gated" in body:
        if body["gated"] not in (False, "auto", "manual"):
            raise Refusal(400, f"Gated {body['gated']!r}: expected auto, manual or false")
        changes["gated"] = body["gated"]
    repo.change(**changes)
    meta = repo.meta()
    return JSONResponse({"private": meta["private"], "gated": meta.get("gated", False)})


def info(request: Request) -> Response:
    repo = access.readable(request)
    commit = repo.at(request.path_params.get("rev", "main"))
    facts = describe(repo, commit, with_blobs=answers.flag(request.query_params.get("blobs")))
    return JSONResponse(_expanded(facts, request))


def auth_check(request: Request) -> Response:
    access.readable(request)
    return JSONResponse({})


def auth_check_write(request: Request) -> Response:
    access.writable(request)
    return JSONResponse({})


def listing(request: Request) -> Response:
    """Return the repos of a type that the caller may read, newest first."""
    query = request.query_params
    rows = []
    for repo in access.visible_repos(request, request.path_params["type"]):
        with suppress(Refusal):  # deleted during the listing, or damaged, which its own address reports
            rows.append(describe(repo, repo.at("main")))
    rows = [row for row in rows if _asked_for(row, query)]
    sort = query.get("sort")
    rows.sort(key=lambda row: row[sort if sort in SORT_KEYS else "lastModified"], reverse=True)
    if query.getlist("expand"):
        rows = [_expanded(row, request) for row in rows]
    elif not answers.flag(query.get("full")):
        left_out = {key for key in ONLY_IN_FULL if not answers.flag(query.get(key))}
        rows = [{k: v for k, v in row.items() if k not in left_out} for row in rows]
    return answers.page(request, rows)


def nameless(request: Request) -> Response:
    """Reply for a repo without a namespace, such as `gpt2` on the real Hub: none exist here."""
    return JSONResponse(access.find(request, "model", request.path_params["name"]).meta())


def describe(repo: Repo, commit: Commit, with_blobs: bool = False) -> dict[str, Any]:
    """Return the Hub's description of a repo at a commit."""
    meta, card = repo.meta(), cards.metadata(repo.file(commit, "README.md"))
    tags = cards.tags(card, repo.type)
    if any(path.endswith(".safetensors") for path in commit.files):
        tags.append("safetensors")
    facts = {
        "_id": meta["_id"],
        "id": meta["id"],
        "author": meta["id"].split("/")[0],
        "sha": commit.id,
        "private": meta["private"],
        "gated": meta.get("gated", False),
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": meta["createdAt"],
        "lastModified": commit.date,
        "cardData": card or None,
        "tags": tags,
        "usedStorage": sum(entry.size for entry in commit.files.values()),
        "siblings": [_sibling(path, entry, with_blobs) for path, entry in commit.files.items()],
    }
    if repo.type == "model":
        facts |= _model_facts(repo, commit, card, meta["id"])
    if repo.type == "space":
        facts["sdk"] = card.get("sdk")
    return facts


def _model_facts(repo: Repo, commit: Commit, card: dict[str, Any], repo_id: str) -> dict[str, Any]:
    guesses = (library for file, library in LIBRARY_FILES.items() if file in commit.files)
    library = card.get("library_name") or next(guesses, None)
    facts: dict[str, Any] = {
        "modelId": repo_id,
        "library_name": library,
        "pipeline_tag": card.get("pipeline_tag"),
        "model-index": card.get("model-index"),
        "spaces": [],
    }
    try:
        config = cards.plain(json.loads(repo.file(commit, "config.json") or b"null"))
    except (ValueError, RecursionError):  # an arbitrary file: ignored
        config = None
    if isinstance(config, dict):
        facts["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
    return facts


def _sibling(path: str, entry: Entry, with_blobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": path}
    if with_blobs:
        row |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            row["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return row


def _expanded(facts: dict[str, Any], request: Request) -> dict[str, Any]:
    """Return only the properties named by `expand`, or all if none are named."""
    names = request.query_params.getlist("expand")
    return {k: v for k, v in facts.items() if k in names or k in ("id", "_id", "modelId")} if names else facts


def _asked_for(row: dict[str, Any], query: QueryParams) -> bool:
    return (
        query.get("author") in (None, "", row["author"])
        and all(text.lower() in row["id"].lower() for text in query.getlist("search"))
        and all(tag in row["tags"] for tag in query.getlist("filter"))
        and query.get("pipeline_tag") in (None, row.get("pipeline_tag"))
        and not answers.flag(query.get("gated"))
    )


def _repo_id(body: dict[str, Any], user: str) -> str:
    return f"{answers.optional(body, 'organization', user)}/{answers.wanted(body, 'name')}"


def _asked_private(body: dict[str, Any]) -> bool | None:
    """Return the visibility in a request; clients before 2.0 send `private`. None if it is not given."""
    if "visibility" in body:
        if body["visibility"] not in ("public", "private", None):
            raise Refusal(400, f"Visibility {body['visibility']!r}: the local hub knows public and private")
        return bool(body["visibility"] == "private")
    return bool(body["private"]) if "private" in body else None


ROUTES = [
    Route("/api/repos/create", create, methods=["POST"]),
    Route("/api/repos/delete", delete, methods=["DELETE"]),
    Route("/api/{type:kind}", listing),
    Route("/api/{type:kind}/{name:part}", nameless),
    Route("/api/{type:kind}/{name:part}/revision/{rev:part}", nameless),
    Route(REPO, info),
    Route(REPO + "/revision/{rev:part}", info),
    Route(REPO + "/settings", settings, methods=["PUT"]),
    Route(REPO + "/auth-check", auth_check),
    Route(REPO + "/auth-check/write", auth_check_write),
]
