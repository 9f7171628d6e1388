"""Conversion of a metrics.json of an older dsc to the current schema: numbers whose meaning has changed become null."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from dsc_hub import stats
from dsc_hub.runs.metrics_schema import SCHEMA, Criterion, CriterionVerdict
from dsc_hub.runs.verdict import BETTER, Setting, better, first_look, verdict_of

OLDER = "recorded by an older dsc, which counted texts that hygiene rejected too"


def upgrade(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a metrics.json of the previous schema to the current one; return any other schema unchanged.

    Numbers whose meaning has changed become null with a reason; Holm-adjusted p values are recomputed for the current
    families. ValueError, LookupError, TypeError or AttributeError if the input does not fit the previous schema.
    """
    out: dict[str, Any] = copy.deepcopy(dict(metrics))
    if out.get("schema") != SCHEMA - 1:
        return out
    out["schema"] = SCHEMA
    if sampling := out.get("sampling"):
        for owner, key in [
            (sampling, "first_reward"),
            *((s, k) for s in sampling["steps"] for k in ("reward_proposed", "reward_state")),
        ]:
            owner[key] = {"mean": None, "low": None, "high": None, "n": 0, "groups": None, "reason": OLDER}
        sampling["last_step"].pop("sentence", None)
        sampling["last_step"]["gain"].pop("bootstrap", None)
    if evaluation := out.get("evaluation"):
        _upgrade_evaluation(evaluation)
    if "blind" in out:
        out["blind"]["win_rate"].pop("bootstrap", None)
    return out


def _upgrade_evaluation(evaluation: dict[str, Any]) -> None:
    differences, side = evaluation["differences"], evaluation["side_effects"]
    estimates = [e for arm in evaluation["arms"].values() for e in arm.values() if isinstance(e, dict)]
    for by_name in (*differences.values(), *side["arms"].values(), *side["differences"].values()):
        estimates += by_name.values()
    for e in estimates:
        e.pop("bootstrap", None)
    evaluation["primary"] = None
    if claim := evaluation["claim"]:
        evaluation["primary"] = stats.adjust_scores(differences, "distilled - base")
        evaluation["claim"] = _judged_anew(claim, evaluation)


def _judged_anew(old: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Judge an older claim by the current rules, as far as its numbers allow.

    The scores are judged by interval and p. Criteria that were judged by bare counts keep their text, and their verdict
    is undecided.
    """
    difference, scores = evaluation["differences"]["distilled - base"], evaluation["scores"]
    setting = Setting(evaluation["split"], evaluation["samples"], evaluation["confidence"])
    criteria = [better(name, difference.get(name), scores.get(name, {}), setting) for name in BETTER]
    for c in old["criteria"]:
        if c["name"] in BETTER.values():
            continue
        is_met = c["name"] == "on test prompts" and c["holds"]
        verdict: CriterionVerdict = "unmeasured" if c["holds"] is None else "met" if is_met else "undecided"
        note = c["told"] if is_met or c["holds"] is None else f"{c['told']} (an older dsc compared bare counts)"
        criteria.append(
            Criterion(name=c["name"], verdict=verdict, base=c.get("base"), distilled=c.get("distilled"), note=note)
        )
    criteria.append(first_look(setting))
    return {
        "verdict": verdict_of([(c.name, c.verdict) for c in criteria], old["answers"]),
        "answers": old["answers"],
        "groups": evaluation["groups"],
        "groups_needed": None,
        "criteria": [c.model_dump() for c in criteria],
    }
