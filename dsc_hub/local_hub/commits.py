"""History: commits and their preparation (preupload), branches and tags."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import access, answers, gitfiles
from .routing import REPO
from .store import Commit, Entry, Refusal, Repo, clean_path, clean_ref, lfs_entry

STALE = "The branch was updated since you opened this page. Please refresh and try again."


@answers.takes_json
def preupload(request: Request, body: dict[str, Any]) -> Response:
    """Return for each file the upload mode (regular or lfs), whether .gitignore excludes it, and the stored oid."""
    repo = access.writable(request)
    head = repo.at(request.path_params["rev"])
    patterns, ignore = _patterns(repo, head.files), answers.optional(body, "gitIgnore")
    if ignore is None:
        ignore = (repo.file(head, ".gitignore") or b"").decode("utf-8", "replace")
    rows = []
    for file in answers.wanted(body, "files", list):
        path, size = clean_path(answers.wanted(file, "path")), answers.wanted(file, "size", int)
        lfs = gitfiles.wants_lfs(patterns, path, size, _decoded(file.get("sample", "")))
        row = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": gitfiles.ignored(ignore, path)}
        if path in head.files:
            row["oid"] = _comparable_oid(repo, head.files[path], lfs)
        rows.append(row)
    return JSONResponse({"files": rows, "commitOid": head.id})


async def commit(request: Request) -> Response:
    """Add a commit to a branch. The body has one JSON object per line: the header, then the operations."""
    raw = await request.body()
    return await run_in_threadpool(_commit, request, raw)


def _commit(request: Request, raw: bytes) -> Response:
    repo, user = access.writable(request), access.signed_in(request)
    header, operations = _read_operations(raw)
    branch = request.path_params["rev"].removeprefix("refs/heads/")
    with repo.locked():
        refs = repo.refs()
        if branch not in refs["heads"]:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.commit(refs["heads"][branch])
        parent = header.get("parentCommit")
        if parent and not (isinstance(parent, str) and len(parent) >= 7 and head.id.startswith(parent)):
            raise Refusal(412, STALE)
        files, patterns = dict(head.files), _patterns(repo, head.files)
        for key, op in operations:
            _apply(repo, files, key, op, patterns)
        _check_tree(files)
        new = repo.add_commit(head.id, files, header["summary"], header.get("description") or "", user)
        pulls = refs.setdefault("pr", {})
        number = str(len(pulls) + 1) if answers.flag(request.query_params.get("create_pr")) else None
        if number is None:
            refs["heads"][branch] = new.id
        else:
            pulls[number] = new.id
        repo.write_refs(refs)
    page = answers.repo_url(request, repo.type, repo.meta()["id"])
    reply = {"success": True, "commitOid": new.id, "commitUrl": f"{page}/commit/{new.id}", "hookOutput": ""}
    return JSONResponse(reply | ({"pullRequestUrl": f"{page}/discussions/{number}"} if number else {}))


def _read_operations(raw: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Return header and operations of a commit, with every path validated."""
    rows = [answers.parsed(line) for line in raw.splitlines() if line.strip()]
    if not all(isinstance(row, dict) and isinstance(row.get("value"), dict) for row in rows):
        raise Refusal(400, "Each line of a commit must hold a key and a value")
    header: dict[str, Any] = next((row["value"] for row in rows if row.get("key") == "header"), {})
    if not header.get("summary") or not isinstance(header["summary"], str):
        raise Refusal(400, '"header.summary" is required')
    operations = [(row.get("key"), row["value"]) for row in rows if row.get("key") != "header"]
    for key, op in operations:
        if key not in ("file", "lfsFile", "deletedFile", "deletedFolder"):
            raise Refusal(400, f"Unknown commit operation: {key!r}")
        path = op.get("path")
        op["path"] = clean_path(path.removesuffix("/") if key.startswith("deleted") and isinstance(path, str) else path)
    return header, operations


def _content(op: dict[str, Any]) -> bytes:
    text = answers.wanted(op, "content")
    return _decoded(text) if op.get("encoding") == "base64" else text.encode()


def _apply(repo: Repo, files: dict[str, Entry], key: str, op: dict[str, Any], patterns: list[str]) -> None:
    """Apply one operation to the file list of the new commit."""
    path = op["path"]
    if key == "file":
        data = _content(op)
        files[path] = repo.store.entry(data, gitfiles.wants_lfs(patterns, path, len(data), data[:512]))
    elif key == "lfsFile":
        size = repo.store.blob_size(op.get("oid"))
        if size is None:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = lfs_entry(op["oid"], size)
    elif key == "deletedFile" and path in files:
        del files[path]
    else:  # a folder; the clients may omit its slash
        deleted = [p for p in files if p.startswith(path + "/")]
        if not deleted:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for p in deleted:
            del files[p]


def _check_tree(files: dict[str, Entry]) -> None:
    """Refuse a path that is both a file and a folder."""
    for path in files:
        parts = path.split("/")
        if any("/".join(parts[:n]) in files for n in range(1, len(parts))):
            raise Refusal(400, f"A file and a folder have the same name on the way to {path}")


def _patterns(repo: Repo, files: dict[str, Entry]) -> list[str]:
    entry = files.get(".gitattributes")
    return gitfiles.lfs_patterns(repo.store.read(entry)) if entry else []


def _comparable_oid(repo: Repo, entry: Entry, lfs: bool) -> str:
    """Return the id by which the client detects an unchanged file: sha256 for lfs, else the git id of the content."""
    if lfs:
        return entry.sha256
    return gitfiles.blob_oid(repo.store.read(entry)) if entry.lfs else entry.oid


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise Refusal(400, "Invalid base64 content") from None


def history(request: Request) -> Response:
    repo = access.readable(request)
    formatted = "formatted" in request.query_params.getlist("expand[]")
    log = repo.history(repo.at(request.path_params["rev"]))
    return answers.page(request, list(_log_rows(log, formatted)), default_size=50)


def _log_rows(log: Iterable[Commit], formatted: bool) -> Iterable[dict[str, Any]]:
    for c in log:
        row = {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        yield row | ({"formatted": {"title": c.title, "message": c.message}} if formatted else {})


def refs(request: Request) -> Response:
    tables = access.readable(request).refs()
    rows = {
        table: [
            {"name": name, "ref": f"refs/{table}/{name}", "targetCommit": commit}
            for name, commit in tables[table].items()
        ]
        for table in ("heads", "tags")
    }
    pulls = [
        {"name": f"pr/{number}", "ref": f"refs/pr/{number}", "targetCommit": commit}
        for number, commit in tables.get("pr", {}).items()
    ]
    return JSONResponse({"branches": rows["heads"], "tags": rows["tags"], "converts": [], "pullRequests": pulls})


@answers.takes_json
def create_branch(request: Request, body: dict[str, Any]) -> Response:
    start = answers.optional(body, "startingPoint", "main")
    return _create_ref(access.writable(request), "heads", request.path_params["ref"], start)


@answers.takes_json
def create_tag(request: Request, body: dict[str, Any]) -> Response:
    return _create_ref(access.writable(request), "tags", answers.wanted(body, "tag"), request.path_params["ref"])


def _create_ref(repo: Repo, table: str, name: str, target: str) -> Response:
    name = clean_ref(name)
    with repo.locked():
        refs = repo.refs()
        if name in refs[table]:
            raise Refusal(409, f"Reference refs/{table}/{name} already exists")
        refs[table][name] = repo.resolve(target)
        repo.write_refs(refs)
    return JSONResponse({})


def delete_branch(request: Request) -> Response:
    if request.path_params["ref"] == "main":
        raise Refusal(403, "Cannot delete refs/heads/main")
    return _delete_ref(request, "heads")


def delete_tag(request: Request) -> Response:
    return _delete_ref(request, "tags")


def _delete_ref(request: Request, table: str) -> Response:
    repo, name = access.writable(request), request.path_params["ref"]
    with repo.locked():
        refs = repo.refs()
        if refs[table].pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        repo.write_refs(refs)
    return JSONResponse({})


ROUTES = [
    Route(REPO + "/preupload/{rev:part}", preupload, methods=["POST"]),
    Route(REPO + "/commit/{rev:part}", commit, methods=["POST"]),
    Route(REPO + "/commits/{rev:part}", history),
    Route(REPO + "/refs", refs),
    Route(REPO + "/branch/{ref:rest}", create_branch, methods=["POST"]),
    Route(REPO + "/branch/{ref:rest}", delete_branch, methods=["DELETE"]),
    Route(REPO + "/tag/{ref:rest}", create_tag, methods=["POST"]),
    Route(REPO + "/tag/{ref:rest}", delete_tag, methods=["DELETE"]),
]
