"""Collections: repos grouped under a title."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dsc_hub.system.files import parse_json

from . import access, answers
from .routing import PARTS
from .store import Refusal, now

SLUG = r"[a-z0-9][a-z0-9-]{0,120}"
ITEM_TYPES = ("model", "dataset", "space", "paper", "collection")
AT = f"/api/collections/{PARTS.replace('name', 'slug')}"


def _folder(request: Request) -> Path:
    return access.store_of(request).root / "collections"


def _collection_file(request: Request, namespace: str, slug: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", namespace) or not re.fullmatch(SLUG, slug):
        raise Refusal(404, "Collection not found")
    return _folder(request) / namespace.lower() / f"{slug}.json"


def _stored(file: Path) -> dict[str, Any] | None:
    """Return a stored collection; None if the file is missing or invalid: a damaged file must not hide the others."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
        return value if {"title", "private"} <= value.keys() and value["owner"]["name"] else None
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None


def _read_collection(request: Request) -> dict[str, Any]:
    """Return the collection of the route if the caller may read it; hidden and missing ones get the same reply."""
    file = _collection_file(request, request.path_params["ns"], request.path_params["slug"])
    collection = _stored(file)
    if collection is None or (collection["private"] and access.caller(request) != collection["owner"]["name"]):
        raise Refusal(404, "Collection not found")
    return collection


def _write(request: Request, collection: dict[str, Any]) -> None:
    namespace, slug = collection["slug"].split("/")
    file = _collection_file(request, namespace, slug)
    file.parent.mkdir(parents=True, exist_ok=True)
    access.store_of(request).write_json(file, collection | {"lastUpdated": now()})


def _of_the_caller(request: Request) -> dict[str, Any]:
    collection, user = _read_collection(request), access.signed_in(request)
    if collection["owner"]["name"] != user:
        raise Refusal(403, "You don't have the rights to change this collection")
    return collection


@answers.takes_json
def create(request: Request, body: dict[str, Any]) -> Response:
    """Create a collection; 409 with its slug if the owner has one of that title."""
    user, title = access.signed_in(request), answers.wanted(body, "title")
    namespace = answers.optional(body, "namespace", user)
    if namespace != user:
        raise Refusal(403, f"You don't have the rights to create a collection for {namespace}")
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "collection"
    with access.store_of(request).locked("collection", f"{namespace}/all"):
        for file in (_folder(request) / namespace.lower()).glob("*.json"):
            if (existing := _stored(file)) and existing["title"] == title:
                refusal = Refusal(409, "You already have a collection with this title")
                refusal.body = {"slug": existing["slug"]}
                raise refusal
        collection = {
            "slug": f"{namespace}/{words}-{secrets.token_hex(12)}",
            "title": title,
            "description": answers.optional(body, "description"),
            "owner": {"name": namespace, "type": "user"},
            "private": bool(body.get("private")),
            "items": [],
            "position": 0,
            "theme": "blue",
            "upvotes": 0,
            "lastUpdated": now(),
        }
        _write(request, collection)
    return JSONResponse(collection)


def read(request: Request) -> Response:
    return JSONResponse(_read_collection(request))


def listing(request: Request) -> Response:
    """Return the collections that the caller may read, limited to `owner` if given."""
    user, owners = access.caller(request), request.query_params.getlist("owner")
    collections = map(_stored, sorted(_folder(request).glob("*/*.json")))
    visible = [c for c in collections if c is not None and (not c["private"] or c["owner"]["name"] == user)]
    visible = [c for c in visible if not owners or c["owner"]["name"] in owners]
    # The clients number the collections of a listing themselves.
    return answers.page(request, [{k: v for k, v in c.items() if k != "position"} for c in visible])


@answers.takes_json
def add(request: Request, body: dict[str, Any]) -> Response:
    """Add an item; 409 if the collection contains it already."""
    item = answers.wanted(body, "item", dict)
    item_id, kind = answers.wanted(item, "id"), answers.wanted(item, "type")
    if kind not in ITEM_TYPES:
        raise Refusal(400, f"Invalid item type: {kind!r}")
    if kind in ("model", "dataset", "space"):
        access.find(request, kind, item_id)
    slug = request.path_params["slug"]
    with access.store_of(request).locked("collection", f"{request.path_params['ns']}/{slug}"):
        collection = _of_the_caller(request)
        if any((i["id"], i["type"]) == (item_id, kind) for i in collection["items"]):
            raise Refusal(409, "This item is in the collection already")
        note = {"text": body["note"]} if isinstance(body.get("note"), str) else None
        entry = {"_id": secrets.token_hex(12), "id": item_id, "type": kind, "position": len(collection["items"])}
        collection["items"].append(entry | ({"note": note} if note else {}))
        _write(request, collection)
    return JSONResponse(collection)


def remove(request: Request) -> Response:
    """Remove an item."""
    slug = request.path_params["slug"]
    with access.store_of(request).locked("collection", f"{request.path_params['ns']}/{slug}"):
        collection = _of_the_caller(request)
        remaining = [i for i in collection["items"] if i["_id"] != request.path_params["item"]]
        if len(remaining) == len(collection["items"]):
            raise Refusal(404, "Item not found")
        _write(request, collection | {"items": [i | {"position": n} for n, i in enumerate(remaining)]})
    return JSONResponse({})


def delete(request: Request) -> Response:
    _of_the_caller(request)
    _collection_file(request, request.path_params["ns"], request.path_params["slug"]).unlink(missing_ok=True)
    return JSONResponse({})


ROUTES = [
    Route("/api/collections", create, methods=["POST"]),
    Route("/api/collections", listing),
    Route(AT, read),
    Route(AT, delete, methods=["DELETE"]),
    Route(AT + "/items", add, methods=["POST"]),
    Route(AT + "/items/{item:part}", remove, methods=["DELETE"]),
]
