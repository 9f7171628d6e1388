"""Side effects: how a tuned model changed besides its scores. Answers in, numbers with intervals out. Pure.

Shares and means of each arm, and paired differences between arms: length, endings, refusals, talk about the
conversation, repetition, similarity to the base's own answer, variety across answers, and the model's surprise at
neutral text (a tuned model that has forgotten the language shows there first).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from dsc_hub import stats
from dsc_hub.chain import hygiene, subject
from dsc_hub.chain.language import foreign_prompts, language_name
from dsc_hub.chain.text import distinct, ngrams, similarity, words
from dsc_hub.metrics.safety import refusal
from dsc_hub.records import Answer, AnswerKey, Prompt

# name -> label, unit, and kind: share of answers ("rate"), mean, or one number for all answers ("whole")
MEASURES: dict[str, dict[str, str]] = {
    "length": {"label": "length", "unit": "words", "kind": "mean"},
    "stops": {"label": "ends by itself", "unit": "share", "kind": "rate"},
    "refuses": {"label": "refuses", "unit": "share", "kind": "rate"},
    "meta_talk": {"label": "talks about the conversation", "unit": "share", "kind": "rate"},
    "repeats": {"label": "repeats itself", "unit": "share", "kind": "rate"},
    "similarity": {"label": "likeness to the baseline's answer", "unit": "ROUGE-L F1, 0..1", "kind": "mean"},
    "distinct_1": {"label": "distinct words", "unit": "share of all words", "kind": "whole"},
    "distinct_2": {"label": "distinct word pairs", "unit": "share of all pairs", "kind": "whole"},
    "neutral": {"label": "surprise at neutral text", "unit": "nats a token", "kind": "mean"},
}

# Range of a mean, to which its interval is limited; shares have their own (0..1).
RANGES: dict[str, stats.Bounds] = {"length": (0.0, None), "similarity": (0.0, 1.0), "neutral": (0.0, None)}


def measures_of(prompts: Iterable[Prompt]) -> dict[str, dict[str, str]]:
    """Return the measures for answers to these prompts: `MEASURES`, plus refusals by kind if prompts have kinds.

    Refusals by kind show too many refusals as well as too few.
    """
    kinds = sorted({p.kind for p in prompts} - {""})
    by_kind = {f"refuses_{k}": {"label": f"refuses what is {k}", "unit": "share", "kind": "rate"} for k in kinds}
    out: dict[str, dict[str, str]] = {}
    for name, about in MEASURES.items():
        out |= {name: about} | (by_kind if name == "refuses" else {})
    return out


def variety(arms: Mapping[str, Iterable[Answer]], n: int) -> tuple[dict[str, float | None], int]:
    """Return distinct-n of each arm (None for an arm without n-grams), and how many n-grams of each arm were compared.

    Distinct-n is computed across the answers of one sample and averaged over the samples, because several answers to
    one prompt may be alike. All arms are cut to the n-gram count of the shortest arm, because distinct-n falls with
    the length of the text.
    """
    texts: dict[str, dict[int, list[str]]] = {arm: defaultdict(list) for arm in arms}
    for arm, rows in arms.items():
        for row in rows:
            texts[arm][row.sample].append(row.text)
    values: dict[str, list[float]] = {arm: [] for arm in arms}
    compared = 0
    for k in sorted(set().union(*texts.values())):
        most = min(sum(len(ngrams(words(t), n)) for t in by_sample[k]) for by_sample in texts.values())
        compared += most
        for arm, by_sample in texts.items():
            if (d := distinct(by_sample[k], n, most)) is not None:
                values[arm].append(d)
    return {arm: sum(v) / len(v) if v else None for arm, v in values.items()}, compared


def summarise_side_effects(
    answers: Sequence[Answer],
    prompts: Sequence[Prompt],
    arms: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    neutral: Mapping[str, Mapping[str, float]],
    confidence: float,
    unreadable: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return {measures, arms: {arm: {measure: estimate}}, differences: {"a - b": {measure: difference}}}.

    An estimate of something that was not measured holds None. `neutral` has nats per token by arm and neutral text, for
    the arms that are one plain answer of their model. `unreadable`: see `unreadable_measures`. All differences of all
    measures here form one Holm family, separate from that of the scores.
    """
    by_id = {p.id: p for p in prompts}
    measures, not_read = measures_of(prompts), unreadable or {}
    kinds = {name: about["kind"] for name, about in measures.items()}
    rows = {arm: {(r.prompt_id, r.sample): r for r in answers if r.arm == arm} for arm in arms}
    base = rows[arms[0]]
    values = {arm: _values(rows[arm], base if arm != arms[0] else {}, by_id, not_read) for arm in arms}
    samples = max((r.sample for r in answers), default=0) + 1
    in_order = {arm: [row for _, row in sorted(by_key.items())] for arm, by_key in rows.items()}
    distinct_n = {name: variety(in_order, n)[0] for name, n in (("distinct_1", 1), ("distinct_2", 2))}
    constants = {"low": None, "high": None, "groups": None, "reason": "one number for all answers", "samples": samples}
    out: dict[str, Any] = {"measures": measures, "arms": {}, "differences": {}}
    for arm in arms:
        out["arms"][arm] = {
            name: {"mean": distinct_n[name][arm], "n": len(rows[arm]), **constants}
            if name in distinct_n
            else _one_arm(name, kind, rows[arm], values[arm], neutral.get(arm), confidence)
            | ({"reason": reason} if (reason := not_read.get(name.partition("_")[0], not_read.get(name))) else {})
            for name, kind in kinds.items()
        }
    for a, b in pairs:
        out["differences"][f"{a} - {b}"] = {
            name: _two(name, kind, values[a], values[b], by_id, neutral.get(a, {}), neutral.get(b, {}), confidence)
            for name, kind in kinds.items()
            if name != "similarity" and kind != "whole"
        }
    stats.adjust(out["differences"])
    return out


def _values(
    rows: Mapping[AnswerKey, Answer],
    base: Mapping[AnswerKey, Answer],
    by_id: Mapping[str, Prompt],
    not_read: Collection[str],
) -> dict[str, dict[AnswerKey, float]]:
    """Return the value of each measure for each answer."""
    measures: dict[str, Callable[[AnswerKey, Answer], float | None]] = {
        "length": lambda k, r: len(words(r.text)),
        "stops": lambda k, r: r.finish_reason == "stop",
        "refuses": lambda k, r: refusal.refuses(r.text),
        "meta_talk": lambda k, r: hygiene.talks_about_the_conversation(r.text),
        "repeats": lambda k, r: hygiene.repeats_itself(r.text, subject.subject_of(by_id[r.prompt_id])),
        "similarity": lambda k, r: similarity(r.text, base[k].text) if k in base else None,
    }
    values = {
        name: {} if name in not_read else {k: float(v) for k, r in rows.items() if (v := f(k, r)) is not None}
        for name, f in measures.items()
    }
    for kind in {p.kind for p in by_id.values()} - {""}:
        values[f"refuses_{kind}"] = {k: v for k, v in values["refuses"].items() if by_id[k[0]].kind == kind}
    return values


def unreadable_measures(prompts: Sequence[Prompt], language: str) -> dict[str, str]:
    """Return the measures by phrases of a language that the prompts are not in, with the reason: not zero but unknown.

    Refusals of each kind go with refusals. `language` is that of the recipe's hygiene; none if answers may be in any.
    """
    if language == "any":
        return {}
    languages = {"refuses": refusal.LANGUAGES, "meta_talk": hygiene.META_TALK_LANGUAGES}
    texts = [p.text for p in prompts]
    return {
        name: f"its phrases are {' or '.join(map(language_name, known))}, the prompts are {reason}"
        for name, known in languages.items()
        if (reason := foreign_prompts(texts, known))
    }


def _one_arm(
    name: str,
    kind: str,
    rows: Mapping[AnswerKey, Answer],
    values: Mapping[str, Mapping[AnswerKey, float]],
    neutral: Mapping[str, float] | None,
    confidence: float,
) -> dict[str, Any]:
    if name == "neutral":
        return _neutral(neutral, confidence)
    measured = values[name]
    if name == "similarity" and not measured:
        return stats.estimate([], []) | {"reason": "the baseline"}
    groups = [rows[k].group for k in measured]
    if kind == "rate":
        return stats.rate([bool(v) for v in measured.values()], groups, confidence)
    return stats.estimate(list(measured.values()), groups, confidence, RANGES[name])


def _neutral(nats: Mapping[str, float] | None, confidence: float) -> dict[str, Any]:
    e = stats.estimate(list((nats or {}).values()), list(nats or {}), confidence, RANGES["neutral"])
    if e["mean"] is None:
        reason = "asked of plain arms only" if nats is None else "the endpoint gives no log-probabilities of prompts"
        return e | {"reason": reason, "perplexity": None}
    return e | {"perplexity": math.exp(e["mean"])}


def _two(
    name: str,
    kind: str,
    a: Mapping[str, Mapping[AnswerKey, float]],
    b: Mapping[str, Mapping[AnswerKey, float]],
    by_id: Mapping[str, Prompt],
    neutral_a: Mapping[str, float],
    neutral_b: Mapping[str, float],
    confidence: float,
) -> dict[str, Any]:
    if name == "neutral":
        texts = [t for t in neutral_a if t in neutral_b]
        return stats.paired_difference([neutral_a[t] for t in texts], [neutral_b[t] for t in texts], texts, confidence)
    keys = sorted(k for k in a[name] if k in b[name])
    groups = [by_id[k[0]].group for k in keys]
    one, other = [a[name][k] for k in keys], [b[name][k] for k in keys]
    if kind == "rate":
        return stats.rate_difference([bool(x) for x in one], [bool(x) for x in other], groups, confidence)
    return stats.paired_difference(one, other, groups, confidence)
