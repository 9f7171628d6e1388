"""Writing to a Hub: make a repo hold exactly these files, in one commit that is read back.

Every attempt begins by reading what is there, at which commit, and commits only on top of that. So whatever strikes (somebody else's
commit, a reply that is lost, a server that is down for a while), the next attempt sees what really happened: files that are
there already are not sent again, and a commit that went through unheard is found and not made twice.
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
from dsc_hub.errors import HubError
from dsc_hub.hub.account import Account
from dsc_hub.hub.client import MANIFEST
from dsc_hub.hub.errors import as_hub_error, one_line
from dsc_hub.hub.repos import (
    RepoState,
    RepoTarget,
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
    tree,
)
from dsc_hub.hub.retry import GO_ON, KEPT, with_retries
from dsc_hub.system.files import write_json
from dsc_hub.system.progress import console, say


def push(account: Account, target: RepoTarget, files: Mapping[str, Path], message: str, work: Path) -> str:
    """Make the repo hold exactly these files (path in repo -> local file), in one commit, and read it back.

    Returns the commit; the present one if nothing differs. Files of an earlier push that are no longer wanted go; files
    that somebody else added stay. HubError if the Hub refuses, if what it holds is not what was sent, or if it can't be
    reached for as long as TRIES attempts take; then the same call goes on from what is there.
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


def collect(
    account: Account, title: str, items: Sequence[tuple[Literal["model", "dataset", "space"], str]], private: bool
) -> str:
    """Put (type, id) repos into the account's collection of that title, made if it isn't there; its address on the Hub.

    A collection that is there already keeps its visibility and what is in it. HubError if `private` and it is public.
    """

    def attempt() -> str:
        made = account.api.create_collection(title, namespace=account.owner, private=private, exists_ok=True)
        if private and not made.private:
            raise HubError(*open_collection(title))
        for repo_type, repo in items:
            account.api.add_collection_item(made.slug, repo, repo_type, exists_ok=True)
        return made.url

    with as_hub_error(f"collection '{title}'", account.endpoint, GO_ON):
        return with_retries(f"collection '{title}'", attempt)


# -- one attempt


def _attempt(api: HfApi, target: RepoTarget, files: Mapping[str, Path], message: str, seen: set[str]) -> str:
    """Read what is there, commit what differs on top of exactly that, read it back. `seen`: repos that an earlier attempt found."""
    try:
        held = look(api, target)
    except RepositoryNotFoundError:
        if target.repo in seen:
            raise _gone(target) from None
        if target.pull_request:
            raise
        sdk: dict[str, Any] = {"space_sdk": "static"} if target.repo_type == "space" else {}
        api.create_repo(target.repo, repo_type=target.repo_type, private=target.private, exist_ok=True, **sdk)
        held = look(api, target)
    seen.add(target.repo)
    for objection in objections(target, held):
        raise objection
    try:
        if target.gated and held.gated != target.gated and not target.pull_request:  # before anything can be had
            api.update_repo_settings(target.repo, gated=target.gated, repo_type=target.repo_type)
        if target.branch != "main":
            held = _branch(api, target, held.commit)
            if another := of_another_recipe(target, held):
                raise another
        return _on_top(api, target, files, message, held)
    except RepositoryNotFoundError:
        raise _gone(target) from None


def _branch(api: HfApi, target: RepoTarget, start: str) -> RepoState:
    """What the branch holds; it is made where it is missing."""
    try:
        return look(api, target, target.branch)
    except RevisionNotFoundError:
        api.create_branch(target.repo, branch=target.branch, revision=start, repo_type=target.repo_type, exist_ok=True)
        return look(api, target, target.branch)


def _on_top(api: HfApi, target: RepoTarget, files: Mapping[str, Path], message: str, held: RepoState) -> str:
    """Commit what differs from what is held, if anything does."""
    changed = {path: file for path, file in files.items() if not same(held.files.get(path), file)}
    gone = [path for path in held.before if path not in files and path in held.files]
    if not changed and not gone:
        say(f"{target}: nothing changed, commit {held.commit[:12]}")
        return held.commit
    if target.pull_request and (open_one := _proposed(api, target, files)):
        say(f"{target}: proposed before, commit {open_one[:12]}")
        return open_one
    if objection := overwrites(target, held, [*changed, *gone]):
        raise objection
    if target.tag and (at := tagged(api, target)):
        raise taken(target, at)
    where: dict[str, Any] = {"repo_type": target.repo_type, "revision": target.branch, "create_pr": target.pull_request}
    additions = [CommitOperationAdd(path, str(file)) for path, file in changed.items()]
    _upload(api, target, additions, where)
    if target.private and not api.repo_info(target.repo, repo_type=target.repo_type).private:
        # The upload may have taken hours. What no commit names can be read by nobody.
        raise HubError(
            f"{target} was made public while the files were uploaded; they were not committed",
            "Make it private again, or set publish.private=false.",
        )
    deletions = [CommitOperationDelete(path) for path in gone]
    made = api.create_commit(
        target.repo, [*additions, *deletions], commit_message=message, parent_commit=held.commit, **where
    )
    if made.pr_url:
        say(f"{target}: proposed at {made.pr_url}")
    return _read_back(api, target, files, made.oid)


def _upload(api: HfApi, target: RepoTarget, additions: Sequence[CommitOperationAdd], where: Mapping[str, Any]) -> None:
    """Send the large files; they are in no commit yet. HubError if that fails: the client has tried each five times."""
    with as_hub_error(str(target), str(api.endpoint), KEPT):
        try:
            api.preupload_lfs_files(target.repo, additions, free_memory=False, **where)
        except RuntimeError as e:  # the client's wrapping, or what its Xet library raises
            if isinstance(e.__cause__, (HfHubHTTPError, httpx2.TransportError, OSError, HubError)):
                raise e.__cause__ from None
            raise HubError(f"{target}: a large file could not be uploaded: {one_line(str(e))}", KEPT) from None


def _read_back(api: HfApi, target: RepoTarget, files: Mapping[str, Path], commit: str) -> str:
    """Compare what the Hub holds now with what was sent, hash by hash."""
    back = tree(api, target.repo_type, target.repo, commit)
    if wrong := sorted(path for path, file in files.items() if not same(back.get(path), file)):
        raise HubError(
            f"{target} at {commit[:12]} does not hold what was sent: {', '.join(wrong[:5])} differ",
            "Publish again; if it stays so, report it.",
        )
    if target.private and not api.repo_info(target.repo, repo_type=target.repo_type).private:
        raise HubError(
            f"{target} was made public while it was published: anybody can read {commit[:12]}",
            "Make it private again at once, or set publish.private=false.",
        )
    return commit


def _tag(api: HfApi, target: RepoTarget, commit: str) -> None:
    """Set the tag on a commit. HubError if it is on another commit already: a tag that moves is none."""
    at = tagged(api, target)
    if at is None:
        api.create_tag(target.repo, tag=str(target.tag), revision=commit, repo_type=target.repo_type, exist_ok=True)
        at = tagged(api, target)
    if at != commit:
        raise taken(target, str(at))


def _gone(target: RepoTarget) -> HubError:
    return HubError(
        f"{target} was there a moment ago and is gone: deleted, renamed, or no longer yours to see",
        "Nothing was published into it. The same command makes it anew if its name is free.",
    )


def _proposed(api: HfApi, target: RepoTarget, files: Mapping[str, Path]) -> str | None:
    """The commit of a pull request that holds these very files already; None if there is none."""
    refs = api.list_repo_refs(target.repo, repo_type=target.repo_type, include_pull_requests=True)
    for ref in refs.pull_requests or ():
        there = tree(api, target.repo_type, target.repo, ref.target_commit)
        if all(same(there.get(path), file) for path, file in files.items()):
            return ref.target_commit
    return None
