"""The objectives of training beside each other, from evaluated runs of one recipe, as a Markdown table.

    dsc grid recipes/grids/objectives.yaml
    python -m tests.benchmarks.objectives runs/quickstart/*

Runs without an evaluation on the split are left out (--split, by default validation).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsc_hub.report.formatting import interval, number
from dsc_hub.runs.metrics_schema import Metrics
from dsc_hub.runs.results import metrics_of
from dsc_hub.runs.run import Run
from dsc_hub.system.progress import duration

COLUMNS = ("training", "rows", "reward", "second scorer", "variety of the base's", "repeats itself", "words", "time")


def label(run: Run, metrics: Metrics) -> str:
    recipe = run.facts.recipe
    d = recipe.distill
    parts = [d.objective]
    if d.weight_temperature is not None and metrics.distill:
        parts.append(f"weighted, T {d.weight_temperature:g}, {metrics.distill.effective_rows:.0f} effective rows")
    if d.objective != "sft":
        parts.append(f"learning rate {getattr(d, d.objective).get('learning_rate', 'default')}")
    if recipe.rounds > 1 and metrics.rounds:
        parts.append(f"{len(metrics.rounds.rounds)} rounds, {metrics.rounds.kept} kept")
    if d.seed is not None:
        parts.append(f"seed {d.seed}")
    return ", ".join(parts)


def row(run: Run) -> list[str]:
    metrics = metrics_of(run)
    e, d = metrics.evaluation, metrics.distill
    assert e and d and e.claim
    difference = e.differences["distilled - base"]
    criteria = {c.name: c for c in e.claim.criteria}
    varied, repeats, words = (criteria[name] for name in ("as varied", "no more repetition", "as long"))
    return [
        label(run, metrics),
        str(d.rows),
        interval(difference["reward"]),
        interval(difference["second"]),
        f"{number(varied.value)} ({number(varied.low)} to {number(varied.high)})",
        f"{number(100 * (repeats.distilled or 0), 0)} %, base {number(100 * (repeats.base or 0), 0)} %",
        f"{number(words.distilled, 0)}, base {number(words.base, 0)}",
        duration(d.seconds),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", default="validation")
    given = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|:---|{'---:|' * (len(COLUMNS) - 1)}")
    for folder in sorted(given.runs, key=lambda p: p.stat().st_ctime):
        run = Run(folder)
        if run.marker("evaluation") and (e := metrics_of(run).evaluation) and e.split == given.split:
            print(f"| {' | '.join(row(run))} |")


if __name__ == "__main__":
    main()
