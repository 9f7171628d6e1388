"""Writing to a Hub: make a repo hold exactly the given files, in one commit that is then verified.

Every attempt begins by reading the repo's current commit, and commits only on top of that. So after any failure (a
commit by others, a lost reply, a server that is down for a while) the next attempt sees the real state: files that
exist already are not sent again, and a commit whose reply was lost is found and not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from dsc_hub import __version__
from dsc_hub.config.origin import MANIFEST
from dsc_hub.errors import HubError
from dsc_hub.hub.account import Account
from dsc_hub.hub.errors import as_hub_error, one_line
from dsc_hub.hub.repos import (
    RepoState,
    RepoTarget,
    files_of,
    look,
    objections,
    of_another_recipe,
    open_collection,
    oversized,
    overwrites,
    same,
    signature,
    tagged,
    taken,
)
from dsc_hub.hub.retry import GO_ON, WORK_IS_KEPT, with_retries
from dsc_hub.system.files import write_json
from dsc_hub.system.progress import console, say


def push(account: Account, target: RepoTarget, files: Mapping[str, Path], message: str, work: Path) -> str:
    """Make the repo hold exactly these files (path in repo -> local file), in one commit, and verify it.

    Return the commit; the present one if nothing differs. Files of an earlier push that are no longer included are
    deleted; files that others added are kept. HubError if the Hub refuses, if its contents differ from the files sent,
    or if it is unreachable during all TRIES attempts; then the same call continues from the state of the repo.
    """
    if problems := oversized(str(target), files):
        raise HubError(problems[0], "Save it in smaller shards.")
    manifest = work / MANIFEST
    listed = {path: signature(file) for path, file in sorted(files.items())}
    named_by = {"named_by": target.named_by.sha256} if target.named_by else {}
    write_json(manifest, {"made_by": "dsc_hub", "version": __version__, **named_by, "files": listed})
    files = {**files, MANIFEST: manifest}
    if not console.is_terminal:
        disable_progress_bars()
    seen: set[str] = set()
    with as_hub_error(str(target), account.endpoint, GO_ON):
        commit = with_retries(str(target), lambda: _attempt(account.api, target, files, message, seen))
        if target.tag:
            with_retries(str(target), lambda: _tag(account.api, target, commit))
    return commit


def add_to_collection(
    account: Account, title: str, items: Sequence[tuple[Literal["model", "dataset", "space"], str]], private: bool
) -> str:
    """Add (type, id) repos to the account's collection of that title and return its address on the Hub.

    The collection is created if it does not exist. An existing one keeps its visibility and contents. HubError if
    `private` is set and the collection is public.
    """

    def attempt() -> str:
        collection = account.api.create_collection(title, namespace=account.owner, private=private, exists_ok=True)
        if private and not collection.private:
            raise HubError(*open_collection(title))
        for repo_type, repo in items:
            account.api.add_collection_item(collection.slug, repo, repo_type, exists_ok=True)
        return collection.url

    with as_hub_error(f"collection '{title}'", account.endpoint, GO_ON):
        return with_retries(f"collection '{title}'", attempt)


# -- one attempt


def _attempt(api: HfApi, target: RepoTarget, files: Mapping[str, Path], message: str, seen: set[str]) -> str:
    """Read the repo, commit the differences on top of that state, verify. `seen`: repos found by earlier attempts."""
    try:
        state = look(api, target)
    except RepositoryNotFoundError:
        if target.repo in seen:
            raise _gone(target) from None
        if target.pull_request:
            raise
        sdk: dict[str, Any] = {"space_sdk": "static"} if target.repo_type == "space" else {}
        api.create_repo(target.repo, repo_type=target.repo_type, private=target.private, exist_ok=True, **sdk)
        state = look(api, target)
    seen.add(target.repo)
    for objection in objections(target, state):
        raise objection
    try:
        # before anything can be downloaded
        if target.gated and state.gated != target.gated and not target.pull_request:
            api.update_repo_settings(target.repo, gated=target.gated, repo_type=target.repo_type)
        if target.branch != "main":
            state = _branch(api, target, state.commit)
            if recipe_objection := of_another_recipe(target, state):
                raise recipe_objection
        return _on_top(api, target, files, message, state)
    except RepositoryNotFoundError:
        raise _gone(target) from None


def _branch(api: HfApi, target: RepoTarget, start: str) -> RepoState:
    """Return the state of the branch; create the branch if it does not exist."""
    try:
        return look(api, target, target.branch)
    except RevisionNotFoundError:
        api.create_branch(target.repo, branch=target.branch, revision=start, repo_type=target.repo_type, exist_ok=True)
        return look(api, target, target.branch)


def _on_top(api: HfApi, target: RepoTarget, files: Mapping[str, Path], message: str, held: RepoState) -> str:
    """Commit the differences to the current state, if there are any."""
    changed_files = {path: file for path, file in files.items() if not same(held.files.get(path), file)}
    deleted_paths = [path for path in held.before if path not in files and path in held.files]
    if not changed_files and not deleted_paths:
        say(f"{target}: nothing changed, commit {held.commit[:12]}")
        return held.commit
    if target.pull_request and (proposed_commit := _proposed(api, target, files)):
        say(f"{target}: proposed before, commit {proposed_commit[:12]}")
        return proposed_commit
    if objection := overwrites(target, held, [*changed_files, *deleted_paths]):
        raise objection
    if target.tag and (tagged_commit := tagged(api, target)):
        raise taken(target, tagged_commit)
    destination: dict[str, Any] = {
        "repo_type": target.repo_type,
        "revision": target.branch,
        "create_pr": target.pull_request,
    }
    additions = [CommitOperationAdd(path, str(file)) for path, file in changed_files.items()]
    _upload(api, target, additions, destination)
    if target.private and not api.repo_info(target.repo, repo_type=target.repo_type).private:
        # The upload may have taken hours. Uploaded files that are in no commit can't be read by anybody.
        raise HubError(
            f"{target} was made public while the files were uploaded; they were not committed",
            "Make it private again, or set publish.private=false.",
        )
    deletions = [CommitOperationDelete(path) for path in deleted_paths]
    commit_info = api.create_commit(
        target.repo, [*additions, *deletions], commit_message=message, parent_commit=held.commit, **destination
    )
    if commit_info.pr_url:
        say(f"{target}: proposed at {commit_info.pr_url}")
    return _read_back(api, target, files, commit_info.oid)


def _upload(api: HfApi, target: RepoTarget, additions: Sequence[CommitOperationAdd], where: Mapping[str, Any]) -> None:
    """Upload the large files; they are in no commit yet. HubError if that fails: the client tries each five times."""
    with as_hub_error(str(target), str(api.endpoint), WORK_IS_KEPT):
        try:
            api.preupload_lfs_files(target.repo, additions, free_memory=False, **where)
        except RuntimeError as e:  # wrapped by the client, or raised by its Xet library
            if isinstance(e.__cause__, (HfHubHTTPError, httpx2.TransportError, OSError, HubError)):
                raise e.__cause__ from None
            raise HubError(f"{target}: a large file could not be uploaded: {one_line(str(e))}", WORK_IS_KEPT) from None


def _read_back(api: HfApi, target: RepoTarget, files: Mapping[str, Path], commit: str) -> str:
    """Compare the Hub's contents with the files sent, hash by hash."""
    stored_files = files_of(api, target.repo_type, target.repo, commit)
    if mismatches := sorted(path for path, file in files.items() if not same(stored_files.get(path), file)):
        raise HubError(
            f"{target} at {commit[:12]} does not hold what was sent: {', '.join(mismatches[:5])} differ",
            "Publish again; if it stays so, report it.",
        )
    if target.private and not api.repo_info(target.repo, repo_type=target.repo_type).private:
        raise HubError(
            f"{target} was made public while it was published: anybody can read {commit[:12]}",
            "Make it private again at once, or set publish.private=false.",
        )
    return commit


def _tag(api: HfApi, target: RepoTarget, commit: str) -> None:
    """Set the tag on a commit. HubError if it is on another commit already: a tag must not move."""
    tagged_commit = tagged(api, target)
    if tagged_commit is None:
        api.create_tag(target.repo, tag=str(target.tag), revision=commit, repo_type=target.repo_type, exist_ok=True)
        tagged_commit = tagged(api, target)
    if tagged_commit != commit:
        raise taken(target, str(tagged_commit))


def _gone(target: RepoTarget) -> HubError:
    return HubError(
        f"{target} was there a moment ago and is gone: deleted, renamed, or no longer yours to see",
        "Nothing was published into it. The same command makes it anew if its name is free.",
    )


def _proposed(api: HfApi, target: RepoTarget, files: Mapping[str, Path]) -> str | None:
    """Return the commit of a pull request that holds exactly these files already; None if there is none."""
    refs = api.list_repo_refs(target.repo, repo_type=target.repo_type, include_pull_requests=True)
    for ref in refs.pull_requests or ():
        stored_files = files_of(api, target.repo_type, target.repo, ref.target_commit)
        if all(same(stored_files.get(path), file) for path, file in files.items()):
            return ref.target_commit
    return None
