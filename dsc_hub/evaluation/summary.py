"""Summary of the arms' answers: scored rows in, the numbers of the evaluation out.

Every number is an estimate over split groups with its interval (stats.py); every difference is paired by prompt and
sample. arms.py provides the answers, side_effects.py the side effects, claim.py the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc_hub import stats
from dsc_hub.config.arms import ADAPTER, ARMS, TEACHER, judges_claim
from dsc_hub.config.recipe import Recipe
from dsc_hub.evaluation import claim, side_effects
from dsc_hub.records import Answer, AnswerKey, Prompt
from dsc_hub.runs import verdict


def arm_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs to compare: each arm with the first, and distilled with the costlier arms and the teacher's."""
    others = [(name, names[0]) for name in names[1:]]
    costlier = [name for name, arm in ARMS.items() if arm.way != "answer"]
    extra = [("distilled", name) for name in costlier if ARMS[name].model is None]
    extra += [(name, "distilled") for name in costlier if ARMS[name].model == ADAPTER]
    extra += [("distilled", name) for name, arm in ARMS.items() if arm.model == TEACHER]
    return others + [p for p in extra if set(p) <= set(names) and p not in others and p[::-1] not in others]


def summarise_evaluation(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    answers: list[Answer],
    scores: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float | None] | None = None,
    neutral: Mapping[str, Mapping[str, float]] | None = None,
    processors: Mapping[str, int | None] | None = None,
    trained_here: bool = True,
    look: int | None = None,
) -> dict[str, Any]:
    """Return the section `evaluation` of metrics.json.

    Values that only the pipeline has (score names, served weights) are missing.

    `scores` describes the scores of the rows: name -> {higher_is_better, low, high (its range; None or missing: no
    limit)}. `seconds` of each arm (None: unknown). `neutral`: nats per token of neutral texts by arm and text.
    `processors`: number of cores or GPUs of each arm's servers (None: unknown). `trained_here`: whether this run
    trained the adapter, so that it cannot have seen the test prompts. `look`: position of the adapter among those
    scored on this test set.
    """
    e = recipe.evaluation
    ranges = {name: (about.get("low"), about.get("high")) for name, about in scores.items()}
    by_arm = {arm: {(a.prompt_id, a.sample): a for a in answers if a.arm == arm} for arm in e.arms}
    expected = len(prompts) * e.samples
    compared = arm_pairs(e.arms)
    keys = [(p.id, k, p.group) for p in prompts for k in range(e.samples)]
    differences = {f"{a} - {b}": _differences(by_arm[a], by_arm[b], keys, ranges, e.confidence) for a, b in compared}
    primary = stats.adjust_scores(differences, "distilled - base" if judges_claim(e.arms) else None)
    # Numbers by the first rule of intervals are of a time when such measures were shares of nothing.
    is_first_rule = stats.interval_rule() == 1
    unreadable = {} if is_first_rule else side_effects.unreadable_measures(prompts, recipe.hygiene.language)
    numbers: dict[str, Any] = {}
    for arm, by_key in by_arm.items():
        rows = list(by_key.values())
        numbers[arm] = _arm(rows, ranges, expected, e.confidence) | _cost(
            rows, (seconds or {}).get(arm), (processors or {}).get(arm)
        )
        gained = differences.get(f"{arm} - {e.arms[0]}", {}).get("reward", {}).get("mean")
        numbers[arm]["gain_per_1000_tokens"] = _per_1000(gained, numbers[arm]["new_tokens_mean"])
    return {
        "split": e.split,
        "confidence": e.confidence,
        "intervals": stats.interval_rule(),
        "prompts": len(prompts),
        "samples": e.samples,
        "groups": len({p.group for p in prompts}),
        "arms": numbers,
        "differences": differences,
        "primary": primary,
        "side_effects": side_effects.summarise_side_effects(
            answers, prompts, e.arms, compared, neutral or {}, e.confidence, unreadable
        ),
        "claim": claim.assess(
            answers,
            prompts,
            verdict.Setting(e.split, e.samples, e.confidence, trained_here, look, recipe.hygiene, unreadable),
            differences["distilled - base"],
            scores,
        ).model_dump()
        if judges_claim(e.arms)
        else None,
    }


def _differences(
    a: Mapping[AnswerKey, Answer],
    b: Mapping[AnswerKey, Answer],
    keys: Sequence[tuple[str, int, str]],
    ranges: Mapping[str, stats.Bounds],
    confidence: float,
) -> dict[str, dict[str, Any]]:
    """Return the differences of two arms by score; `keys` are prompt id, sample and group of all planned answers."""
    return {
        name: score_difference(a, b, name, confidence=confidence, bounds=bounds) | _if_missing(a, b, name, keys, bounds)
        for name, bounds in ranges.items()
    }


def score_difference(
    a: Mapping[AnswerKey, Answer],
    b: Mapping[AnswerKey, Answer],
    score: str,
    score_of_b: str | None = None,
    confidence: float = 0.95,
    bounds: stats.Bounds = stats.UNBOUNDED,
) -> dict[str, Any]:
    """Return the `paired_difference` of two arms on one score, over the keys that are scored in both.

    `score_of_b` is the score's name in b, if it is not `score`; `bounds` is its range.
    """
    both = [
        (x, y, a[k].group)
        for k in sorted(a)
        if k in b and (x := a[k].score(score)) is not None and (y := b[k].score(score_of_b or score)) is not None
    ]
    return stats.paired_difference(
        [x for x, *_ in both], [y for _, y, _ in both], [g for *_, g in both], confidence, bounds
    )


def _arm(
    rows: Sequence[Answer], ranges: Mapping[str, tuple[float | None, float | None]], expected: int, confidence: float
) -> dict[str, Any]:
    """Return the numbers of one arm but for its cost; `expected`: how many answers it should have given."""
    numbers: dict[str, Any] = {
        "new_tokens_mean": _mean_or_none([a.new_tokens for a in rows]),
        "stops_by_itself": _mean_or_none([a.finish_reason == "stop" for a in rows]),
        "defects": _mean_or_none([bool(a.defect) for a in rows]),
        "stripped": sum(bool(a.raw) for a in rows),
    }
    for name, bounds in ranges.items():
        scored = [(value, a.group) for a in rows if (value := a.score(name)) is not None]
        estimate = stats.estimate([value for value, _ in scored], [group for _, group in scored], confidence, bounds)
        numbers[name] = estimate | {"unscored": len(rows) - len(scored), "failed": expected - len(rows)}
    return numbers


def _if_missing(
    a: Mapping[AnswerKey, Answer],
    b: Mapping[AnswerKey, Answer],
    name: str,
    keys: Sequence[tuple[str, int, str]],
    bounds: tuple[float | None, float | None],
) -> dict[str, float | None]:
    """Return the mean difference with all missing scores set to the lowest, and to the highest, value of the range.

    If the share of unscored answers differs between two arms, the mean over scored pairs may be too high. {} if the
    shares are equal or the score has no range.
    """
    values = [[row.score(name) if (row := arm.get((i, k))) else None for i, k, _ in keys] for arm in (a, b)]
    worst, best = bounds
    if worst is None or best is None or len({side.count(None) for side in values}) < 2:
        return {}
    groups = [group for *_, group in keys]
    out = {}
    for key, limit in (("if_missing_worst", worst), ("if_missing_best", best)):
        first, second = ([limit if v is None else v for v in side] for side in values)
        out[key] = stats.group_mean([x - y for x, y in zip(first, second, strict=True)], groups)
    return out


def _cost(rows: Sequence[Answer], seconds: float | None, processors: int | None) -> dict[str, Any]:
    """Return the cost of an arm's answers: tokens, server seconds, processor hours (of cores, or of GPUs if any)."""
    return {
        "new_tokens": sum(a.new_tokens for a in rows),
        "prompt_tokens": sum(a.prompt_tokens for a in rows),
        "seconds": seconds,
        "processor_hours": None if seconds is None or processors is None else seconds * processors / 3600,
    }


def _per_1000(gained: float | None, tokens: float | None) -> float | None:
    """Return the reward gain over the baseline per 1,000 generated tokens; None for the baseline itself."""
    return None if gained is None or not tokens else 1000 * gained / tokens


def _mean_or_none(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
