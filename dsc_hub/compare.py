"""Two or more evaluated runs beside each other: the same arm on the same prompts, paired where both answered.

Run folders in, numbers out; the first run is the baseline. Scores are matched by their scorer, not by the part they play:
what chose the data in one run may be the second scorer of the other. Numbers of different prompts are never subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc_hub import stats
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.runs import Run
from dsc_hub.side_effects import adjust

Row = Mapping[str, Any]


def compare(runs: Sequence[Run], confidence: float = 0.95) -> dict[str, Any]:
    """{runs: [{name, folder, scores, arms}], differences: [{run, against, arm, prompts, unshared, by_score}]}.

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
            both = sorted(k for k in mine if k in theirs)
            by_score = {
                scorer: _difference(mine, theirs, both, column, first["columns"][scorer], confidence)
                for scorer, column in other["columns"].items()
                if scorer in first["columns"]
            }
            differences.append(
                {"run": name, "against": baseline, "arm": arm, "prompts": len(both)}
                | {"unshared": len(mine) + len(theirs) - 2 * len(both), "by_score": by_score}
            )
    adjust({f"{d['run']} {d['arm']}": d["by_score"] for d in differences})
    shown = [
        {"name": name, "folder": str(run.folder), "scores": r["about"], "arms": r["arms"]}
        for name, run, r in zip(names, runs, read, strict=True)
    ]
    return {"confidence": confidence, "runs": shown, "differences": differences}


def _names(runs: Sequence[Run]) -> list[str]:
    """What the runs are called: recipe and fingerprint, the shortest that tells them apart."""
    return [f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}" for run in runs]


def _read(run: Run) -> dict[str, Any]:
    """Answers by arm, prompt and sample, and which column of them each scorer fills."""
    section = run.metrics.get("evaluation")
    if run.marker("evaluation") is None or not isinstance(section, dict):
        raise RunError(f"{run.folder} is not evaluated", "Run `dsc evaluate RECIPE` first.")
    rows: dict[str, dict[tuple[str, int], Row]] = {arm: {} for arm in section["arms"]}
    for row in run.rows("evaluation/answers.jsonl"):
        if "sample" not in row:
            raise RunError(
                f"{run.folder} was evaluated by an older dsc",
                f"Remove {run['evaluation.done.json']} and evaluate it again.",
            )
        rows[row["arm"]][row["prompt_id"], row["sample"]] = row
    columns = {about["name"]: column for column, about in section["scores"].items()}
    about = {column: s["name"] for column, s in section["scores"].items()}
    arms = {arm: {s: numbers[s] for s in about} for arm, numbers in section["arms"].items()}
    return {"rows": rows, "columns": columns, "about": about, "arms": arms}


def _difference(
    mine: Mapping[Any, Row], theirs: Mapping[Any, Row], keys: Sequence[Any], my: str, their: str, confidence: float
) -> dict[str, Any]:
    scored = [k for k in keys if mine[k][my] is not None and theirs[k][their] is not None]
    return stats.paired_difference(
        [mine[k][my] for k in scored],
        [theirs[k][their] for k in scored],
        [mine[k]["group"] for k in scored],
        confidence,
    )
