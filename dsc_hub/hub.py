"""The only module that talks to a Hub: who we are, what is there, pull, and push in one commit that is read back.

Works against any endpoint. A token goes only to the endpoint it belongs to: the user's own to HF_ENDPOINT (the public Hub
by default), the embedded Hub's to the embedded Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2  # what huggingface_hub itself speaks through: its lost connections come up as they are
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from dsc_hub import __version__
from dsc_hub.errors import HubError, disk_error
from dsc_hub.machine import file_hash
from dsc_hub.progress import console, say
from dsc_hub.runs import write_json

MANIFEST = "manifest.json"  # also the mark by which we know our own repos
UNREACHED = "Is the network up, and HF_ENDPOINT right?"


@dataclass(frozen=True)
class Account:
    """Somebody at an endpoint: where, who, and with which token (never shown)."""

    endpoint: str
    owner: str
    token: str = field(repr=False)
    names: tuple[str, ...] = ()  # namespaces this token may write to

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token, library_name="dsc_hub", library_version=__version__)


@dataclass(frozen=True)
class Info:
    commit: str
    license: str | None
    private: bool


@contextmanager
def _as_hub_error(what: str, endpoint: str) -> Iterator[None]:
    """Turn what the client raises into one line. The token is in none of the client's messages."""
    try:
        yield
    except GatedRepoError:
        raise HubError(
            f"{what}: access is gated at {endpoint}",
            f"Ask for access on its page, and log in with `hf auth login` (endpoint {endpoint}).",
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{what}: not found at {endpoint}, or private and not yours",
            "Check the name; private repos need HF_TOKEN or `hf auth login`.",
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{what}: no such revision at {endpoint}", "Name a branch, a tag or a commit of it.") from None
    except HFValidationError as e:
        raise HubError(
            f"{what}: not a repo name: {e}",
            "A repo is USER/NAME, on the command line hub:USER/NAME[@REVISION]; a local folder starts with ./ or /.",
        ) from None
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else 0
        hint = {
            401: "The token isn't valid there: set HF_TOKEN or run `hf auth login` again.",
            403: "The token has no right to do that: it needs write access to this namespace.",
            412: "Somebody else changed the repo in the meantime; publish again.",
        }.get(status, "")
        raise HubError(
            f"{what}: {endpoint} answered {status}: {e.server_message or str(e).splitlines()[0]}", hint
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as e:
        # The client says so of a lost connection too: then what it could not do is the cause.
        if not (constants.is_offline_mode() or isinstance(e, OfflineModeIsEnabled)):
            raise HubError(f"{what}: {endpoint} can't be reached: {e.__cause__ or e}", UNREACHED) from None
        raise HubError(
            f"{what}: offline, and not in the cache", "Unset HF_HUB_OFFLINE, or fetch it first with `hf download`."
        ) from None
    except ValueError as e:
        raise HubError(f"{what}: refused before it was sent: {' '.join(str(e).split())[:400]}") from None
    except (OSError, httpx2.TransportError) as e:
        if isinstance(e, OSError) and (disk := disk_error(e)):
            raise disk from None
        raise HubError(f"{what}: {endpoint} can't be reached: {e}", UNREACHED) from None


# -- reading


def model_info(repo: str, revision: str) -> Info:
    """Commit, licence and visibility of a model. HubError if it isn't there."""
    if constants.is_offline_mode():  # what is in the cache can be used; a snapshot's folder is named by its commit
        with _as_hub_error(f"model '{repo}' at '{revision}'", constants.ENDPOINT):
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return Info(folder.name, None, private=True)
    with _as_hub_error(f"model '{repo}' at '{revision}'", constants.ENDPOINT):
        info = HfApi().model_info(repo, revision=revision)
    return Info(str(info.sha), (info.card_data or {}).get("license"), bool(info.private))


def download_model(repo: str, commit: str, patterns: Sequence[str]) -> Path:
    """A model's files at a commit, in the Hub's cache."""
    with _as_hub_error(f"model '{repo}' at '{commit}'", constants.ENDPOINT):
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(patterns)))


def pull_recipe(reference: str) -> Path:
    """`USER/REPO[@REV]` -> the recipe.yaml in it. Looks at dataset repos, then models."""
    repo, _, revision = reference.partition("@")
    for repo_type in ("dataset", "model"):
        with _as_hub_error(f"recipe 'hub:{reference}'", constants.ENDPOINT):
            try:
                return Path(hf_hub_download(repo, "recipe.yaml", repo_type=repo_type, revision=revision or "main"))
            except RepositoryNotFoundError:
                if repo_type == "model":
                    raise
            except LocalEntryNotFoundError:  # a kind of EntryNotFoundError, and another matter: nothing could be asked
                raise
            except EntryNotFoundError:
                break
    raise HubError(f"hub:{reference} holds no recipe.yaml", "Repos that dsc published have one; name such a repo.")


@dataclass(frozen=True)
class Listing:
    """A repo at a commit, and the names of its files."""

    repo: str
    repo_type: str  # "dataset" or "model"
    revision: str  # as it was asked for
    commit: str
    files: tuple[str, ...]


def listing(reference: str) -> Listing:
    """`USER/REPO[@REV]` -> what is there at which commit. A dataset of that name goes before a model. HubError if neither is."""
    repo, _, revision = reference.partition("@")
    if constants.is_offline_mode():
        return _cached(reference)
    for repo_type in ("dataset", "model"):
        with _as_hub_error(f"'hub:{reference}'", constants.ENDPOINT):
            try:
                info = HfApi().repo_info(repo, repo_type=repo_type, revision=revision or "main")
            except RepositoryNotFoundError:
                if repo_type == "model":
                    raise
            else:
                names = sorted(s.rfilename for s in info.siblings or ())
                return Listing(repo, repo_type, revision or "main", str(info.sha), tuple(names))
    raise AssertionError("unreachable")


def _cached(reference: str) -> Listing:
    """What of a repo is in the cache, where nothing can be asked."""
    repo, _, named = reference.partition("@")
    revision = named or "main"
    for repo_type in ("dataset", "model"):
        with _as_hub_error(f"'hub:{reference}'", constants.ENDPOINT):
            try:
                folder = Path(snapshot_download(repo, repo_type=repo_type, revision=revision, local_files_only=True))
            except IncompleteSnapshotError as e:  # of a repo that was fetched in part, as `fetch` does
                folder = Path(e.snapshot_path)
            except LocalEntryNotFoundError:
                if repo_type == "model":
                    raise
                continue
            files = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            return Listing(repo, repo_type, revision, folder.name, tuple(sorted(files)))
    raise AssertionError("unreachable")


def fetch(there: Listing, names: Sequence[str]) -> Path:
    """These files of a repo, in the Hub's cache: the folder of its commit. Nothing is asked where they are there already."""
    if constants.is_offline_mode():
        return (
            Path(constants.HF_HUB_CACHE)
            / repo_folder_name(repo_id=there.repo, repo_type=there.repo_type)
            / "snapshots"
            / there.commit
        )
    if not console.is_terminal:
        disable_progress_bars()
    exact = [name.replace("[", "[[]") for name in names]
    with _as_hub_error(f"'hub:{there.repo}'", constants.ENDPOINT):
        folder = Path(
            snapshot_download(there.repo, repo_type=there.repo_type, revision=there.revision, allow_patterns=exact)
        )
    if folder.name != there.commit:
        raise HubError(f"'hub:{there.repo}' changed while it was fetched", "Fetch it again.")
    return folder


def _is_dataset(repo: str) -> bool:
    try:
        HfApi().dataset_info(repo)
    except RepositoryNotFoundError:
        return False
    return True


def pull_adapter(reference: str) -> tuple[Path, str]:
    """`USER/REPO[@REV]` -> a folder with the adapter's configuration and safetensors (and recipe.yaml, if the repo has one),
    and the commit they are of. HubError if it isn't there, or holds no such adapter."""
    repo, _, revision = reference.partition("@")
    wanted = ["adapter_config.json", "adapter_model.safetensors", "recipe.yaml"]
    with _as_hub_error(f"adapter 'hub:{reference}'", constants.ENDPOINT):
        try:
            folder = Path(snapshot_download(repo, revision=revision or "main", allow_patterns=wanted))
        except RepositoryNotFoundError:
            if _is_dataset(repo):
                raise HubError(
                    f"hub:{reference} is a dataset, expected an adapter", "Its adapter is another repo: a model's."
                ) from None
            raise
    missing = [name for name in wanted[:2] if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"hub:{reference} is no adapter that can be loaded: {' and '.join(missing)} not in it",
            "An adapter repo of peft holds both; pickled weights are not loaded.",
        )
    return folder, folder.name  # the cache keeps a snapshot under its commit


def dataset_commit(repo: str, revision: str) -> str:
    """The commit of a dataset at a revision. HubError if it isn't there."""
    if constants.is_offline_mode():
        return revision  # what is in the cache is what can be had
    with _as_hub_error(f"dataset '{repo}' at '{revision}'", constants.ENDPOINT):
        return str(HfApi().dataset_info(repo, revision=revision).sha)


def dataset_rows(repo: str, config: str | None, split: str, revision: str) -> Iterator[dict[str, Any]]:
    """Rows of one split of a dataset; data files alone, no code of it is run. HubError if there is no such config or split."""
    import datasets

    what = f"dataset '{repo}' at '{revision[:12]}', config {config or 'by default'}, split '{split}'"
    with _as_hub_error(what, constants.ENDPOINT):
        try:
            rows = datasets.load_dataset(repo, config, split=split, revision=revision)
        except (
            datasets.exceptions.DatasetsError,
            RuntimeError,
        ) as e:  # RuntimeError: a repo with code, which is not run
            raise HubError(f"{what}: {' '.join(str(e).split())[:300]}", "Check the name and the token.") from None
    for row in rows:
        yield dict(row)


def pull_beside(recipe_file: Path, reference: str, name: str) -> None:
    """Fetch a prompt file that a pulled recipe names, from the same commit, into the folder of the recipe."""
    repo, _, _ = reference.partition("@")
    commit = recipe_file.parent.name  # the cache keeps a snapshot under its commit
    repo_type = "dataset" if recipe_file.parents[2].name.startswith("datasets--") else "model"
    with _as_hub_error(f"'{name}' of 'hub:{reference}'", constants.ENDPOINT):
        try:
            hf_hub_download(repo, name, repo_type=repo_type, revision=commit)
        except EntryNotFoundError:
            raise HubError(f"hub:{reference} names the prompt file '{name}' and doesn't hold it") from None


# -- publishing


def login(owner: str | None, endpoint: str | None = None, token: str | None = None) -> Account:
    """Who are we at the endpoint, and may we write to `owner`? HubError: no token, a wrong one, read-only, not ours."""
    endpoint = endpoint or constants.ENDPOINT
    token = token or get_token()
    if not token:
        raise HubError(
            f"no token for {endpoint}: publishing needs one with write access",
            "Set HF_TOKEN or run `hf auth login`; publish.to=local needs no account, publish.to=none publishes nothing.",
        )
    with _as_hub_error("token", endpoint):
        me: dict[str, Any] = HfApi(endpoint=endpoint, token=token).whoami()
    access = (me.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(f"the token for {endpoint} can only read", "Make one with write access and set HF_TOKEN.")
    names = (me["name"], *(o["name"] for o in me.get("orgs", ()) if o.get("roleInOrg") != "read"))
    if owner and owner not in names:
        raise HubError(
            f"'{owner}' is somebody else's at {endpoint}: the token belongs to {', '.join(names)}",
            "Set publish.owner to one of these.",
        )
    return Account(endpoint, owner or me["name"], token, names)


def preflight(account: Account, repos: Sequence[tuple[str, str]], private: bool) -> list[str]:
    """What stands in the way of publishing to these (type, id) repos; empty if nothing does. Writes nothing.

    `private` has no effect on a repo that exists: private data must never go into one that is public.
    """
    problems = []
    for repo_type, repo in repos:
        with _as_hub_error(f"{repo_type} '{repo}'", account.endpoint):
            try:
                info = account.api.repo_info(repo, repo_type=repo_type)
            except RepositoryNotFoundError:
                continue
        if private and not info.private:
            problems.append(
                f"{repo_type} '{repo}' exists and is public, but the recipe publishes privately: make it private, or set publish.private=false"
            )
        with _as_hub_error(f"{repo_type} '{repo}'", account.endpoint):
            there = {s.rfilename for s in info.siblings or ()}
            if not _ours(account.api, repo_type, repo, str(info.sha), there):
                problems.append(
                    f"{repo_type} '{repo}' exists and was not published by dsc: choose another name under `publish:`"
                )
    return problems


def check_card(account: Account, repo_type: str, metadata: Mapping[str, Any]) -> list[str]:
    """What the endpoint's own validator says of a card's metadata (licence, language ...); empty if it agrees."""
    content = f"---\n{yaml.safe_dump(dict(metadata))}---\n"
    with _as_hub_error("card metadata", account.endpoint):
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


def push(
    account: Account, repo_type: str, repo: str, files: Mapping[str, Path], private: bool, message: str, work: Path
) -> str:
    """Make the repo hold exactly these files (path in repo -> local file), in one commit, and read it back.

    Returns the commit; the present one if nothing differs. Files of an earlier push that are no longer wanted go; files
    that somebody else added stay. HubError if the Hub refuses or what it holds is not what was sent.
    """
    manifest = work / MANIFEST
    write_json(
        manifest,
        {
            "made_by": "dsc_hub",
            "version": __version__,
            "files": {
                path: {"sha256": file_hash(file), "size": file.stat().st_size} for path, file in sorted(files.items())
            },
        },
    )
    files = {**files, MANIFEST: manifest}
    what = f"{repo_type} '{repo}'"
    if not console.is_terminal:
        disable_progress_bars()
    with _as_hub_error(what, account.endpoint):
        api = account.api
        api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        info = api.repo_info(repo, repo_type=repo_type)
        if private and not info.private:
            raise HubError(
                f"{what} is public, but the recipe publishes privately",
                "Make it private, or set publish.private=false.",
            )
        there = _tree(api, repo_type, repo, str(info.sha))
        if not _ours(api, repo_type, repo, str(info.sha), there):
            raise HubError(f"{what} exists and was not published by dsc", "Choose another name under `publish:`.")
        changed = {path: file for path, file in files.items() if not _same(there.get(path), file)}
        gone = [
            path
            for path in _listed_before(api, repo_type, repo, str(info.sha), there)
            if path not in files and path in there
        ]
        if not changed and not gone:
            say(f"{what}: nothing changed, commit {str(info.sha)[:12]}")
            return str(info.sha)
        operations = [CommitOperationAdd(path, str(file)) for path, file in changed.items()] + [
            CommitOperationDelete(path) for path in gone
        ]
        commit = api.create_commit(
            repo, operations, commit_message=message, repo_type=repo_type, parent_commit=info.sha
        ).oid
        back = _tree(api, repo_type, repo, commit)
    wrong = [path for path, file in files.items() if not _same(back.get(path), file)]
    if wrong:
        raise HubError(
            f"{what} at {commit[:12]} does not hold what was sent: {', '.join(sorted(wrong)[:5])} differ",
            "Publish again; if it stays so, report it.",
        )
    return commit


def _tree(api: HfApi, repo_type: str, repo: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, repo_type=repo_type, revision=revision, recursive=True)
    return {e.path: e for e in entries if isinstance(e, RepoFile)}


def _same(there: RepoFile | None, file: Path) -> bool:
    """Does the Hub hold this very file? By the hash the Hub reports: SHA-256 for large files, git's blob id for small."""
    if there is None or there.size != file.stat().st_size:
        return False
    return there.lfs.sha256 == file_hash(file) if there.lfs else there.blob_id == _git_blob(file)


def _manifest(api: HfApi, repo_type: str, repo: str, revision: str, there: Collection[str]) -> dict[str, Any] | None:
    """Our manifest in a repo; None if there is none, or one that isn't ours."""
    if MANIFEST not in there:
        return None
    path = api.hf_hub_download(repo, MANIFEST, repo_type=repo_type, revision=revision)
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("made_by") == "dsc_hub" else None


def _ours(api: HfApi, repo_type: str, repo: str, revision: str, there: Collection[str]) -> bool:
    """Is the repo empty, or one that dsc published?"""
    empty = not set(there) - {".gitattributes", "README.md"}
    return empty or _manifest(api, repo_type, repo, revision, there) is not None


def _listed_before(api: HfApi, repo_type: str, repo: str, revision: str, there: Collection[str]) -> list[str]:
    """The files that our manifest in the repo names: those an earlier push brought."""
    return list((_manifest(api, repo_type, repo, revision, there) or {}).get("files", {}))


def _git_blob(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def web_address(account: Account, repo_type: str, repo: str) -> str:
    return f"{account.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"


def prepare_for_embedded() -> None:
    """Make the client fit for the embedded Hub: large files go over plain HTTP there, and it is there when offline too."""
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_OFFLINE = False
    disable_progress_bars()  # seconds, on this disk
