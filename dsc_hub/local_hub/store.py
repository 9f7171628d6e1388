"""Storage of the local hub: content-addressed blobs, commits as JSON, refs per repo.

    root/blobs/ab/<sha256>                   contents; immutable
    root/repos/<type>s/<namespace>/<name>/   folder names in lower case, because repo ids are case-insensitive
        meta.json                            id, visibility, time of creation
        refs.json                            {"heads": {branch: commit}, "tags": {tag: commit}, "pr": {number: commit}}
        commits/<commit>.json                parent, title, author, date and the whole file list
    root/locks/, root/tmp/                   one lock per repo; temporary files

Files appear by rename, so an existing file is always complete: a killed process leaves files only in tmp/. Nothing is
kept in memory between calls and every change holds the repo's file lock, so threads and several processes can share one
root. Paths inside a repo are keys of a commit's file list, never paths on this disk. Blobs of deleted files and repos
are kept: history can still refer to them, and there is no garbage collection.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsc_hub.system.files import parse_json
from dsc_hub.system.locks import locked

from . import gitfiles

REPO_TYPES = ("model", "dataset", "space")
# Required keys of a repo's files.
NEEDED = {"meta.json": frozenset({"_id", "id", "private", "createdAt"}), "refs.json": frozenset({"heads", "tags"})}
STALE_S = 24 * 3600  # files in tmp/ older than this belong to no running process

_ID_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"


class Refusal(Exception):
    """A refused request: HTTP status, a message for people, and a code by which clients distinguish causes."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}
        self.body: dict[str, Any] = {}  # fields of the reply in addition to the message


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is the id that git would store: of the content, or of its LFS pointer."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        """Identifier of this content for a client's cache."""
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        return len(gitfiles.lfs_pointer(self.sha256, self.size))


@dataclass(frozen=True)
class Commit:
    """A snapshot of the whole repo."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


def now() -> str:
    """Return the current time in the Hub's format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_repo_id(repo_id: str) -> bool:
    """Return whether this is a valid repo id: two parts of letters, digits, `-`, `_`, `.`, all of them safe in git."""
    return (
        re.fullmatch(f"{_ID_PART}/{_ID_PART}", repo_id) is not None
        and "--" not in repo_id
        and ".." not in repo_id
        and not repo_id.endswith(".git")
    )


def clean_path(path: Any) -> str:
    """Return a path inside a repo, unchanged; 422 if it could leave the client's folder or enter .git."""
    parts = path.split("/") if isinstance(path, str) else []
    if not parts or "\\" in path or "\0" in path or any(p in ("", ".", "..") or p.lower() == ".git" for p in parts):
        raise Refusal(422, f"Invalid path in the repository: {path!r}")
    return str(path)


def clean_ref(name: Any) -> str:
    """Return a branch or tag name, unchanged; 400 for a name that git refuses."""
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[^\s\x00-\x1f\x7f~^:?*\[\\]{1,200}", name)
        or name.startswith(("refs/", "/", "-"))
        or name.endswith(("/", ".", ".lock"))
        or ".." in name
        or "//" in name
    ):
        raise Refusal(400, f"Invalid reference name: {name!r}")
    return name


class Store:
    """A folder of repos and their blobs."""

    def __init__(self, root: Path):
        self.root = Path(root)
        # Private repos are stored unencrypted, so only the owner has access to the folder.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.tmp = self.root / "tmp"
        for folder in (self.tmp, self.root / "locks", self.root / "blobs", self.root / "repos"):
            folder.mkdir(exist_ok=True)
        self._sweep()

    # -- blobs

    def blob_path(self, sha256: Any) -> Path:
        """Return the path of a blob, existing or not."""
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise Refusal(422, f"Not a sha256: {sha256!r}")
        return self.root / "blobs" / sha256[:2] / sha256

    def blob_size(self, sha256: Any) -> int | None:
        """Return the size of a blob in bytes; None if it does not exist."""
        try:
            return self.blob_path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    @contextmanager
    def incoming(self) -> Iterator[Incoming]:
        """Yield a blob that is being received; it is discarded unless kept."""
        fd, name = tempfile.mkstemp(dir=self.tmp)
        try:
            with os.fdopen(fd, "wb") as file:
                yield Incoming(self, Path(name), file)
        finally:
            Path(name).unlink(missing_ok=True)

    def put(self, data: bytes) -> str:
        """Store these bytes and return their sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.blob_size(sha256) is None:
            with self.incoming() as blob:
                blob.write(data)
                blob.keep(sha256)
        return sha256

    def read(self, entry: Entry) -> bytes:
        try:
            return self.blob_path(entry.sha256).read_bytes()
        except FileNotFoundError:
            raise Refusal(500, f"A file can't be read: {self.blob_path(entry.sha256)} is missing") from None

    def entry(self, data: bytes, lfs: bool) -> Entry:
        """Store these bytes as a file of a future commit."""
        sha256 = self.put(data)
        return lfs_entry(sha256, len(data)) if lfs else Entry(gitfiles.blob_oid(data), len(data), sha256, False)

    # -- repos

    def repo(self, repo_type: str, repo_id: str) -> Repo | None:
        """Return the repo of that id, ignoring case."""
        if repo_type not in REPO_TYPES or not is_repo_id(repo_id):
            return None
        repo = Repo(self, repo_type, self._folder(repo_type, repo_id))
        return repo if repo.path.is_dir() else None

    def repos(self, repo_type: str) -> list[Repo]:
        """Return all repos of a type."""
        folders = sorted((self.root / "repos" / f"{repo_type}s").glob("*/*/meta.json"))
        return [Repo(self, repo_type, meta.parent) for meta in folders]

    def create(self, repo_type: str, repo_id: str, author: str, private: bool, sdk: str | None = None) -> Repo:
        """Create a repo with its first commit; 409 if the id is taken."""
        if repo_type not in REPO_TYPES:
            raise Refusal(400, f"Invalid repo type: {repo_type!r}")
        if not is_repo_id(repo_id):
            raise Refusal(400, f"Invalid repo name: {repo_id}")
        files = {".gitattributes": self.entry(gitfiles.DEFAULT_GITATTRIBUTES, False)}
        if repo_type == "space":
            card = f"---\ntitle: {repo_id.split('/')[1]}\nsdk: {sdk or 'static'}\n---\n"
            files["README.md"] = self.entry(card.encode(), False)
        final = self._folder(repo_type, repo_id)
        with self.locked(repo_type, repo_id):
            if final.exists():
                raise Refusal(409, f"You already created this {repo_type} repo: {repo_id}")
            draft = Repo(self, repo_type, Path(tempfile.mkdtemp(dir=self.tmp)))
            (draft.path / "commits").mkdir()
            meta = {"_id": secrets.token_hex(12), "id": repo_id, "private": private, "createdAt": now(), "sdk": sdk}
            self.write_json(draft.path / "meta.json", meta)
            commit = draft.add_commit(None, files, "initial commit", "", author)
            draft.write_refs({"heads": {"main": commit.id}, "tags": {}})
            final.parent.mkdir(parents=True, exist_ok=True)
            os.rename(draft.path, final)
        return Repo(self, repo_type, final)

    def delete(self, repo: Repo) -> None:
        """Delete a repo atomically: it is moved away before its files are removed."""
        with repo.locked():
            trash = Path(tempfile.mkdtemp(dir=self.tmp))
            os.rename(repo.path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    # -- shared means

    @contextmanager
    def locked(self, repo_type: str, repo_id: str) -> Iterator[None]:
        """Hold a repo's lock against other threads and processes; the lock ends with the process that holds it."""
        name = f"{repo_type}s--{repo_id.lower().replace('/', '--')}"
        with locked(self.root / "locks" / name):
            yield

    def write_json(self, path: Path, data: dict[str, Any]) -> None:
        """Write atomically: a reader sees either the old or the new file."""
        fd, part = tempfile.mkstemp(dir=self.tmp)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(fd)
        os.replace(part, path)

    def _folder(self, repo_type: str, repo_id: str) -> Path:
        return self.root / "repos" / f"{repo_type}s" / repo_id.lower()

    def _sweep(self) -> None:
        """Remove files left by killed processes; recent ones may belong to another server on the same root."""
        for path in self.tmp.iterdir():
            try:
                if path.stat().st_mtime < time.time() - STALE_S:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            except FileNotFoundError:
                pass  # its owner, or another server starting now, was faster


class Incoming:
    """Received bytes that become a blob once their sha256 matches the announced one."""

    def __init__(self, store: Store, path: Path, file: Any):
        self._store, self._path, self._file, self._hash = store, path, file, hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._file.write(chunk)

    def keep(self, sha256: str) -> None:
        """Move the bytes to their final path; 400 if the sha256 does not match."""
        if self._hash.hexdigest() != sha256:
            raise Refusal(400, "The sha256 of the uploaded bytes is not the announced one")
        self._file.flush()
        os.fsync(self._file.fileno())
        target = self._store.blob_path(sha256)
        target.parent.mkdir(exist_ok=True)
        os.replace(self._path, target)


def lfs_entry(sha256: str, size: int) -> Entry:
    """Return the entry of a file whose content is stored in LFS."""
    return Entry(gitfiles.blob_oid(gitfiles.lfs_pointer(sha256, size)), size, sha256, True)


@dataclass(frozen=True)
class Repo:
    """One repo, read from disk at each access; 404 if it has been deleted meanwhile."""

    store: Store
    type: str
    path: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock while changing refs or settings."""
        with self.store.locked(self.type, f"{self.path.parent.name}/{self.path.name}"):
            self.meta()  # it may have been deleted during the wait; a late write must not recreate half of it
            yield

    def meta(self) -> dict[str, Any]:
        return self._read("meta.json")

    def change(self, **settings: Any) -> None:
        """Change settings: private, gated."""
        with self.locked():
            self.store.write_json(self.path / "meta.json", self.meta() | settings)

    def refs(self) -> dict[str, dict[str, str]]:
        return self._read("refs.json")

    def write_refs(self, refs: dict[str, Any]) -> None:
        """Replace all refs; the caller must hold the lock."""
        self.store.write_json(self.path / "refs.json", refs)

    def resolve(self, revision: str) -> str:
        """Return the commit id of a branch, a tag, a full ref name or a (shortened) commit id."""
        refs = self.refs()
        for table in ("heads", "tags"):
            name = revision.removeprefix(f"refs/{table}/")
            if name in refs[table]:
                return refs[table][name]
        if (number := revision.removeprefix("refs/pr/")) != revision and number in refs.get("pr", {}):
            return refs["pr"][number]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            matches = [path.stem for path in (self.path / "commits").glob(f"{revision}*.json")]
            if len(matches) == 1:
                return matches[0]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, commit_id: str) -> Commit:
        row = self._read(f"commits/{commit_id}.json")
        try:
            return Commit(**row | {"files": {path: Entry(**entry) for path, entry in row["files"].items()}})
        except (LookupError, TypeError, AttributeError):
            raise Refusal(
                500, f"This repository can't be read: its commit {commit_id} is damaged ({self.path})"
            ) from None

    def at(self, revision: str) -> Commit:
        """Return the commit of a revision, loaded."""
        return self.commit(self.resolve(revision))

    def history(self, commit: Commit) -> Iterator[Commit]:
        """Yield this commit and its ancestors, newest first."""
        yield commit
        while commit.parent:
            commit = self.commit(commit.parent)
            yield commit

    def add_commit(self, parent: str | None, files: dict[str, Entry], title: str, message: str, author: str) -> Commit:
        """Write a commit. It is invisible until a ref names it, so this is done first and the ref is written last."""
        row: dict[str, Any] = {
            "parent": parent,
            "title": title,
            "message": message,
            "author": author,
            "date": now(),
            "files": {path: asdict(entry) for path, entry in sorted(files.items())},
        }
        # The salt distinguishes two equal commits in the same millisecond.
        row["id"] = hashlib.sha1(json.dumps(row).encode() + secrets.token_bytes(16)).hexdigest()
        self.store.write_json(self.path / "commits" / f"{row['id']}.json", row)
        return Commit(**row | {"files": files})

    def file(self, commit: Commit, path: str) -> bytes | None:
        """Return the content of a file; None if the commit has no such file."""
        entry = commit.files.get(path)
        return None if entry is None else self.store.read(entry)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value = parse_json((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Refusal(404, "Repository not found", "RepoNotFound") from None
        except ValueError:
            value = None
        if not isinstance(value, dict) or not NEEDED.get(name, frozenset()) <= value.keys():
            raise Refusal(500, f"This repository can't be read: its {name} is damaged ({self.path})")
        return value
