"""The files of each repo that a run is published to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dsc_hub.config.recipe import PUBLISHERS_OWN, SCORERS, SERVERS, is_folder, publishes_rejected
from dsc_hub.errors import RunError
from dsc_hub.inference.base_model import WANTED
from dsc_hub.metrics.registry import commit_of
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_json, write_json, write_whole

TEXT_SUFFIXES = (".md", ".json", ".jsonl", ".yaml", ".jinja", ".txt", ".csv", "")


def trees(run: Run, model_folder: Path, recipe_folder: Path, work: Path) -> dict[str, tuple[str, dict[str, Path]]]:
    """Return {"base" | "dataset" | "adapter": (repo type, {path in repo: local file})}, in publishing order.

    The recipe and its prompt files are included under plain names, so that `dsc run hub:USER/REPO` can run it.
    """
    facts = run.facts
    shared = _recipe_files(facts, recipe_folder, work) | {"metrics.json": run["metrics.json"]}
    out: dict[str, tuple[str, dict[str, Path]]] = {}
    public = {kind: {"run.json": _public_facts(facts, kind, work)} for kind in ("dataset", "adapter")}
    if facts["repos"]["base"]:
        model_files = {p for pattern in WANTED for p in model_folder.glob(pattern) if p.is_file()}
        weights = {p.name: p for p in sorted(model_files) if p.name != "complete.json"}
        out["base"] = ("model", weights | _card(run, "base"))
    data = {p.relative_to(run["dataset"]).as_posix(): p for p in sorted(run["dataset"].rglob("*.parquet"))}
    if not publishes_rejected(facts["recipe"]["publish"]):
        data = _kept_alone(data, work)
    out["dataset"] = ("dataset", data | shared | public["dataset"] | _card(run, "dataset"))
    adapter = {p.name: p for p in sorted(run["adapter"].iterdir()) if p.is_file() and p.name != "README.md"}
    adapter["adapter_config.json"] = _named_base(run, work)
    out["adapter"] = ("model", adapter | shared | public["adapter"] | _card(run, "adapter"))
    return out


def _public_facts(facts: Mapping[str, Any], kind: str, work: Path) -> Path:
    """Write the public run.json: all facts that the card of this repo uses, without local details.

    The dataset is published first, so values known only afterwards (its own commit, the base's) are left out of its
    copy: publishing again must not change it.
    """
    later = {"dataset": ("dataset_revision", "published_commit"), "adapter": ()}[kind]
    model, repos = ({k: v for k, v in facts[key].items() if k not in later} for key in ("model", "repos"))
    model.pop("folder", None)
    repos.pop("endpoint", None)
    identity = dict(facts["identity"])
    if is_folder(model["source"]):
        model["source"] = f"./{Path(model['source']).name}"
        identity["model"] = f"{model['source']}@{model['commit']}"
    public_keys = ("fingerprints", "versions", "hardware", "started_at", "imported")
    kept = {key: facts[key] for key in public_keys if key in facts}
    target = work / f"{kind}.run.json"
    write_json(
        target,
        kept | {"recipe": _public_recipe(facts)} | {"identity": identity, "model": model, "repos": repos},
    )
    return target


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
    model = run.facts["model"]
    config = read_json(run["adapter"] / "adapter_config.json")
    config |= {"base_model_name_or_path": model["published_as"], "revision": model["published_commit"]}
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


def _public_recipe(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe in a form that others can run: Hub references are pinned to the commits that were used.

    Endpoints and key names are local details and are left out.
    """
    data = deepcopy(dict(facts["recipe"]))
    for place, section in scorer_sections(data).items():
        if commit := commit_of(facts["identity"].get(place)):
            section["revision"] = commit
    if facts["model"]["published_as"] == facts["model"]["source"]:
        data["model"]["revision"] = facts["model"]["commit"]
    for key in ("path", "values"):
        if name := data["prompts"].get(key):
            data["prompts"][key] = Path(name).name
    for key in ("endpoints", "served_model", "api_key_env"):
        data["serving"].pop(key, None)
    for key in PUBLISHERS_OWN:
        data["publish"].pop(key, None)
    if is_folder(data["model"]["source"]):
        data["model"] |= {"source": facts["model"]["published_as"], "revision": "main"}
    for section in scorer_sections(data).values():
        if "scorer" in section and is_folder(section["scorer"]):
            section["scorer"] = Path(section["scorer"]).name
        if (file := section.get("metric", "")).endswith(".py"):
            space = facts.get("spaces", {}).get(file)
            # A code file is not published with the recipe: code comes from a Space's commit, and runs only if allowed.
            section |= {"metric": space["repo"], "revision": space["commit"]} if space else {"metric": Path(file).name}
        for key in SERVERS:
            section.get("options", {}).pop(key, None)
    for key in SERVERS:
        (data["chain"].get("critic") or {}).pop(key, None)
    return data


def scorer_sections(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe that reference something with a revision, by their location."""
    sections = {key: data[key] for key in ("prompts", *SCORERS.values()) if data[key]}
    sections |= {f"reward.plus.{i}": section for i, section in enumerate(data["reward"].get("plus") or ())}
    return sections | ({"chain.veto": data["chain"]["veto"]} if data["chain"].get("veto") else {})


def _recipe_files(facts: Mapping[str, Any], folder: Path, work: Path) -> dict[str, Path]:
    """Return the public recipe.yaml and its prompt files."""
    named = (facts["recipe"]["prompts"].get(key) for key in ("path", "values"))
    files = {Path(name).name: folder / name for name in named if name}
    target = work / "recipe.yaml"
    data = _public_recipe(facts)
    write_whole(target, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))
    return files | {"recipe.yaml": target}
