"""The files of each repo that a run is published to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dsc_hub.config.publishing import PUBLISHERS_OWN, publishes_rejected
from dsc_hub.config.recipe import SCORERS, is_folder, scorers
from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.config.serving import CRITICS_OWN, SERVERS, SERVERS_OWN
from dsc_hub.errors import RunError
from dsc_hub.inference.base_model import WANTED
from dsc_hub.metrics.registry import commit_of
from dsc_hub.runs.facts import ModelFacts, RunFacts, ServerFacts
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_json, write_json, write_whole

PROMPT_FILES = ("path", "values")  # keys of `prompts:` that name files
TEXT_SUFFIXES = (".html", ".md", ".json", ".jsonl", ".yaml", ".jinja", ".txt", ".csv", "")


def trees(
    run: Run, model_folder: Path | None, recipe_folder: Path, work: Path
) -> dict[str, tuple[str, dict[str, Path]]]:
    """Return {"base" | "dataset" | "adapter": (repo type, {path in repo: local file})}, in publishing order.

    The recipe and its prompt files are included under plain names, so that `dsc run hub:USER/REPO` can run it.
    """
    facts = run.facts
    shared = _recipe_files(facts, recipe_folder, work) | {"metrics.json": run["metrics.json"]}
    out: dict[str, tuple[str, dict[str, Path]]] = {}
    for_dataset, for_adapter = _public_facts(facts, "dataset", work), _public_facts(facts, "adapter", work)
    if facts.repos.base:
        if model_folder is None:
            raise RunError(
                f"the weights of {facts.base.id} are to be published, and are not on this machine",
                "`dsc evaluate RECIPE` puts them there again.",
            )
        model_files = {p for pattern in WANTED for p in model_folder.glob(pattern) if p.is_file()}
        weights = {p.name: p for p in sorted(model_files) if p.name != "complete.json"}
        out["base"] = ("model", weights | _card(run, "base"))
    data = {p.relative_to(run["dataset"]).as_posix(): p for p in sorted(run["dataset"].rglob("*.parquet"))}
    if not publishes_rejected(facts.recipe.publish):
        data = _kept_alone(data, work)
    out["dataset"] = ("dataset", data | shared | {"run.json": for_dataset} | _card(run, "dataset"))
    adapter = {p.name: p for p in sorted(run["adapter"].iterdir()) if p.is_file() and p.name != "README.md"}
    adapter["adapter_config.json"] = _named_base(run, work)
    out["adapter"] = ("model", adapter | shared | {"run.json": for_adapter} | _card(run, "adapter"))
    return out


def _public_facts(facts: RunFacts, kind: Literal["dataset", "adapter"], work: Path) -> Path:
    """Write the public run.json: all facts that the card of this repo uses, without local details.

    The dataset is published first, so values known only afterwards (its own commit, the base's) are left out of its
    copy: publishing again must not change it.
    """
    is_first = kind == "dataset"
    identity, models = facts.identity, {}
    for place, model in _models(facts).items():
        if is_folder(model.source):
            source = f"./{Path(model.source).name}"
            model = model.model_copy(update={"source": source})
            identity = identity | {place: f"{source}@{model.commit}"}
        models[place] = model.model_dump(exclude={"folder"} | ({"published_commit"} if is_first else set()))
    public: dict[str, Any] = {
        "fingerprints": facts.fingerprints,
        "versions": facts.versions,
        "hardware": facts.hardware.model_dump(),
        "started_at": facts.started_at,
        **({"imported": facts.imported.model_dump()} if facts.imported else {}),
        **({"servers": [_public_server(s) for s in facts.servers]} if facts.servers else {}),
        "recipe": _public_recipe(facts),
        "identity": identity,
        **models,
        "repos": facts.repos.model_dump(exclude={"endpoint"} | ({"dataset_revision"} if is_first else set())),
    }
    target = work / f"{kind}.run.json"
    write_json(target, public)
    return target


def _public_server(server: ServerFacts) -> dict[str, Any]:
    """Return what was learned of a server, without its address; of a model that is a path there, the name alone."""
    return server.model_dump(exclude={"address"}) | {"model": server.shown_model}


def _models(facts: RunFacts) -> dict[str, ModelFacts]:
    """Return the run's models by the section of the recipe that names them."""
    return {"model": facts.model} | ({"student": facts.student} if facts.student else {})


def model_folders(facts: RunFacts) -> list[str]:
    """Return the folders of weights on this machine, which no published file may name."""
    return [model.folder for model in _models(facts).values() if model.folder]


def _kept_alone(data: Mapping[str, Path], work: Path) -> dict[str, Path]:
    """Return the dataset files without rejected answers: the training rows, and the evaluation's scores without texts.

    The other configs contain first answers and rejected revisions, so they are left out.
    """
    out = {name: path for name, path in data.items() if name.startswith("sft/")}
    for name, path in data.items():
        if name.startswith("evaluation/"):
            table = pq.read_table(path)
            for column in ("text", "raw"):
                if (place := table.schema.get_field_index(column)) >= 0:  # answers from an older dsc have no `raw`
                    table = table.set_column(place, column, pa.nulls(len(table), pa.string()))
            out[name] = work / f"without-texts-{path.name}"
            pq.write_table(table, out[name])
    return out


def _card(run: Run, kind: str) -> dict[str, Path]:
    folder = run["cards"] / kind
    if not (folder / "README.md").is_file():
        raise RunError(f"{folder} holds no card", "Run `dsc report` first: nothing is published without its card.")
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def _named_base(run: Run, work: Path) -> Path:
    """Write adapter_config.json with the base model that is loadable from this Hub.

    A reused adapter may have been trained for another Hub.
    """
    model = run.facts.base
    config = read_json(run["adapter"] / "adapter_config.json")
    config |= {"base_model_name_or_path": model.published_as, "revision": model.published_commit}
    write_json(work / "adapter_config.json", config)
    return work / "adapter_config.json"


def check_no_paths(files: Mapping[str, Path], secrets: Sequence[str]) -> None:
    """Check that no file to publish contains a local path; else RunError with the file's name.

    The cause would be a bug in dsc, or a base model that was saved with a path in it.
    """
    for name, path in files.items():
        if path.suffix in TEXT_SUFFIXES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if local_path := next((s for s in secrets if s in text), None):
                raise RunError(
                    f"{name} would publish the local path {local_path}", "Remove it from that file, or from the recipe."
                )


def _public_recipe(facts: RunFacts) -> dict[str, Any]:
    """Return the recipe in a form that others can run: Hub references are pinned to the commits that were used.

    Endpoints, key names and how training was started are local details and are left out.
    """
    r = facts.recipe
    chain = r.chain
    if chain.veto:
        scorer = {"scorer": Path(chain.veto.scorer).name} if is_folder(chain.veto.scorer) else {}
        veto = chain.veto.model_copy(update=scorer | _pinned(facts, "chain.veto"))
        chain = chain.model_copy(update={"veto": veto})
    models: dict[str, Any] = {}
    for place, model in _models(facts).items():
        if is_folder(model.source):
            update = {"source": model.published_as, "revision": "main"}
        else:
            update = {"revision": model.commit} if model.published_as == model.source else {}
        models[place] = getattr(r, place).model_copy(update=update)
    files = {key: Path(name).name for key in PROMPT_FILES if (name := getattr(r.prompts, key))}
    plus = tuple(_public_scorer(facts, f"reward.plus.{i}", term) for i, term in enumerate(r.reward.plus))
    scorer_sections = {SCORERS[name]: _public_scorer(facts, SCORERS[name], s) for name, s in scorers(r).items()}
    public = r.model_copy(
        update={
            **scorer_sections,
            "reward": scorer_sections["reward"].model_copy(update={"plus": plus}),
            **models,
            "prompts": r.prompts.model_copy(update=files | _pinned(facts, "prompts")),
            "chain": chain,
            "distill": r.distill.model_copy(update={"launch": None, "report_to": "none"}),
        }
    )
    local: dict[str, Any] = {
        "serving": set(SERVERS_OWN),
        "publish": set(PUBLISHERS_OWN),
        "chain": {"critic": set(CRITICS_OWN)},
    }
    return public.model_dump(mode="json", exclude=local)


def _pinned(facts: RunFacts, place: str) -> dict[str, str]:
    """Return the revision of what is named at a place of the recipe: the commit that was used; {} without one."""
    commit = commit_of(facts.identity.get(place))
    return {"revision": commit} if commit else {}


def _public_scorer(facts: RunFacts, place: str, section: ScorerConfig) -> ScorerConfig:
    """Return a scorer's section without local details.

    A metric file is not published with the recipe: its code comes from a Space's commit, and runs only if allowed.
    """
    update: dict[str, Any] = _pinned(facts, place)
    if is_folder(section.scorer):
        update["scorer"] = Path(section.scorer).name
    if section.metric.endswith(".py"):
        space = facts.spaces.get(section.metric)
        at_space = {"metric": space.repo, "revision": space.commit} if space else {}
        update |= at_space or {"metric": Path(section.metric).name}
    update["options"] = {key: value for key, value in section.options.items() if key not in SERVERS}
    return section.model_copy(update=update)


def _recipe_files(facts: RunFacts, folder: Path, work: Path) -> dict[str, Path]:
    """Return the public recipe.yaml and its prompt files."""
    named = (getattr(facts.recipe.prompts, key) for key in PROMPT_FILES)
    files = {Path(name).name: folder / name for name in named if name}
    target = work / "recipe.yaml"
    write_whole(target, yaml.safe_dump(_public_recipe(facts), sort_keys=False, allow_unicode=True, width=100))
    return files | {"recipe.yaml": target}
