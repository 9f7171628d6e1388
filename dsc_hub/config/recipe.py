"""The recipe schema: the YAML that defines a run, validated completely before anything starts.

A recipe is data, never code: numbers, texts, ids. `recipe_files.load(path, overrides)` returns a frozen `Recipe` or
raises one `ConfigError` that lists every problem. `fingerprints.stage_fingerprints` shows which work a changed recipe
would invalidate. Its sections are in section.py, sampling.py, serving.py, training.py and publishing.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from dsc_hub.acceptance import RULES
from dsc_hub.config.arms import TEACHER, models_of
from dsc_hub.config.publishing import PublishConfig
from dsc_hub.config.sampling import (
    BudgetConfig,
    ChainConfig,
    HygieneConfig,
    ModelConfig,
    PromptsConfig,
    RewardConfig,
    ScorerConfig,
    StudentConfig,
    VetoConfig,
)
from dsc_hub.config.section import Section, StageName, seconds_given
from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.config.training import DatasetConfig, DistillConfig, EvaluationConfig
from dsc_hub.system.hashing import digest

# Name of a score in tables and rows -> its section in the recipe (and key in its identity).
SCORERS = {"reward": "reward", "second": "second_scorer", "third": "third_scorer"}


class Recipe(Section):
    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="name of the recipe: its runs lie in runs/NAME"
    )
    description: str = Field("", description="one sentence for the report and the cards")
    seed: int = Field(
        0, ge=0, lt=2**32, description="every seed derives from it: of the splits, of each request, of the training"
    )
    rounds: int = Field(
        1,
        ge=1,
        le=16,
        description="in each further round the distilled model samples, and a new adapter is trained on that; they end "
        "when the mean reward of answers to validation prompts no longer rises",
    )
    model: ModelConfig = Field(description="the model that answers, criticises and revises")
    student: StudentConfig | None = Field(
        None, description="the model that is trained on the kept answers; null: the one that wrote them"
    )
    prompts: PromptsConfig = Field(description="what it is asked")
    chain: ChainConfig = Field(description="critique, revision, and when a revision is kept")
    hygiene: HygieneConfig = Field(HygieneConfig(), description="which texts are never kept")
    generation: GenerationConfig = Field(GenerationConfig(), description="how texts are drawn")
    serving: ServingConfig = Field(ServingConfig(), description="the servers of the models")
    reward: RewardConfig = Field(RewardConfig(), description="the score that decides what is kept")
    second_scorer: ScorerConfig | None = Field(
        None, description="a score that chooses nothing and shows whether the reward was gamed; null: none"
    )
    third_scorer: ScorerConfig | None = Field(None, description="another one; null: none")
    budget: BudgetConfig | None = Field(None, description="what sampling may use; null: what the chains take")
    dataset: DatasetConfig = Field(DatasetConfig(), description="which chains become training rows")
    distill: DistillConfig = Field(DistillConfig(), description="the training of the adapter")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="what is compared on held-out prompts")
    publish: PublishConfig = Field(PublishConfig(), description="where dataset and adapter go")

    @model_validator(mode="after")
    def _groups_are_named(self) -> Recipe:
        if self.chain.asks_for_group() and not (self.prompts.templates or self.prompts.group_column):
            raise ValueError("chain: {group} needs prompts from templates, or prompts.group_column")
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
    def _one_sampling_to_end(self) -> Recipe:
        if self.ends_early and self.rounds > 1:
            raise ValueError("dataset.rows and budget are of one sampling; leave them out, or rounds")
        enough, least = self.chain.good_enough, self.dataset.min_reward
        if enough is not None and least is not None and enough < least:
            raise ValueError(
                f"chain.good_enough: {enough:g} ends chains below dataset.min_reward ({least:g}), which gives no row"
            )
        if self.budget and self.budget.tokens is not None and self.budget.tokens < self.most_tokens_of_chain:
            raise ValueError(
                f"budget.tokens: {self.budget.tokens} is less than one chain may take ({self.most_tokens_of_chain})"
            )
        return self

    @property
    def most_tokens_of_chain(self) -> int:
        """New tokens of a chain whose turns are all of full length."""
        return (1 + 2 * self.chain.steps) * self.generation.most_tokens

    @property
    def ends_early(self) -> bool:
        """Whether sampling may end before all chains of all prompts are finished."""
        return self.dataset.rows is not None or self.budget is not None

    @model_validator(mode="before")
    @classmethod
    def _shows_the_teacher(cls, data: Any) -> Any:
        """Add the teacher to the arms of a recipe that has a student and names no arms."""
        if not isinstance(data, dict) or not data.get("student"):
            return data
        evaluation = data.get("evaluation") or {}
        if not isinstance(evaluation, dict) or "arms" in evaluation:
            return data
        arms = (*EvaluationConfig.model_fields["arms"].default, TEACHER)
        return data | {"evaluation": evaluation | {"arms": arms}}

    @model_validator(mode="after")
    def _student_is_another(self) -> Recipe:
        student = self.student
        if student is None:
            if TEACHER in models_of(self.evaluation.arms):
                raise ValueError("evaluation.arms: without a student the teacher is the base; leave its arms out")
            return self
        if (student.source, student.revision) == (self.model.source, self.model.revision):
            raise ValueError("student: it is the model itself; leave it out")
        if self.rounds > 1:
            raise ValueError(
                "rounds: the next one is sampled by the model that was trained, and a student does not write the "
                "chains; leave out student, or rounds"
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

    budget_s: dict[StageName, Annotated[float, Field(gt=0), BeforeValidator(seconds_given)]] = Field(
        {},
        description=(
            "seconds each stage should take on the machine the recipe is written for; shown beside what it took"
        ),
    )


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


def model_server(recipe: Recipe) -> ServingConfig:
    """Return the section `serving` with the name that the model has at its endpoints: an api:NAME has its own."""
    name = recipe.serving.served_model or recipe.model.api_name
    return recipe.serving.model_copy(update={"served_model": name})


def servers(recipe: Recipe) -> list[Server]:
    """Return all external servers that a run uses."""
    out = [
        Server("serving.endpoints", url, recipe.serving.api_key_env, model_server(recipe).served_model)
        for url in recipe.serving.endpoints
    ]
    if (critic := recipe.chain.critic) and critic.endpoint:
        out.append(Server("chain.critic", critic.endpoint, critic.api_key_env, critic.model))
    for place, section in all_scorers(recipe).items():
        if section.options.get("endpoint"):
            out.append(server_of_judge(place, section))
    return out


def server_of_judge(place: str, section: ScorerConfig) -> Server:
    """Return the server that a judge's options name; `place` is the recipe's key of the section."""
    url, key, model = (section.options.get(name) for name in ("endpoint", "api_key_env", "model"))
    return Server(place, str(url), str(key or ServingConfig().api_key_env), str(model))


def all_scorers(recipe: Recipe) -> dict[str, ScorerConfig]:
    """Return every scorer by its place in the recipe: `scorers`, further reward terms, the veto's similarity scorer."""
    sections = {place: section for name in scorers(recipe) for place, section in reward_terms(recipe, name).items()}
    if (veto := effective_veto(recipe)) and veto.similarity:
        sections["chain.veto"] = ScorerConfig(metric="similarity", scorer=veto.scorer, revision=veto.revision)
    return sections


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
