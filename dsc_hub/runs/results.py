"""Read and validate the results of an evaluated run: its numbers and its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.stages import BY_NAME
from dsc_hub.errors import RunError
from dsc_hub.records import Answer
from dsc_hub.runs import metrics_schema
from dsc_hub.runs.metrics_schema import Metrics
from dsc_hub.runs.run import Run


def evaluated(run: Run) -> dict[str, Any]:
    """Return the validated metrics.json of an evaluated run; RunError if it is not evaluated or the file is damaged."""
    metrics = run.metrics
    if run.marker("evaluation") is None or "evaluation" not in metrics:
        raise RunError(f"{run.folder} is not evaluated", "Run `dsc run RECIPE`, or `dsc evaluate RECIPE`, first.")
    recorded(metrics, run)
    return metrics


def recipe_of(run: Run) -> Recipe:
    """Return the recipe that a run recorded; RunError if this version of dsc cannot read it."""
    try:
        return Recipe.model_validate(run.facts["recipe"])
    except (KeyError, ValidationError) as e:
        raise RunError(
            f"{run['run.json']} holds a recipe that this version of dsc can't read: {' '.join(str(e).split())[:200]}",
            "Run the recipe again with `dsc run`.",
        ) from None


def recorded(metrics: Mapping[str, Any], run: Run) -> Metrics:
    """Numbers of a run (metrics.json) as their type; RunError, with what to do, if they are damaged or of another
    schema."""
    hint = f"Remove {run['evaluation.done.json']} and run again: the answers are kept, only the numbers are made anew."
    if (schema := metrics.get("schema")) != metrics_schema.SCHEMA:
        raise RunError(
            f"{run['metrics.json']} is of schema {schema!r:.40}, this dsc reads {metrics_schema.SCHEMA}", hint
        )
    try:
        return Metrics.model_validate(metrics)
    except ValidationError as e:
        problems = metrics_schema.error_lines(e)
        shown = "; ".join(p[:200] for p in problems[:3]) + (f" and {len(problems) - 3} more" * (len(problems) > 3))
        section = problems[0].split(".")[0]
        if section in BY_NAME and section != "evaluation":
            hint = f"Remove {run[f'{section}.done.json']} and run the recipe again."
        elif section == "blind":
            hint = "Run `dsc blind RUN` again: the verdicts are kept, only their count is made anew."
        raise RunError(f"{run['metrics.json']} is damaged: {shown}", hint) from None


def answers(run: Run) -> list[dict[str, Any]]:
    """Return the validated rows of evaluation/answers.jsonl (`records.Answer`).

    RunError if a row is damaged, or if the number of rows per arm differs from the counts in metrics.json.
    """
    rows = [asdict(row) for row in run.rows("evaluation/answers.jsonl").as_type(Answer)]
    arms = evaluated(run)["evaluation"]["arms"]
    counts = Counter(row["arm"] for row in rows)
    expected = {arm: a["reward"]["n"] + a["reward"]["unscored"] for arm, a in arms.items()}
    if counts != Counter(expected):
        detail = ", ".join(f"{counts[arm]} of {expected.get(arm, 0)} of {arm}" for arm in sorted({*counts, *expected}))
        raise RunError(
            f"{run['evaluation/answers.jsonl']} doesn't hold the answers that metrics.json counts: {detail}",
            f"Remove {run['evaluation.done.json']} and run again: what the models wrote is kept elsewhere.",
        )
    return rows
