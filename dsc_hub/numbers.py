"""What metrics.json holds: every number that a table, a page or a card may print, with its meaning and unit.

`dsc schema metrics` prints this as JSON schema. Stages write plain dicts; that they write these and nothing else is tested
(tests/test_numbers.py, tests/e2e). A number that was not measured is null, never 0, and `reason` says why where that is not
plain. SCHEMA goes up when a key changes its name or meaning, not when one is added.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 2


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Bootstrap(Part):
    low: float
    high: float
    method: Literal["BCa", "percentile"] = Field(description="percentile where BCa is degenerate")


class Estimate(Part):
    """A mean with its interval over split groups. Values in the score's unit."""

    mean: float | None = Field(description="mean of group means; null: nothing was measured")
    low: float | None = Field(description="lower end of the t interval; null with fewer than two groups")
    high: float | None
    n: int = Field(description="values that went in")
    groups: int | None = Field(description="split groups (films, topics) that they belong to; the unit of the interval")
    bootstrap: Bootstrap | None = Field(None, description="from 40 groups on, beside the t interval")
    reason: str = Field("", description="why there is no mean or no interval")


class Rate(Part):
    """A share of answers, 0..1, with Wilson's interval for as many trials as the groups are worth."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    groups: int
    effective_n: float | None = Field(description="independent answers that the n are worth (design effect)")
    reason: str = Field("", description="why there is no interval")


class Whole(Part):
    """One number for all answers of an arm (distinct-n), without an interval."""

    mean: float | None
    low: None
    high: None
    n: int
    groups: None
    reason: str
    samples: int = Field(description="the number is the mean over so many sets of one answer a prompt")


class Neutral(Estimate):
    """Surprise of the model at plain texts about other things, nats a token; a group is a text."""

    perplexity: float | None = Field(description="exp(mean)")


class Difference(Estimate):
    """One arm minus another, paired by prompt and sample."""

    p: float | None = Field(
        description="two-sided; sign-flip permutation on group means, or McNemar's exact test of shares"
    )
    p_holm: float | None = Field(
        description="p after Holm for the family: all differences of scores, or of side effects"
    )
    p_t: float | None = Field(None, description="paired t test on group means")
    effect: float | None = Field(None, description="mean over standard deviation of group means")
    wins: int = Field(description="pairs (of shares: groups) with the first arm above the second")
    ties: int
    losses: int
    detectable: float | None = Field(None, description="true difference that would be found with probability 0.8")


class Scored(Estimate):
    unscored: int = Field(description="answers that the scorer gave no value; in no mean")
    failed: int = Field(description="answers that the server did not give")


class Arm(Part):
    """One arm of the evaluation."""

    reward: Scored
    second: Scored | None = None
    third: Scored | None = None
    new_tokens_mean: float | None = Field(description="generated tokens an answer, all turns and candidates included")
    stops_by_itself: float | None = Field(description="share of answers, 0..1")
    defects: float | None = Field(description="share of answers with a hygiene defect, 0..1")
    new_tokens: int
    prompt_tokens: int
    seconds: float | None = Field(description="of the server, first answers included; null if a session was broken off")
    processor_hours: float | None = Field(
        description="seconds times cores (or GPUs) / 3600; null with servers of others"
    )
    gain_per_1000_tokens: float | None = Field(description="reward over the first arm for 1,000 generated tokens")


class Score(Part):
    name: str
    unit: str
    higher_is_better: bool


class Criterion(Part):
    name: str
    holds: bool | None = Field(description="null: could not be measured, which is not a pass")
    told: str


class Claim(Part):
    holds: bool
    prompts: int = Field(description="answers compared: prompts times samples")
    criteria: list[Criterion]


class Measure(Part):
    label: str
    unit: str
    kind: Literal["mean", "rate", "whole"]


class SideEffects(Part):
    measures: dict[str, Measure]
    arms: dict[str, dict[str, Rate | Whole | Neutral | Estimate]]
    differences: dict[str, dict[str, Difference]]


class Evaluation(Part):
    split: Literal["validation", "test"]
    confidence: float
    prompts: int
    samples: int = Field(description="answers of each arm to each prompt")
    groups: int
    arms: dict[str, Arm]
    differences: dict[str, dict[str, Difference]] = Field(description="'one - other' -> score -> difference")
    side_effects: SideEffects
    claim: Claim | None
    processors: Literal["core", "GPU"]
    neutral_texts: int
    scores: dict[str, Score]
    served_on: str


class Prompts(Part):
    train: int
    validation: int
    test: int
    groups: dict[str, int]
    duplicates_dropped: int
    overlapping_dropped: int
    read: int | None = None


class Step(Part):
    step: int
    proposals: int
    accepted: int
    rejected: dict[str, int] = Field(description="reason -> proposals; with accepted they add up to proposals")
    reward_proposed: Estimate
    reward_state: Estimate


class Agreement(Part):
    median: float
    highest: float
    above_limit: float = Field(description="share of prompts with R-hat above 1.01")


class EffectiveSize(Part):
    median: float
    lowest: float


class Mixing(Part):
    estimable: bool
    reason: str
    prompts: int | None = None
    left_out: int | None = None
    stuck: int | None = None
    draws: int | None = None
    r_hat: Agreement | None = None
    ess: EffectiveSize | None = None


class Gain(Difference):
    p_holm: float | None = Field(None, description="not part of a family")


class LastStep(Part):
    gain: Gain
    first_clean: int
    sentence: str


class Sampling(Part):
    chains: int
    finished: int
    failed: int
    dirty_answers: int
    dirty_answers_by_reason: dict[str, int] = {}
    unscored: int
    usable: int = Field(description="chains with a clean, scored final state")
    stripped: int = 0
    first_reward: Estimate
    steps: list[Step]
    mixing: Mixing
    last_step: LastStep
    prompt_tokens: int
    new_tokens: int
    seconds: float | None
    tokens_per_s: float | None
    reused_turns: int


class Dataset(Part):
    sft: dict[str, int]
    preference: dict[str, int]
    chains: dict[str, int] = {}
    dropped: dict[str, int]


class Blind(Part):
    prompts: int
    groups: int
    judges: int
    verdicts: int
    outdated: int
    distilled: int
    base: int
    tie: int
    share_decided: float | None
    win_rate: Estimate
    p: float | None
    confidence: float


class TestSet(Part):
    id: str
    adapters_scored: int


class Metrics(Part):
    """metrics.json as a whole; a section is there when its stage has run."""

    schema_: Literal[2] = Field(alias="schema")
    prompts: Prompts | None = None
    sampling: Sampling | None = None
    dataset: Dataset | None = None
    distill: dict[str, float | int | str | bool | None] | None = Field(None, description="what the trainer recorded")
    evaluation: Evaluation | None = None
    test_set: TestSet | None = None
    blind: Blind | None = None
    stages: dict[str, float] = Field({}, description="seconds of each stage")
