"""Sentences about the evaluation: one verdict per comparison, the headline, the caveats.

The numbers in them are recorded ones. Shared by the page, the cards and the terminal, so that the three never disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import scipy  # imports scipy.stats at its first use

from dsc_hub.acceptance import RULES
from dsc_hub.config.arms import ADAPTER, ARMS
from dsc_hub.config.models import is_at_endpoints
from dsc_hub.config.recipe import generation_at_evaluation
from dsc_hub.report.formatting import (
    SCORE_TITLES,
    arm_name,
    count,
    families,
    many,
    measured,
    model_name,
    number,
    p_value,
    percent,
)
from dsc_hub.runs.facts import RunFacts
from dsc_hub.runs.metrics_schema import (
    ArmNumbers,
    Blind,
    Dataset,
    Difference,
    Evaluation,
    Metrics,
    ScoreDescription,
    TestSet,
    Training,
)

# -- the verdict

WEAKER_P = 0.001  # of chance alone, below which the base counts as weaker: chains of one prompt are alike
FEW_ROWS = 50  # of training: fewer teach little, whatever the claim says


@dataclass(frozen=True)
class ComparisonVerdict:
    """One comparison in one sentence. `kind` is the conclusion that the interval allows."""

    kind: Literal["better", "worse", "unclear", "unmeasured"]
    sentence: str


def is_shown(difference: Difference, confidence: float) -> bool:
    """Return whether a difference counts as one: the interval leaves out zero, and p after Holm is small enough."""
    low, high, p = difference.low, difference.high, difference.p_holm
    if not (measured(low) and measured(high) and measured(p)):
        return False
    return not low <= 0 <= high and p <= 1 - confidence


def judge_difference(key: str, difference: Difference, score: ScoreDescription, confidence: float) -> ComparisonVerdict:
    """Return the verdict on the difference `one - other` of a score.

    `is_shown` says what counts as a difference.
    """
    one, other = (arm_name(a) for a in key.split(" - "))
    subject, name = one[:1].upper() + one[1:], score.name
    mean, low, high = difference.mean, difference.low, difference.high
    if not measured(mean):
        return ComparisonVerdict(
            "unmeasured",
            f"Not measured: {one} against {other} on {name} ({difference.reason or 'no reason recorded'}).",
        )
    if not (measured(low) and measured(high)):
        return ComparisonVerdict(
            "unmeasured",
            f"{subject} minus {other} on {name} is {number(mean)}, without an interval: no difference can be claimed.",
        )
    if not is_shown(difference, confidence):
        return ComparisonVerdict(
            "unclear",
            f"No difference shown between {one} and {other} on {name}: "
            f"{_evidence(mean, low, high, difference, confidence)}.",
        )
    is_gain = mean > 0
    if mean < 0:  # shown as a positive amount ("worse by 0.2"); the bounds swap places with their signs
        mean, low, high = -mean, -high, -low
    if is_gain == score.higher_is_better:
        return ComparisonVerdict(
            "better", f"{subject} beats {other} on {name} by {_evidence(mean, low, high, difference, confidence)}."
        )
    return ComparisonVerdict(
        "worse", f"{subject} is worse than {other} on {name} by {_evidence(mean, low, high, difference, confidence)}."
    )


def _evidence(mean: float, low: float, high: float, difference: Difference, confidence: float) -> str:
    missing = (difference.if_missing_worst, difference.if_missing_best)
    bounds = (
        f"; with what is unscored counted as worst {number(missing[0])}, as best {number(missing[1])}"
        if all(map(measured, missing))
        else ""
    )
    return (
        f"{number(mean)} ({100 * confidence:g} % interval {number(low)} to {number(high)}, "
        f"{p_value(difference.p_holm)} after Holm; "
        f"{count(difference.n)} pairs of answers in {count(difference.groups)} groups{bounds})"
    )


def verdicts(evaluation: Evaluation) -> list[ComparisonVerdict]:
    """Return the verdicts of distilled against the baseline: on the reward, then on the other scores if present."""
    differences = evaluation.differences
    key = next((k for k in differences if k.startswith("distilled - ")), next(iter(differences), None))
    if key is None:
        return [ComparisonVerdict("unmeasured", "No comparison was made: the evaluation has one arm only.")]
    scores = evaluation.scores
    return [
        judge_difference(key, differences[key][s], scores[s], evaluation.confidence)
        for s in evaluation.score_names
        if s in differences[key]
    ]


def headline(evaluation: Evaluation) -> str:
    """Return the verdict in one sentence, plus one for each other scorer with another conclusion."""
    (_, first), *others = zip(SCORE_TITLES.values(), verdicts(evaluation), strict=False)
    words = {"unclear": "shows none", "unmeasured": "says nothing"}
    apart = [
        f" The {title} {words.get(v.kind, 'says otherwise')}: {v.sentence}"
        for title, v in others
        if v.kind != first.kind
    ]
    return first.sentence + "".join(apart)


# -- human verdicts


def blind_lines(b: Blind | None) -> list[str]:
    """Return the blind comparison as sentences: counts, win rate with interval and p, caveats. [] without one."""
    if b is None:
        return []
    one, rate, level = b.judges == 1, b.win_rate, f"{100 * b.confidence:g} %"
    low, high = rate.low, rate.high
    if measured(low) and measured(high):
        within = f"{level} interval over groups {percent(low)} to {percent(high)}"
    else:
        within = f"no interval: {rate.reason or 'too few groups'}"
    decided = b.distilled + b.base
    out = [
        f"Blind comparison by {count(b.judges)} {'person' if one else 'people'}: of {many(b.prompts, 'prompt')} "
        "in "
        f"{many(b.groups, 'group')}, the distilled answer was preferred on {count(b.distilled)}, the base's on "
        f"{count(b.base)}, neither on {count(b.tie)}."
        + ("" if one else f" {count(b.verdicts)} verdicts; a prompt counts with the mean of its judges."),
        f"Win rate of distilled, ties as half: {percent(rate.mean)} ({within}). Of the {count(decided)} decided: "
        f"{percent(b.share_decided)}, exact sign test {p_value(b.p)}, which takes prompts as independent.",
        f"Who judged was not checked: the {'judge is' if one else 'judges are'} counted by the names given, and not "
        "necessarily independent of whoever made this.",
    ]
    if b.outdated:
        out.append(f"Not counted: {many(b.outdated, 'verdict')} on answers that have changed since.")
    return out


# -- caveats


def caveats(facts: RunFacts, metrics: Metrics, evaluation: Evaluation) -> list[str]:
    """Return the caveats on these numbers, one or two sentences each, from recorded facts only."""
    chain = facts.recipe.chain
    rule = RULES[chain.acceptance].caveat.format(temperature=chain.temperature)
    out = [
        "Critique-and-revise is not a reversible proposal, so the chain does not sample p(x|c)·exp(r(x)/T) exactly: "
        f"it is a heuristic sampler. {rule}"
    ]
    if "second" in evaluation.scores:
        out.append(
            "The reward that is reported also chose the training data, so part of a gain on it may be gaming. "
            f"Look at the second scorer, {evaluation.scores['second'].name}, which chose nothing"
            + (f", and at the third, {evaluation.scores['third'].name}." if "third" in evaluation.scores else ".")
        )
    else:
        out.append(
            "The reward that is reported also chose the training data, and no second scorer was recorded: "
            "a gain cannot be told from gaming the reward."
        )
    if facts.student:
        out.append(
            f"The base of these numbers is the student, {model_name(facts.student)}; its teacher, "
            f"{model_name(facts.model)}, wrote the chains. A gain says that the student learned from what was "
            "kept, not that it is as good as its teacher."
        )
    arms = evaluation.arms
    out[:0] = _weaker_than_sampled(facts, metrics, evaluation)
    out += [
        *_side_effects(arms),
        *_left_out(arms),
        *_stripped(arms),
        *(_uncompared(metrics.dataset) if facts.recipe.distill.objective == "sft" else []),
        *(_little_training(metrics.distill) if metrics.distill else []),
        *test_set_sentences(evaluation, metrics.test_set),
    ]
    out.append(
        "Intervals and p are over groups, not prompts: prompts of one group are alike and do not count as independent. "
        f"p is of a sign-flip permutation test on group means, adjusted after Holm{families(evaluation)}."
    )
    if "distilled" in arms:
        out.append(
            "Intervals hold this one adapter fixed: they say nothing of how much another training seed would change. "
            "`dsc grid` over distill.seed and `dsc compare` on its runs show that spread."
        )
    out += _too_small(evaluation)
    out.append(f"Arms were served on: {evaluation.served_on}. Numbers on other weights may differ.")
    out.append(
        "All answers are a model's. They may be wrong, and the scorers measure one property of a text, "
        "not whether it is true or useful."
    )
    return out


def _weaker_than_sampled(facts: RunFacts, metrics: Metrics, evaluation: Evaluation) -> list[str]:
    """Return the caveat that the base fails at its own chains in the evaluation, where it does: rounding may be why.

    The revisions accepted while sampling are compared with the answers that the arm `self_critique` changed for the
    better. Both are counts of the same only for the rule 'improve', and of the same model without later rounds.
    """
    sampled, recipe = metrics.sampling, facts.recipe
    chains = evaluation.differences.get("self_critique - base", {}).get("reward")
    is_rounded = recipe.distill.method == "qlora" and recipe.evaluation.weights == "rounded"
    is_rounded = is_rounded and any(ARMS[arm].model == ADAPTER for arm in evaluation.arms if arm in ARMS)
    is_same_model = not facts.student and not is_at_endpoints(recipe, None) and recipe.rounds == 1
    # The evaluation draws its pairs of texts evenly, and a sampling that learns draws the better ones more often.
    is_same_chain = not (recipe.ends_early and len(recipe.chain.pairs) > 1)
    if not (is_rounded and is_same_model and is_same_chain and recipe.chain.acceptance == "improve"):
        return []
    if sampled is None or not sampled.steps or not sampled.finished or not chains or not chains.n:
        return []
    # Of all chains, since those that are good enough at once propose nothing, here and there.
    accepted, finished, changed = sampled.steps[0].accepted, sampled.finished, chains.wins + chains.losses
    if changed / chains.n > accepted / finished / 2:
        return []
    table = [[accepted, finished - accepted], [changed, chains.n - changed]]
    if scipy.stats.fisher_exact(table).pvalue > WEAKER_P:
        return []
    sampled_at, drawn_at = recipe.generation.temperature, generation_at_evaluation(recipe).temperature
    hotter = f", and draw at temperature {drawn_at:g} instead of {sampled_at:g}" if drawn_at != sampled_at else ""
    return [
        f"The base is weaker here than where the chains were sampled: {accepted} of {finished} chains accepted their "
        f"first revision there, and {changed} of {chains.n} chains of Self-critique got another reward here. "
        f"The arms run on weights that were rounded as in training{hotter}, so part of what Distilled gains on Base "
        "may be a repair of the rounding. `evaluation.weights=original` compares on the weights that wrote the chains; "
        "`distill.method=lora` rounds nothing."
    ]


def _too_small(evaluation: Evaluation) -> list[str]:
    """Return the detectable difference for each score on which no difference was found."""
    out = []
    for s, title in SCORE_TITLES.items():
        d = evaluation.differences.get("distilled - base", {}).get(s)
        if d and d.detectable and measured(d.low) and measured(d.high) and d.low <= 0 <= d.high:
            out.append(
                f"With {d.groups} groups a difference of {number(d.detectable)} on the {title} would have "
                "been found four times in five; a smaller one may well be there."
            )
    return out


def _side_effects(arms: Mapping[str, ArmNumbers]) -> list[str]:
    """Return what got worse from base to distilled besides the scores: unfinished answers and hygiene defects."""
    if not {"base", "distilled"} <= set(arms):
        return []
    out = []
    before, after = (arms[a].stops_by_itself for a in ("base", "distilled"))
    if measured(before) and measured(after) and after < before:
        detail = f"{percent(after)} against {percent(before)} of answers"
        out.append(f"The distilled model ends by itself less often than the base ({detail}); the rest is cut off.")
    before, after = (arms[a].defects for a in ("base", "distilled"))
    if measured(before) and measured(after) and after > before:
        detail = f"{percent(after)} against {percent(before)}"
        out.append(
            f"More of the distilled model's answers are not clean than of the base's ({detail}): "
            "empty, cut off, repeating themselves, copying the critique or talking about the conversation."
        )
    return out


def _left_out(arms: Mapping[str, ArmNumbers]) -> list[str]:
    missing = [
        f"{arm_name(arm)} {a.reward.unscored} unscored and {a.reward.failed} failed"
        for arm, a in arms.items()
        if a.reward.unscored or a.reward.failed
    ]
    return [f"Left out of the means, and not counted as zero: {'; '.join(missing)}."] if missing else []


def _stripped(arms: Mapping[str, ArmNumbers]) -> list[str]:
    if not any(a.stripped for a in arms.values()):
        return []
    cut = ", ".join(f"{arm_name(arm)} {count(a.stripped)}" for arm, a in arms.items())
    return [
        "Before anything was scored, openings that talk about the task were cut off the answers of all arms alike: "
        f"{cut}."
    ]


def _uncompared(dataset: Dataset | None) -> list[str]:
    """Return a caveat on training rows that were kept without a comparison."""
    if dataset is None or not (n := sum(dataset.uncompared.values())):
        return []
    rows = sum(dataset.sft.values())
    return [
        f"{count(n)} of {count(rows)} rows (for training and validation) were never compared with another clean text: "
        "their first answer "
        "was not clean (or not scored), and the first clean revision was kept."
    ]


def _little_training(training: Training) -> list[str]:
    """Return a caveat on a training that can't have taught much, or that failed to."""
    out = []
    if training.rows < FEW_ROWS:
        checked = "" if training.validation_rows else ", and no validation row shows what it learned"
        out.append(
            f"The adapter was trained on {many(training.rows, 'row')}{checked}: so few teach little. More rows come "
            "from more prompts, chains or steps, or from a lower dataset.min_reward; more test groups would not help."
        )
    first, last = training.first_loss, training.final_loss
    if measured(first) and measured(last) and last > first:
        out.append(
            f"The loss rose in training, from {number(first, 3)} to {number(last, 3)}: lower the learning rate, or "
            "train on more rows."
        )
    return out


def test_set_sentences(evaluation: Evaluation, test_set: TestSet | None) -> list[str]:
    if evaluation.split != "test":
        return [
            f"These numbers are of the {evaluation.split} split, which choices may have been made on; they flatter."
        ]
    if test_set is None:
        return ["How often this test set was scored before is not recorded."]
    n = test_set.adapters_scored
    subject = "1 adapter has" if n == 1 else f"{n} adapters have"
    return [
        f"{subject} been scored on this test set ({test_set.id}); every further look makes a gain by chance likelier."
    ]
