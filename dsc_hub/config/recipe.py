"""The recipe schema: the YAML that defines a run, validated completely before anything starts.

A recipe is data, never code: numbers, texts, ids. `recipe_files.load(path, overrides)` returns a frozen `Recipe` or
raises one `ConfigError` that lists every problem. `fingerprints.stage_fingerprints` shows which work a changed recipe
would invalidate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dsc_hub.acceptance import RULES
from dsc_hub.config import messages
from dsc_hub.config.arms import ARMS
from dsc_hub.config.stages import NAMES
from dsc_hub.system.addresses import checked_address, checked_key_name
from dsc_hub.system.hashing import digest

# Names from the tables: pydantic rejects all others. A type checker can't evaluate such a Literal and sees `str`.
if TYPE_CHECKING:
    ArmName = str
    RuleName = str
    StageName = str
else:
    ArmName = Literal[tuple(ARMS)]
    RuleName = Literal[tuple(RULES)]
    StageName = Literal[NAMES]

TABLES = (".jsonl", ".csv", ".parquet")  # prompt files with columns; any other file has one prompt per line
# Name of a score in tables and rows -> its section in the recipe (and key in its identity).
SCORERS = {"reward": "reward", "second": "second_scorer", "third": "third_scorer"}
# Trainer settings that are reserved for the tool: file locations, uploads, process layout.
OWNED_TRAINER_KEYS = frozenset(
    "output_dir overwrite_output_dir push_to_hub hub_model_id hub_token hub_strategy hub_private_repo report_to"
    " deepspeed fsdp fsdp_config local_rank ddp_backend use_cpu no_cuda bf16 fp16 seed data_seed dataset_text_field"
    " dataset_kwargs completion_only_loss assistant_only_loss eos_token pad_token chat_template_path model_init_kwargs"
    " remove_unused_columns save_strategy logging_dir trackio_space_id trackio_bucket_id trackio_static_space_id"
    " project run_name".split()
)

OBJECTIVES = ("sft", "dpo", "kto")  # of training; each has a section of `distill` with its settings

QUANTIZATION_DEFAULTS: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def _placeholders(allowed: str) -> AfterValidator:
    names = set(allowed.split())

    def check(text: str) -> str:
        unknown = sorted(set(re.findall(r"\{(\w+)\}", text)) - names)
        if unknown:
            raise ValueError(
                f"unknown placeholder {{{unknown[0]}}}; known here: {', '.join(f'{{{n}}}' for n in sorted(names))}"
            )
        return text

    return AfterValidator(check)


def _unique(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"each only once, got {', '.join(names)}")
    return names


def _seconds(value: Any) -> Any:
    return messages.no_switch(value, float)


def _auto_or(most: int, several: bool = False) -> BeforeValidator:
    """Accept auto or a whole number; with `several` also a list of these."""

    def one(value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise ValueError(f"should be a whole number from 1 to {most}, or auto, got {value!r:.60}")
        return value

    def check(value: Any) -> Any:
        return tuple(map(one, value)) if several and isinstance(value, (list, tuple)) else one(value)

    return BeforeValidator(check)


ServerAddress = Annotated[str, AfterValidator(checked_address)]
KeyName = Annotated[str, AfterValidator(checked_key_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return messages.no_switch(value, cls.model_fields[str(info.field_name)].annotation)


class ModelConfig(Section):
    """The base model: a Hub id (`org/name`) at a revision, a local folder, or `package:NAME` (an installed package)."""

    source: str = Field(min_length=1)
    revision: str = "main"
    license: str | None = Field(None, description="licence of the weights, for the cards; None: ask the Hub")


class SplitShares(Section):
    """Shares of the groups (not of the prompts) that go to each split."""

    train: float = Field(0.7, gt=0, le=1)
    validation: float = Field(0.15, ge=0, lt=1)
    test: float = Field(0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _sum(self) -> SplitShares:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, got {total:g}")
        return self


class PromptsConfig(Section):
    """Where the prompts come from: a file, a dataset of the Hub, or templates crossed with a list of values (one value
    = one group)."""

    path: str | None = Field(None, description="text (a prompt a line), .jsonl, .csv or .parquet, beside the recipe")
    dataset: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="dataset of the Hub, USER/NAME")
    dataset_config: str | None = Field(None, description="its config; None: the default one")
    dataset_split: str = Field("train", description="which of its splits to read; ours are made anew, by group")
    revision: str = Field("main", description="of the dataset; resolved at the start and recorded as a commit")
    column: str = "prompt"
    group_column: str | None = Field(
        None, description="column that names the split group; None: each prompt its own, as is one whose cell is empty"
    )
    kind_column: str | None = Field(
        None, description="column that says of what kind a prompt is (say, harmful or harmless), for metrics that ask"
    )
    templates: tuple[Annotated[str, _placeholders("value")], ...] = ()
    values: str | None = Field(None, description="text file, a value a line, put into {value} of each template")
    limit: int | None = Field(None, ge=1)
    drop_overlaps: bool | None = Field(
        None,
        description=(
            "leave out held-out prompts that are near-copies of training prompts: of the same words, or with eight"
            " words in a row in common; None: the latter only where no groups are named (by templates or group_column),"
            " which keep apart what must be apart"
        ),
    )
    split: SplitShares = SplitShares()

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if sum(map(bool, (self.path, self.dataset, self.templates))) != 1:
            raise ValueError("give one of: path, dataset, or templates with values")
        if missing := [t for t in self.templates if "{value}" not in t]:
            raise ValueError(f"template has no {{value}}: '{missing[0][:60]}'")
        named = [
            k
            for k in ("column", "group_column", "kind_column")
            if getattr(self, k) != type(self).model_fields[k].default
        ]
        is_table = self.dataset or (self.path or "").endswith(TABLES)
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
            "a shipped metric (README, Metrics), a file METRIC.py beside the recipe, or a Space of the Hub USER/NAME, "
            "whose code runs only if the command line allows it (--allow-code)"
        ),
    )
    revision: str = Field("main", description="of the scorer's model, or of the metric's Space; recorded as a commit")
    positive_label: str | None = Field(None, description="label of a classifier that means positive; None: known names")
    options: dict[str, Any] = Field({}, description="further settings of the metric; README, Metrics, lists them")
    weight: float = Field(1.0, gt=0, description="the score is multiplied by it")
    batch_size: int = Field(32, ge=1)


class RewardConfig(ScorerConfig):
    """What the chain goes by: a score, or the sum of several."""

    plus: tuple[ScorerConfig, ...] = Field((), description="further scores, each with its weight, that are added")


class VetoConfig(Section):
    """What a revision must keep of the chain's first answer, whatever it scores: who says nothing leaks nothing."""

    similarity: float = Field(0.5, ge=0, le=1, description="least likeness to the first answer; 0: don't look")
    scorer: str = Field("minilm", min_length=1, description="of the metric similarity: how likeness is measured")
    revision: str = "main"
    length: float = Field(0.5, ge=0, description="least length, as a share of the first answer's words; 0: don't look")


class CriticConfig(Section):
    """Another model than the base that writes the critiques, at an OpenAI-compatible server."""

    model: str = Field(min_length=1, description="its name there")
    endpoint: ServerAddress | None = Field(
        None, description="address up to and including /v1; of this machine alone, so no published recipe has one"
    )
    api_key_env: KeyName = Field("OPENAI_API_KEY", description="variable that holds the endpoint's key")


class ChainConfig(Section):
    """The Gibbs chain: the two texts, how many steps, how many chains a prompt, and when a revision is kept."""

    critique: Annotated[str, _placeholders("prompt answer group principle")] = Field(min_length=1)
    revision: Annotated[str, _placeholders("prompt answer group principle")] = Field(min_length=1)
    system: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**32, description="of the texts that are drawn; None: the recipe's seed")
    steps: int = Field(1, ge=1, le=64)
    chains_per_prompt: int = Field(1, ge=1, le=256)
    acceptance: RuleName = "improve"
    temperature: float = Field(0.1, gt=0, description="T of the metropolis rule, in the reward's unit")
    critic: CriticConfig | None = Field(None, description="who criticises; None: the base itself")
    principles: tuple[str, ...] = Field(
        (), description="one of them, drawn anew for each step, stands for {principle} in both texts"
    )
    veto: VetoConfig | None = Field(
        None, description="what a revision must keep of the first answer; None: the default one for a reward of privacy"
    )

    @model_validator(mode="after")
    def _principled(self) -> ChainConfig:
        if ("{principle}" in self.critique + self.revision) != bool(self.principles):
            raise ValueError("principles and the placeholder {principle} go together: one is there without the other")
        return self

    def asks_for_group(self) -> bool:
        return "{group}" in self.critique + self.revision


class HygieneConfig(Section):
    """Which texts are not fit to be kept, whatever they score; the detectors are described in README, "Hygiene"."""

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


class GenerationConfig(Section):
    temperature: float = Field(0.8, ge=0, le=5)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(128, ge=1)
    extra: dict[str, Any] = Field(
        {},
        description=(
            "further parameters of the server, sent with every request as they are (vLLM: top_k, min_p, "
            "repetition_penalty, chat_template_kwargs ...)"
        ),
    )

    @model_validator(mode="after")
    def _not_ours(self) -> GenerationConfig:
        owned = "model messages prompt seed temperature top_p max_tokens max_completion_tokens n stream"
        if taken := sorted(set(owned.split()) & self.extra.keys()):
            raise ValueError(f"extra.{taken[0]} is set by dsc itself; remove it")
        return self


class ServingConfig(Section):
    """How the base model is served. `endpoints` (local recipes and overrides only): servers that already run."""

    context: int = Field(2048, ge=128, description="tokens of prompt and answer together")
    concurrency: Annotated[int | Literal["auto"] | tuple[int | Literal["auto"], ...], _auto_or(4096, several=True)] = (
        Field(
            "auto",
            description=(
                "requests in flight at each server; auto: it begins with 128 and doubles as long as that brings more"
                " tokens a second. A list: one for each of `endpoints`"
            ),
        )
    )
    replicas: Annotated[int | Literal["auto"], _auto_or(1024)] = Field(
        "auto", description="vLLM servers on this machine; auto: one for each GPU, or group of GPUs, one on a CPU"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs that hold one replica together")
    start_timeout_s: float = Field(600, gt=0)
    request_timeout_s: float = Field(600, gt=0)
    kv_cache_gib: float = Field(2, gt=0, description="CPU only: memory for the KV cache")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    endpoints: tuple[ServerAddress, ...] = ()
    served_model: str | None = Field(None, description="name of the model at the endpoints; None: the only one there")
    api_key_env: KeyName = Field("OPENAI_API_KEY", description="variable that holds the endpoints' key")

    @model_validator(mode="after")
    def _one_for_each(self) -> ServingConfig:
        if isinstance(self.concurrency, tuple) and (
            not self.concurrency or len(self.concurrency) != len(self.endpoints)
        ):
            raise ValueError(
                f"concurrency: {len(self.concurrency)} numbers for {len(self.endpoints)} endpoints; give one for "
                "each, or one for all"
            )
        return self


class DatasetConfig(Section):
    """Which chains become training rows: a clean final state, at least so good, at least so much better."""

    min_reward: float | None = None
    min_gain: Annotated[float | Literal["auto"] | None, Field(union_mode="left_to_right")] = Field(
        "auto",
        description=(
            "final reward minus the first answer's, strictly above; a dirty first answer counts as -inf, beside an"
            " unscored one there is no gain. auto: 0, but no limit under metropolis, whose draws are from their target"
            " only if none is left out"
        ),
    )
    phrase_limit: int | None = Field(
        None,
        ge=1,
        description=(
            "so many rows of a split may share a phrase of four words (the subject's name is one), those with the "
            "highest reward; the others are left out, so that the model doesn't learn to say the same of everything. "
            "None: all rows"
        ),
    )
    rows_per_prompt: int | None = Field(
        None, ge=1, description="at most so many rows per prompt, those with the highest reward. None: all"
    )


class DistillConfig(Section):
    """Training through trl. `sft`, `dpo`, `kto`, `lora`, `quantization` go straight into SFTConfig, DPOConfig,
    KTOConfig, LoraConfig, BitsAndBytesConfig."""

    method: Literal["qlora", "lora"] = "qlora"
    objective: Literal["sft", "dpo", "kto"] = Field(
        "sft",
        description=(
            "sft: likelihood of the kept answers; dpo: preference pairs (final over first answer); kto: the same pairs,"
            " each answer by itself as desirable or not. The section of the same name has its settings; the others are"
            " not used"
        ),
    )
    weight_temperature: float | None = Field(
        None,
        gt=0,
        description=(
            "sft only: each row's loss counts exp(reward / T), divided by the mean of all rows; None: all rows count"
            " alike"
        ),
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="of the adapter's first weights, dropout and row order; None: the recipe's seed",
    )
    sft: dict[str, Any] = {}
    dpo: dict[str, Any] = {}
    kto: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    quantization: dict[str, Any] = {}
    validation_prompts: int | None = Field(
        None,
        ge=1,
        description="answer so many validation prompts at each validation while training and log their mean reward",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "end the training after so many validations without a better one, and keep the best adapter "
            "(load_best_model_at_end of the objective's section; metric_for_best_model is loss or reward)"
        ),
    )
    report_to: Literal["none", "trackio", "tensorboard", "wandb"] = Field(
        "none", description="tracker of the training's curves; trackio and tensorboard write to this machine only"
    )
    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description=(
            "training processes, all machines together: each multiplies the batch of a step. Under a launcher of "
            "several processes, and with `launch`, the number is theirs"
        ),
    )
    launch: str | None = Field(
        None,
        description=(
            "file of `accelerate config` with which training is started, or the name of one in recipes/accelerate; "
            "None: chosen for this machine and `processes`"
        ),
    )

    @model_validator(mode="after")
    def _not_ours(self) -> DistillConfig:
        owned = [
            f"{name}.{key}" for name in OBJECTIVES for key in sorted(OWNED_TRAINER_KEYS & getattr(self, name).keys())
        ]
        if owned:
            raise ValueError(
                f"{owned[0]} is set by dsc itself"
                + (" by distill.report_to" if owned[0].endswith(".report_to") else "")
                + (f" (also: {', '.join(owned[1:])})" if owned[1:] else "")
                + "; remove it"
            )
        if self.weight_temperature is not None and self.objective != "sft":
            raise ValueError(f"weight_temperature: rows are weighted with objective sft only, got {self.objective}")
        four, eight = self.quantization.get("load_in_4bit", True), self.quantization.get("load_in_8bit", False)
        if self.method == "qlora" and not four and not eight:
            raise ValueError("quantization: neither load_in_4bit nor load_in_8bit; method 'lora' trains without")
        return self


class EvaluationConfig(Section):
    """Arms compared on the same prompts with the same seeds; the first is the baseline of the differences."""

    arms: Annotated[tuple[ArmName, ...], Field(min_length=1), AfterValidator(_unique)] = (
        "base",
        "self_critique",
        "best_of_n",
        "distilled",
    )
    samples: int = Field(1, ge=1, le=256, description="answers that each arm gives to each prompt")
    split: Literal["validation", "test"] = "test"
    temperature: float | None = Field(
        None,
        ge=0,
        le=5,
        description=(
            "of every arm; None: generation.temperature. Answers drawn at T < 1 and learned are sharper by nature: "
            "drawing from them at the same T sharpens twice, and variety is lost"
        ),
    )
    confidence: float = Field(0.95, gt=0.5, lt=1)
    weights: Literal["rounded", "original"] = Field(
        "rounded",
        description="qlora: all arms run on the base as the adapter was trained on, rounded by the quantisation, or on "
        "the original weights, where a server of the published base and adapter runs",
    )


class PublishConfig(Section):
    """Where to: `local` (the embedded Hub), `hub` (HF_ENDPOINT, the public Hub by default) or `none`.

    Names are without owner.
    """

    to: Literal["local", "hub", "none"] = "hub"
    owner: str | None = Field(None, description="user or organisation; None: whoever the token belongs to")
    dataset: str | None = Field(None, description="name of the dataset repo; None: <recipe>-dsc")
    adapter: str | None = Field(None, description="name of the adapter repo; None: <recipe>-dsc-lora")
    base: str | None = Field(
        None, description="publish the base model too, under this name (needed when it is on no Hub)"
    )
    private: bool = True
    branch: str = Field(
        "main", pattern=r"^[\w][\w./-]{0,99}$", description="branch to commit to; made if it isn't there"
    )
    pull_request: bool = Field(
        False, description="propose the commits as pull requests instead; the repos must be there"
    )
    tag: str | None = Field(
        None,
        pattern=r"^[\w][\w.-]{0,99}$",
        description="tag for the commits; None: no tag. One that exists is not moved",
    )
    collection: str | None = Field(
        None,
        min_length=1,
        max_length=60,
        description="title of a collection that gets dataset, adapter and base; None: none",
    )
    overwrite: bool = Field(
        False, description="write over files that somebody changed on the Hub since dsc published them (a card, say)"
    )
    gated: Literal["auto", "manual"] | None = Field(
        None,
        description=(
            "who wants the files must ask: auto lets in whoever does, manual whom you accept; None: as the repo is"
        ),
    )
    content_warning: str | None = Field(
        None,
        min_length=1,
        description=(
            "a sentence on top of the cards where prompts or answers may hurt; answers that were not kept then stay"
            " here"
        ),
    )
    rejected: bool | None = Field(
        None, description="publish answers that were not kept, too; None: unless there is a content_warning"
    )
    metrics: bool = Field(
        False,
        description=(
            "publish metric files of one's own (METRIC.py), too, as Spaces, and name these in the published recipe: "
            "without them nobody else can run it"
        ),
    )
    license: str | None = Field(None, description="licence of dataset and adapter; None: the base model's")
    language: str = "en"

    @model_validator(mode="after")
    def _proposed_or_set(self) -> PublishConfig:
        if self.pull_request and (self.tag or self.branch != "main"):
            raise ValueError("pull_request: with branch or tag there is nothing to propose; leave them out")
        if self.pull_request and self.metrics:
            raise ValueError("metrics: a Space is not proposed with the run; publish it first (dsc publish-metric)")
        return self

    @model_validator(mode="after")
    def _names(self) -> PublishConfig:
        for key in ("owner", "dataset", "adapter", "base"):
            name = getattr(self, key)
            if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII):
                raise ValueError(
                    f"{key}: a name has letters, digits, '-', '_' and '.', at most 96, no owner; got {name[:99]!r}"
                )
        return self


class Recipe(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**32)
    rounds: int = Field(
        1,
        ge=1,
        le=16,
        description="in each further round the distilled model samples, and a new adapter is trained on that; they end "
        "when the mean reward of answers to validation prompts no longer rises",
    )
    model: ModelConfig
    prompts: PromptsConfig
    chain: ChainConfig
    hygiene: HygieneConfig = HygieneConfig()
    generation: GenerationConfig = GenerationConfig()
    serving: ServingConfig = ServingConfig()
    reward: RewardConfig = RewardConfig()
    second_scorer: ScorerConfig | None = None
    third_scorer: ScorerConfig | None = None
    dataset: DatasetConfig = DatasetConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _groups_are_named(self) -> Recipe:
        if self.chain.asks_for_group() and not (self.prompts.templates or self.prompts.group_column):
            raise ValueError("chain: {group} needs prompts from templates, or prompts.group_column")
        return self

    @model_validator(mode="after")
    def _evaluates_on_something(self) -> Recipe:
        if not getattr(self.prompts.split, self.evaluation.split):
            raise ValueError(
                f"evaluation.split: there is no prompt in the split '{self.evaluation.split}'; "
                f"set prompts.split.{self.evaluation.split} above 0, or name another one"
            )
        return self

    @model_validator(mode="after")
    def _validates_on_something(self) -> Recipe:
        d = self.distill
        keeps_best = getattr(d, d.objective).get("load_best_model_at_end") or d.patience
        if (keeps_best or d.validation_prompts or self.rounds > 1) and not self.prompts.split.validation:
            raise ValueError(
                "rounds, distill.patience, validation_prompts and load_best_model_at_end need validation prompts; set "
                "prompts.split.validation above 0"
            )
        return self

    @model_validator(mode="after")
    def _rounds_serve_adapters(self) -> Recipe:
        if self.rounds > 1 and self.serving.endpoints:
            raise ValueError(
                "rounds: serving.endpoints don't have the adapters of earlier rounds; leave endpoints empty"
            )
        return self

    @model_validator(mode="after")
    def _training_loads_the_reward(self) -> Recipe:
        terms = (self.reward, *self.reward.plus)
        if (self.distill.validation_prompts or self.rounds > 1) and any(
            t.metric.endswith(".py") or "/" in t.metric for t in terms
        ):
            raise ValueError(
                "rounds and distill.validation_prompts: training scores with shipped metrics only; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _scorers_differ(self) -> Recipe:
        if self.third_scorer and not self.second_scorer:
            raise ValueError("third_scorer: there is no second_scorer; call it that")
        digests = [digest(s.model_dump(include={"metric", "scorer", "options"})) for s in scorers(self).values()]
        if len(set(digests)) < len(digests):
            raise ValueError("reward, second_scorer and third_scorer: the same scorer twice tells nothing new")
        return self

    budget_s: dict[StageName, Annotated[float, Field(gt=0), BeforeValidator(_seconds)]] = Field(
        {},
        description=(
            "seconds each stage should take on the machine the recipe is written for; shown beside what it took"
        ),
    )


def quantization(distill: DistillConfig) -> dict[str, Any] | None:
    """Return the BitsAndBytesConfig arguments with which the base is quantised in training.

    Without the compute dtype, which depends on the machine. None if the base is not quantised.
    """
    if distill.method != "qlora":
        return None
    settings = distill.quantization
    return dict(settings) if settings.get("load_in_8bit") else QUANTIZATION_DEFAULTS | settings


def chain_seed(recipe: Recipe) -> int:
    """Return the seed of the sampled chains: `chain.seed`, or the recipe's."""
    return recipe.seed if recipe.chain.seed is None else recipe.chain.seed


def training_seed(recipe: Recipe) -> int:
    """Return the seed of the training: `distill.seed`, or the recipe's."""
    return recipe.seed if recipe.distill.seed is None else recipe.distill.seed


def generation_at_evaluation(recipe: Recipe) -> GenerationConfig:
    """Return the generation settings of all arms: the chain's, with the evaluation's temperature if it sets one."""
    t = recipe.evaluation.temperature
    return recipe.generation if t is None else recipe.generation.model_copy(update={"temperature": t})


def scorers(recipe: Recipe) -> dict[str, ScorerConfig]:
    """Return the scorers that a recipe names, by the name of their scores: reward, second, third."""
    return {name: section for name, key in SCORERS.items() if (section := getattr(recipe, key))}


def effective_veto(recipe: Recipe) -> VetoConfig | None:
    """Return the effective veto: the recipe's own, or the default one for a privacy reward; None if it is empty."""
    private = any(s.metric == "privacy" for s in (recipe.reward, *recipe.reward.plus))
    veto = recipe.chain.veto or (VetoConfig() if private else None)
    return veto if veto and (veto.similarity or veto.length) else None


def least_gain(recipe: Recipe) -> float | None:
    """Return the gain over the first answer that a training row must exceed (`dataset.min_gain`); None: no minimum."""
    limit = recipe.dataset.min_gain
    if limit == "auto":
        return None if RULES[recipe.chain.acceptance].can_descend else 0.0
    return limit


def reward_terms(recipe: Recipe, name: str) -> dict[str, ScorerConfig]:
    """Return the terms that one of `scorers` adds up, by their place in the recipe: itself, and the reward's `plus`."""
    place, section = SCORERS[name], scorers(recipe)[name]
    return {place: section} | {f"{place}.plus.{i}": s for i, s in enumerate(getattr(section, "plus", ()))}


@dataclass(frozen=True)
class Server:
    """A model server that a recipe uses.

    `place` is the recipe's key that names it, `key_name` the environment variable with its API key, `model` the model
    name on the server (None: the only one).
    """

    place: str
    address: str
    key_name: str
    model: str | None


def servers(recipe: Recipe) -> list[Server]:
    """Return all external servers that a run uses."""
    out = [
        Server("serving.endpoints", url, recipe.serving.api_key_env, recipe.serving.served_model)
        for url in recipe.serving.endpoints
    ]
    if (critic := recipe.chain.critic) and critic.endpoint:
        out.append(Server("chain.critic", critic.endpoint, critic.api_key_env, critic.model))
    for place, section in all_scorers(recipe).items():
        if url := section.options.get("endpoint"):
            key, model = section.options.get("api_key_env"), section.options.get("model")
            out.append(Server(place, str(url), str(key or ServingConfig().api_key_env), str(model)))
    return out


def all_scorers(recipe: Recipe) -> dict[str, ScorerConfig]:
    """Return every scorer by its place in the recipe: `scorers`, further reward terms, the veto's similarity scorer."""
    sections = {place: section for name in scorers(recipe) for place, section in reward_terms(recipe, name).items()}
    if (veto := effective_veto(recipe)) and veto.similarity:
        sections["chain.veto"] = ScorerConfig(metric="similarity", scorer=veto.scorer, revision=veto.revision)
    return sections


# Keys of `publish:` that the publisher decides: no pulled recipe may set them, and no published recipe contains them.
PUBLISHERS_OWN = ("owner", "private", "branch", "pull_request", "tag", "collection", "overwrite", "gated", "metrics")


def publishes_rejected(publish: PublishConfig) -> bool:
    """Return whether answers that were not kept (all the base's, rejected revisions) are published."""
    return publish.rejected if publish.rejected is not None else publish.content_warning is None


def repo_names(recipe: Recipe) -> dict[str, str | None]:
    """Return the names, without owner, of the repos that a recipe publishes: dataset, adapter and (or None) base."""
    p = recipe.publish
    return {
        "dataset": p.dataset or f"{recipe.name}-dsc",
        "adapter": p.adapter or f"{recipe.name}-dsc-lora",
        "base": p.base,
    }


def metric_files(recipe: Recipe) -> dict[str, str]:
    """Return the user's metric files in a recipe: place of the scorer -> file, relative to the recipe's folder."""
    return {place: s.metric for place, s in all_scorers(recipe).items() if s.metric.endswith(".py")}


def is_folder(source: str) -> bool:
    """Return whether it is a local folder, or written like one, and not a name on the Hub."""
    try:
        return source.startswith(("/", ".", "~")) or Path(source).is_dir()
    except (OSError, ValueError):  # too long for a path, or not a path
        return False


SERVERS = ("endpoint", "api_key_env")  # options that depend on the machine: no pulled recipe may set them
