"""Cards: the README.md of the dataset, the adapter and the base model, rendered from the run's recorded facts.

Every number is looked up by name in run.json or metrics.json; nothing is inferred and no model is called. Text from
models, prompts and recipes is untrusted: it is put into code fences that it cannot close, or escaped within a line,
independently of the template. huggingface_hub writes the metadata, so that it is always valid YAML.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
import yaml
from huggingface_hub import (
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsc_hub.config.models import licences
from dsc_hub.config.publishing import languages, publishes_rejected
from dsc_hub.config.recipe import generation_at_evaluation, scorers
from dsc_hub.config.training import quantization
from dsc_hub.errors import DataError
from dsc_hub.inference.adapters import max_lora_rank
from dsc_hub.records import SPLITS, Chain, Prompt
from dsc_hub.report import formatting, plots, sentences, style, tables, verdicts
from dsc_hub.runs.facts import RunFacts
from dsc_hub.runs.metrics_schema import Dataset, Evaluation, Metrics, ScoreName
from dsc_hub.runs.results import answers, evaluated, needed
from dsc_hub.runs.run import Run
from dsc_hub.system.files import packaged_folder, write_whole

PAPER = "2312.01957"
TAGS = [f"arxiv:{PAPER}", "distilled-self-critique"]
CONFIGS = ("sft", "preference", "repairs", "chains", "evaluation")
PLOTS = {"dataset": ("steps",), "adapter": ("arms", "loss"), "base": ()}
CHAINS_ON_CARD, ANSWERS_ON_CARD = 3, 2  # examples: whole chains, prompts with every arm's answer
_PLAIN = re.compile(r"[\w\s.,'\[\]-]*", re.ASCII)  # values that may stand in a card's code
LONGEST_EXAMPLE = 800  # characters of one text on a card
# Upper bounds of the Hub's size categories.
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


def build_cards(run: Run) -> dict[str, list[str]]:
    """Write cards/dataset, cards/adapter and (if the base is published) cards/base: README.md and its plots.

    Return the files of each folder. DataError if a fact is missing, or if the dataset's files do not match its numbers.
    """
    facts, (metrics, evaluation) = run.facts, evaluated(run)
    for name in ("prompts", "sampling", "dataset", "distill"):
        needed(getattr(metrics, name), name)
    for kind, repo in (("dataset", facts.repos.dataset), ("adapter", facts.repos.adapter), ("base", facts.repos.base)):
        _check_repo_id(repo, kind)
    rejected_too = publishes_rejected(facts.recipe.publish)
    files = {
        config: entry
        for config, entry in _dataset_files(run, needed(metrics.dataset, "dataset")).items()
        if rejected_too or config in ("sft", "evaluation")
    }
    _draw_missing_plots(run, metrics)
    metadata = {"dataset": _dataset_metadata(facts, files), "adapter": _adapter_metadata(facts, evaluation)}
    if facts.repos.base:
        metadata["base"] = _base_metadata(facts)
    context = _context(run, facts, metrics, evaluation, files, rejected_too)
    written = {}
    for kind, data in metadata.items():
        folder = run["cards"] / kind
        shutil.rmtree(folder, ignore_errors=True)
        pictures = [f"{name}.png" for name in PLOTS[kind] if (run["cards"] / f"{name}.png").is_file()]
        body = environment().get_template(f"{kind}_card.md.jinja").render(context, pictures=pictures)
        write_whole(folder / "README.md", f"---\n{data.to_yaml()}\n---\n\n{body}")
        for picture in pictures:
            shutil.copy2(run["cards"] / picture, folder / picture)
        written[kind] = ["README.md", *pictures]
        if kind == "adapter" and (entries := _result_entries(facts, evaluation)):
            name = f".eval_results/{facts.recipe.name}.yaml"
            write_whole(folder / name, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
            written[kind].append(name)
    return written


def _context(
    run: Run,
    facts: RunFacts,
    metrics: Metrics,
    evaluation: Evaluation,
    files: Mapping[str, Any],
    rejected_too: bool,
) -> dict[str, Any]:
    """Return what the templates of the cards show."""
    sampling = needed(metrics.sampling, "sampling")
    return {
        "facts": facts,
        "recipe": facts.recipe,
        "metrics": metrics,
        "repos": facts.repos,
        "files": files,
        "paper": PAPER,
        "longest": LONGEST_EXAMPLE,
        "base_id": _base_id(facts),
        "model": formatting.model_name(facts.model),
        "base": formatting.model_name(facts.base),
        "arms": tables.arm_rows(evaluation),
        "differences": tables.difference_rows(evaluation),
        "details": tables.detail_rows(evaluation),
        "side_effect_note": tables.SIDE_EFFECT_NOTE,
        "side_effects": tables.side_effect_rows(evaluation),
        "costs": tables.cost_rows(evaluation),
        "ending": sentences.ending_sentence(sampling, facts.recipe),
        "last_step": sentences.last_step_sentence(sampling),
        "mixing": sentences.mixing_sentence(sampling),
        "verdict": " ".join(filter(None, (sentences.claim_sentence(evaluation.claim), verdicts.headline(evaluation)))),
        "criteria": tables.claim_rows(evaluation),
        "blind": verdicts.blind_lines(metrics.blind),
        "caveats": verdicts.caveats(facts, metrics, evaluation),
        "rounds_sentence": sentences.rounds_sentence(metrics.rounds) if metrics.rounds else "",
        "reasons": plots.rejection_reasons(sampling.steps),
        "chains": _example_chains(run) if rejected_too else [],
        "answers": _example_answers(run) if rejected_too else [],
        "rejected_too": rejected_too,
        "temperature": generation_at_evaluation(facts.recipe).temperature,
        "quantization": quantization(facts.recipe.distill),
        "lora_rank": max_lora_rank(run["adapter"]),
    }


def _draw_missing_plots(run: Run, metrics: Metrics) -> None:
    # The report stage draws the plots, but a reused report comes without this folder.
    if not all((run["cards"] / f"{name}.png").is_file() for names in PLOTS.values() for name in names):
        figures = plots.draw_all(metrics, run.rows("adapter/training_log.jsonl"))
        for name in figures.keys() & set().union(*PLOTS.values()):
            style.save_png(figures[name], run["cards"] / f"{name}.png")


# -- untrusted text in Markdown


def environment() -> Environment:
    """Return the Jinja environment of cards: unknown names are errors; values are escaped unless marked safe."""
    env = Environment(
        loader=FileSystemLoader(packaged_folder("model_cards")),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else inline(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= formatting.FILTERS | {
        "fenced": fenced,
        "id": _vouched_id,
        "arm_name": formatting.arm_name,
        "python": _literal,
        "arguments": _arguments,
    }
    return env


def inline(text: str) -> Markup:
    """Escape a text for a line or a table cell: one line, without active Markdown, HTML, links or formulas."""
    text = re.sub(r"\s+", " ", _clean(text))
    text = re.sub(r"[\\`*\[\]$~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    # Bare addresses would become links, which model text must not contain.
    text = text.replace("://", "&#58;//").replace("@", "&#64;")
    return Markup(re.sub(r"(?i)\bwww\.", "www&#46;", text))


def fenced(text: str, language: str = "text", limit: int | None = None) -> Markup:
    """Return a code block whose fence is longer than any run of backticks in the text, so that it cannot end early."""
    text = _clean(text)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]} […] ({len(text):,} characters, cut here)"
    fence = "`" * (1 + max([2, *(len(m) for m in re.findall(r"`+", text))]))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def _clean(text: str) -> str:
    # Some renderers end a line, and with it a fence, at more than \n; control characters are removed.
    text = re.sub(r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]", "\n", text)
    # Invisible or reordering marks are replaced as well (zero width, bidirectional overrides, tags).
    return re.sub(
        "[\x00-\x08\x0e-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]",
        "\ufffd",
        text,
    )


def _arguments(settings: Mapping[str, Any]) -> Markup:
    """Return settings as keyword arguments of a call, each with a comma after it; those that no code can show safely
    are left out."""
    plain = {
        k: v for k, v in settings.items() if re.fullmatch(r"[A-Za-z_]\w*", k, re.ASCII) and _PLAIN.fullmatch(repr(v))
    }
    return Markup("".join(f"{key}={value!r}, " for key, value in plain.items()))


def _literal(value: Any) -> Markup:
    """Return a plain recipe value as Python code for a code block; DataError if it could end the block."""
    text = repr(value)
    if not _PLAIN.fullmatch(text):
        raise DataError(
            f"distill.quantization holds {text[:80]}, which can't stand in a card's code", "Use plain values."
        )
    return Markup(text)


def _vouched_id(repo_id: str) -> Markup:
    """Return a repo id unescaped, for use within code; DataError if it is not a valid id."""
    _check_repo_id(repo_id, "base")
    return Markup(repo_id)


def _check_repo_id(repo_id: str | None, kind: str) -> None:
    try:
        if repo_id is not None:
            validate_repo_id(repo_id)
    except HFValidationError as e:
        raise DataError(
            f"the {kind} repo's name {repo_id!r:.80} is not one: {e}", f"Set publish.{kind} in the recipe."
        ) from None


# -- metadata


def _licences(facts: RunFacts) -> tuple[str, str]:
    """Return the licences of dataset and adapter; "unknown" where there is none to name."""
    of_dataset, of_adapter = licences(facts.recipe, facts.base.license)
    return of_dataset or "unknown", of_adapter or "unknown"


def _source(facts: RunFacts) -> str | None:
    """Return the dataset that the prompts were read from, or None."""
    return facts.recipe.prompts.dataset


def _base_id(facts: RunFacts) -> str | None:
    """Return the repo of the base model, or None for a local folder."""
    for name in (facts.base.published_as, facts.repos.base, facts.base.upstream, facts.base.id):
        if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return str(name)
    return None


def _dataset_metadata(facts: RunFacts, files: Mapping[str, Any]) -> DatasetCardData:
    configs = [
        {"config_name": config}
        | ({"default": True} if config == "sft" else {})
        | {"data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in about["splits"]]}
        for config, about in files.items()
    ]
    source = _source(facts)
    rows = sum(n for config in files.values() for n in config["splits"].values())
    return DatasetCardData(
        pretty_name=f"{facts.recipe.name}: distilled self-critique",
        language=languages(facts.recipe.publish),
        license=_licences(facts)[0],
        source_datasets=[source] if source else None,
        task_categories=["text-generation"],
        size_categories=[next((name for top, name in SIZES if rows < top), "n>10M")],
        tags=["synthetic", *TAGS, *_warned(facts)],
        configs=configs,
    )


def _warned(facts: RunFacts) -> list[str]:
    return ["not-for-all-audiences"] if facts.recipe.publish.content_warning else []


def _adapter_metadata(facts: RunFacts, evaluation: Evaluation) -> ModelCardData:
    return ModelCardData(
        model_name=facts.repos.adapter.split("/")[-1],
        base_model=_base_id(facts),
        base_model_relation="adapter",
        datasets=[facts.repos.dataset],
        language=languages(facts.recipe.publish),
        license=_licences(facts)[1],
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "synthetic", *TAGS, *_warned(facts)],
        eval_results=list(_eval_results(facts, evaluation).values()) or None,
    )


def _eval_results(facts: RunFacts, evaluation: Evaluation) -> dict[ScoreName, EvalResult]:
    """Return the distilled arm's scores by role (reward, second, third)."""
    arm = evaluation.arms.get("distilled")
    if arm is None:
        return {}
    named = scorers(facts.recipe)
    return {
        s: EvalResult(
            task_type="text-generation",
            dataset_type=facts.repos.dataset,
            dataset_name=f"{facts.recipe.name}, held-out prompts",
            dataset_config="evaluation",
            dataset_split=evaluation.split,
            dataset_revision=facts.repos.dataset_revision,
            metric_type=named[s].metric,
            metric_name=evaluation.scores[s].name,
            metric_value=arm.score(s).mean,
        )
        for s in evaluation.score_names
        if formatting.measured(arm.score(s).mean)
    }


def _result_entries(facts: RunFacts, evaluation: Evaluation) -> list[EvalResultEntry]:
    """Return the same numbers in the format that the Hub shows on model and dataset pages."""
    return [
        EvalResultEntry(
            dataset_id=r.dataset_type,
            task_id=f"{facts.recipe.name}-{s}",
            value=r.metric_value,
            dataset_revision=r.dataset_revision,
            date=facts.started_at,
            notes=f"{r.metric_name}, {evaluation.scores[s].unit}: mean of {arm.n} answers of the distilled model in "
            f"{arm.groups} groups, {formatting.interval(arm)}; {r.dataset_split} split",
        )
        for s, r in _eval_results(facts, evaluation).items()
        for arm in [evaluation.arms["distilled"].score(s)]
    ]


def _base_metadata(facts: RunFacts) -> ModelCardData:
    return ModelCardData(
        base_model=facts.base.upstream,
        language=languages(facts.recipe.publish),
        license=facts.base.license or "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distilled-self-critique"],
    )


# -- content besides numbers


def _dataset_files(run: Run, recorded: Dataset) -> dict[str, dict[str, Any]]:
    """Return configs and splits of dataset/ with rows and columns of the files, checked against metrics.json."""
    out: dict[str, dict[str, Any]] = {}
    for config in CONFIGS:
        splits: dict[str, int] = {}
        columns: list[str] = []
        for path in sorted((run["dataset"] / config).glob("*-*.parquet")):
            footer = pq.read_metadata(path)
            split = path.name.split("-")[0]
            splits[split] = splits.get(split, 0) + footer.num_rows
            columns = footer.schema.to_arrow_schema().names
        if splits:
            ordered = sorted(splits, key=lambda s: SPLITS.index(s) if s in SPLITS else len(SPLITS))
            out[config] = {"splits": {s: splits[s] for s in ordered}, "columns": columns}
        for split, n in getattr(recorded, config, {}).items():
            if splits.get(split, 0) != n:
                raise DataError(
                    f"dataset/{config} has {splits.get(split, 0)} rows of the split '{split}', metrics.json says {n}",
                    "Remove dataset.done.json from the run folder and run again: the stage 'dataset' writes both.",
                )
    return out


def _example_chains(run: Run) -> list[dict[str, Any]]:
    """Return the first training chains in key order, kept or not: not hand-picked."""
    prompts = {p.id: p.transcript for p in run.rows("prompts.jsonl").as_type(Prompt) if p.split == "train"}
    chains = sorted((c for c in run.rows("chains.jsonl").as_type(Chain) if c.prompt_id in prompts), key=lambda c: c.key)
    return [{"prompt": prompts[c.prompt_id], "chain": c} for c in chains[:CHAINS_ON_CARD]]


def _example_answers(run: Run) -> list[dict[str, Any]]:
    """Return the first evaluated prompts in order of their ids, with every arm's answer."""
    rows = [row for row in answers(run) if row.sample == 0]
    ids = sorted({r.prompt_id for r in rows})[:ANSWERS_ON_CARD]
    return [
        {
            "prompt": next(r.prompt for r in rows if r.prompt_id == i),
            "answers": [r for r in rows if r.prompt_id == i],
        }
        for i in ids
    ]
