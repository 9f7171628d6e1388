"""Reading from a Hub: repo contents, commits and files. Writing is in push.py.

Works with any endpoint. A token is sent only to the endpoint it belongs to: the user's own to HF_ENDPOINT (the public
Hub by default), the embedded Hub's to the embedded Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from dsc_hub.errors import HubError
from dsc_hub.hub.errors import as_hub_error
from dsc_hub.system.progress import console

RECIPE = "recipe.yaml"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Info:
    commit: str
    license: str | None
    private: bool


def _repo_and_revision(reference: str) -> tuple[str, str]:
    """Split `USER/REPO[@REVISION]` into repo and revision (default: main). HubError for anything else."""
    repo, separator, revision = reference.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1 or (separator and not revision):
        raise HubError(
            f"'hub:{reference:.200}' is not of the form hub:USER/REPO[@REVISION]",
            "A revision is a branch, a tag or a commit.",
        )
    return repo, revision or "main"


# -- reading


def model_info(repo: str, revision: str) -> Info:
    """Return commit, licence and visibility of a model. HubError if it does not exist."""
    if constants.is_offline_mode():  # cached models are usable; a snapshot's folder is named after its commit
        with as_hub_error(f"model '{repo}' at '{revision}'", constants.ENDPOINT):
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return Info(folder.name, None, private=True)
    with as_hub_error(f"model '{repo}' at '{revision}'", constants.ENDPOINT):
        info = HfApi().model_info(repo, revision=revision)
    return Info(str(info.sha), info.card_data.get("license") if info.card_data else None, bool(info.private))


def download_model(repo: str, commit: str, patterns: Sequence[str]) -> Path:
    """Download a model's files at a commit into the Hub's cache and return the folder."""
    with as_hub_error(f"model '{repo}' at '{commit}'", constants.ENDPOINT):
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(patterns)))


def pull_recipe(reference: str) -> Path:
    """Return the path of the recipe.yaml in `USER/REPO[@REV]`. A dataset of that name takes precedence over a model."""
    contents = listing(reference)
    if RECIPE not in contents.files:
        raise HubError(f"hub:{reference} holds no {RECIPE}", "Repos that dsc published have one; name such a repo.")
    with as_hub_error(f"recipe 'hub:{reference}'", constants.ENDPOINT):
        return Path(hf_hub_download(contents.repo, RECIPE, repo_type=contents.repo_type, revision=contents.revision))


@dataclass(frozen=True)
class Listing:
    """A repo at a commit, with the names of its files."""

    repo: str
    repo_type: str  # "dataset" or "model"
    revision: str  # as requested
    commit: str
    files: tuple[str, ...]


def listing(reference: str) -> Listing:
    """Return the contents of `USER/REPO[@REV]` and their commit.

    A dataset of that name takes precedence over a model. HubError if neither exists.
    """
    repo, revision = _repo_and_revision(reference)
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
                names = sorted(s.rfilename for s in getattr(info, "siblings", None) or ())
                return Listing(repo, repo_type, revision, str(info.sha), tuple(names))
    raise AssertionError("unreachable")


def _cached(reference: str) -> Listing:
    """Return the cached contents of a repo; used offline."""
    repo, revision = _repo_and_revision(reference)
    for repo_type in ("dataset", "model"):
        with as_hub_error(f"'hub:{reference}'", constants.ENDPOINT):
            try:
                folder = Path(snapshot_download(repo, repo_type=repo_type, revision=revision, local_files_only=True))
            except IncompleteSnapshotError as e:  # of a partly downloaded repo, as left by `fetch`
                folder = Path(e.snapshot_path)
            except LocalEntryNotFoundError:
                if repo_type == "model":
                    raise
                continue
            files = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            return Listing(repo, repo_type, revision, folder.name, tuple(sorted(files)))
    raise AssertionError("unreachable")


def fetch(there: Listing, names: Sequence[str]) -> Path:
    """Download these files of a repo into the Hub's cache and return the folder of its commit.

    No request is sent for files that are cached already.
    """
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
    """Return a folder with the adapter of `USER/REPO[@REV]`, and its commit.

    The folder holds the adapter's configuration and safetensors (and recipe.yaml, if the repo has one). HubError if the
    repo does not exist or holds no such adapter.
    """
    repo, revision = _repo_and_revision(reference)
    names = ["adapter_config.json", "adapter_model.safetensors", RECIPE]
    with as_hub_error(f"adapter 'hub:{reference}'", constants.ENDPOINT):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names))
    missing = [file_name for file_name in names[:2] if not (folder / file_name).is_file()]
    if missing:
        raise HubError(
            f"hub:{reference} is no adapter that can be loaded: {' and '.join(missing)} not in it",
            "An adapter repo of peft holds both; pickled weights are not loaded.",
        )
    return folder, folder.name  # the cache names the folder of a snapshot after its commit


def dataset_commit(repo: str, revision: str) -> str:
    """Return the commit of a dataset at a revision.

    HubError if it does not exist, or if a local folder would be read in its place.
    """
    _check_no_folder(repo)
    if constants.is_offline_mode():
        return _cached_commit(repo, "dataset", revision)
    with as_hub_error(f"dataset '{repo}' at '{revision}'", constants.ENDPOINT):
        return str(HfApi().dataset_info(repo, revision=revision).sha)


def space_commit(repo: str, revision: str) -> str:
    """Return the commit of a Space at a revision. HubError if it does not exist."""
    if constants.is_offline_mode():
        return _cached_commit(repo, "space", revision)
    with as_hub_error(f"Space '{repo}' at '{revision}'", constants.ENDPOINT):
        return str(HfApi().space_info(repo, revision=revision).sha)


def _cached_commit(repo: str, repo_type: str, revision: str) -> str:
    """Return the commit that the cache records for a revision, or the only cached commit; else the revision itself."""
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
    """Raise HubError if `datasets` would read a local folder of that name.

    It prefers the folder to the Hub, whatever commit is recorded.
    """
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
    """Return the Python file of a metric's Space at a commit, from the Hub's cache; it is named like the Space.

    The file is code: the caller must have the user's consent.
    """
    name = f"{repo.partition('/')[2]}.py"
    _quiet_in_pipes()
    with as_hub_error(f"Space '{repo}' at '{commit}'", constants.ENDPOINT):
        folder = snapshot_download(repo, repo_type="space", revision=commit, allow_patterns=["*.py", "*.json"])
    if not (Path(folder) / name).is_file():
        raise HubError(f"Space '{repo}' holds no {name}", "A metric's Space has a Python file of the Space's own name.")
    return Path(folder) / name


def dataset_rows(repo: str, config: str | None, split: str, revision: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split of a dataset. HubError if the config or split does not exist.

    Only data files are read; no code of the dataset is run.
    """
    import datasets

    _check_no_folder(repo)
    description = f"dataset '{repo}' at '{revision[:12]}', config {config or 'by default'}, split '{split}'"
    with as_hub_error(description, constants.ENDPOINT):
        try:
            rows = datasets.load_dataset(repo, config, split=split, revision=revision)
        except (
            datasets.exceptions.DatasetsError,
            RuntimeError,
        ) as e:  # RuntimeError: a repo with code, which is not run
            raise HubError(
                f"{description}: {' '.join(str(e).split())[:300]}", "Check the name and the token."
            ) from None
    for row in rows:
        yield dict(row)


def pull_beside(recipe_file: Path, reference: str, name: str) -> None:
    """Download a prompt file that a pulled recipe names into the recipe's folder, from the same commit."""
    repo, _ = _repo_and_revision(reference)
    commit = recipe_file.parent.name  # the cache names the folder of a snapshot after its commit
    repo_type = "dataset" if recipe_file.parents[2].name.startswith("datasets--") else "model"
    with as_hub_error(f"'{name}' of 'hub:{reference}'", constants.ENDPOINT):
        try:
            hf_hub_download(repo, name, repo_type=repo_type, revision=commit)
        except RemoteEntryNotFoundError:
            raise HubError(f"hub:{reference} names the prompt file '{name}' and doesn't hold it") from None
