"""Comparison of two or more evaluated runs: the same arm on the same prompts, paired where both runs have an answer.

Run folders in, numbers out; the first run is the baseline. Scores are matched by their scorer (package and version, or
model and commit), not by their role: the reward of one run may be the second scorer of another. Numbers of different
prompts are never subtracted; a note reports if the arms ran on different weights or at different temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc_hub import stats
from dsc_hub.config.recipe import SCORERS
from dsc_hub.errors import ConfigError
from dsc_hub.runs.results import answers, evaluated
from dsc_hub.runs.run import Run
from dsc_hub.runs.verdict import Row


def compare_runs(runs: Sequence[Run], confidence: float = 0.95) -> dict[str, Any]:
    """Compare each further run with the first one.

    Return {confidence, runs: [{name, folder, served_on, split, temperature, scores, arms}], differences: [{run,
    against, arm, prompts, unshared, by_score}], notes: sentences}. `by_score` has one `stats.paired_difference` per
    scorer, run minus baseline, with `p_holm` over all of them together. `prompts` counts answers (prompt and sample)
    that both runs have, `unshared` those that only one has. Arms or scorers that only one run has are left out.
    ConfigError for fewer than two different runs; RunError for a run that is not evaluated.
    """
    if len({run.folder.resolve() for run in runs}) < max(2, len(runs)):
        raise ConfigError(
            "compare needs two or more different runs", "Name run folders, as runs/quickstart/0123456789ab."
        )
    read = [_read_run(run) for run in runs]
    names = _run_names(runs)
    first, baseline = read[0], names[0]
    differences = []
    for name, other in zip(names[1:], read[1:], strict=True):
        for arm in (a for a in first["rows"] if a in other["rows"]):
            run_rows, baseline_rows = other["rows"][arm], first["rows"][arm]
            shared = len(run_rows.keys() & baseline_rows.keys())
            by_score = {
                first["names"][scorer]: stats.paired_rows(
                    run_rows, baseline_rows, column, first["columns"][scorer], confidence, other["ranges"][column]
                )
                for scorer, column in other["columns"].items()
                if scorer in first["columns"]
            }
            differences.append(
                {"run": name, "against": baseline, "arm": arm, "prompts": shared}
                | {"unshared": len(run_rows) + len(baseline_rows) - 2 * shared, "by_score": by_score}
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


def _run_names(runs: Sequence[Run]) -> list[str]:
    """Return recipe/fingerprint of each run, or the full paths if these names are not unique."""
    short = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder.resolve()) for run in runs]


def _read_run(run: Run) -> dict[str, Any]:
    """Return a run's answers by arm, prompt and sample, the column of each scorer, and the evaluation settings."""
    section = evaluated(run)["evaluation"]
    rows: dict[str, dict[tuple[str, int], Row]] = {arm: {} for arm in section["arms"]}
    for row in answers(run):
        rows[row["arm"]][row["prompt_id"], row["sample"]] = row
    facts, scorers = run.facts, {column: about["name"] for column, about in section["scores"].items()}
    identity = {column: _meant(facts, column, name) for column, name in scorers.items()}
    temperature = facts["recipe"]["evaluation"].get("temperature")
    return {
        "rows": rows,
        "columns": {identity[column]: column for column in scorers},
        "names": {identity[column]: name for column, name in scorers.items()},
        "ranges": {column: (about.get("low"), about.get("high")) for column, about in section["scores"].items()},
        "served_on": section["served_on"],
        "split": section["split"],
        "temperature": facts["recipe"]["generation"]["temperature"] if temperature is None else temperature,
        "scores": scorers,
        "arms": {arm: {s: numbers[s] for s in scorers} for arm, numbers in section["arms"].items()},
    }


def _meant(facts: Mapping[str, Any], column: str, name: str) -> str:
    """Return the exact identity of a column: every scorer term with its weight. Equal identities are comparable."""
    place = SCORERS[column]
    section = facts["recipe"].get(place) or {}
    terms = [(place, section), *((f"{place}.plus.{i}", term) for i, term in enumerate(section.get("plus") or ()))]
    weighted = [(term.get("weight", 1), str(facts["identity"].get(location) or name)) for location, term in terms]
    return " + ".join(identity if weight == 1 else f"{weight:g} x {identity}" for weight, identity in weighted)
