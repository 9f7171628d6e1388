"""Tables of several runs, for the terminal or as a page: grid, comparison, list. Formats numbers, computes none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dsc_hub.evaluation.compare import Comparison
from dsc_hub.pipeline.grid import GridRow
from dsc_hub.report.formatting import ABSENT, arm_name, count, interval, measured, megabytes, number, p_value
from dsc_hub.report.verdicts import is_shown
from dsc_hub.runs.metrics_schema import Estimate
from dsc_hub.runs.overview import RunSummary
from dsc_hub.stats import PRIMARY_SCORES


def grid_table(rows: Sequence[GridRow]) -> Table:
    """Return the table of a grid: one row per combination with its settings and results."""
    table = Table(caption_justify="left", caption_style="")
    keys = list(rows[0].set)
    arms = next((list(r.arms) for r in rows if r.arms), [])
    titles = [*keys, "accepted", "reward of the state", "rows", *map(arm_name, arms)]
    titles += ["distilled − base", "second scorer", "claim"] if "distilled" in arms else []
    for title in titles:
        table.add_column(Text(title), overflow="fold")
    for r in rows:
        s, d = r.sampling, r.difference or {}
        cells = [value if isinstance(value := r.set[key], str) else json.dumps(value) for key in keys]
        cells += [
            f"{s.accepted}/{s.proposals}" if s else ABSENT,
            interval(s.reward) if s else ABSENT,
            count(r.rows),
        ]
        cells += [number(r.arms[arm]["reward"].mean) if r.arms else ABSENT for arm in arms]
        if "distilled" in arms:
            cells += [interval(d[name]) if name in d else ABSENT for name in PRIMARY_SCORES]
            cells.append(r.claim or ABSENT)
        table.add_row(*map(Text, cells))
        if r.error:
            table.add_row(Text(f"can't be finished: {r.error}", "bold red"))
    return table


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """Return the table of runs: folder, start, state, verdict, size, and the settings that differ."""
    table = Table()
    for title in ("run", "started", "state", "claim", "size", "settings that differ"):
        table.add_column(title, overflow="fold", justify="right" if title == "size" else "left")
    for before, run in zip([None, *runs], runs, strict=False):
        if before and before.recipe != run.recipe:
            table.add_section()
        started = run.started_at[:16].replace("T", " ")
        cells = (str(run.folder), started, run.state, run.verdict or ABSENT, megabytes(run.bytes))
        table.add_row(*map(Text, cells), Text("\n".join(run.differs)))
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return the tables of `compare.compare_runs`: the runs' arms, their differences, the spread between trainings."""
    arms = Table()
    for title in ("run", "arm", "score", "mean", "n", "groups"):
        arms.add_column(title, overflow="fold")
    for run in comparison.runs:
        for arm, scores in run.arms.items():
            for column, e in scores.items():
                cells = (run.name, arm_name(arm), run.scores[column], interval(e), str(e.n), str(e.groups))
                arms.add_row(*map(Text, cells))
        arms.add_section()
    differences = Table()
    for title in ("difference", "arm", "score", "mean", "p (Holm)", "answers of both", "of one alone"):
        differences.add_column(title, overflow="fold")
    for d in comparison.differences:
        name = f"{d.run} \N{MINUS SIGN} {d.against}"
        if not d.by_score:
            differences.add_row(*map(Text, (name, arm_name(d.arm), "no scorer in common", "", "", "", "")))
        for score, difference in d.by_score.items():
            no_pairs = difference.model_copy(update={"reason": "no prompt in common"})
            mean = interval(difference if difference.n else no_pairs)
            p = p_value(difference.p_holm).removeprefix("p ")
            row = (name, arm_name(d.arm), score, mean, p, str(d.prompts), str(d.unshared))
            differences.add_row(*map(Text, row))
    if not comparison.spread:
        return [arms, differences]
    spread = Table()
    for title in ("between trainings", "score", "mean", "standard deviation", "from", "to", "seeds"):
        spread.add_column(title, overflow="fold")
    for s in comparison.spread:
        values = [number(v, 3) for v in (s.mean, s.sd, s.low, s.high)]
        spread.add_row(*map(Text, (arm_name(s.arm), s.score, *values, str(s.runs))))
    return [arms, differences, spread]


def comparison_sentences(comparison: Comparison) -> list[str]:
    """Return what the runs differ in, and for each difference of the adapter's plain answers what it shows."""
    out = [f"{run.name}: {', '.join(run.differs)}" for run in comparison.runs if run.differs]
    for d in comparison.differences:
        for score, e in d.by_score.items() if d.arm == "distilled" else ():
            if not measured(e.mean):
                continue
            side = "higher" if e.mean > 0 else "lower"
            word = f"{side} than" if is_shown(e, comparison.confidence) else "not shown to differ from"
            evidence = f"{interval(e)}, {p_value(e.p_holm)} after Holm"
            out.append(f"Distilled of {d.run} is {word} that of {d.against} on {score}: {evidence}")
    return out


def comparison_page(path: Path, compared: Comparison) -> None:
    """Write a comparison as a page, with a forest plot of each score's differences."""
    from dsc_hub.report.table_page import forest, write_tables

    by_score: dict[str, dict[str, Estimate]] = {}
    for d in compared.differences:
        for score, difference in d.by_score.items():
            by_score.setdefault(score, {})[f"{arm_name(d.arm)}: {d.run} \N{MINUS SIGN} {d.against}"] = difference
    plots = {score: figure for score, rows in by_score.items() if (figure := forest(score, rows))}
    title = "Compared: " + ", ".join(f"{run.folder.parent.name}/{run.folder.name}" for run in compared.runs)
    write_tables(path, title, comparison_tables(compared), plots, [*comparison_sentences(compared), *compared.notes])


def grid_page(path: Path, rows: Sequence[GridRow]) -> None:
    """Write a grid as a page, with a forest plot of distilled - base by combination."""
    from dsc_hub.report.table_page import forest, write_tables

    plots = {}
    for name in PRIMARY_SCORES:
        found = {
            ", ".join(f"{k}={v}" for k, v in r.set.items()): r.difference[name]
            for r in rows
            if r.difference and name in r.difference
        }
        if figure := forest(f"distilled \N{MINUS SIGN} base, {name}", found):
            plots[name] = figure
    write_tables(path, f"{len(rows)} combinations", [grid_table(rows)], plots)
