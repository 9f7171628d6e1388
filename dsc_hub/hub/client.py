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

import yaml
from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    metadata_load,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from dsc_hub.errors import HubError
from dsc_hub.hub.errors import UNREACHED, as_hub_error
from dsc_hub.system.progress import console

RECIPE = "recipe.yaml"
CARD = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\x00-\x20\x7f\\]+")  # as git: no way out of the folder of the refs


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
            f"'{reference:.200}' is not of the form USER/REPO[@REVISION]",
            "A revision is a branch, a tag or a commit.",
        )
    return repo, revision or "main"


# -- reading


def is_offline() -> bool:
    """Return whether nothing may be asked of the Hub (HF_HUB_OFFLINE), so that only its cache is read."""
    return bool(constants.is_offline_mode())


def _resolve(repo: str, repo_type: str, revision: str) -> tuple[str, Any]:
    """Return the commit of a revision, and what the Hub says of the repo there; offline None instead of that.

    Online the Hub is asked, and its cache keeps the commit under the revision's name; offline the kept one is returned.
    Raises what the client raises; HubError for a revision that is none.
    """
    if not _REVISION.fullmatch(revision):
        raise HubError(f"{repo}: '{revision:.100}' is no revision", "A revision is a branch, a tag or a commit.")
    info = None if is_offline() else HfApi().repo_info(repo, repo_type=repo_type, revision=revision)
    commit = (
        HfApi().resolve_revision(repo, repo_type=repo_type, revision=revision, local_files_only=is_offline()).resolved
    )
    if not _COMMIT.fullmatch(commit):
        raise HubError(f"{repo}: the cache of the Hub holds {commit!r:.60} for '{revision}', expected a commit")
    if info is not None and not _COMMIT.fullmatch(revision) and commit != info.sha:
        raise HubError(f"'{repo}' changed while '{revision}' was resolved", "Run the same command again.")
    return (commit if info is None else str(info.sha)), info


def model_info(repo: str, revision: str) -> Info:
    """Return commit, licence and visibility of a model. HubError if it does not exist.

    Offline they are those of the last commit that was resolved online; a licence that no cached card says is None.
    """
    with as_hub_error(f"model '{repo}' at '{revision}'", constants.ENDPOINT):
        commit, info = _resolve(repo, "model", revision)
        if info is None:
            return Info(commit, _cached_license(repo, commit), private=True)
    return Info(commit, info.card_data.get("license") if info.card_data else None, bool(info.private))


def _cached_license(repo: str, commit: str) -> str | None:
    card = try_to_load_from_cache(repo, CARD, revision=commit)
    if not isinstance(card, str):
        return None
    try:
        license = (metadata_load(Path(card)) or {}).get("license")
    except (yaml.YAMLError, ValueError):  # a card is a text of others: one that can't be read names no licence
        return None
    return license if isinstance(license, str) else None


def download_model(repo: str, commit: str, patterns: Sequence[str]) -> Path:
    """Download a model's files at a commit, and its card, into the Hub's cache and return the folder.

    Offline the files must be there. HubError if they are not.
    """
    with as_hub_error(f"model '{repo}' at '{commit}'", constants.ENDPOINT):
        _quiet_in_pipes()
        names = [*patterns] if is_offline() else [*patterns, CARD]
        return Path(snapshot_download(repo, revision=commit, allow_patterns=names))


def to_download(repo: str, commit: str, patterns: Sequence[str]) -> int:
    """Return the bytes of a model's files that the Hub's cache does not hold yet."""
    with as_hub_error(f"model '{repo}' at '{commit}'", constants.ENDPOINT):
        files = snapshot_download(repo, revision=commit, allow_patterns=[*patterns, CARD], dry_run=True)
    return sum(file.file_size or 0 for file in files if file.will_download)


def cached_bytes(repo: str, repo_type: str, commit: str) -> int:
    """Return the bytes of a repo's files at a commit in the Hub's cache."""
    return sum(p.stat().st_size for p in _snapshot(repo, repo_type, commit).rglob("*") if p.is_file())


def cache_folders() -> tuple[str, str]:
    """Return the cache of the Hub's client, and that in which `datasets` prepares rows."""
    from datasets import config

    return str(constants.HF_HUB_CACHE), str(config.HF_DATASETS_CACHE)


def _snapshot(repo: str, repo_type: str, commit: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=repo_type) / "snapshots" / commit


def pull_recipe(reference: str) -> Path:
    """Return the path of the recipe.yaml in `USER/REPO[@REV]`. A dataset of that name takes precedence over a model."""
    contents = listing(reference)
    if RECIPE not in contents.files:
        raise HubError(f"hub:{reference} holds no {RECIPE}", "Repos that dsc published have one; name such a repo.")
    with as_hub_error(f"recipe 'hub:{reference}'", constants.ENDPOINT):
        return Path(hf_hub_download(contents.repo, RECIPE, repo_type=contents.repo_type, revision=contents.commit))


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
    for repo_type in ("dataset", "model"):
        with as_hub_error(f"'hub:{reference}'", constants.ENDPOINT):
            try:
                commit, info = _resolve(repo, repo_type, revision)
            except (RepositoryNotFoundError, RevisionResolutionError) as e:
                if repo_type == "model" or (isinstance(e, RevisionResolutionError) and not is_offline()):
                    raise
                continue
            if info is None:
                names = _cached_names(repo, repo_type, commit)
            else:
                names = [s.rfilename for s in getattr(info, "siblings", None) or ()]
            return Listing(repo, repo_type, revision, commit, tuple(sorted(names)))
    raise AssertionError("unreachable")


def _cached_names(repo: str, repo_type: str, commit: str) -> list[str]:
    """Return the names of a repo's files at a commit in the Hub's cache."""
    try:
        folder = Path(snapshot_download(repo, repo_type=repo_type, revision=commit, local_files_only=True))
    except IncompleteSnapshotError as e:  # of a partly downloaded repo, as left by `fetch`
        folder = Path(e.snapshot_path)
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]


def fetch(there: Listing, names: Sequence[str]) -> Path:
    """Download these files of a repo into the Hub's cache and return the folder of its commit.

    No request is sent for files that are cached already.
    """
    if is_offline():
        return _snapshot(there.repo, there.repo_type, there.commit)
    _quiet_in_pipes()
    exact = [name.replace("[", "[[]") for name in names]
    with as_hub_error(f"'hub:{there.repo}'", constants.ENDPOINT):
        return Path(
            snapshot_download(there.repo, repo_type=there.repo_type, revision=there.commit, allow_patterns=exact)
        )


def _quiet_in_pipes() -> None:
    if is_offline() or not console.is_terminal:  # offline nothing is fetched that could progress
        disable_progress_bars()


def pull_adapter(reference: str) -> tuple[Path, str]:
    """Return a folder with the adapter of `USER/REPO[@REV]`, and its commit.

    The folder holds the adapter's configuration and safetensors (and recipe.yaml, if the repo has one). HubError if the
    repo does not exist or holds no such adapter.
    """
    repo, revision = _repo_and_revision(reference)
    names = ["adapter_config.json", "adapter_model.safetensors", RECIPE]
    with as_hub_error(f"adapter 'hub:{reference}'", constants.ENDPOINT):
        _quiet_in_pipes()
        commit, _ = _resolve(repo, "model", revision)
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=names))
    missing = [file_name for file_name in names[:2] if not (folder / file_name).is_file()]
    if missing:
        raise HubError(
            f"hub:{reference} is no adapter that can be loaded: {' and '.join(missing)} not in it",
            "An adapter repo of peft holds both; pickled weights are not loaded.",
        )
    return folder, commit


def dataset_commit(repo: str, revision: str) -> str:
    """Return the commit of a dataset at a revision.

    HubError if it does not exist, or if a local folder would be read in its place.
    """
    _check_no_folder(repo)
    with as_hub_error(f"dataset '{repo}' at '{revision}'", constants.ENDPOINT):
        return _resolve(repo, "dataset", revision)[0]


def space_commit(repo: str, revision: str) -> str:
    """Return the commit of a Space at a revision. HubError if it does not exist."""
    with as_hub_error(f"Space '{repo}' at '{revision}'", constants.ENDPOINT):
        return _resolve(repo, "space", revision)[0]


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
            if is_offline():
                rows = _prepared(repo, config, revision).as_dataset(split=split)
            else:
                rows = datasets.load_dataset(repo, config, split=split, revision=revision)
        except (
            datasets.exceptions.DatasetsError,
            RuntimeError,
        ) as e:  # RuntimeError: a repo with code, which is not run
            raise HubError(
                f"{description}: {' '.join(str(e).split())[:300]}", "Check the name and the token."
            ) from None
    # After a failed request `datasets` reads whatever version it prepared last.
    if _COMMIT.fullmatch(revision) and any(Path(f["filename"]).parent.name != revision for f in rows.cache_files):
        raise HubError(f"{description}: it could not be read, and only another version is cached", UNREACHED)
    for row in rows:
        yield dict(row)


def _prepared(repo: str, config: str | None, commit: str) -> Any:
    """Return the builder of a dataset that `datasets` prepared at this commit, in its own cache.

    (Offline, `load_dataset` takes the version that was prepared last, whatever commit is asked for.)
    LocalEntryNotFoundError if there is none.
    """
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, _, name = repo.rpartition("/")
    folder = Path(settings.HF_DATASETS_CACHE) / "___".join(filter(None, (owner, camelcase_to_snakecase(name))))
    prepared = {p.parts[-3]: p for p in folder.glob(f"*/*/{commit}") if (p / "dataset_info.json").is_file()}
    if config is None and len(prepared) > 1:
        card = try_to_load_from_cache(repo, CARD, repo_type="dataset", revision=commit)
        configs = (metadata_load(Path(card)) or {}).get("configs") if isinstance(card, str) else None
        defaults = [c.get("config_name") for c in configs or () if c.get("default")]
        config = defaults[0] if defaults else "default"
    chosen = prepared.get(config) if config else next(iter(prepared.values()), None)
    if chosen is None:
        raise LocalEntryNotFoundError(f"{repo} at {commit} was not prepared")
    return Cache(repo_id=repo, dataset_name=name, config_name=chosen.parts[-3], version=chosen.parts[-2], hash=commit)


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
