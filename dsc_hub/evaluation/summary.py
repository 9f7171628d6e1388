"""What the arms answered, scored, counted and compared: rows in, the numbers of a table out.

Every number is an estimate over split groups with its interval (stats.py); every difference is paired by prompt and sample.
The answers themselves come from arms.py, what moved besides the scores from side_effects.py, the verdict from claim.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc_hub import stats
from dsc_hub.config.arms import judges_claim
from dsc_hub.config.recipe import Recipe
from dsc_hub.evaluation import claim, side_effects
from dsc_hub.evaluation.answers import Row
from dsc_hub.records import Prompt
from dsc_hub.runs import verdict


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which arms are compared: each with the first, and what distilling is meant to spare with what it gives."""
    others = [(name, names[0]) for name in names[1:]]
    extra = [
        ("distilled", "self_critique"),
        ("distilled", "best_of_n"),
        ("distilled_self_critique", "distilled"),
    ]
    return others + [p for p in extra if set(p) <= set(names) and p not in others and p[::-1] not in others]


def summarise(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    answers: list[Row],
    scores: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float | None] | None = None,
    neutral: Mapping[str, Mapping[str, float]] | None = None,
    processors: int | None = None,
    trained_here: bool = True,
    look: int | None = None,
) -> dict[str, Any]:
    """The section `evaluation` of metrics.json, but for what only the pipeline knows (names of scores, what was served).

    `scores` are those of the rows: name -> {higher_is_better, low, high (its range; None or missing: no limit)};
    `seconds` of each arm (None: not known); `neutral`: nats a token of neutral texts by arm and text; `processors`:
    cores or GPUs that the arms had; `trained_here`: is the adapter one that can't have seen the test prompts? `look`:
    which adapter it is on this test set.
    """
    names, e = list(scores), recipe.evaluation
    ranges = {name: (about.get("low"), about.get("high")) for name, about in scores.items()}
    by_arm = {arm: {(a["prompt_id"], a["sample"]): a for a in answers if a["arm"] == arm} for arm in e.arms}
    expected = len(prompts) * e.samples
    compared = pairs_of(e.arms)
    keys = [(p.id, k, p.group) for p in prompts for k in range(e.samples)]
    differences = {
        f"{a} - {b}": {
            name: stats.paired_rows(by_arm[a], by_arm[b], name, confidence=e.confidence, bounds=ranges[name])
            | _if_missing(by_arm[a], by_arm[b], name, keys, ranges[name])
            for name in names
        }
        for a, b in compared
    }
    primary = stats.adjust_scores(differences, "distilled - base" if judges_claim(e.arms) else None)
    numbers: dict[str, Any] = {}
    for arm, rows in by_arm.items():
        numbers[arm] = {
            "new_tokens_mean": _mean([a["new_tokens"] for a in rows.values()]),
            "stops_by_itself": _mean([a["finish_reason"] == "stop" for a in rows.values()]),
            "defects": _mean([bool(a["defect"]) for a in rows.values()]),
            "stripped": sum(bool(a.get("raw")) for a in rows.values()),
        } | _cost(list(rows.values()), (seconds or {}).get(arm), processors)
        for name in names:
            scored = [a for a in rows.values() if a[name] is not None]
            numbers[arm][name] = stats.estimate(
                [a[name] for a in scored], [a["group"] for a in scored], e.confidence, ranges[name]
            ) | {"unscored": len(rows) - len(scored), "failed": expected - len(rows)}
        gained = differences.get(f"{arm} - {e.arms[0]}", {}).get("reward", {}).get("mean")
        numbers[arm]["gain_per_1000_tokens"] = _per_1000(gained, numbers[arm]["new_tokens_mean"])
    return {
        "split": e.split,
        "confidence": e.confidence,
        "prompts": len(prompts),
        "samples": e.samples,
        "groups": len({p.group for p in prompts}),
        "arms": numbers,
        "differences": differences,
        "primary": primary,
        "side_effects": side_effects.summarise(answers, prompts, e.arms, compared, neutral or {}, e.confidence),
        "claim": claim.assess(
            answers,
            prompts,
            verdict.Setting(e.split, e.samples, e.confidence, trained_here, look, recipe.hygiene),
            differences["distilled - base"],
            scores,
        )
        if judges_claim(e.arms)
        else None,
    }


def _if_missing(
    a: Mapping[Any, Row],
    b: Mapping[Any, Row],
    name: str,
    keys: Sequence[tuple[str, int, str]],
    bounds: tuple[float | None, float | None],
) -> dict[str, float]:
    """Where the share of answers without a score differs between two arms, a mean over scored pairs may be too good:
    the mean difference if all missing scores were the lowest, or the highest, value of the range. {} where there is
    nothing to say."""
    values = [[(arm.get((i, k)) or {}).get(name) for i, k, _ in keys] for arm in (a, b)]
    if None in bounds or len({side.count(None) for side in values}) < 2:
        return {}
    groups = [group for *_, group in keys]
    out = {}
    for key, limit in zip(("if_missing_worst", "if_missing_best"), bounds, strict=True):
        first, second = ([limit if v is None else v for v in side] for side in values)
        out[key] = stats.group_mean([x - y for x, y in zip(first, second, strict=True)], groups)
    return out


def _cost(rows: Sequence[Row], seconds: float | None, processors: int | None) -> dict[str, Any]:
    """What an arm's answers took: tokens, seconds of the server, processor hours (cores, or GPUs where there are any)."""
    return {
        "new_tokens": sum(a["new_tokens"] for a in rows),
        "prompt_tokens": sum(a["prompt_tokens"] for a in rows),
        "seconds": seconds,
        "processor_hours": None if seconds is None or processors is None else seconds * processors / 3600,
    }


def _per_1000(gained: float | None, tokens: float | None) -> float | None:
    """Reward gained over the baseline for 1,000 generated tokens; None for the baseline itself."""
    return None if gained is None or not tokens else 1000 * gained / tokens


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
