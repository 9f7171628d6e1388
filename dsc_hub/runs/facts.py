"""Type of run.json: what a run is, recorded at its start. Hub repos and the published copy of run.json hold it too.

Keys that this version does not know are ignored, but for those of the recipe, which it has to understand. A key with a
default was not recorded by every version, is recorded later than the start, or is left out of the published copy, which
holds no local details.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dsc_hub.config.recipe import Recipe
from dsc_hub.errors import RunError


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class ModelFacts(_Facts):
    """A model. `commit` is a Hub commit, or a checksum if there is none; "" for a model behind an API."""

    source: str
    id: str
    commit: str
    license: str | None = None
    note: str = ""
    upstream: str | None = None  # the model on the Hub that the weights come from
    folder: str | None = None  # the weights on this machine
    published_as: str | None = None  # the name under which others can load it
    published_commit: str | None = None

    @property
    def weights(self) -> Path:
        """The folder of the weights on this machine. RunError if it was never recorded."""
        if self.folder is None:
            raise RunError(
                f"the weights of {self.id} are not recorded as a folder of this machine",
                "`dsc evaluate RECIPE` downloads them and records their folder.",
            )
        return Path(self.folder)


class Hardware(_Facts):
    cpu: str
    cores: int
    memory_gib: float
    gpus: list[str]


class Repos(_Facts):
    """Full names of the repos that the run publishes; `base` is None unless the base model is published."""

    owner: str
    dataset: str
    adapter: str
    base: str | None = None
    endpoint: str | None = None  # address of the Hub that they are on
    dataset_revision: str | None = None  # commit of the dataset


class Imported(_Facts):
    """A file of result rows of the reference implementation that the chains come from."""

    rows: int
    sha256: str | None = None
    file: str


class RepoCommit(_Facts):
    """A repo at a commit."""

    repo: str
    commit: str | None = None


class ServerFacts(_Facts):
    """A server of others, and what it did not take of our requests.

    `place` is the recipe's key that names it. A parameter in `left_out` had the server's own value; those in `changes`
    are of these, and the recipe asked for another value than the usual default: what was sampled depends on it.
    """

    place: str
    model: str
    address: str | None = None
    renamed: dict[str, str] = {}  # parameter -> its name there
    left_out: list[str] = []
    changes: list[str] = []

    @property
    def shown_model(self) -> str:
        """The model's name there; of a name that is a path on the server, its last part."""
        return self.model.rstrip("/").rpartition("/")[2] if self.model.startswith(("/", ".", "~")) else self.model


class RunFacts(_Facts):
    """run.json. `recipe` is the effective recipe, with the default veto and minimum gain written out."""

    recipe: Recipe
    # place in the recipe (or "prompts", "model", "student") -> exact version of what is named there
    identity: dict[str, str]
    model: ModelFacts  # writes the chains
    student: ModelFacts | None = None  # is trained in its place
    versions: dict[str, str]  # library -> version
    hardware: Hardware
    repos: Repos
    started_at: str  # UTC, ISO 8601
    fingerprints: dict[str, str] = {}  # stage -> hash of its inputs
    command: str = "dsc run RECIPE"
    cost: dict[str, dict[str, Any]] = {}  # stage -> section of metrics.json
    imported: Imported | None = None
    adapter: RepoCommit | None = None  # somebody else's adapter that is evaluated
    servers: list[ServerFacts] = []  # of others, in the order of the recipe; [] also where it was not recorded
    spaces: dict[str, RepoCommit] = {}  # the user's metric file -> the Space where it is published

    @property
    def base(self) -> ModelFacts:
        """The model that is trained, and that the adapter lies on."""
        return self.student or self.model


def parse_facts(facts: Mapping[str, Any], path: Path) -> RunFacts:
    """Return the content of the run.json at `path` as its type; RunError, with what to do, if it does not fit."""
    try:
        return RunFacts.model_validate(facts)
    except ValidationError as e:
        problems = [f"{'.'.join(map(str, err['loc']))}: {err['msg']}" for err in e.errors()]
    shown = f"{'; '.join(problems[:3])}{f' and {len(problems) - 3} more' * (len(problems) > 3)}"
    if all(p.startswith("recipe.") for p in problems):
        raise RunError(
            f"{path} holds a recipe that this version of dsc can't read: {shown}",
            "Run the recipe again with `dsc run`.",
        )
    raise RunError(f"{path} is damaged: {shown}", "Move the whole run folder away and run the recipe again.")
