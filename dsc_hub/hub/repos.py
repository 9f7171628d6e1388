"""Target repos of a publication: their contents, whether dsc published them, and the reasons not to write to them."""

from __future__ import annotations

import hashlib
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

from dsc_hub.config.origin import MANIFEST
from dsc_hub.config.publishing import PublishConfig
from dsc_hub.errors import HubError
from dsc_hub.hub.account import Account
from dsc_hub.hub.errors import as_hub_error
from dsc_hub.hub.retry import GO_ON, LONGEST_PAUSE_S, PASSING, REPLY_S, WORK_IS_KEPT, bounded, with_retries
from dsc_hub.system.files import parse_json
from dsc_hub.system.hashing import file_hash

LARGEST_FILE = 50 * 10**9  # bytes; limit of the public Hub


@dataclass(frozen=True)
class Stranger:
    """A recipe of others that chose the name of a repo: the repo it came from (`source`) and the SHA-256 of its file.

    `weights`: SHA-256 of the base model's weight files. A repo that holds one of them is that base already.
    """

    source: str
    sha256: str
    weights: frozenset[str] = frozenset()

    def with_weights(self, files: Iterable[Path]) -> Stranger:
        return replace(self, weights=frozenset(file_hash(file) for file in files if file.suffix == ".safetensors"))


@dataclass(frozen=True)
class RepoTarget:
    """A repo to publish to, with the publication's settings."""

    repo_type: str  # "model", "dataset" or "space"
    repo: str
    private: bool
    branch: str = "main"
    overwrite: bool = False  # overwrite files that were changed on the Hub since they were published
    pull_request: bool = False  # propose the commit as a pull request on top of `branch`
    tag: str | None = None  # set on the commit after its verification
    gated: Literal["auto", "manual"] | None = None  # access to the files on request only; None: unchanged
    named_by: Stranger | None = None  # recipe of others that chose the repo's name; None: the user chose it

    def __str__(self) -> str:
        return f"{self.repo_type} '{self.repo}'"


def repo_target(how: PublishConfig, repo_type: str, repo: str, named_by: Stranger | None = None) -> RepoTarget:
    """Return the target for a repo according to a recipe's `publish:` section."""
    return RepoTarget(
        repo_type, repo, how.private, how.branch, how.overwrite, how.pull_request, how.tag, how.gated, named_by
    )


@dataclass(frozen=True)
class RepoState:
    """Contents of a repo at a commit."""

    name: str  # as the Hub reports it: differs if the repo was renamed
    commit: str
    private: bool
    gated: Any  # False, "auto" or "manual"
    files: Mapping[str, RepoFile]
    manifest: Mapping[str, Any] | None  # written by dsc; None if there is none

    @property
    def ours(self) -> bool:
        """Whether the repo is empty or was published by dsc."""
        return self.manifest is not None or not set(self.files) - {".gitattributes", "README.md"}

    @property
    def before(self) -> Mapping[str, Any]:
        """Paths and hashes of the previous publication."""
        files: Mapping[str, Any] = (self.manifest or {}).get("files", {})
        return files


# -- before any work


def check_targets(account: Account, targets: Sequence[RepoTarget]) -> list[str]:
    """Return all obstacles to publishing to these repos; empty if there are none. Writes nothing."""
    problems = []
    for target in targets:
        try:
            with as_hub_error(str(target), account.endpoint):
                problems += with_retries(str(target), partial(_obstacles, account, target))
        except HubError as e:
            problems.append(e.one_line)
    return problems


def _obstacles(account: Account, target: RepoTarget) -> list[str]:
    api = account.api
    try:
        state = look(api, target)
    except RepositoryNotFoundError:
        if target.pull_request:
            return [f"{target} doesn't exist: a pull request needs a repo that does"]
        if not account.may_write(target.repo_type, target.repo):
            return [
                f"{target} doesn't exist, and this token may not make it: give it the right to write to its namespace"
            ]
        return []
    problems = objections(target, state)
    if target.branch != "main":
        with suppress(RevisionNotFoundError):  # it will be created
            state = look(api, target, target.branch)
        if objection := of_another_recipe(target, state):
            problems.append(objection)
    if objection := overwrites(target, state, state.before):
        problems.append(objection)
    if target.tag and (tagged_commit := tagged(api, target)) not in (None, state.commit):
        problems.append(taken(target, str(tagged_commit)))
    if not target.pull_request:
        try:
            with as_hub_error(str(target), account.endpoint):
                api.auth_check(target.repo, repo_type=target.repo_type, write=True)
        except HubError as e:
            problems.append(e)
    return [e.one_line for e in problems]


def is_private(account: Account, target: RepoTarget) -> bool:
    """Return whether the target exists and is private."""
    try:
        with as_hub_error(str(target), account.endpoint):
            return with_retries(str(target), lambda: bool(look(account.api, target).private))
    except RepositoryNotFoundError:
        return False


def check_card(account: Account, repo_type: str, metadata: Mapping[str, Any]) -> list[str]:
    """Return the problems that the endpoint's validator finds in a card's metadata (licence, language ...)."""
    return check_readme(account, repo_type, f"---\n{yaml.safe_dump(dict(metadata))}---\n")


def check_readme(account: Account, repo_type: str, text: str) -> list[str]:
    """Return the problems that the endpoint's validator finds in a whole card; empty if valid."""

    def ask() -> Any:
        answer = get_session().post(
            f"{account.endpoint}/api/validate-yaml",
            json={"content": text, "repoType": repo_type},
            headers=build_hf_headers(token=account.token),
        )
        if answer.status_code != 400:  # 400: there are errors, which are to be shown
            hf_raise_for_status(answer)
        return answer.json()

    with as_hub_error("card metadata", account.endpoint, GO_ON):
        errors = with_retries("card metadata", ask).get("errors", [])
    return [f"publish: card metadata is refused: {str(e.get('message'))[:200]}" for e in errors]


def oversized(where: str, files: Mapping[str, Path]) -> list[str]:
    """Return the problems with files that exceed the Hub's size limit."""
    limit = f"is larger than {LARGEST_FILE / 1e9:.0f} GB"
    return [f"{where}: {path} {limit}" for path, file in files.items() if file.stat().st_size > LARGEST_FILE]


def collection_is_public(account: Account, title: str) -> list[str]:
    """Return the problem if the collection of that title is public: private repos can't be added to it.

    Empty if the collection is private or does not exist.
    """
    with as_hub_error(f"collection '{title}'", account.endpoint), bounded(REPLY_S, LONGEST_PAUSE_S):
        public_collections = [
            c for c in account.api.list_collections(owner=account.owner) if c.title == title and not c.private
        ]
    return [": ".join(open_collection(title))] if public_collections else []


def open_collection(title: str) -> tuple[str, str]:
    return (
        f"the collection '{title}' exists and is public, but the recipe publishes privately",
        "Make it private, or set publish.collection to another title.",
    )


# -- what forbids to write


def objections(target: RepoTarget, held: RepoState) -> list[HubError]:
    """Return the reasons not to publish into a repo, whatever the files."""
    problems = []
    if held.name.lower() != target.repo.lower():
        problems.append(HubError(f"{target} has moved to '{held.name}'", "Name it so under `publish:`."))
    if target.private and not held.private:  # `private` has no effect on a repo that exists
        problems.append(
            HubError(
                f"{target} exists and is public, but the recipe publishes privately",
                "Make it private, or set publish.private=false.",
            )
        )
    if objection := of_another_recipe(target, held):
        problems.append(objection)
    elif not held.ours:
        problems.append(
            HubError(f"{target} exists and was not published by dsc", "Choose another name under `publish:`.")
        )
    return problems


def of_another_recipe(target: RepoTarget, held: RepoState) -> HubError | None:
    """Return the objection to writing to a repo whose name was chosen by a recipe of others.

    None if the repo is empty, or if its contents were published by this same recipe.
    """
    manifest = held.manifest or {}
    stranger = target.named_by
    if stranger is None or not set(held.files) - {".gitattributes"}:
        return None
    published = {name: dict(entry or {}).get("sha256") for name, entry in held.before.items()}
    weights = {sha256 for name, sha256 in published.items() if name.endswith(".safetensors")}
    if stranger.sha256 in (manifest.get("named_by"), published.get("recipe.yaml")) or stranger.weights & weights:
        return None
    return HubError(
        f"{target} exists, and its name was chosen by a recipe of somebody else ({stranger.source})",
        "Choose the names: publish.dataset, publish.adapter (and publish.base).",
    )


def overwrites(target: RepoTarget, held: RepoState, touched: Iterable[str]) -> HubError | None:
    """Return the objection to overwriting what others added, or changed since dsc published (a card edited on its
    page).
    """
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
        f"{target}: {', '.join(edited[:5])} {'was' if len(edited) == 1 else 'were'} changed there since dsc published "
        "it",
        "Take those changes over into the recipe or elsewhere; publish.overwrite=true writes over them.",
    )


def tagged(api: HfApi, target: RepoTarget) -> str | None:
    """Return the commit of the target's tag; None if there is no such tag."""
    refs = api.list_repo_refs(target.repo, repo_type=target.repo_type)
    return next((t.target_commit for t in refs.tags if t.name == target.tag), None)


def taken(target: RepoTarget, at: str) -> HubError:
    return HubError(f"{target} has the tag '{target.tag}' at {at[:12]} already", "Set publish.tag to another name.")


# -- what is there


def look(api: HfApi, target: RepoTarget, revision: str | None = None) -> RepoState:
    """Return the contents of a repo (`revision`: None is main)."""
    info = api.repo_info(target.repo, repo_type=target.repo_type, revision=revision)
    head = str(info.sha)
    files = files_of(api, target.repo_type, target.repo, head)
    manifest = _manifest(api, target.repo_type, target.repo, head, files)
    return RepoState(str(info.id), head, bool(info.private), getattr(info, "gated", False), files, manifest)


def files_of(api: HfApi, repo_type: str, repo: str, revision: str) -> dict[str, RepoFile]:
    """Return the files of a repo. HubError if the Hub is unreachable: the client itself tries five times."""
    try:
        entries = list(api.list_repo_tree(repo, repo_type=repo_type, revision=revision, recursive=True))
    except (HfHubHTTPError, httpx2.TransportError) as e:
        if isinstance(e, HfHubHTTPError) and e.response.status_code not in PASSING:
            raise
        with as_hub_error(f"files of {repo_type} '{repo}'", str(api.endpoint), WORK_IS_KEPT):
            raise
    return {e.path: e for e in entries if isinstance(e, RepoFile)}


def signature(file: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest; the Hub reports one hash for large files and another for small ones."""
    size = file.stat().st_size
    git = {"git": _git_blob(file)} if size < 10**7 else {}
    return {"sha256": file_hash(file), "size": size} | git


def same(there: RepoFile | None, file: Path) -> bool:
    """Return whether the Hub holds this exact file, by hash: SHA-256 for large files, git's blob id for small ones."""
    if there is None or there.size != file.stat().st_size:
        return False
    return there.lfs.sha256 == file_hash(file) if there.lfs else there.blob_id == _git_blob(file)


def _is(there: RepoFile, signature: Mapping[str, Any]) -> bool:
    """Return whether the Hub's file matches a manifest entry. True if the entry lacks the hash that the Hub reports."""
    if there.lfs:
        return there.lfs.sha256 == signature.get("sha256")
    return bool(there.blob_id == signature.get("git", there.blob_id))


def _manifest(api: HfApi, repo_type: str, repo: str, revision: str, there: Collection[str]) -> dict[str, Any] | None:
    """Return dsc's manifest in a repo; None if there is none, or one written by others."""
    if MANIFEST not in there:
        return None
    path = api.hf_hub_download(repo, MANIFEST, repo_type=repo_type, revision=revision)
    try:
        manifest = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return None
    fits = isinstance(manifest, dict) and manifest.get("made_by") == "dsc_hub"
    return manifest if fits and isinstance(manifest.get("files"), dict) else None


def _git_blob(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
