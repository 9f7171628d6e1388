"""Read and validate the results of an evaluated run: its numbers and its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from dsc_hub.config.stages import BY_NAME, STAGES, writer_of
from dsc_hub.errors import DataError, RunError
from dsc_hub.records import Answer
from dsc_hub.runs import metrics_schema
from dsc_hub.runs.metrics_schema import Evaluation, Metrics
from dsc_hub.runs.run import Run
from dsc_hub.runs.test_sets import with_current_looks

T = TypeVar("T")


def evaluated(run: Run) -> tuple[Metrics, Evaluation]:
    """Return all numbers of an evaluated run, and those of its evaluation.

    RunError if it is not evaluated or metrics.json is damaged.
    """
    metrics = metrics_of(run) if run.marker("evaluation") else None
    if metrics is None or metrics.evaluation is None:
        raise RunError(f"{run.folder} is not evaluated", "Run `dsc run RECIPE`, or `dsc evaluate RECIPE`, first.")
    return metrics, metrics.evaluation


def evaluation_of(run: Run) -> Evaluation:
    """Return the numbers of the evaluation of a run (`evaluated`)."""
    return evaluated(run)[1]


def metrics_of(run: Run) -> Metrics:
    """Return the numbers of a run as their type; RunError if metrics.json is damaged."""
    return parse_metrics(run.metrics, run)


def finished_metrics(run: Run) -> Metrics:
    """Return `metrics_of` without the sections of stages that are not done: they are of what was there before."""
    metrics = run.metrics
    for stage in STAGES:
        if run.marker(stage.name) is None:
            for section in stage.sections:
                metrics.pop(section, None)
    return parse_metrics(metrics, run)


def current_metrics(run: Run) -> Metrics:
    """Return `metrics_of` with the ledger's current number of adapters scored on the run's test set."""
    return with_current_looks(run, metrics_of(run))


def needed(section: T | None, name: str) -> T:
    """Return a section of metrics.json; DataError that names its stage if the stage recorded none."""
    if section is None:
        stage = writer_of(name)
        raise DataError(
            f"metrics.json has no '{name}'",
            f"The stage '{stage}' should have recorded it: remove {stage}.done.json from the run folder and run again.",
        )
    return section


def parse_metrics(metrics: Mapping[str, Any], run: Run) -> Metrics:
    """Return a run's metrics.json as its type; RunError, with what to do, if it is damaged or of another schema."""
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


def answers(run: Run) -> list[Answer]:
    """Return the rows of evaluation/answers.jsonl of an evaluated run.

    RunError if a row is damaged, or if the number of rows per arm differs from the counts in metrics.json.
    """
    rows = list(run.rows("evaluation/answers.jsonl").as_type(Answer))
    counts = Counter(row.arm for row in rows)
    expected = {arm: a.reward.n + a.reward.unscored for arm, a in evaluation_of(run).arms.items()}
    if counts != Counter(expected):
        detail = ", ".join(f"{counts[arm]} of {expected.get(arm, 0)} of {arm}" for arm in sorted({*counts, *expected}))
        raise RunError(
            f"{run['evaluation/answers.jsonl']} doesn't hold the answers that metrics.json counts: {detail}",
            f"Remove {run['evaluation.done.json']} and run again: what the models wrote is kept elsewhere.",
        )
    return rows
