"""Sections of the recipe for what is sampled: model, prompts, scorers, chain, budget, hygiene."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from dsc_hub.acceptance import RULES
from dsc_hub.config.section import RuleName, Section, placeholders, text_or_texts
from dsc_hub.config.serving import CriticConfig

# Prompt files with columns; any other file has one prompt per line.
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


# Files of other programs, by suffix: their bytes are no text, or their lines are no prompts.
OTHER_FILES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "a spreadsheet: export it as CSV"),
    **dict.fromkeys((".feather", ".arrow", ".orc", ".avro"), "another format of columns: save it as Parquet"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy"), "Python objects, which can run code: save it as JSON lines"),
    **dict.fromkeys((".zip", ".7z", ".tar", ".tgz", ".bz2", ".xz", ".zst"), "packed: unpack it (gzip is read)"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "a database: export the table as CSV"),
    **dict.fromkeys((".docx", ".pdf", ".html", ".xml"), "a document: save a prompt a line as .txt"),
    **dict.fromkeys((".yaml", ".yml"), "YAML: save it as JSON lines"),
}


def table_suffix(name: str) -> str:
    """Return the suffix by which a prompt file is read: in lower case, of a packed file the one before .gz."""
    return PurePath(name.lower().removesuffix(".gz")).suffix


PLACEHOLDERS = ("prompt", "answer", "group", "principle")  # of critique and revision


API = "api:"  # before the name of a model that is known by its name alone


class ModelConfig(Section):
    """The model that writes the chains: a Hub id (`org/name`) at a revision, a local folder, `package:NAME` (an
    installed package), or `api:NAME`, which `serving.endpoints` know by that name and which has no weights here."""

    source: str = Field(
        min_length=1,
        description="ORG/NAME on the Hub, a local folder, package:NAME of an installed package, or api:NAME of a model "
        "behind serving.endpoints, of which nothing is loaded here",
    )
    revision: str = Field("main", description="branch, tag or commit on the Hub; recorded as a commit")
    license: str | None = Field(None, description="licence of the weights, for the cards; null: ask the Hub")

    @property
    def api_name(self) -> str | None:
        """The name of a model behind an API; None for one whose weights can be had."""
        return self.source.removeprefix(API) if self.source.startswith(API) else None

    @model_validator(mode="after")
    def _names_one(self) -> ModelConfig:
        if self.api_name is not None and not self.api_name.strip():
            raise ValueError("source: api: needs the name that the server knows, as in api:NAME")
        return self


class StudentConfig(ModelConfig):
    """Another model than the one that writes the chains, trained on what is kept of them. It is the base of the adapter
    and of the comparison; the model of the chains is then its teacher."""

    source: str = Field(
        min_length=1, description="ORG/NAME on the Hub, a local folder, or package:NAME of an installed package"
    )

    @model_validator(mode="after")
    def _has_weights(self) -> StudentConfig:
        if self.api_name is not None:
            raise ValueError(f"source: {self.source} has no weights to train; name ORG/NAME or a folder")
        return self


class SplitShares(Section):
    """Shares of the groups (not of the prompts) that go to each split."""

    train: float = Field(0.7, gt=0, le=1, description="share of the groups whose chains become training rows")
    validation: float = Field(0.15, ge=0, lt=1, description="share to choose settings and checkpoints by")
    test: float = Field(
        0.15, ge=0, lt=1, description="share that nothing is chosen by: only measured on; 0 for who only samples"
    )

    @model_validator(mode="after")
    def _sum(self) -> SplitShares:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            shares = f"train {self.train:g}, validation {self.validation:g}, test {self.test:g}"
            raise ValueError(f"train + validation + test must be 1, got {total:g} ({shares})")
        return self


class PromptsConfig(Section):
    """Where the prompts come from: a file, a dataset of the Hub, or templates crossed with a list of values (one value
    = one group)."""

    path: str | None = Field(
        None, description="text (a prompt a line), JSON, JSON lines, CSV or Parquet, also as .gz, beside the recipe"
    )
    dataset: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="dataset of the Hub, USER/NAME")
    dataset_config: str | None = Field(None, description="its config; null: the default one")
    dataset_split: str = Field("train", description="which of its splits to read; ours are made anew, by group")
    revision: str = Field("main", description="of the dataset; resolved at the start and recorded as a commit")
    column: str = Field(
        "prompt",
        description=(
            "column that holds the prompt, in tables and datasets: a text, or a conversation (a list of {role, content}"
            " that ends with a user turn)"
        ),
    )
    drop_last_answer: bool = Field(
        False, description="leave out the answer that a conversation ends with: the prompt is what comes before it"
    )
    tools_column: str | None = Field(
        None, description="column that lists the tools that a prompt's model is shown, as JSON schemas; null: none"
    )
    group_column: str | None = Field(
        None, description="column that names the split group; null: each prompt its own, as is one whose cell is empty"
    )
    kind_column: str | None = Field(
        None, description="column that says of what kind a prompt is (say, harmful or harmless), for metrics that ask"
    )
    templates: tuple[Annotated[str, placeholders("value")], ...] = Field(
        (), description="prompts with {value}, each crossed with every line of `values`"
    )
    values: str | None = Field(None, description="text file, a value a line, put into {value} of each template")
    limit: int | None = Field(None, ge=1, description="take only the first so many prompts; null: all")
    drop_overlaps: bool | None = Field(
        None,
        description=(
            "leave out held-out prompts that are near-copies of training prompts: of the same words, or with eight"
            " words in a row in common; null: the latter only where no groups are named (by templates or group_column),"
            " which keep apart what must be apart"
        ),
    )
    split: SplitShares = Field(SplitShares(), description="shares of the groups in each split")

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if sum(map(bool, (self.path, self.dataset, self.templates))) != 1:
            raise ValueError("give one of: path, dataset, or templates with values")
        if missing := [t for t in self.templates if "{value}" not in t]:
            raise ValueError(f"template has no {{value}}: '{missing[0][:60]}'")
        named = [
            k
            for k in ("column", "group_column", "kind_column", "tools_column", "drop_last_answer")
            if getattr(self, k) != type(self).model_fields[k].default
        ]
        if reason := OTHER_FILES.get(table_suffix(self.path or "")):
            raise ValueError(f"path: {self.path} is {reason}")
        is_table = self.dataset or table_suffix(self.path or "") in TABLES
        if named and not is_table:
            source = (
                "templates have no columns: each value is a group"
                if self.templates
                else f"{self.path} is read a prompt a line"
            )
            raise ValueError(f"{', '.join(named)}: {source}; columns need a {', '.join(TABLES)} file or a dataset")
        if self.templates and not self.values:
            raise ValueError("templates need values: the file that lists what goes into {value}")
        return self


class ScorerConfig(Section):
    """A metric and the scorer behind it. What is scored points the way that is wanted: the score of a metric where
    lower is better counts with a minus."""

    scorer: str = Field(
        "vader", min_length=1, description="a packaged scorer of the metric, or a model of the Hub that it loads"
    )
    metric: str = Field(
        "sentiment",
        pattern=r"^(?:[a-z][a-z0-9_]*|[^/\\][^\\]*\.py|[\w.-]+/[\w.-]+)$",
        description=(
            "a shipped metric (docs/reference/metrics.md), a file METRIC.py beside the recipe, or a Space of the Hub"
            " USER/NAME, whose code runs only if the command line allows it (--allow-code)"
        ),
    )
    revision: str = Field("main", description="of the scorer's model, or of the metric's Space; recorded as a commit")
    positive_label: str | None = Field(None, description="label of a classifier that means positive; null: known names")
    options: dict[str, Any] = Field({}, description="further settings of the metric (docs/reference/metrics.md)")
    weight: float = Field(1.0, gt=0, description="the score is multiplied by it")
    batch_size: int = Field(32, ge=1, description="texts that a classifier scores together")


class RewardConfig(ScorerConfig):
    """What the chain goes by: a score, or the sum of several."""

    plus: tuple[ScorerConfig, ...] = Field((), description="further scores, each with its weight, that are added")


class VetoConfig(Section):
    """What a revision must keep of the chain's first answer, whatever it scores: who says nothing leaks nothing."""

    similarity: float = Field(0.5, ge=0, le=1, description="least likeness to the first answer; 0: don't look")
    scorer: str = Field("minilm", min_length=1, description="of the metric similarity: how likeness is measured")
    revision: str = Field("main", description="of the scorer's model; recorded as a commit")
    length: float = Field(0.5, ge=0, description="least length, as a share of the first answer's words; 0: don't look")


class ChainConfig(Section):
    """The Gibbs chain: the two texts, how many steps, how many chains a prompt, and when a revision is kept."""

    critique: Annotated[str | tuple[str, ...], text_or_texts(" ".join(PLACEHOLDERS))] = Field(
        description="text that asks for a critique of {answer} to {prompt}; {group}, {principle} too. A list: one of "
        "them, drawn anew for each step, with the revision at the same place"
    )
    revision: Annotated[str | tuple[str, ...], text_or_texts(" ".join(PLACEHOLDERS))] = Field(
        description="text that asks for the revision, after the critique in the same conversation; a list as above. "
        "With dataset.rows or budget, texts that give more rows are drawn more often"
    )
    system: str | None = Field(None, description="system text of all conversations, training rows included; null: none")
    seed: int | None = Field(None, ge=0, lt=2**32, description="of the texts that are drawn; null: the recipe's seed")
    steps: int = Field(1, ge=1, le=64, description="critiques and revisions of a chain")
    chains_per_prompt: int = Field(1, ge=1, le=256, description="chains, each from a first answer of its own")
    acceptance: RuleName = Field(
        "improve",
        description=(
            "improve: keep a revision with a higher reward; metropolis: with probability exp(gain / T) if it is not"
            " higher; always: keep each clean one"
        ),
    )
    temperature: float = Field(0.1, gt=0, description="T of the metropolis rule, in the reward's unit")
    good_enough: float | None = Field(
        None,
        description="reward from which a clean answer is not revised any more, which saves its further steps; null: "
        "each chain has all steps",
    )
    critic: CriticConfig | None = Field(None, description="who criticises; null: the base itself")
    principles: tuple[str, ...] = Field(
        (), description="one of them, drawn anew for each step, stands for {principle} in both texts"
    )
    veto: VetoConfig | None = Field(
        None, description="what a revision must keep of the first answer; null: the default one for a reward of privacy"
    )

    @model_validator(mode="after")
    def _as_many(self) -> ChainConfig:
        counts = [1 if isinstance(t, str) else len(t) for t in (self.critique, self.revision)]
        if min(counts) > 1 and counts[0] != counts[1]:
            raise ValueError(
                f"{counts[0]} critiques and {counts[1]} revisions: give as many of both, or one text that goes with all"
            )
        return self

    @model_validator(mode="after")
    def _principled(self) -> ChainConfig:
        if ("{principle}" in str(self.pairs)) != bool(self.principles):
            raise ValueError("principles and the placeholder {principle} go together: one is there without the other")
        return self

    @model_validator(mode="after")
    def _may_end_early(self) -> ChainConfig:
        if self.good_enough is not None and RULES[self.acceptance].can_descend:
            raise ValueError(
                f"good_enough: under {self.acceptance} the states are draws from a distribution, which ending chains "
                "early would change; leave it out, or use acceptance: improve"
            )
        return self

    def asks_for_group(self) -> bool:
        return "{group}" in str(self.pairs)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The texts of critique and revision that belong together."""
        lists = [(t,) if isinstance(t, str) else t for t in (self.critique, self.revision)]
        most = max(map(len, lists))
        critiques, revisions = (t * most if len(t) == 1 else t for t in lists)
        return tuple(zip(critiques, revisions, strict=True))


class BudgetConfig(Section):
    """What sampling may use, over all its sessions. What was sampled by then becomes the dataset. (`budget_s` limits
    nothing: it is shown beside what a stage took.)"""

    tokens: int | None = Field(
        None,
        ge=1,
        description="new tokens; no chain begins unless it fits at its full length. Turns of other runs cost nothing",
    )
    hours: float | None = Field(
        None, gt=0, description="hours of sampling, without the server's start; a chain that has begun is finished"
    )

    @model_validator(mode="after")
    def _limits_something(self) -> BudgetConfig:
        if self.tokens is None and self.hours is None:
            raise ValueError("give tokens, hours or both; null stands for no budget")
        return self


class HygieneConfig(Section):
    """Which texts are not fit to be kept, whatever they score; docs/concepts/hygiene.md describes the detectors."""

    meta_talk: Literal["reject", "strip", "keep"] = Field(
        "reject",
        description="strip: cut an opening that talks about the task, then check and score the rest; keep: don't look",
    )
    repeated: float = Field(
        0.04,
        ge=0,
        le=1,
        description="share of a text's word 3-grams that come again, from which it repeats itself; 1: don't look",
    )
    language: Literal["prompt", "any"] = Field(
        "prompt", description="prompt: an answer must be in its prompt's language"
    )
    subject: bool = Field(
        False,
        description="reject answers that don't name what their prompt is about (its group, where the prompt names it)",
    )
