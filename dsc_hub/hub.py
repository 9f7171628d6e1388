"""Talking to a Hub: who we are, what is there, and reading it. Writing is in push.py.

Works against any endpoint. A token goes only to the endpoint it belongs to: the user's own to HF_ENDPOINT (the public Hub
by default), the embedded Hub's to the embedded Hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2  # what huggingface_hub itself speaks through: its lost connections come up as they are
from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from dsc_hub import __version__
from dsc_hub.errors import DscError, HubError, disk_error
from dsc_hub.system.progress import console

MANIFEST = "manifest.json"  # also the mark by which we know our own repos
RECIPE = "recipe.yaml"
WRITING = frozenset({"repo.write", "repo.content.write"})  # rights of a fine-grained token, either of which will do
_COMMIT = re.compile(r"[0-9a-f]{40}")
UNREACHED = "Is the network up, and HF_ENDPOINT right?"


@dataclass(frozen=True)
class Account:
    """Somebody at an endpoint: where, who, and with which token (never shown)."""

    endpoint: str
    owner: str
    token: str = field(repr=False)
    names: tuple[str, ...] = ()  # the user and the organisations they may write to
    # What a fine-grained token may write to, namespaces and `TYPE:NAMESPACE/NAME`; None: whatever its user may.
    scopes: frozenset[str] | None = None

    def may_write(self, repo_type: str, repo: str) -> bool:
        """As far as can be known without asking: for a repo that exists the Hub has the last word."""
        namespace = repo.partition("/")[0]
        known = self.names if self.scopes is None else self.scopes
        return namespace in known or f"{repo_type}:{repo}" in known

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token, library_name="dsc_hub", library_version=__version__)


@dataclass(frozen=True)
class Info:
    commit: str
    license: str | None
    private: bool


_FAILURES = (HfHubHTTPError, httpx2.TransportError, OSError, ValueError)  # what the client raises


@contextmanager
def as_hub_error(what: str, endpoint: str, go_on: str = "") -> Iterator[None]:
    """Turn what the client raises into one line; `go_on` is the hint where the Hub is busy or out of reach. The token is in none
    of the client's messages."""
    try:
        yield
    except _FAILURES as e:
        raise _told(e, what, endpoint, go_on) from None


def _told(e: BaseException, what: str, endpoint: str, go_on: str) -> DscError:
    if isinstance(e, GatedRepoError):
        return HubError(
            f"{what}: access is gated at {endpoint}",
            f"Ask for access on its page, and log in with `hf auth login` (endpoint {endpoint}).",
        )
    if isinstance(e, RepositoryNotFoundError):
        if kind := _other_kind(e, endpoint):
            return HubError(
                f"{what}: a {kind} has that name at {endpoint}, expected a {e.repo_type}",
                "Adapters and base models are model repos, prompts and rows dataset repos.",
            )
        return HubError(
            f"{what}: not found at {endpoint}, or private and not yours",
            "Check the name; private repos need HF_TOKEN or `hf auth login`.",
        )
    if isinstance(e, RevisionNotFoundError):
        return HubError(f"{what}: no such revision at {endpoint}", _revisions(e, endpoint))
    if isinstance(e, HFValidationError):
        return HubError(f"{what}: not a repo name", "A repo is USER/NAME; a local folder starts with ./ or /.")
    if isinstance(e, HfHubHTTPError):
        status = e.response.status_code if e.response is not None else 0
        hint = {
            401: "The token isn't valid there: set HF_TOKEN or run `hf auth login` again.",
            403: "The token has no right to do that: it needs write access to this namespace.",
            412: go_on or "Somebody else changed the repo in the meantime; publish again.",
        }.get(status, go_on if status == 429 or status >= 500 else "")
        return HubError(f"{what}: {endpoint} answered {status}: {one_line(e.server_message or str(e))}", hint)
    if isinstance(e, OfflineModeIsEnabled) or (isinstance(e, LocalEntryNotFoundError) and constants.is_offline_mode()):
        return HubError(
            f"{what}: offline, and not in the cache", "Unset HF_HUB_OFFLINE, or fetch it first with `hf download`."
        )
    if isinstance(e, LocalEntryNotFoundError) and isinstance(e.__cause__, _FAILURES):
        # The client could not ask, looked into the cache instead, and tells of that.
        return _told(e.__cause__, what, endpoint, go_on)
    if isinstance(e, json.JSONDecodeError):
        return HubError(
            f"{what}: {endpoint} answered something that is no JSON",
            go_on or "Is there a proxy before it, or is it down?",
        )
    if isinstance(e, ValueError):
        return HubError(f"{what}: refused before it was sent: {one_line(str(e))}")
    if isinstance(e, OSError) and (disk := disk_error(e)):
        return disk
    return HubError(f"{what}: {endpoint} can't be reached: {one_line(str(e)) or type(e).__name__}", go_on or UNREACHED)


def one_line(text: str) -> str:
    """What a client or a Hub says, fit for one line. Addresses lose their query, which may be signed, and nothing that
    looks like a token stays."""
    text = re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]*", r"\1", " ".join(text.split()))
    return re.sub(r"\bhf_\w{8,}", "hf_...", text)[:400]


def _other_kind(e: RepositoryNotFoundError, endpoint: str) -> str | None:
    """The type of another repo with the name that was not found, if the user's Hub has one."""
    if endpoint != constants.ENDPOINT or not e.repo_id:
        return None
    try:
        kinds = [kind for kind in ("model", "dataset", "space") if kind != e.repo_type]
        return next((kind for kind in kinds if HfApi().repo_exists(e.repo_id, repo_type=kind)), None)
    except _FAILURES:  # it is a courtesy: what the user is told is still that the repo was not found
        return None


def _revisions(e: RevisionNotFoundError, endpoint: str) -> str:
    """What can be named instead of the revision that was not found. Names are a stranger's: made printable, and short."""
    names: list[str] = []
    if endpoint == constants.ENDPOINT and e.repo_id:
        with suppress(*_FAILURES):  # a courtesy too
            refs = HfApi().list_repo_refs(e.repo_id, repo_type=e.repo_type)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
    if not names:
        return "Name a branch, a tag or a commit of it."
    shown = ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) for name in names[:5]]
    shown = [name if len(name) <= 40 else f"{name[:39]}\N{HORIZONTAL ELLIPSIS}" for name in shown]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"It has {', '.join(shown)}{more}; a commit can be named too."


def _named(reference: str) -> tuple[str, str]:
    """`USER/REPO[@REVISION]` -> repo and revision (default: main). HubError for anything else."""
    repo, at, revision = reference.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1 or (at and not revision):
        raise HubError(
            f"'hub:{reference:.200}' is not of the form hub:USER/REPO[@REVISION]",
            "A revision is a branch, a tag or a commit.",
        )
    return repo, revision or "main"


# -- reading


def model_info(repo: str, revision: str) -> Info:
    """Commit, licence and visibility of a model. HubError if it isn't there."""
    if constants.is_offline_mode():  # what is in the cache can be used; a snapshot's folder is named by its commit
        with as_hub_error(f"model '{repo}' at '{revision}'", constants.ENDPOINT):
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return Info(folder.name, None, private=True)
    with as_hub_error(f"model '{repo}' at '{revision}'", constants.ENDPOINT):
        info = HfApi().model_info(repo, revision=revision)
    return Info(str(info.sha), (info.card_data or {}).get("license"), bool(info.private))


def download_model(repo: str, commit: str, patterns: Sequence[str]) -> Path:
    """A model's files at a commit, in the Hub's cache."""
    with as_hub_error(f"model '{repo}' at '{commit}'", constants.ENDPOINT):
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(patterns)))


def pull_recipe(reference: str) -> Path:
    """`USER/REPO[@REV]` -> the recipe.yaml in it. A dataset of that name goes before a model."""
    there = listing(reference)
    if RECIPE not in there.files:
        raise HubError(f"hub:{reference} holds no {RECIPE}", "Repos that dsc published have one; name such a repo.")
    with as_hub_error(f"recipe 'hub:{reference}'", constants.ENDPOINT):
        return Path(hf_hub_download(there.repo, RECIPE, repo_type=there.repo_type, revision=there.revision))


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
    repo, revision = _named(reference)
    if constants.is_offline_mode():
        return _cached(reference)
    for repo_type in ("dataset", "model"):
        with as_hub_error(f"'hub:{reference}'", constants.ENDPOINT):
            try:
                info = HfApi().repo_info(repo, repo_type=repo_type, revision=revision)
            except RepositoryNotFoundError:
                if repo_type == "model":
                    raise
            else:
                names = sorted(s.rfilename for s in info.siblings or ())
                return Listing(repo, repo_type, revision, str(info.sha), tuple(names))
    raise AssertionError("unreachable")


def _cached(reference: str) -> Listing:
    """What of a repo is in the cache, where nothing can be asked."""
    repo, revision = _named(reference)
    for repo_type in ("dataset", "model"):
        with as_hub_error(f"'hub:{reference}'", constants.ENDPOINT):
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
    _quiet_in_pipes()
    exact = [name.replace("[", "[[]") for name in names]
    with as_hub_error(f"'hub:{there.repo}'", constants.ENDPOINT):
        folder = Path(
            snapshot_download(there.repo, repo_type=there.repo_type, revision=there.revision, allow_patterns=exact)
        )
    if folder.name != there.commit:
        raise HubError(f"'hub:{there.repo}' changed while it was fetched", "Fetch it again.")
    return folder


def _quiet_in_pipes() -> None:
    if not console.is_terminal:
        disable_progress_bars()


def pull_adapter(reference: str) -> tuple[Path, str]:
    """`USER/REPO[@REV]` -> a folder with the adapter's configuration and safetensors (and recipe.yaml, if the repo has one),
    and the commit they are of. HubError if it isn't there, or holds no such adapter."""
    repo, revision = _named(reference)
    wanted = ["adapter_config.json", "adapter_model.safetensors", RECIPE]
    with as_hub_error(f"adapter 'hub:{reference}'", constants.ENDPOINT):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    missing = [name for name in wanted[:2] if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"hub:{reference} is no adapter that can be loaded: {' and '.join(missing)} not in it",
            "An adapter repo of peft holds both; pickled weights are not loaded.",
        )
    return folder, folder.name  # the cache keeps a snapshot under its commit


def dataset_commit(repo: str, revision: str) -> str:
    """The commit of a dataset at a revision. HubError if it isn't there, or if a folder here would be read in its place."""
    _check_no_folder(repo)
    if constants.is_offline_mode():
        return _cached_commit(repo, "dataset", revision)
    with as_hub_error(f"dataset '{repo}' at '{revision}'", constants.ENDPOINT):
        return str(HfApi().dataset_info(repo, revision=revision).sha)


def space_commit(repo: str, revision: str) -> str:
    """The commit of a Space at a revision. HubError if it isn't there."""
    if constants.is_offline_mode():
        return _cached_commit(repo, "space", revision)
    with as_hub_error(f"Space '{repo}' at '{revision}'", constants.ENDPOINT):
        return str(HfApi().space_info(repo, revision=revision).sha)


def _cached_commit(repo: str, repo_type: str, revision: str) -> str:
    """The commit that the cache has for a revision, or the only one that it has; the revision itself where that says nothing."""
    if _COMMIT.fullmatch(revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=repo_type)
    ref = folder / "refs" / revision
    if ref.resolve().is_relative_to(folder.resolve()) and ref.is_file():
        commit = ref.read_text(encoding="utf-8").strip()
        return commit if _COMMIT.fullmatch(commit) else revision
    snapshots = [p.name for p in (folder / "snapshots").glob("*")]
    return snapshots[0] if len(snapshots) == 1 else revision


def _check_no_folder(repo: str) -> None:
    """HubError if `datasets` would take the name for a folder, which it prefers to the Hub, whatever commit is recorded."""
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise HubError(f"dataset '{repo}': {e}", "A dataset of the Hub is USER/NAME.") from None
    if Path(repo).exists():
        raise HubError(
            f"dataset '{repo}' of the Hub is also a folder here, which would be read in its place",
            "Run dsc from another folder; a file of your own is prompts.path.",
        )


def space_module(repo: str, commit: str) -> Path:
    """A metric's Space at a commit, in the Hub's cache: the Python file named like the Space. Code: the caller asked for leave."""
    name = f"{repo.partition('/')[2]}.py"
    _quiet_in_pipes()
    with as_hub_error(f"Space '{repo}' at '{commit}'", constants.ENDPOINT):
        folder = snapshot_download(repo, repo_type="space", revision=commit, allow_patterns=["*.py", "*.json"])
    if not (Path(folder) / name).is_file():
        raise HubError(f"Space '{repo}' holds no {name}", "A metric's Space has a Python file of the Space's own name.")
    return Path(folder) / name


def dataset_rows(repo: str, config: str | None, split: str, revision: str) -> Iterator[dict[str, Any]]:
    """Rows of one split of a dataset; data files alone, no code of it is run. HubError if there is no such config or split."""
    import datasets

    _check_no_folder(repo)
    what = f"dataset '{repo}' at '{revision[:12]}', config {config or 'by default'}, split '{split}'"
    with as_hub_error(what, constants.ENDPOINT):
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
    repo, _ = _named(reference)
    commit = recipe_file.parent.name  # the cache keeps a snapshot under its commit
    repo_type = "dataset" if recipe_file.parents[2].name.startswith("datasets--") else "model"
    with as_hub_error(f"'{name}' of 'hub:{reference}'", constants.ENDPOINT):
        try:
            hf_hub_download(repo, name, repo_type=repo_type, revision=commit)
        except RemoteEntryNotFoundError:
            raise HubError(f"hub:{reference} names the prompt file '{name}' and doesn't hold it") from None


# -- who we are


def _scopes(access: Mapping[str, Any]) -> frozenset[str] | None:
    """What a fine-grained token may write to, as `whoami` tells it; None if it is of another kind, or can't be told."""
    if access.get("role") != "fineGrained" or (scoped := (access.get("fineGrained") or {}).get("scoped")) is None:
        return None
    scopes = set()
    for scope in scoped:
        entity = scope.get("entity") or {}
        if not WRITING & set(scope.get("permissions") or ()):
            continue
        if entity.get("type") not in ("user", "org", *constants.REPO_TYPES_MAPPING.values()):
            return None  # some kind that we don't know: the Hub will tell
        whole = entity["type"] in ("user", "org")
        scopes.add(str(entity.get("name")) if whole else f"{entity['type']}:{entity.get('name')}")
    return frozenset(scopes)


def login(owner: str | None, endpoint: str | None = None, token: str | None = None) -> Account:
    """Who are we at the endpoint, and may we write to `owner`? HubError: no token, a wrong one, read-only, not ours."""
    endpoint = endpoint or constants.ENDPOINT
    token = token or get_token()
    if urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1"):
        # A Hub on this machine is the embedded one, whoever named it: large files go over plain HTTP there.
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        constants.HF_HUB_DISABLE_XET = True
    if not token:
        raise HubError(
            f"no token for {endpoint}: publishing needs one with write access",
            "Set HF_TOKEN or run `hf auth login`; publish.to=local needs no account, publish.to=none publishes nothing.",
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the client would show it in what it says of a bad header
        raise HubError(
            "the token holds spaces or other characters that no token has", "Set HF_TOKEN to the token alone."
        )
    with as_hub_error("token", endpoint):
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
    owner, scopes = owner or me["name"], _scopes(access)
    if scopes is not None and owner not in {s.rpartition(":")[2].partition("/")[0] for s in scopes}:
        raise HubError(
            f"the fine-grained token for {endpoint} may not write to repos of '{owner}', but to: "
            f"{', '.join(sorted(scopes)) or 'nothing'}",
            "Give it write access to repos of that namespace, on its page in your settings.",
        )
    return Account(endpoint, owner, token, names, scopes)


def web_address(account: Account, repo_type: str, repo: str) -> str:
    return f"{account.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo}"


def prepare_for_embedded() -> None:
    """Make the client fit for the embedded Hub: it is there when offline too."""
    constants.HF_HUB_OFFLINE = False
    disable_progress_bars()  # seconds, on this disk
