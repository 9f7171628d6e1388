"""The gate: is the claim justified that the distilled model is better than its base? Answers in, criteria out. Pure.

A small model games every reward, so a gain on the reward alone is weak evidence. The claim holds if distilled beats
base on the reward and on a second scorer that played no part in training, *and* no usual symptom of reward gaming got
worse by more than a margin stated in advance: losing the subject, saying the same about everything, longer or shorter
answers, talking about the conversation, repetition, unfinished answers, missing answers. The gate cannot distinguish
fluent text from word salad: read the answers, or have them judged (`dsc blind`).

Each criterion is a non-inferiority test over split groups: the interval of a paired difference (or ratio) lies within
its limits (met), wholly outside of them (failed), or neither (undecided: not enough data). So an equal model rarely
fails and a worse one rarely passes, however few groups there are. The error rates were simulated:
`python -m pytest -m long -s tests/evaluation/test_gate_simulation.py`. Source of the design: G. Piaggio et al., JAMA
308, 2012 (CONSORT for non-inferiority).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsc_hub import stats
from dsc_hub.chain import hygiene
from dsc_hub.chain.language import in_another_language
from dsc_hub.chain.subject import names, subject_of, without
from dsc_hub.chain.text import phrases, words
from dsc_hub.errors import RunError
from dsc_hub.evaluation import repeated
from dsc_hub.evaluation.repeated import Pairs
from dsc_hub.evaluation.side_effects import variety
from dsc_hub.records import Answer, AnswerKey, Prompt
from dsc_hub.runs.metrics_schema import Claim, Criterion, CriterionVerdict
from dsc_hub.runs.results import evaluation_of
from dsc_hub.runs.run import Run
from dsc_hub.runs.verdict import (
    BETTER,
    LEAST_CONFIDENCE,
    Row,
    Setting,
    _loose,
    _upwards,
    better,
    first_look,
    verdict_of,
    within_limits,
)

# Margins, fixed in advance.
SHARE_MARGIN = 0.10  # for a share of answers (0..1): how much worse than the base it may be
SCORE_MARGIN = 0.05  # for a score with a range: how much worse it may be, as a fraction of the range
SPREAD_MARGIN = 0.25  # for a score without a range: in standard deviations of the base's group means
LEAST_VARIETY = 0.8  # distinct-2 as a share of the base's
SHORTEST, LONGEST = 0.7, 1.3  # length as a share of the base's
MANNERISM_WORDS = 8  # words per phrase when searching for mannerisms
SENTENCE_WORDS = 3  # minimum number of words of a sentence
BLOCKS = 50  # maximum number of blocks of groups that the jackknife leaves out in turn


def assess(
    answers: Iterable[Answer],
    prompts: Sequence[Prompt],
    setting: Setting,
    differences: Mapping[str, Row],
    scores: Mapping[str, Row],
) -> Claim:
    """Judge an evaluation.

    `answers` are rows of the arms on `prompts`. `differences` are the paired differences distilled - base by score
    name, with p and interval. `scores` describes each score: {higher_is_better, low, high (its range, or None)}.
    """
    by_id = {p.id: p for p in prompts}
    arms: dict[str, dict[AnswerKey, Answer]] = {"base": {}, "distilled": {}}
    for row in answers:
        if row.arm in arms and row.prompt_id in by_id:
            arms[row.arm][row.prompt_id, row.sample] = row
    both = [key for key in sorted(arms["base"]) if key in arms["distilled"]]
    pairs = Pairs([arms["base"][k] for k in both], [arms["distilled"][k] for k in both], [by_id[i] for i, _ in both])
    criteria = [
        *(_better(name, pairs, differences.get(name), scores.get(name, {}), setting) for name in BETTER),
        _on_test_prompts(setting),
        first_look(setting),
        _answered(arms, prompts, scores, setting),
    ]
    if "third" in differences:
        criteria.append(_not_worse("third", pairs, differences["third"], scores.get("third", {}), setting))
    # The text criteria use at least the claim's confidence, whatever confidence the scores are shown with.
    setting = replace(setting, confidence=max(setting.confidence, LEAST_CONFIDENCE))
    if both:
        criteria += [
            _names_subject(pairs, setting),
            _varied(pairs, setting),
            _long(pairs, setting),
            _mannerisms(pairs, setting),
            *_text_defects(pairs, setting),
        ]
    needed = [c.groups_needed for c in criteria if c.verdict == "undecided"]
    return Claim(
        verdict=verdict_of([(c.name, c.verdict) for c in criteria], len(both)),
        answers=len(both),
        groups=len(set(pairs.groups)),
        groups_needed=max((n for n in needed if n is not None), default=None) if None not in needed else None,
        criteria=criteria,
    )


def where_alike(estimate: Row) -> dict[str, Any]:
    """Return the estimate with an interval of zero width if all groups have the same value.

    Enough groups that agree (`stats.LEAST_GROUPS`) suffice to judge a margin.
    """
    is_alike = estimate["mean"] is not None and estimate["low"] is None and estimate["groups"] >= stats.LEAST_GROUPS
    return dict(estimate) | ({"low": estimate["mean"], "high": estimate["mean"]} if is_alike else {})


def _ratio_within(name: str, logs: Row, setting: Setting, least: float, most: float | None, **more: Any) -> Criterion:
    """Apply `within_limits` to a ratio whose interval was computed on its logarithm."""
    log_most = None if most is None else math.log(most)
    c = within_limits(name, logs, setting.confidence, at_least=math.log(least), at_most=log_most, **more)
    value, low, high = (None if end is None else math.exp(end) for end in (c.value, c.low, c.high))
    return c.model_copy(
        update={"value": value, "low": low, "high": high, "at_least": least, "at_most": most, "is_ratio": True}
    )


# -- scores


def _better(name: str, pairs: Pairs, difference: Row | None, score: Row, setting: Setting) -> Criterion:
    return better(name, difference, score, setting, repeated.of_score(name, score, pairs, setting.confidence))


def _not_worse(name: str, pairs: Pairs, difference: Row, score: Row, setting: Setting) -> Criterion:
    label = f"not worse on the {name} scorer"
    if setting.confidence < LEAST_CONFIDENCE:
        return Criterion(name=label, verdict="undecided", note=_loose(setting))
    low, high = score.get("low"), score.get("high")
    if low is not None and high is not None:
        margin, note = SCORE_MARGIN * (high - low), f"margin: {SCORE_MARGIN:.0%} of the score's range"
    else:
        scored = [(r.score(name), p.group) for r, p in zip(pairs.base, pairs.prompts, strict=True)]
        kept = [(value, group) for value, group in scored if value is not None]
        margin = SPREAD_MARGIN * stats.spread_of_groups([v for v, _ in kept], [g for _, g in kept])
        note = f"margin: {SPREAD_MARGIN:g} standard deviations of the base's group means"
    upwards = where_alike(_upwards(difference, score))
    again = repeated.of_score(name, score, pairs, setting.confidence)
    criterion = within_limits(label, upwards, setting.confidence, at_least=-margin, note=note, repeated=again)
    # The recipe requested this scorer, so an unmeasured result leaves the claim undecided.
    return criterion.model_copy(update={"verdict": "undecided"}) if criterion.verdict == "unmeasured" else criterion


# -- prompts and missing answers


def _on_test_prompts(setting: Setting) -> Criterion:
    name = "on test prompts"
    if not setting.trained_here:
        return Criterion(
            name=name,
            verdict="undecided",
            note="the adapter is somebody else's: what it was trained on is not known here",
        )
    if setting.split != "test":
        return Criterion(
            name=name, verdict="undecided", note=f"the {setting.split} split, which choices may have been made on"
        )
    return Criterion(name=name, verdict="met", note="the test split")


def _answered(
    arms: Mapping[str, Mapping[AnswerKey, Answer]],
    prompts: Sequence[Prompt],
    scores: Mapping[str, Row],
    setting: Setting,
) -> Criterion:
    """Compare the shares of missing answers: failed, empty, or without a value for any of the scores.

    These answers drop out of all means, so more of them would bias the means upwards.
    """

    def is_missing(row: Answer | None) -> bool:
        if row is None or not words(row.text):
            return True
        return any(row.score(name) is None for name in {"reward", *scores})

    keys = [(p.id, k) for p in prompts for k in range(setting.samples)]
    groups = [p.group for p in prompts for _ in range(setting.samples)]
    missing = {arm: [is_missing(rows.get(key)) for key in keys] for arm, rows in arms.items()}
    return _share("as many answers", missing["base"], missing["distilled"], groups, setting)


# -- the texts


def _share(
    name: str,
    base: Sequence[bool],
    distilled: Sequence[bool],
    groups: Sequence[str],
    setting: Setting,
    less_is_better: bool = True,
    note: str = "",
) -> Criterion:
    """Return the criterion that the share of answers with a property is worse by less than SHARE_MARGIN."""

    def of_groups(times: int) -> Row:
        more = repeated.copies(groups, times)
        return stats.rate_difference([*distilled] * times, [*base] * times, more, setting.confidence)

    limits = {"at_most": SHARE_MARGIN} if less_is_better else {"at_least": -SHARE_MARGIN}
    before, after = (sum(side) / len(side) if side else None for side in (base, distilled))
    return within_limits(
        name,
        of_groups(1),
        setting.confidence,
        **limits,
        repeated=of_groups,
        base=before,
        distilled=after,
        note=note,
    )


def _names_subject(pairs: Pairs, setting: Setting) -> Criterion:
    name = "names its subject"
    places = [k for k, p in enumerate(pairs.prompts) if subject_of(p)]
    if not places:
        return Criterion(name=name, verdict="unmeasured", note="no prompt names its group, so the subject is not known")
    base, distilled = (
        [names(rows[k].text, subject_of(pairs.prompts[k])) for k in places] for rows in (pairs.base, pairs.distilled)
    )
    return _share(name, base, distilled, [pairs.groups[k] for k in places], setting, less_is_better=False)


def _varied(pairs: Pairs, setting: Setting) -> Criterion:
    """Compare distinct-2 of the two arms.

    Distinct-2 is one number for all texts, so its interval comes from the jackknife, which leaves out one group (or
    block of groups) at a time.
    """
    name = "as varied"
    groups = pairs.groups

    def both(left_out: frozenset[str]) -> dict[str, float | None]:
        kept = [k for k, g in enumerate(groups) if g not in left_out]
        arms = {"base": [pairs.base[k] for k in kept], "distilled": [pairs.distilled[k] for k in kept]}
        return variety(arms, 2)[0]

    full = both(frozenset())
    before, after = full["base"], full["distilled"]
    if not before or not after:
        return Criterion(name=name, verdict="unmeasured", note="an arm has no two words")
    blocks: dict[int, set[str]] = defaultdict(set)
    for k, group in enumerate(dict.fromkeys(groups)):
        blocks[k % BLOCKS].add(group)
    replicates = [both(frozenset(block)) for block in blocks.values()] if len(blocks) > 1 else []
    logs = [math.log(r["distilled"] / r["base"]) for r in replicates if r["base"] and r["distilled"]]
    estimate = stats.jackknife(math.log(after / before), logs, setting.confidence) | {"groups": len(set(groups))}
    return _ratio_within(name, estimate, setting, LEAST_VARIETY, None, base=before, distilled=after)


def _long(pairs: Pairs, setting: Setting) -> Criterion:
    """Compare lengths by the geometric mean of the pairs' word-count ratios.

    Only pairs in which both answers have words count. With this mean one overlong answer does not offset ten short
    ones.
    """
    sizes = [
        (len(words(base.text)), len(words(distilled.text)), group)
        for base, distilled, group in zip(pairs.base, pairs.distilled, pairs.groups, strict=True)
    ]
    kept = [(math.log(before), math.log(after), group) for before, after, group in sizes if before and after]
    groups = [group for *_, group in kept]
    again = repeated.of_mean([after - before for before, after, _ in kept], groups, setting.confidence)
    estimate = where_alike(again(1))
    logs = ([before for before, _, _ in kept], [after for _, after, _ in kept])
    means = [stats.group_mean(side, groups) for side in logs]
    before, after = (None if mean is None else math.exp(mean) for mean in means)
    return _ratio_within("as long", estimate, setting, SHORTEST, LONGEST, repeated=again, base=before, distilled=after)


def phrases_of(row: Answer, prompt: Prompt) -> set[str]:
    """Return an answer's phrases of PHRASE_WORDS words and its sentences, with the subject's name replaced by a mark.

    So "X is a wonderful film that everybody should see" is the same phrase for every X.
    """
    subject = subject_of(prompt)
    out = {" ".join(g) for g in phrases(without(row.text, subject), MANNERISM_WORDS)}
    sentences = (without(s, subject) for s in re.split(r"[.!?\n]+(?=\s|$)|[\u3002\uff01\uff1f]+", row.text))
    return out | {" ".join(s) for s in sentences if len(s) >= SENTENCE_WORDS}


def _mannerisms(pairs: Pairs, setting: Setting) -> Criterion:
    """Judge the phrase whose share grew most, among phrases in answers of more than one group."""
    name = "no mannerisms"
    phrase_sets = {
        arm: [phrases_of(row, p) for row, p in zip(rows, pairs.prompts, strict=True)]
        for arm, rows in (("base", pairs.base), ("distilled", pairs.distilled))
    }
    growth: Counter[str] = Counter(phrase for s in phrase_sets["distilled"] for phrase in s)
    growth.subtract(phrase for s in phrase_sets["base"] for phrase in s if phrase in growth)
    groups: dict[str, set[str]] = defaultdict(set)
    for s, group in zip(phrase_sets["distilled"], pairs.groups, strict=True):
        for phrase in s:
            groups[phrase].add(group)
    worst = max((p for p in sorted(growth) if len(groups[p]) > 1), key=lambda p: growth[p], default="")
    base, distilled = ([worst in s for s in phrase_sets[arm]] for arm in ("base", "distilled"))
    note = f'"{worst}" (* is the subject)' if worst else "no phrase comes in answers of two groups"
    return _share(name, base, distilled, pairs.groups, setting, note=note)


def _text_defects(pairs: Pairs, setting: Setting) -> list[Criterion]:
    """Return one criterion per hygiene detector and one for unfinished answers.

    A property that the recipe declares normal (by switching its detector off) is shown but not judged.
    """
    rules = setting.hygiene
    detectors: dict[str, tuple[Callable[[Answer, Prompt], bool], bool]] = {
        "no more talk about the conversation": (
            lambda row, prompt: hygiene.talks_about_the_conversation(row.text),
            rules.meta_talk != "keep",
        ),
        "no more repetition": (
            lambda row, prompt: hygiene.repeats_itself(row.text, subject_of(prompt)),
            rules.repeated < 1,
        ),
        "no more in another language": (
            lambda row, prompt: in_another_language(row.text, prompt.text),
            rules.language != "any",
        ),
        "no more unfinished answers": (lambda row, prompt: row.finish_reason != "stop", True),
    }
    out = []
    if reason := setting.unreadable.get("meta_talk"):
        name = "no more talk about the conversation"
        # The recipe asks for it: what could not be measured leaves the claim undecided.
        verdict: CriterionVerdict = "undecided" if detectors.pop(name)[1] else "not judged"
        out.append(Criterion(name=name, verdict=verdict, note=reason))
    for name, (is_so, is_judged) in detectors.items():
        base, distilled = (
            [is_so(r, p) for r, p in zip(rows, pairs.prompts, strict=True)] for rows in (pairs.base, pairs.distilled)
        )
        criterion = _share(name, base, distilled, pairs.groups, setting)
        if not is_judged:
            criterion = Criterion(
                name=name,
                verdict="not judged",
                value=criterion.value,
                base=criterion.base,
                distilled=criterion.distilled,
                note="the recipe's hygiene does not look for it",
            )
        out.append(criterion)
    return out


def claim_of(run: Run) -> Claim:
    """Return the claim of an evaluated run.

    RunError if nothing was evaluated or compared, or if the verdict does not follow from the criteria.
    """
    evaluation = evaluation_of(run)
    if (claim := evaluation.claim) is None:
        raise RunError(
            f"{run.folder} did not compare a distilled model with its base: its arms are "
            f"{', '.join(evaluation.arms)}, the first is the baseline",
            "Set evaluation.arms to [base, self_critique, distilled] and run again.",
        )
    if claim.verdict != verdict_of([(c.name, c.verdict) for c in claim.criteria], claim.answers):
        raise RunError(
            f"{run['metrics.json']} is damaged: the claim's verdict is not what its criteria add up to",
            f"Remove {run['evaluation.done.json']} and run again: the answers are kept, only the numbers are made "
            "anew.",
        )
    return claim
