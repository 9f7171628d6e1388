"""Files: trees, downloads, and uploads of large files (git LFS, basic transfer).

An upload of any size is one PUT: nothing between a client and a local hub cuts connections, so multipart is not
supported.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from . import access, answers
from .routing import REPO, at_repo
from .store import Commit, Entry, Refusal, Repo

# A stored page or script must never run with the reader's permissions.
SAFE_HEADERS = {"Content-Security-Policy": "default-src 'none'; sandbox", "X-Content-Type-Options": "nosniff"}
LFS_JSON = "application/vnd.git-lfs+json"


# -- trees


def tree(request: Request) -> Response:
    """Return the entries of a folder, or of everything below it; a file lists itself."""
    repo, query = access.readable(request), request.query_params
    commit = repo.at(request.path_params["rev"])
    rows = list_tree(commit, request.path_params.get("path", ""), answers.flag(query.get("recursive")))
    if answers.flag(query.get("expand")):
        rows = _with_last_commits(repo, commit, rows)
    response = answers.page(request, rows)
    response.headers["X-Repo-Commit"] = commit.id
    return response


async def paths_info(request: Request) -> Response:
    """Return the entries of the given paths; missing ones are left out. The clients send a form."""
    return await run_in_threadpool(_paths_info, request, await request.body())


def _paths_info(request: Request, body: bytes) -> Response:
    if request.headers.get("content-type", "").startswith("application/json"):
        form = answers.parsed(body)
        if not isinstance(form, dict):
            raise Refusal(400, "The request body must be a JSON object")
        paths, expand = form.get("paths") or [], bool(form.get("expand"))
    else:
        fields = parse_qs(body.decode("utf-8", "replace"))
        paths, expand = fields.get("paths", []), answers.flag(fields.get("expand", [""])[0])
    repo = access.readable(request)
    commit = repo.at(request.path_params["rev"])
    rows_by_path = {row["path"]: row for row in list_tree(commit, "", recursive=True)}
    rows = [rows_by_path[path] for path in dict.fromkeys(p.strip("/") for p in paths) if path in rows_by_path]
    return JSONResponse(_with_last_commits(repo, commit, rows) if expand else rows)


def list_tree(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries of a folder in the Hub's order: folders, then files. Folders exist only through files."""
    folder = folder.strip("/")
    if folder in commit.files:
        return [_file_row(folder, commit.files[folder])]
    prefix = f"{folder}/" if folder else ""
    folders: dict[str, hashlib._Hash] = {}
    files = []
    for path, entry in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            subfolder = prefix + "/".join(parts[:depth])
            folders.setdefault(subfolder, hashlib.sha1()).update(f"{path} {entry.oid}\n".encode())
        if recursive or len(parts) == 1:
            files.append(_file_row(path, entry))
    if folder and not folders and not files:
        raise Refusal(404, f'{folder} does not exist on "{commit.id}"', "EntryNotFound", {"X-Repo-Commit": commit.id})
    rows: list[dict[str, Any]] = [
        {"type": "directory", "oid": sha1.hexdigest(), "size": 0, "path": path} for path, sha1 in folders.items()
    ]
    return sorted(rows, key=lambda row: row["path"]) + files


def last_change(history: Iterable[Commit], path: str) -> Commit:
    """Return the newest commit that changed a path, or anything below it."""

    def state(commit: Commit) -> dict[str, str]:
        return {p: e.oid for p, e in commit.files.items() if p == path or p.startswith(path + "/")}

    newest, *older = history
    for commit in older:
        if state(commit) != state(newest):
            break
        newest = commit
    return newest


def _file_row(path: str, entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.lfs:
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return row


def _with_last_commits(repo: Repo, commit: Commit, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    history = list(repo.history(commit))
    expanded = []
    for row in rows:
        last = last_change(history, row["path"])
        row = row | {"lastCommit": {"id": last.id, "title": last.title, "date": last.date}}
        if row["type"] == "file":
            row["securityFileStatus"] = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
        expanded.append(row)
    return expanded


# -- downloads


def resolve(request: Request) -> Response:
    """Return a file's bytes, or the requested Range of them, with the headers that clients use for their cache."""
    repo, path = access.downloadable(request), request.path_params["path"]
    commit = repo.at(request.path_params["rev"])
    headers = {"X-Repo-Commit": commit.id}
    entry = commit.files.get(path)
    if entry is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"} | SAFE_HEADERS
    if entry.lfs:
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"'}
    return FileResponse(
        repo.store.blob_path(entry.sha256),
        headers=headers,
        media_type="application/octet-stream",
        filename=os.path.basename(path),
        content_disposition_type="inline",
    )


def resolve_nameless(request: Request) -> Response:
    """Refuse a file of a repo without namespace: none exist here. Clients also request names that are no local path."""
    access.find(request, "model", request.path_params["name"])
    raise Refusal(404, "Repository not found", "RepoNotFound")


def blob_page(request: Request) -> Response:
    """Redirect to the file: the target of the address that upload_file returns."""
    repo, params = access.readable(request), request.path_params
    url = answers.repo_url(request, repo.type, repo.meta()["id"])
    return RedirectResponse(f"{url}/resolve/{quote(params['rev'], safe='')}/{quote(params['path'])}")


# -- uploads


@answers.takes_json
def lfs_batch(request: Request, body: dict[str, Any]) -> Response:
    """Return the upload address of each object; an object without actions is stored already."""
    repo = access.writable(request)
    if body.get("operation") != "upload":
        raise Refusal(422, "The local hub speaks LFS for uploads; download through resolve/")
    objects = []
    for item in answers.wanted(body, "objects", list):
        oid, size = answers.wanted(item, "oid"), answers.wanted(item, "size", int)
        row = {"oid": oid, "size": size, "authenticated": True}
        if repo.store.blob_size(oid) != size:
            href = f"{answers.base_url(request)}/_lfs/{oid}"
            # The clients send both requests without their token.
            row["actions"] = {
                "upload": {"href": f"{href}?sig={_signature(request, oid)}"},
                "verify": {"href": f"{href}/verify?sig={_signature(request, oid)}"},
            }
        objects.append(row)
    return JSONResponse({"transfer": "basic", "objects": objects}, media_type=LFS_JSON)


async def lfs_put(request: Request) -> Response:
    """Store one large file if its sha256 matches the announced one."""
    oid = _signed_oid(request)
    with access.store_of(request).incoming() as blob:
        try:
            async for chunk in request.stream():
                blob.write(chunk)
        except ClientDisconnect:
            raise Refusal(400, "The upload broke off") from None
        blob.keep(oid)
    return Response()


@answers.takes_json
def lfs_verify(request: Request, body: dict[str, Any]) -> Response:
    if access.store_of(request).blob_size(_signed_oid(request)) != body.get("size"):
        raise Refusal(404, "The object was not uploaded")
    return JSONResponse({})


def _signed_oid(request: Request) -> str:
    oid: str = request.path_params["oid"]
    if not hmac.compare_digest(request.query_params.get("sig", "").encode(), _signature(request, oid).encode()):
        raise Refusal(403, "The upload address is not signed by this server")
    return oid


def _signature(request: Request, oid: str) -> str:
    """Return the signature of an upload address, which contains no token.

    The key is made from the hub's tokens, so that an address outlives a restart and is valid at each server of a root.
    """
    tokens = "\0".join(sorted(request.app.state.users))
    return hmac.new(f"upload addresses\0{tokens}".encode(), oid.encode(), "sha256").hexdigest()


ROUTES = [
    Route("/_lfs/{oid:part}", lfs_put, methods=["PUT"]),
    Route("/_lfs/{oid:part}/verify", lfs_verify, methods=["POST"]),
    Route(REPO + "/tree/{rev:part}", tree),
    Route(REPO + "/tree/{rev:part}/{path:rest}", tree),
    Route(REPO + "/paths-info/{rev:part}", paths_info, methods=["POST"]),
    *at_repo(".git/info/lfs/objects/batch", lfs_batch, methods=["POST"]),
    *at_repo("/resolve/{rev:part}/{path:rest}", resolve),
    *at_repo("/blob/{rev:part}/{path:rest}", blob_page),
    Route("/{name:part}/resolve/{rev:part}/{path:rest}", resolve_nameless),
    Route("/{type:kind}/{name:part}/resolve/{rev:part}/{path:rest}", resolve_nameless),
]
