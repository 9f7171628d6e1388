"""Writing to a Hub: make a repo hold exactly these files, in one commit that is read back.

Every attempt begins by reading what is there, at which commit, and commits only on top of that. So whatever strikes (somebody else's
commit, a reply that is lost, a server that is down for a while), the next attempt sees what really happened: files that are
there already are not sent again, and a commit that went through unheard is found and not made twice.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from dsc_hub import __version__
from dsc_hub.errors import HubError
from dsc_hub.hub import MANIFEST, Account, as_hub_error
from dsc_hub.machine import file_hash
from dsc_hub.progress import console, say
from dsc_hub.runs import write_json

TRIES = 6
PAUSE_S = 1.0  # before the second attempt; twice as long before each further one, and a random part of it besides
LONGEST_PAUSE_S = 300.0  # also where the server asks for more
GO_ON = f"Tried {TRIES} times. What is there already is kept: the same command goes on from it."
PASSING = frozenset({408, 409, 412, 429, 500, 502, 503, 504})  # answers after which another attempt makes sense
LARGEST_FILE = 50 * 10**9  # bytes; the public Hub takes no larger one


@dataclass(frozen=True)
class Target:
    """Where something goes: a repo, and how it is to be there."""

    repo_type: str  # "model", "dataset" or "space"
    repo: str
    private: bool
    branch: str = "main"
    overwrite: bool = False  # files that somebody changed on the Hub since we published them
    pull_request: bool = False  # propose it, on top of `branch`
    gated: Literal["auto", "manual"] | None = None  # None: as the repo is

    def __str__(self) -> str:
        return f"{self.repo_type} '{self.repo}'"


def preflight(account: Account, repos: Sequence[tuple[str, str]], private: bool) -> list[str]:
    """What stands in the way of publishing to these (type, id) repos; empty if nothing does. Writes nothing.

    `private` has no effect on a repo that exists: private data must never go into one that is public.
    """
    problems = []
    for repo_type, repo in repos:
        with as_hub_error(f"{repo_type} '{repo}'", account.endpoint):
            try:
                info = account.api.repo_info(repo, repo_type=repo_type)
            except RepositoryNotFoundError:
                continue
        if private and not info.private:
            problems.append(
                f"{repo_type} '{repo}' exists and is public, but the recipe publishes privately: make it private, or set publish.private=false"
            )
        with as_hub_error(f"{repo_type} '{repo}'", account.endpoint):
            there = {s.rfilename for s in info.siblings or ()}
            if not _ours(account.api, repo_type, repo, str(info.sha), there):
                problems.append(
                    f"{repo_type} '{repo}' exists and was not published by dsc: choose another name under `publish:`"
                )
    return problems


def check_card(account: Account, repo_type: str, metadata: Mapping[str, Any]) -> list[str]:
    """What the endpoint's own validator says of a card's metadata (licence, language ...); empty if it agrees."""
    content = f"---\n{yaml.safe_dump(dict(metadata))}---\n"
    with as_hub_error("card metadata", account.endpoint):
        answer = httpx2.post(
            f"{account.endpoint}/api/validate-yaml",
            json={"content": content, "repoType": repo_type},
            headers={"Authorization": f"Bearer {account.token}"},
            timeout=30,
        )
    if answer.status_code == 200:
        return []
    try:
        errors = [e["message"] for e in answer.json()["errors"]]
    except (ValueError, KeyError, TypeError):
        errors = [f"{account.endpoint} answered {answer.status_code} to validate-yaml"]
    return [f"publish: card metadata is refused: {e[:200]}" for e in errors]


def push(account: Account, target: Target, files: Mapping[str, Path], message: str, work: Path) -> str:
    """Make the repo hold exactly these files (path in repo -> local file), in one commit, and read it back.

    Returns the commit; the present one if nothing differs. Files of an earlier push that are no longer wanted go; files
    that somebody else added stay. HubError if the Hub refuses, if what it holds is not what was sent, or if it can't be
    reached for as long as TRIES attempts take; then the same call goes on from what is there.
    """
    if too_large := [path for path, file in files.items() if file.stat().st_size > LARGEST_FILE]:
        raise HubError(
            f"{target}: {too_large[0]} is larger than {LARGEST_FILE / 1e9:.0f} GB", "Save it in smaller shards."
        )
    manifest = work / MANIFEST
    listed = {path: _signature(file) for path, file in sorted(files.items())}
    write_json(manifest, {"made_by": "dsc_hub", "version": __version__, "files": listed})
    files = {**files, MANIFEST: manifest}
    if not console.is_terminal:
        disable_progress_bars()
    with as_hub_error(str(target), account.endpoint, GO_ON):
        for number in range(1, TRIES + 1):
            try:
                return _attempt(account.api, target, files, message)
            except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError) as e:
                if number == TRIES or not _may_pass(e):
                    raise
                pause = _pause(number, e)
                say(f"{target}: {_told(e)}; attempt {number + 1} of {TRIES} in {pause:.0f} s")
                time.sleep(pause)
    raise AssertionError("unreachable")


def tag(account: Account, target: Target, commit: str, name: str) -> None:
    """Set a tag on a commit. HubError if it is on another commit already: a tag that moves is none."""
    with as_hub_error(f"tag '{name}' of {target}", account.endpoint):
        refs = account.api.list_repo_refs(target.repo, repo_type=target.repo_type)
        there = next((t.target_commit for t in refs.tags if t.name == name), None)
        if there is None:
            account.api.create_tag(target.repo, tag=name, revision=commit, repo_type=target.repo_type)
        elif there != commit:
            raise HubError(
                f"{target} has the tag '{name}' at {there[:12]}, and this is {commit[:12]}",
                "Set publish.tag to another name.",
            )


def collect(account: Account, title: str, items: Sequence[tuple[str, str]], private: bool) -> str:
    """Put (type, id) repos into the account's collection of that title, made if it isn't there; its address on the Hub.

    A collection that is there already keeps its visibility and what is in it.
    """
    with as_hub_error(f"collection '{title}'", account.endpoint):
        made = account.api.create_collection(title, namespace=account.owner, private=private, exists_ok=True)
        for repo_type, repo in items:
            account.api.add_collection_item(made.slug, repo, repo_type, exists_ok=True)
    return made.url


# -- one attempt


def _attempt(api: HfApi, target: Target, files: Mapping[str, Path], message: str) -> str:
    """Read what is there, commit what differs on top of exactly that, read it back."""
    where = {"repo_type": target.repo_type, "revision": target.branch}
    more = {"space_sdk": "static"} if target.repo_type == "space" else {}
    if not target.pull_request:
        api.create_repo(target.repo, repo_type=target.repo_type, private=target.private, exist_ok=True, **more)
    if target.branch != "main":
        api.create_branch(target.repo, branch=target.branch, repo_type=target.repo_type, exist_ok=True)
    info = api.repo_info(target.repo, **where)
    if target.private and not info.private:
        raise HubError(
            f"{target} is public, but the recipe publishes privately", "Make it private, or set publish.private=false."
        )
    if target.gated and info.gated != target.gated:  # before a file goes up, not after it
        api.update_repo_settings(target.repo, gated=target.gated, repo_type=target.repo_type)
    head = str(info.sha)
    there = _tree(api, target.repo_type, target.repo, head)
    if not _ours(api, target.repo_type, target.repo, head, there):
        raise HubError(f"{target} exists and was not published by dsc", "Choose another name under `publish:`.")
    before = (_manifest(api, target.repo_type, target.repo, head, there) or {}).get("files", {})
    changed = {path: file for path, file in files.items() if not _same(there.get(path), file)}
    gone = [path for path in before if path not in files and path in there]
    if not changed and not gone:
        say(f"{target}: nothing changed, commit {head[:12]}")
        return head
    if target.pull_request and (open_one := _proposed(api, target, files)):
        say(f"{target}: proposed before, commit {open_one[:12]}")
        return open_one
    _refuse_to_overwrite(target, there, before, [*changed, *gone])
    operations = [CommitOperationAdd(path, str(file)) for path, file in changed.items()]
    operations += [CommitOperationDelete(path) for path in gone]
    made = api.create_commit(
        target.repo, operations, commit_message=message, parent_commit=head, create_pr=target.pull_request, **where
    )
    if made.pr_url:
        say(f"{target}: proposed at {made.pr_url}")
    commit = made.oid
    back = _tree(api, target.repo_type, target.repo, commit)
    if wrong := sorted(path for path, file in files.items() if not _same(back.get(path), file)):
        raise HubError(
            f"{target} at {commit[:12]} does not hold what was sent: {', '.join(wrong[:5])} differ",
            "Publish again; if it stays so, report it.",
        )
    return commit


def _proposed(api: HfApi, target: Target, files: Mapping[str, Path]) -> str | None:
    """The commit of a pull request that holds these very files already; None if there is none."""
    refs = api.list_repo_refs(target.repo, repo_type=target.repo_type, include_pull_requests=True)
    for ref in refs.pull_requests or ():
        there = _tree(api, target.repo_type, target.repo, ref.target_commit)
        if all(_same(there.get(path), file) for path, file in files.items()):
            return ref.target_commit
    return None


def _refuse_to_overwrite(
    target: Target, there: Mapping[str, RepoFile], before: Mapping[str, Any], touched: Sequence[str]
) -> None:
    """HubError if we would write over what somebody changed since we published it (a card edited on its page)."""
    edited = [
        path
        for path in touched
        if path in there and path in before and not _is(there[path], before[path]) and path != MANIFEST
    ]
    if edited and not target.overwrite:
        raise HubError(
            f"{target}: {', '.join(edited[:5])} {'was' if len(edited) == 1 else 'were'} changed there since dsc published it",
            "Take those changes over into the recipe or elsewhere; publish.overwrite=true writes over them.",
        )


Passing = HfHubHTTPError | LocalEntryNotFoundError | httpx2.TransportError


def _may_pass(error: Passing) -> bool:
    if isinstance(error, LocalEntryNotFoundError):  # the client's word for a file that it could not ask for
        return not constants.is_offline_mode()
    if isinstance(error, httpx2.TransportError):
        return True
    return error.response is not None and error.response.status_code in PASSING


def _pause(number: int, error: Passing) -> float:
    """Seconds before the next attempt: what the server asks for, or longer and longer, never in step with others."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    longer = PAUSE_S * 2 ** (number - 1) * (1 + random.random())
    return min(LONGEST_PAUSE_S, max(longer, float(asked) if asked.isdigit() else 0.0))


def _told(error: Passing) -> str:
    if (response := getattr(error, "response", None)) is not None:
        return (
            "somebody else committed in between" if response.status_code == 412 else f"answered {response.status_code}"
        )
    return f"no answer ({type(error).__name__})"


# -- what is there


def _tree(api: HfApi, repo_type: str, repo: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, repo_type=repo_type, revision=revision, recursive=True)
    return {e.path: e for e in entries if isinstance(e, RepoFile)}


def _signature(file: Path) -> dict[str, Any]:
    """What a manifest says of a file; the Hub tells one hash of large files and another of small ones."""
    size = file.stat().st_size
    git = {"git": _git_blob(file)} if size < 10**7 else {}
    return {"sha256": file_hash(file), "size": size} | git


def _same(there: RepoFile | None, file: Path) -> bool:
    """Does the Hub hold this very file? By the hash the Hub reports: SHA-256 for large files, git's blob id for small."""
    if there is None or there.size != file.stat().st_size:
        return False
    return there.lfs.sha256 == file_hash(file) if there.lfs else there.blob_id == _git_blob(file)


def _is(there: RepoFile, signature: Mapping[str, Any]) -> bool:
    """Is what the Hub holds what a manifest says? True where the manifest lacks the hash that the Hub tells."""
    if there.lfs:
        return there.lfs.sha256 == signature.get("sha256")
    return there.blob_id == signature.get("git", there.blob_id)


def _manifest(api: HfApi, repo_type: str, repo: str, revision: str, there: Collection[str]) -> dict[str, Any] | None:
    """Our manifest in a repo; None if there is none, or one that isn't ours."""
    if MANIFEST not in there:
        return None
    path = api.hf_hub_download(repo, MANIFEST, repo_type=repo_type, revision=revision)
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return None
    fits = isinstance(manifest, dict) and manifest.get("made_by") == "dsc_hub"
    return manifest if fits and isinstance(manifest.get("files"), dict) else None


def _ours(api: HfApi, repo_type: str, repo: str, revision: str, there: Collection[str]) -> bool:
    """Is the repo empty, or one that dsc published?"""
    empty = not set(there) - {".gitattributes", "README.md"}
    return empty or _manifest(api, repo_type, repo, revision, there) is not None


def _git_blob(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
