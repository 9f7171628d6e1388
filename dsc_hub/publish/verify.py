"""Verification of a published repo: compare files with the manifest; recompute numbers and card from the repo's rows.

Uses no local runs and sends no request to a model. Values that cannot be recomputed from rows (seconds, tokens per
second, nats of each neutral text, trainer records) are not checked. A manifest shows that the files are those that the
publisher sent, not that the publisher was honest: invented rows would agree with numbers computed from them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError

from dsc_hub import __version__, stats
from dsc_hub.config import recipe as recipe_module
from dsc_hub.config import untrusted
from dsc_hub.config.origin import MANIFEST, MARK
from dsc_hub.config.publishing import publishes_rejected
from dsc_hub.config.recipe import Recipe
from dsc_hub.data import dataset
from dsc_hub.data.prompts import Counts, load_prompts
from dsc_hub.errors import DscError, HubError
from dsc_hub.evaluation.summary import summarise_evaluation
from dsc_hub.hub import client
from dsc_hub.hub.pull import Pulled, differences, kind_of, pull_repo
from dsc_hub.publish import numbers
from dsc_hub.publish.numbers import (
    ADVICE,
    NOT_RECOMPUTED,
    NOT_RECOMPUTED_IN_SAMPLING,
    SHOWN_DIFFERENCES,
    Differs,
    NotVerifiable,
)
from dsc_hub.records import Answer, Chain, Prompt, Score, from_row
from dsc_hub.report import cards
from dsc_hub.runs import metrics_schema
from dsc_hub.runs.run import Run
from dsc_hub.sampling import summary
from dsc_hub.system import parquet
from dsc_hub.system.files import read_object, write_json
from dsc_hub.system.hashing import file_hash


@dataclass(frozen=True)
class Check:
    """Result of one check. `agrees` is None if the check was not possible, which is not a pass."""

    name: str
    agrees: bool | None
    detail: str


def verify_repo(reference: str, rescore: bool = False) -> tuple[Pulled, list[Check]]:
    """Pull `[hub:]USER/REPO[@REV]` (dataset or adapter) into a temporary folder and check it.

    With `rescore`, the packaged scorers score the dataset's answers again. HubError if the repo does not exist or was
    not published by dsc.
    """
    listing = client.listing(reference.removeprefix("hub:"))  # checked before any large download
    if MANIFEST not in listing.files or kind_of(listing.repo_type, listing.files) not in ("dataset", "adapter"):
        raise HubError(
            f"hub:{listing.repo} is no dataset or adapter that dsc published ({MANIFEST} or its files are not there)",
            "Name the repo of a dataset or an adapter; `dsc pull` takes any.",
        )
    with tempfile.TemporaryDirectory(prefix="dsc-verify-") as work:
        work_folder = Path(work)
        pulled = pull_repo(reference, work_folder / "repo")
        manifest = _read_manifest(pulled)
        if pulled.kind == "dataset":
            return pulled, [
                manifest,
                *_run_check(_of_dataset(Rows(pulled.folder, work_folder), pulled.folder, rescore)),
            ]
        return pulled, [manifest, *_run_check(_of_adapter(pulled, work_folder))]


Work = tuple[str, Callable[[], str]]  # name, function: returns a message or raises Differs or NotVerifiable


def _run_check(works: Sequence[Work]) -> list[Check]:
    out = []
    for name, work in works:
        try:
            out.append(Check(name, True, work()))
        except NotVerifiable as e:
            out.append(Check(name, None, str(e)))
        except Differs as e:
            out.append(Check(name, False, str(e)))
        except (ValidationError, LookupError, OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
            # A malformed file of the repo.
            out.append(Check(name, False, f"can't be read: {type(e).__name__}: {' '.join(str(e).split())[:200]}"))
        except DscError as e:
            out.append(Check(name, False, " ".join([e.message, *getattr(e, "problems", ())])[:300]))
    return out


def _read_manifest(pulled: Pulled) -> Check:
    changes = differences(pulled.folder)
    listed = read_object(pulled.folder / MANIFEST)["files"]
    extra = sorted(
        str(p.relative_to(pulled.folder)) for p in pulled.folder.rglob("*") if p.is_file() and p.name != MANIFEST
    )
    extra = [name for name in extra if name not in listed and name != MARK]
    untaken = [n for n in pulled.left_out if n in listed]
    extra += [f"{n} (not taken)" for n in pulled.left_out if n not in listed and n != ".gitattributes"]
    detail = f"{len(listed) - len(untaken)} of {len(listed)} files have the hash that is listed"
    detail += f"; not taken, so not checked: {', '.join(untaken[:SHOWN_DIFFERENCES])}" if untaken else ""
    detail += f"; there besides: {', '.join(extra[:SHOWN_DIFFERENCES])}" if extra else ""
    return Check("files", not changes, "; ".join(changes[:SHOWN_DIFFERENCES]) or detail)


# -- a dataset


class Rows:
    """A dataset repo's rows, presented as a run in a run folder under `work`."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.run = folder, Run(work / "run")
        shutil.copytree(folder, self.run["dataset"], ignore=shutil.ignore_patterns("*.md", "*.png", "*.json", "*.yaml"))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return _of_today(read_object(self.folder / "metrics.json"))

    @cached_property
    def facts(self) -> dict[str, Any]:
        return read_object(self.folder / "run.json")

    @cached_property
    def recipe(self) -> Recipe:
        return untrusted.read_to_compare("its recipe", self.folder / "recipe.yaml")

    @cached_property
    def prompts(self) -> tuple[list[Prompt], Counts]:
        return load_prompts(self.recipe.prompts, self.folder, self.recipe.seed, self.facts["identity"]["prompts"])

    @cached_property
    def chains(self) -> list[Chain]:
        if not (self.folder / "chains").is_dir():
            raise NotVerifiable("the chains are not published")
        rows = [dataset.chain_of(row)[1] for row in _rows(self.folder, "chains")]
        return sorted(rows, key=lambda c: c.key)

    @cached_property
    def answers(self) -> list[Answer]:
        rows = list(_rows(self.folder, "evaluation"))
        if not rows:
            raise NotVerifiable("the evaluated answers are not published")
        if any(row["text"] is None for row in rows):
            raise NotVerifiable("the texts of the evaluated answers are not published")
        return [from_row(Answer, row) for row in rows]


def _of_today(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers; NotVerifiable if an older dsc wrote them, since some had another meaning."""
    schema = metrics.get("schema")
    if isinstance(schema, int) and schema < metrics_schema.SCHEMA:
        raise NotVerifiable(
            f"its numbers are of schema {schema}, which an older dsc made and this one reads but can't make anew "
            f"(it makes schema {metrics_schema.SCHEMA})"
        )
    return metrics


def _rows(folder: Path, config: str) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / config).glob("*.parquet")):
        yield from parquet.rows(path)


def _of_dataset(rows: Rows, folder: Path, rescore: bool) -> list[Work]:
    works: list[Work] = [
        ("metrics.json", lambda: _check_described(rows.metrics)),
        ("prompts", lambda: _check_prompts(rows)),
        ("rows", lambda: _row_counts(rows)),
        ("training rows", lambda: _training_rows(rows)),
        ("numbers of the chains", lambda: _check_sampling(rows)),
        ("numbers of the evaluation", lambda: _check_evaluation(rows)),
    ]
    if rescore:
        works.append(("scores", lambda: _check_scores(rows)))
    return [*works, ("card", lambda: _check_card(rows, "dataset", folder))]


def _check_described(metrics: Mapping[str, Any]) -> str:
    """Check that metrics.json fits the schema of this dsc."""
    if (schema := metrics.get("schema")) != metrics_schema.SCHEMA:
        raise Differs(f"it is of schema {schema!r:.40}, this dsc knows none after {metrics_schema.SCHEMA}")
    if problems := metrics_schema.schema_problems(metrics):
        raise Differs("; ".join(p[:150] for p in problems[:SHOWN_DIFFERENCES]))
    return f"every number is one that schema {metrics_schema.SCHEMA} describes"


def _check_prompts(rows: Rows) -> str:
    """Split the recipe's prompts again: every answer must belong to a held-out prompt, every chain to another."""
    prompts, dropped = rows.prompts
    split = {p.id: p.split for p in prompts}
    held_out = {row.prompt_id for row in rows.answers}
    wrong = [i for i in held_out if split.get(i) != rows.recipe.evaluation.split]
    wrong += [c.prompt_id for c in rows.chains if split.get(c.prompt_id) not in ("train", "validation")]
    if wrong:
        raise Differs(
            f"{len(wrong)} prompts are not in the split that the recipe gives them: "
            f"{', '.join(wrong[:SHOWN_DIFFERENCES])}"
        )
    counts = {s: sum(p.split == s for p in prompts) for s in ("train", "validation", "test")}
    groups = {s: len({p.group for p in prompts if p.split == s}) for s in counts}
    numbers.same(rows.metrics["prompts"], counts | {"groups": groups} | dropped.as_metrics(), "prompts")
    return f"{len(prompts)} prompts, split as the recipe says; no chain on a test prompt"


def _row_counts(rows: Rows) -> str:
    recorded = {k: v for k, v in rows.metrics["dataset"].items() if k in dataset.SCHEMAS}
    if not publishes_rejected(rows.recipe.publish):
        recorded = {"sft": recorded["sft"]}
    counts = {
        config: {
            p.name.split("-")[0]: pq.read_metadata(p).num_rows for p in sorted((rows.folder / config).glob("*.parquet"))
        }
        for config in recorded
    }
    numbers.same(recorded, counts, "dataset")
    return ", ".join(f"{config} {sum(splits.values())}" for config, splits in counts.items())


def _training_rows(rows: Rows) -> str:
    """Recompute the training rows from the published chains and compare them."""
    rebuilt = Run(rows.run["again"])
    prompts = {p.id: p for p in rows.prompts[0]}
    selection = rows.metrics["dataset"].get("selection", 1)
    if selection > dataset.SELECTION:
        raise NotVerifiable("its rows were selected by a later version of dsc_hub; install that one")
    counts = dataset.build_dataset(rebuilt, rows.recipe, prompts, rows.chains, selection)
    for key in ("dropped", "uncompared"):
        numbers.same(rows.metrics["dataset"][key], counts[key], f"dataset.{key}")
    for config in ("sft", "preference", "repairs"):
        for path in sorted(rebuilt["dataset"].glob(f"{config}/*.parquet")):
            published = rows.folder / config / path.name
            if published.is_file():
                deque(parquet.rows(published), maxlen=0)  # DataError if it is too large to compare
            if not published.is_file() or not pq.read_table(path).equals(pq.read_table(published)):
                raise Differs(f"{config}/{path.name} is not what the recipe makes of the chains")
    return "sft, preference and repairs are what the recipe makes of the chains, row by row"


def _check_sampling(rows: Rows) -> str:
    c, group_of = rows.recipe.chain, {p.id: p.group for p in rows.prompts[0]}.__getitem__
    recorded = rows.metrics["sampling"]
    low, high = recorded.get("reward_range") or stats.UNBOUNDED
    with stats.intervals_by(rule := numbers.interval_rule(recorded)):
        recomputed = summary.chain_numbers(rows.chains, group_of, recorded["chains"], c, (low, high))
    recorded = {k: v for k, v in recorded.items() if k not in NOT_RECOMPUTED_IN_SAMPLING}
    n = numbers.same(recorded | {"intervals": rule}, recomputed, "sampling", ADVICE)
    return f"{n} numbers made anew from {len(rows.chains)} chains agree; tokens and seconds are not in the rows"


def _check_evaluation(rows: Rows) -> str:
    recorded, checked = rows.metrics["evaluation"], rows.recipe
    prompts = [p for p in rows.prompts[0] if p.split == checked.evaluation.split]
    look = (rows.metrics.get("test_set") or {}).get("position")
    with stats.intervals_by(rule := numbers.interval_rule(recorded)):
        recomputed = summarise_evaluation(
            checked, prompts, rows.answers, recorded["scores"], neutral=recorded["neutral"], look=look
        )
    recomputed |= {"neutral": recorded["neutral"]}
    n = numbers.same(recorded | {"intervals": rule}, recomputed, "evaluation", NOT_RECOMPUTED | ADVICE)
    claim = recorded["claim"]
    verdict = "" if claim is None else f"; claim: {claim['verdict']}"
    return f"{n} numbers made anew from {len(rows.answers)} answers agree{verdict}"


def _check_scores(rows: Rows) -> str:
    """Score the published answers again with the packaged scorers."""
    from dsc_hub.metrics import loading, registry

    results = []
    texts = [row.text for row in rows.answers]
    by_id = {p.id: p for p in rows.prompts[0]}
    prompts = [by_id[row.prompt_id] for row in rows.answers]
    for name in recipe_module.scorers(rows.recipe):
        terms = recipe_module.reward_terms(rows.recipe, name)
        if other := [s for s in terms.values() if not registry.is_packaged(s)]:
            results.append(f"{name} not scored again: {other[0].metric}, {other[0].scorer} is no packaged scorer")
            continue
        local = {place: registry.identify_scorer(section) for place, section in terms.items()}
        recorded = {place: rows.facts["identity"][place] for place in terms}
        scored: list[Score] = loading.load_named(name, rows.recipe, local, rows.folder).score(texts, prompts)
        differing = [i for i, s in enumerate(scored) if not numbers.close(s.value, rows.answers[i].score(name))]
        if differing:
            versions = (
                ""
                if local == recorded
                else f" (here {' + '.join(local.values())}, there {' + '.join(recorded.values())})"
            )
            raise Differs(f"{len(differing)} of {len(texts)} answers have another {name} here{versions}")
        results.append(f"{name} of {len(texts)} answers agrees")
    return "; ".join(results)


def _check_card(rows: Rows, kind: str, folder: Path) -> str:
    """Render the card again from the published numbers and rows, and compare it."""
    version = rows.facts["versions"]["dsc_hub"]
    if version != __version__:
        raise NotVerifiable(f"it was written by dsc {version}, this is {__version__}")
    run = rows.run
    write_json(run["run.json"], read_object(folder / "run.json"))
    write_json(run["metrics.json"], read_object(folder / "metrics.json"))
    run.finish("evaluation", "published", 0.0, {})
    prompts, _ = rows.prompts
    for name, contents in (
        ("prompts.jsonl", [p.as_row() for p in prompts]),
        ("chains.jsonl", [c.as_row() for c in rows.chains]),
        ("evaluation/answers.jsonl", [asdict(a) for a in rows.answers]),
    ):
        run[name].parent.mkdir(parents=True, exist_ok=True)
        run[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in contents), encoding="utf-8")
    run["adapter"].mkdir(exist_ok=True)
    config = folder / "adapter_config.json"
    run["adapter/adapter_config.json"].write_text(config.read_text() if config.is_file() else '{"r": 1}')
    for name in {n for names in cards.PLOTS.values() for n in names}:
        run["cards"].mkdir(exist_ok=True)
        run[f"cards/{name}.png"].touch()  # not compared: other matplotlib versions draw other bytes
    for name in cards.PLOTS[kind]:
        if not (folder / f"{name}.png").is_file():
            run[f"cards/{name}.png"].unlink()
    cards.build_cards(run)
    rendered = (run["cards"] / kind / "README.md").read_text(encoding="utf-8").splitlines()
    published = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    if rendered != published:
        line_no = next(
            (i for i, (a, b) in enumerate(zip(rendered, published, strict=False)) if a != b),
            min(len(rendered), len(published)),
        )
        line = published[line_no][:120] if line_no < len(published) else "(its end)"
        raise Differs(f"it is not what its numbers and rows give, from line {line_no + 1} on: {line}")
    return f"all {len(rendered)} lines are what numbers and rows give"


# -- an adapter


def _of_adapter(pulled: Pulled, work: Path) -> list[Work]:
    facts = read_object(pulled.folder / "run.json")
    metrics = read_object(pulled.folder / "metrics.json")

    def weights() -> str:
        recorded = metrics["distill"]["adapter_sha256"]
        if file_hash(pulled.folder / "adapter_model.safetensors") != recorded:
            raise Differs("adapter_model.safetensors is not what was trained and evaluated: its hash differs")
        return "the weights are those that were trained and evaluated"

    def data() -> Rows:
        repo, commit = facts["repos"]["dataset"], facts["repos"]["dataset_revision"]
        target = work / "dataset"
        if not target.is_dir():
            try:
                pull_repo(f"{repo}@{commit}", target)
            except HubError as e:
                raise NotVerifiable(f"its dataset {repo} at {commit[:12]} can't be had: {e.message}") from None
        return Rows(target, Path(tempfile.mkdtemp(dir=work)))

    def same_numbers() -> str:
        rows = data()
        n = numbers.same(rows.metrics, metrics, "metrics")
        return (
            f"{n} numbers are those of its dataset {facts['repos']['dataset']} at"
            f" {facts['repos']['dataset_revision'][:12]}"
        )

    return [
        ("weights", weights),
        ("metrics.json", lambda: _check_described(_of_today(metrics))),
        ("numbers", same_numbers),
        ("numbers of the evaluation", lambda: _check_evaluation(data())),
        ("card", lambda: _check_card(data(), "adapter", pulled.folder)),
    ]
