"""The repos that something goes to: what they hold, whether they are ours, and what forbids to write to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx2
import yaml
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from dsc_hub.config.recipe import PublishConfig
from dsc_hub.errors import HubError
from dsc_hub.hub.account import Account
from dsc_hub.hub.client import MANIFEST
from dsc_hub.hub.errors import as_hub_error
from dsc_hub.hub.retry import GO_ON, KEPT, LONGEST_PAUSE_S, PASSING, REPLY_S, bounded, with_retries
from dsc_hub.system.hashing import file_hash

LARGEST_FILE = 50 * 10**9  # bytes; the public Hub takes no larger one


@dataclass(frozen=True)
class Stranger:
    """Somebody else's recipe that chose the name of a repo: the repo it came from (`source`) and the SHA-256 of its file.

    `weights`: SHA-256 of the base model's weight files. A repo that holds one of them is that base already."""

    source: str
    sha256: str
    weights: frozenset[str] = frozenset()

    def with_weights(self, files: Iterable[Path]) -> Stranger:
        return replace(self, weights=frozenset(file_hash(file) for file in files if file.suffix == ".safetensors"))


@dataclass(frozen=True)
class RepoTarget:
    """Where something goes: a repo, and how it is to be there."""

    repo_type: str  # "model", "dataset" or "space"
    repo: str
    private: bool
    branch: str = "main"
    overwrite: bool = False  # files that somebody changed on the Hub since we published them
    pull_request: bool = False  # propose it, on top of `branch`
    tag: str | None = None  # for the commit, once it was read back
    gated: Literal["auto", "manual"] | None = None  # only those have the files who ask for them; None: as it is
    named_by: Stranger | None = None  # whose recipe chose the repo's name; None: the user did

    def __str__(self) -> str:
        return f"{self.repo_type} '{self.repo}'"


def repo_target(how: PublishConfig, repo_type: str, repo: str, named_by: Stranger | None = None) -> RepoTarget:
    """The target that a recipe's `publish:` section makes of a repo."""
    return RepoTarget(
        repo_type, repo, how.private, how.branch, how.overwrite, how.pull_request, how.tag, how.gated, named_by
    )


@dataclass(frozen=True)
class RepoState:
    """What a repo holds at a commit."""

    name: str  # as the Hub spells it: another one if the repo was renamed
    commit: str
    private: bool
    gated: Any  # False, "auto" or "manual"
    files: Mapping[str, RepoFile]
    manifest: Mapping[str, Any] | None  # ours; None if there is none

    @property
    def ours(self) -> bool:
        """Is the repo empty, or one that dsc published?"""
        return self.manifest is not None or not set(self.files) - {".gitattributes", "README.md"}

    @property
    def before(self) -> Mapping[str, Any]:
        """Paths and hashes of what we published last."""
        files: Mapping[str, Any] = (self.manifest or {}).get("files", {})
        return files


# -- before any work


def preflight(account: Account, targets: Sequence[RepoTarget]) -> list[str]:
    """All that stands in the way of publishing to these repos; empty if nothing does. Writes nothing."""
    problems = []
    for target in targets:
        try:
            with as_hub_error(str(target), account.endpoint):
                problems += with_retries(str(target), partial(_obstacles, account, target))
        except HubError as e:
            problems.append(_in_a_line(e))
    return problems


def _obstacles(account: Account, target: RepoTarget) -> list[str]:
    api = account.api
    try:
        held = look(api, target)
    except RepositoryNotFoundError:
        if target.pull_request:
            return [f"{target} doesn't exist: a pull request needs a repo that does"]
        if not account.may_write(target.repo_type, target.repo):
            return [
                f"{target} doesn't exist, and this token may not make it: give it the right to write to its namespace"
            ]
        return []
    found = objections(target, held)
    if target.branch != "main":
        with suppress(RevisionNotFoundError):  # it will be made
            held = look(api, target, target.branch)
        if objection := of_another_recipe(target, held):
            found.append(objection)
    if objection := overwrites(target, held, held.before):
        found.append(objection)
    if target.tag and (at := tagged(api, target)) not in (None, held.commit):
        found.append(taken(target, str(at)))
    if not target.pull_request:
        try:
            with as_hub_error(str(target), account.endpoint):
                api.auth_check(target.repo, repo_type=target.repo_type, write=True)
        except HubError as e:
            found.append(e)
    return [_in_a_line(e) for e in found]


def is_private(account: Account, target: RepoTarget) -> bool:
    """Is the target a repo that exists and is private?"""
    try:
        with as_hub_error(str(target), account.endpoint):
            return with_retries(str(target), lambda: bool(look(account.api, target).private))
    except RepositoryNotFoundError:
        return False


def check_card(account: Account, repo_type: str, metadata: Mapping[str, Any]) -> list[str]:
    """What the endpoint's own validator says of a card's metadata (licence, language ...); empty if it agrees."""
    return check_readme(account, repo_type, f"---\n{yaml.safe_dump(dict(metadata))}---\n")


def check_readme(account: Account, repo_type: str, text: str) -> list[str]:
    """What the endpoint's own validator says of a whole card; empty if it agrees."""

    def ask() -> Any:
        answer = get_session().post(
            f"{account.endpoint}/api/validate-yaml",
            json={"content": text, "repoType": repo_type},
            headers=build_hf_headers(token=account.token),
        )
        if answer.status_code != 400:  # 400: there are errors, and these are to be shown
            hf_raise_for_status(answer)
        return answer.json()

    with as_hub_error("card metadata", account.endpoint, GO_ON):
        errors = with_retries("card metadata", ask).get("errors", [])
    return [f"publish: card metadata is refused: {str(e.get('message'))[:200]}" for e in errors]


def oversized(where: str, files: Mapping[str, Path]) -> list[str]:
    """Problems with files that no Hub takes."""
    limit = f"is larger than {LARGEST_FILE / 1e9:.0f} GB"
    return [f"{where}: {path} {limit}" for path, file in files.items() if file.stat().st_size > LARGEST_FILE]


def collection_is_public(account: Account, title: str) -> list[str]:
    """The problem with a collection of that title into which private repos can't go; none if it isn't there."""
    with as_hub_error(f"collection '{title}'", account.endpoint), bounded(REPLY_S, LONGEST_PAUSE_S):
        found = [c for c in account.api.list_collections(owner=account.owner) if c.title == title and not c.private]
    return [": ".join(open_collection(title))] if found else []


def open_collection(title: str) -> tuple[str, str]:
    return (
        f"the collection '{title}' exists and is public, but the recipe publishes privately",
        "Make it private, or set publish.collection to another title.",
    )


# -- what forbids to write


def objections(target: RepoTarget, held: RepoState) -> list[HubError]:
    """What forbids to publish into a repo, whatever is to go there."""
    found = []
    if held.name.lower() != target.repo.lower():
        found.append(HubError(f"{target} has moved to '{held.name}'", "Name it so under `publish:`."))
    if target.private and not held.private:  # `private` has no effect on a repo that exists
        found.append(
            HubError(
                f"{target} exists and is public, but the recipe publishes privately",
                "Make it private, or set publish.private=false.",
            )
        )
    if objection := of_another_recipe(target, held):
        found.append(objection)
    elif not held.ours:
        found.append(HubError(f"{target} exists and was not published by dsc", "Choose another name under `publish:`."))
    return found


def of_another_recipe(target: RepoTarget, held: RepoState) -> HubError | None:
    """The objection to writing where a stranger's recipe wants it to go, unless the repo is empty, or what it holds was published
    by this same recipe."""
    manifest = held.manifest or {}
    by = target.named_by
    if by is None or not set(held.files) - {".gitattributes"}:
        return None
    published = {name: dict(about or {}).get("sha256") for name, about in held.before.items()}
    weights = {sha256 for name, sha256 in published.items() if name.endswith(".safetensors")}
    if by.sha256 in (manifest.get("named_by"), published.get("recipe.yaml")) or by.weights & weights:
        return None
    return HubError(
        f"{target} exists, and its name was chosen by a recipe of somebody else ({by.source})",
        "Choose the names: publish.dataset, publish.adapter (and publish.base).",
    )


def overwrites(target: RepoTarget, held: RepoState, touched: Iterable[str]) -> HubError | None:
    """The objection to writing over what somebody added, or changed since we published it (a card edited on its page)."""
    if target.overwrite or held.manifest is None:
        return None
    edited = [
        path
        for path in touched
        if path in held.files
        and path != MANIFEST
        and not (path in held.before and _is(held.files[path], held.before[path]))
    ]
    if not edited:
        return None
    return HubError(
        f"{target}: {', '.join(edited[:5])} {'was' if len(edited) == 1 else 'were'} changed there since dsc published it",
        "Take those changes over into the recipe or elsewhere; publish.overwrite=true writes over them.",
    )


def _in_a_line(error: HubError) -> str:
    return f"{error.message}: {error.hint}" if error.hint else error.message


def tagged(api: HfApi, target: RepoTarget) -> str | None:
    """The commit at which the target's tag is; None if there is no such tag."""
    refs = api.list_repo_refs(target.repo, repo_type=target.repo_type)
    return next((t.target_commit for t in refs.tags if t.name == target.tag), None)


def taken(target: RepoTarget, at: str) -> HubError:
    return HubError(f"{target} has the tag '{target.tag}' at {at[:12]} already", "Set publish.tag to another name.")


# -- what is there


def look(api: HfApi, target: RepoTarget, revision: str | None = None) -> RepoState:
    """What a repo holds (`revision`: None is main)."""
    info = api.repo_info(target.repo, repo_type=target.repo_type, revision=revision)
    head = str(info.sha)
    files = tree(api, target.repo_type, target.repo, head)
    manifest = _manifest(api, target.repo_type, target.repo, head, files)
    return RepoState(str(info.id), head, bool(info.private), getattr(info, "gated", False), files, manifest)


def tree(api: HfApi, repo_type: str, repo: str, revision: str) -> dict[str, RepoFile]:
    """Files of a repo. HubError if the Hub can't be had for it: the client has tried five times by itself."""
    try:
        entries = list(api.list_repo_tree(repo, repo_type=repo_type, revision=revision, recursive=True))
    except (HfHubHTTPError, httpx2.TransportError) as e:
        if isinstance(e, HfHubHTTPError) and e.response.status_code not in PASSING:
            raise
        with as_hub_error(f"files of {repo_type} '{repo}'", str(api.endpoint), KEPT):
            raise
    return {e.path: e for e in entries if isinstance(e, RepoFile)}


def signature(file: Path) -> dict[str, Any]:
    """What a manifest says of a file; the Hub tells one hash of large files and another of small ones."""
    size = file.stat().st_size
    git = {"git": _git_blob(file)} if size < 10**7 else {}
    return {"sha256": file_hash(file), "size": size} | git


def same(there: RepoFile | None, file: Path) -> bool:
    """Does the Hub hold this very file? By the hash the Hub reports: SHA-256 for large files, git's blob id for small."""
    if there is None or there.size != file.stat().st_size:
        return False
    return there.lfs.sha256 == file_hash(file) if there.lfs else there.blob_id == _git_blob(file)


def _is(there: RepoFile, signature: Mapping[str, Any]) -> bool:
    """Is what the Hub holds what a manifest says? True where the manifest lacks the hash that the Hub tells."""
    if there.lfs:
        return there.lfs.sha256 == signature.get("sha256")
    return bool(there.blob_id == signature.get("git", there.blob_id))


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


def _git_blob(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
