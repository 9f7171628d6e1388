"""Two or more evaluated runs beside each other: the same arm on the same prompts, paired where both answered.

Run folders in, numbers out; the first run is the baseline. Scores are matched by their scorer (package and version, or model
and commit), not by the part they play: what chose the data in one run may be the second scorer of the other. Numbers of
different prompts are never subtracted; where the arms ran on other weights or at another temperature, a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc_hub import stats
from dsc_hub.config.recipe import SCORERS
from dsc_hub.errors import ConfigError
from dsc_hub.runs.results import answers, evaluated
from dsc_hub.runs.run import Run

Row = Mapping[str, Any]


def compare(runs: Sequence[Run], confidence: float = 0.95) -> dict[str, Any]:
    """{confidence, runs: [{name, folder, served_on, split, temperature, scores, arms}], differences: [{run, against, arm, prompts,
    unshared, by_score}], notes: sentences}.

    `by_score` has a `stats.paired_difference` a scorer, run minus baseline, with `p_holm` over all of them together. `prompts`
    counts answers that both runs gave (prompt and sample), `unshared` those that only one has. Arms or scorers that only one
    run has are left out. ConfigError for fewer than two different runs; RunError for one that is not evaluated.
    """
    if len({run.folder.resolve() for run in runs}) < max(2, len(runs)):
        raise ConfigError(
            "compare needs two or more different runs", "Name run folders, as runs/quickstart/0123456789ab."
        )
    read = [_read(run) for run in runs]
    names = _names(runs)
    first, baseline = read[0], names[0]
    differences = []
    for name, other in zip(names[1:], read[1:], strict=True):
        for arm in (a for a in first["rows"] if a in other["rows"]):
            mine, theirs = other["rows"][arm], first["rows"][arm]
            shared = len(mine.keys() & theirs.keys())
            by_score = {
                first["names"][scorer]: stats.paired_rows(
                    mine, theirs, column, first["columns"][scorer], confidence, other["ranges"][column]
                )
                for scorer, column in other["columns"].items()
                if scorer in first["columns"]
            }
            differences.append(
                {"run": name, "against": baseline, "arm": arm, "prompts": shared}
                | {"unshared": len(mine) + len(theirs) - 2 * shared, "by_score": by_score}
            )
    stats.adjust({str(i): d["by_score"] for i, d in enumerate(differences)})
    shown = [
        {
            "name": name,
            "folder": str(run.folder),
            **{key: r[key] for key in ("served_on", "split", "temperature", "scores", "arms")},
        }
        for name, run, r in zip(names, runs, read, strict=True)
    ]
    notes = [
        f"{r['name']} and {baseline} differ in what the arms {words}: {r[key]} against {shown[0][key]}."
        for r in shown[1:]
        for key, words in (
            ("served_on", "ran on"),
            ("split", "were asked (split)"),
            ("temperature", "were drawn at (temperature)"),
        )
        if r[key] != shown[0][key]
    ]
    return {"confidence": confidence, "runs": shown, "differences": differences, "notes": notes}


def _names(runs: Sequence[Run]) -> list[str]:
    """Recipe and fingerprint; the whole path where that doesn't tell them apart."""
    short = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder.resolve()) for run in runs]


def _read(run: Run) -> dict[str, Any]:
    """Answers by arm, prompt and sample, and which column of them each scorer fills."""
    section = evaluated(run)["evaluation"]
    rows: dict[str, dict[tuple[str, int], Row]] = {arm: {} for arm in section["arms"]}
    for row in answers(run):
        rows[row["arm"]][row["prompt_id"], row["sample"]] = row
    facts, shown = run.facts, {column: about["name"] for column, about in section["scores"].items()}
    identity = {column: _meant(facts, column, name) for column, name in shown.items()}
    own = facts["recipe"]["evaluation"].get("temperature")
    return {
        "rows": rows,
        "columns": {identity[column]: column for column in shown},
        "names": {identity[column]: name for column, name in shown.items()},
        "ranges": {column: (about.get("low"), about.get("high")) for column, about in section["scores"].items()},
        "served_on": section["served_on"],
        "split": section["split"],
        "temperature": facts["recipe"]["generation"]["temperature"] if own is None else own,
        "scores": shown,
        "arms": {arm: {s: numbers[s] for s in shown} for arm, numbers in section["arms"].items()},
    }


def _meant(facts: Mapping[str, Any], column: str, name: str) -> str:
    """What a column measures, exactly, every term with its weight: runs are compared where it is the same."""
    place = SCORERS[column]
    section = facts["recipe"].get(place) or {}
    terms = [(place, section), *((f"{place}.plus.{i}", term) for i, term in enumerate(section.get("plus") or ()))]
    told = [(term.get("weight", 1), str(facts["identity"].get(at) or name)) for at, term in terms]
    return " + ".join(identity if weight == 1 else f"{weight:g} x {identity}" for weight, identity in told)
