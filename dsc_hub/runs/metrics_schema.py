"""Schema of metrics.json: every number that a table, a page or a card may print, with its meaning and unit.

`dsc schema metrics` prints it as JSON schema. Stages write plain dicts; tests check that these match the schema
(tests/runs/test_metrics_schema.py, tests/e2e), and readers validate them first (`runs.results`). A number that was
not measured is null, never 0, and `reason` says why where that is not obvious. SCHEMA is incremented when a key
changes its name or meaning, not when a key is added; upgrade.py converts files of an older schema.

Texts that a mean covers: in `sampling`, only clean and scored texts (a text that hygiene rejects is no state of a
chain); in `evaluation`, all answers with a score, clean or not, because users see all of them. `n` is their number
everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA = 4

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
ScoreName = Literal["reward", "second", "third"]
CriterionVerdict = Literal["met", "failed", "undecided", "unmeasured", "not judged"]
ClaimVerdict = Literal["holds", "fails", "not enough data"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Estimate(Part):
    """A mean with its interval over split groups. Values in the score's unit."""

    mean: float | None = Field(description="mean of group means; null: nothing was measured")
    low: float | None = Field(description="lower end; null where there is no interval, and `reason` says why")
    high: float | None = Field(description="upper end; null where there is no interval")
    n: Count = Field(description="values that went in")
    groups: Count | None = Field(
        description="split groups (films, topics) that they belong to; the unit of the interval"
    )
    reason: str = Field("", description="why there is no mean or no interval")


class Rate(Estimate):
    """A share of answers, 0..1, with Wilson's interval for as many trials as the groups are worth."""

    mean: Share | None = Field(description="mean of the groups' shares; null: nothing was measured")
    low: Share | None = Field(description="lower end of Wilson's interval; null where there is none")
    high: Share | None = Field(description="upper end of Wilson's interval; null where there is none")
    n: Count = Field(description="answers that went in")
    groups: Count = Field(description="split groups that they belong to")
    effective_n: float | None = Field(description="independent answers that the n are worth (design effect)")
    reason: str = Field("", description="why there is no interval")


class Whole(Estimate):
    """One number for all answers of an arm (distinct-n), without an interval."""

    mean: float | None = Field(description="mean over the sets of one answer a prompt; null: not one n-gram")
    low: None = Field(description="always null: there is no interval")
    high: None = Field(description="always null: there is no interval")
    n: Count = Field(description="answers that went in")
    groups: None = Field(description="always null: groups play no part")
    reason: str = Field(description="why there is no interval")
    samples: Count = Field(description="the number is the mean over so many sets of one answer a prompt")


class Neutral(Estimate):
    """Surprise of the model at plain texts about other things, nats a token; a group is a text."""

    perplexity: float | None = Field(description="exp(mean)")


class Difference(Estimate):
    """One arm minus another, paired by prompt and sample."""

    p: Share | None = Field(
        description="two-sided; sign-flip permutation on group means, or McNemar's exact test of shares"
    )
    p_holm: Share | None = Field(
        description=(
            "p after Holm within its family: the primary comparison's scores; all other differences of scores; "
            "all differences of side effects"
        )
    )
    p_t: Share | None = Field(None, description="paired t test on group means")
    effect: float | None = Field(None, description="mean over standard deviation of group means (Cohen's d_z)")
    wins: Count = Field(description="pairs (of shares: groups) with the first arm above the second")
    ties: Count = Field(description="pairs (of shares: groups) with both alike")
    losses: Count = Field(description="pairs (of shares: groups) with the first arm below the second")
    detectable: float | None = Field(None, description="true difference that would be found with probability 0.8")
    if_missing_worst: float | None = Field(
        None,
        description=(
            "the difference if all answers without a score had the lowest of the score's range, in both arms; null"
            " where the same share is missing in both, or the score has no range"
        ),
    )
    if_missing_best: float | None = Field(None, description="the same with the highest")


class Scored(Estimate):
    """A score of one arm's answers: of all that have a value, clean or not."""

    unscored: Count = Field(description="answers that the scorer gave no value; in no mean")
    failed: Count = Field(description="answers that the server did not give")


class ArmNumbers(Part):
    """One arm of the evaluation."""

    def score(self, name: ScoreName) -> Scored:
        """Return one of the recorded scores (`Evaluation.score_names`)."""
        scored: Scored = getattr(self, name)
        return scored

    reward: Scored = Field(description="the score that chose the training data")
    second: Scored | None = Field(None, description="the score that chose nothing")
    third: Scored | None = Field(None, description="another one that chose nothing")
    new_tokens_mean: float | None = Field(description="generated tokens an answer, all turns and candidates included")
    stops_by_itself: Share | None = Field(description="share of answers, 0..1")
    defects: Share | None = Field(description="share of answers with a hygiene defect, 0..1")
    stripped: Count = Field(
        0, description="answers that lost an opening about the task, as the recipe's hygiene asks for all arms"
    )
    new_tokens: Count = Field(description="generated tokens of all answers, all turns and candidates included")
    prompt_tokens: Count = Field(description="tokens read for them, cached ones included")
    seconds: Seconds | None = Field(
        description="of the server, first answers included; null if a session was broken off"
    )
    processor_hours: float | None = Field(
        description="seconds times cores (or GPUs) / 3600; null with servers of others"
    )
    gain_per_1000_tokens: float | None = Field(description="reward over the first arm for 1,000 generated tokens")
    cost_usd: float | None = Field(None, description="USD of these tokens by the recipe's prices; null: no price")


class ScoreDescription(Part):
    """What a score is."""

    name: str = Field(description="metric and scorer, for people")
    unit: str = Field(description="unit and range")
    higher_is_better: bool = Field(description="which way is good")
    low: float | None = Field(None, description="lowest value that it can have; null: no limit")
    high: float | None = Field(None, description="highest value that it can have; null: no limit")


class Criterion(Part):
    """One condition of the claim: a value with its interval, and the limits that it should lie within."""

    name: str = Field(description="what is asked for")
    verdict: CriterionVerdict = Field(
        description=(
            "met: the interval lies within the limits; failed: wholly outside of one; undecided: neither; unmeasured:"
            " it could not be measured, which is not a pass; not judged: the recipe declares the property normal"
        )
    )
    value: float | None = Field(None, description="distilled - base, or distilled / base (is_ratio)")
    low: float | None = Field(None, description="lower end of its interval")
    high: float | None = Field(None, description="upper end of its interval")
    at_least: float | None = Field(None, description="limit below; null: none")
    at_most: float | None = Field(None, description="limit above; null: none")
    base: float | None = Field(None, description="the base's number (share, length ...); null where there is none")
    distilled: float | None = Field(None, description="the distilled model's")
    is_ratio: bool = Field(False, description="are value, interval and limits ratios?")
    groups_needed: Count | None = Field(
        None,
        description=(
            "split groups with which what was seen would be enough four times in five; null: it is, or never would be"
        ),
    )
    note: str = Field("", description="what numbers don't say")


class Claim(Part):
    """May one say that the distilled model is better than its base?"""

    verdict: ClaimVerdict = Field(
        description="fails: a criterion failed; holds: none is undecided and those on the scores are met"
    )
    answers: Count = Field(description="pairs of answers compared: prompts times samples")
    groups: Count | None = Field(description="split groups of these; null: not recorded")
    groups_needed: Count | None = Field(
        description="the most that an undecided criterion needs; null: none, or not known"
    )
    criteria: list[Criterion] = Field(description="all that was asked for")


class Primary(Part):
    """The comparison that was named before anything was measured; its p are a family of their own (Holm)."""

    difference: str = Field(description="'one - other'")
    scores: list[Literal["reward", "second"]] = Field(description="its scores")


class Measure(Part):
    """What a side effect is."""

    label: str = Field(description="for people")
    unit: str = Field(description="unit and range")
    kind: Literal["mean", "rate", "whole"] = Field(
        description="mean over answers, share of answers, or one number for all of an arm's answers together"
    )


class SideEffectNumbers(Part):
    """What moved besides the scores."""

    measures: dict[str, Measure] = Field(description="measure -> what it is")
    arms: dict[str, dict[str, Rate | Whole | Neutral | Estimate]] = Field(description="arm -> measure -> value")
    differences: dict[str, dict[str, Difference]] = Field(description="'one - other' -> measure -> difference")


class Evaluation(Part):
    """The arms on the held-out prompts."""

    split: Literal["validation", "test"] = Field(description="which prompts")
    confidence: Share = Field(description="of all intervals here")
    intervals: Count = Field(1, description="rule that made the intervals of means: `stats.INTERVALS`")
    prompts: Count = Field(description="prompts asked")
    samples: Count = Field(description="answers of each arm to each prompt")
    groups: Count = Field(description="split groups of the prompts")
    arms: dict[str, ArmNumbers] = Field(min_length=1, description="the first is the baseline")
    differences: dict[str, dict[ScoreName, Difference]] = Field(description="'one - other' -> score -> difference")
    side_effects: SideEffectNumbers
    primary: Primary | None = Field(description="null unless base comes first and distilled is among the arms")
    claim: Claim | None = Field(description="null unless base comes first and distilled is among the arms")
    processors: Literal["core", "GPU"] = Field(description="what processor_hours counts")
    neutral_texts: Count = Field(description="neutral texts that the models were asked about")
    neutral: dict[str, dict[str, float]] = Field(description="arm -> neutral text -> nats a token; plain arms only")
    scores: dict[ScoreName, ScoreDescription] = Field(min_length=1, description="part it plays -> score")
    served_on: str = Field(description="weights that all arms ran on")
    cost_usd: float | None = Field(
        None, description="USD by the recipe's prices; arms share answers, so it is less than their sum; null: no price"
    )

    @property
    def score_names(self) -> list[ScoreName]:
        """The recorded scores, the reward first."""
        return [name for name in get_args(ScoreName) if name in self.scores]

    @model_validator(mode="after")
    def _whole(self) -> Evaluation:
        """Check that every arm and difference has every score and measure."""
        scores: set[str] = set(self.scores)
        measures, arms = set(self.side_effects.measures), set(self.arms)
        for name, arm in self.arms.items():
            if missing := [s for s in sorted(scores) if getattr(arm, s) is None]:
                raise ValueError(f"arm '{name}' has no {missing[0]}")
        for pair, by_score in self.differences.items():
            if not set(pair.split(" - ")) <= arms:
                raise ValueError(f"difference '{pair}' is of arms that are not there")
            if missing := sorted(scores - by_score.keys()):
                raise ValueError(f"difference '{pair}' has no {missing[0]}")
        if set(self.side_effects.arms) != arms:
            raise ValueError("side_effects and arms name other arms")
        if missing := [
            f"{name}.{m}" for name, values in self.side_effects.arms.items() for m in measures - values.keys()
        ]:
            raise ValueError(f"side_effects has no {missing[0]}")
        return self


class Prompts(Part):
    """What became of the prompts."""

    train: Count = Field(description="prompts of the training split")
    validation: Count = Field(description="prompts of the validation split")
    test: Count = Field(description="prompts of the test split")
    groups: dict[str, Count] = Field(description="split -> groups in it")
    duplicates_dropped: Count = Field(description="prompts left out since their text came before")
    overlapping_dropped: Count = Field(description="prompts left out since another split has nearly the same")
    read: Count | None = Field(None, description="prompts before that")


class StepNumbers(Part):
    """One step of all chains."""

    step: Count = Field(description="1 is the first critique and revision")
    proposals: Count = Field(description="revisions proposed")
    accepted: Count = Field(description="revisions that became their chain's state")
    rejected: dict[str, Count] = Field(description="reason -> proposals; with accepted they add up to proposals")
    reward_proposed: Estimate = Field(description="reward of the clean, scored proposals")
    reward_state: Estimate = Field(
        description="reward of the chains' clean, scored states after the step; n chains have one"
    )


class PairNumbers(Part):
    """One pair of texts for critique and revision, over all steps."""

    proposals: Count = Field(description="revisions proposed")
    accepted: Count = Field(description="revisions that became their chain's state")


class Agreement(Part):
    """R-hat over the prompts."""

    median: float = Field(description="over prompts")
    highest: float = Field(description="over prompts")
    above_limit: Share = Field(description="share of prompts with R-hat above 1.01")


class EffectiveSize(Part):
    """Effective sample size over the prompts, in draws."""

    median: float = Field(description="over prompts")
    lowest: float = Field(description="over prompts")


class Mixing(Part):
    """Do the chains of a prompt agree? Of `metropolis` with 2 chains and 20 steps or more only."""

    estimable: bool = Field(description="false: reason says why, and the rest is null")
    reason: str = Field(description="why it can't be told")
    prompts: Count | None = Field(None, description="prompts with an R-hat")
    left_out: Count | None = Field(None, description="prompts with unscored states, too few chains, or none that moved")
    stuck: Count | None = Field(None, description="prompts whose chains stand still at different rewards")
    draws: Count | None = Field(None, description="draws of each prompt: chains times steps")
    r_hat: Agreement | None = Field(None, description="potential scale reduction of the reward")
    ess: EffectiveSize | None = Field(None, description="effective sample size of the reward")


class Gain(Difference):
    """What the last step gave to chains whose state was clean and scored before it; never negative under `improve`."""

    p_holm: None = Field(None, description="always null: it is in no family")


class LastStep(Part):
    """What the last step gave. What one more would give is not told by it."""

    gain: Gain
    first_clean: Count = Field(description="chains to which the last step gave their first clean, scored state")
    chains: Count | None = Field(None, description="of so many; null: not recorded")


class Sampling(Part):
    """The chains of the training and validation prompts."""

    chains: Count = Field(description="chains asked for")
    finished: Count = Field(description="chains that came to their end")
    failed: Count = Field(description="chains whose requests failed; finished + failed = chains")
    dirty_answers: Count = Field(description="first answers with a hygiene defect")
    dirty_answers_by_reason: dict[str, Count] = Field({}, description="reason -> first answers")
    unscored: Count = Field(description="texts that the reward gave no value")
    usable: Count = Field(description="chains with a clean, scored final state")
    stripped: Count = Field(0, description="texts that lost an opening which talked about the task")
    reward_range: list[float | None] | None = Field(
        None, description="[lowest, highest] reward, at which the intervals are cut; null: no limit, or not recorded"
    )
    intervals: Count = Field(1, description="rule that made the intervals of means: `stats.INTERVALS`")
    first_reward: Estimate = Field(description="reward of clean, scored first answers")
    steps: list[StepNumbers] = Field(description="in their order")
    pairs: list[PairNumbers] = Field([], description="by pair of texts, in the recipe's order; empty: there is one")
    mixing: Mixing
    last_step: LastStep
    prompt_tokens: Count | None = Field(description="tokens read, cached ones included; null: imported chains")
    new_tokens: Count | None = Field(description="tokens generated; null: imported chains")
    seconds: Seconds | None = Field(description="of all sessions; null if one was killed")
    tokens_per_s: float | None = Field(description="new tokens a second of the sessions that ended")
    cache_rate: float | None = Field(
        None, description="share of prompt tokens that were found in the prefix cache; null: the server doesn't tell"
    )
    processor_hours: float | None = Field(
        None, description="hours of cores or GPUs; null where a session was killed, or the servers are somebody else's"
    )
    processors: Literal["core", "GPU"] | None = Field(None, description="what processor_hours counts")
    scoring_s: float | None = Field(None, description="seconds that scorers worked, beside the generation")
    retries: dict[str, Count] | None = Field(
        None, description="reason -> requests that were sent again; null: not recorded"
    )
    cost_usd: float | None = Field(
        None, description="USD by the recipe's prices, turns taken over from other runs included; null: no price"
    )
    ended_by: Literal["", "rows", "budget", "chains"] = Field(
        "",
        description="what ended a sampling for `dataset.rows` or a `budget`: the rows were there, the budget was used "
        'up, no prompt had another chain; "": neither was asked for',
    )
    reused_turns: Count = Field(
        description="turns that the last session found made, by one that was broken off or by another run"
    )


class Dataset(Part):
    """Rows of each config by split."""

    sft: dict[str, Count] = Field(description="split -> rows")
    preference: dict[str, Count] = Field(description="split -> pairs")
    repairs: dict[str, Count] = Field({}, description="split -> pairs whose rejected first answer has a defect")
    chains: dict[str, Count] = Field({}, description="split -> rows")
    dropped: dict[str, Count] = Field(description="reason -> chains that became no training row")
    uncompared: dict[str, Count] = Field(
        {}, description="split -> sft rows that are revisions never compared with another clean text of their chain"
    )
    selection: Count = Field(1, description="rules by which rows and pairs were selected: `data.dataset.SELECTION`")


class Training(Part):
    """The training of the adapter. Losses of sft are means over trained tokens, in nats; others their objective's."""

    rows: Count = Field(description="training rows")
    validation_rows: Count = Field(description="validation rows")
    steps: Count = Field(description="optimizer steps")
    epochs: float = Field(ge=0, description="passes over the training rows")
    first_loss: float | None = Field(description="first loss that was logged")
    final_loss: float | None = Field(description="mean of the last tenth of the logged losses")
    validation_loss: float | None = Field(description="of the adapter that was kept; null: no validation rows")
    validation_reward: float | None = Field(
        None, description="mean reward of answers to validation prompts after training; null: not measured"
    )
    best_step: Count | None = Field(
        None, description="step of the adapter that was kept, the best at a validation; null: the last one"
    )
    preference_accuracy: Share | None = Field(
        None,
        description=(
            "dpo: share of validation pairs whose answers the adapter ranks as the reward did; null: not measured"
        ),
    )
    seconds: Seconds = Field(description="of the steps and their validations, loading excluded")
    seconds_per_step: Seconds = Field(description="seconds / steps")
    peak_memory_gib: float | None = Field(None, description="of one process, or of its GPU")
    trainable_parameters: Count = Field(description="parameters of the adapter")
    total_parameters: Count = Field(description="parameters of base and adapter, as bitsandbytes counts packed ones")
    trained_tokens_per_epoch: Count = Field(description="tokens of all answers: those that have a loss")
    max_length: Count = Field(description="tokens; longer rows would be cut")
    truncated: Count | None = Field(None, description="rows that were cut; null: not recorded")
    method: Literal["qlora", "lora"] = Field(description="whether the base was quantised")
    objective: Literal["sft", "dpo", "kto"] = Field("sft", description="what the steps minimised")
    weight_temperature: float | None = Field(
        None, description="T of the rows' weights exp(reward / T); null: all alike"
    )
    effective_rows: float | None = Field(
        None, description="effective sample size of the weighted rows; null: all alike"
    )
    compute_dtype: str = Field(description="dtype of the products")
    quantization: str = Field(description="of the base's layers, for people")
    world_size: Count | None = Field(None, description="processes that trained; null: not recorded")
    adapter_sha256: str | None = Field(None, description="hash of adapter_model.safetensors")


class Round(Part):
    """One round: what was sampled, and what the adapter that was trained on it reaches."""

    round: Count = Field(description="1: the base sampled; else the adapter of the round before")
    first_reward: Estimate = Field(description="reward of clean, scored first answers")
    final_reward: Estimate = Field(description="reward of the states after the last step")
    rows: Count = Field(description="training rows")
    validation_reward: float = Field(description="mean reward of answers to validation prompts, after the training")
    seconds: Seconds = Field(description="of sampling, dataset and training")


class Rounds(Part):
    """The rounds of sampling and training. All other sections are of the round that was kept."""

    planned: Count = Field(description="rounds that the recipe asks for")
    kept: Count = Field(description="round with the highest validation reward")
    rounds: list[Round] = Field(min_length=1, description="in their order")


class Blind(Part):
    """What people preferred who did not know which answer was whose."""

    prompts: Count = Field(description="prompts judged")
    groups: Count = Field(description="split groups of these")
    judges: Count = Field(description="names given; nobody checked them")
    verdicts: Count = Field(description="verdicts counted")
    outdated: Count = Field(description="verdicts on answers that have changed since, not counted")
    distilled: Count = Field(description="prompts on which the distilled answer was preferred")
    base: Count = Field(description="prompts on which the base's answer was preferred")
    tie: Count = Field(description="prompts on which neither was")
    share_decided: Share | None = Field(description="distilled / (distilled + base)")
    win_rate: Estimate = Field(description="of distilled, ties as half; interval cut to 0..1")
    p: Share | None = Field(description="exact sign test over decided prompts")
    confidence: Share = Field(description="of the interval")


class TestSet(Part):
    """How often this test set was looked at."""

    id: str = Field(description="hash of its prompts")
    adapters_scored: Count = Field(
        description="different adapters scored on it under this folder of runs, when this was recorded"
    )
    position: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description=(
            "this adapter's place in the order in which adapters were scored on it, 1: the first; null: not known"
        ),
    )


class Metrics(Part):
    """metrics.json as a whole; a section is there when its stage has run."""

    schema_: Literal[4] = Field(alias="schema", description="version of this description")
    prompts: Prompts | None = None
    sampling: Sampling | None = None
    rounds: Rounds | None = None
    dataset: Dataset | None = None
    distill: Training | None = None
    evaluation: Evaluation | None = None
    test_set: TestSet | None = None
    blind: Blind | None = None
    stages: dict[str, Seconds] = Field({}, description="seconds of each stage")
    server_starts: dict[str, Seconds] = Field(
        {}, description="of the stages' seconds, those until vLLM was ready; without stages that started none"
    )

    @model_validator(mode="before")
    @classmethod
    def _made_or_left_out(cls, value: Any) -> Any:
        if isinstance(value, dict) and (empty := [key for key, section in value.items() if section is None]):
            raise ValueError(f"{empty[0]} is null; a section that was not made is left out")
        return value


def schema_problems(metrics: Mapping[str, Any]) -> list[str]:
    """Return the problems of a metrics.json as `location: problem` strings; empty if it fits the schema."""
    try:
        Metrics.model_validate(metrics)
    except ValidationError as e:
        return error_lines(e)
    return []


def error_lines(error: ValidationError) -> list[str]:
    """Return the problems of a failed validation as `location: problem` strings."""
    return [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
