"""One self-contained page of tables and a forest plot, for what compares several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.table import Table

from dsc_hub.report import style
from dsc_hub.report.formatting import measured
from dsc_hub.report.templates import asset, page_environment
from dsc_hub.runs.metrics_schema import Estimate
from dsc_hub.system.files import write_whole


def write_tables(
    path: Path, title: str, tables: Sequence[Table], plots: Mapping[str, Figure], notes: Sequence[str] = ()
) -> None:
    """Write tables, as they are printed on the terminal, with plots above them. `plots`: title -> figure."""
    page = (
        page_environment()
        .get_template("tables.html.jinja")
        .render(
            title=title,
            css=Markup(asset("report.css")),
            tables=[_cells(table) for table in tables],
            plots=[Markup(style.as_svg(figure, f"plot{n}", name)) for n, (name, figure) in enumerate(plots.items())],
            notes=notes,
        )
    )
    write_whole(path, page)


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return (titles, rows) of a table as plain text."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return [str(column.header) for column in table.columns], [list(row) for row in zip(*columns, strict=True)]


def forest(title: str, estimates: Mapping[str, Estimate]) -> Figure | None:
    """Return a forest plot of labelled differences around zero; None without one that has a mean."""
    drawn = {label: e for label, e in estimates.items() if measured(e.mean)}
    if not drawn:
        return None
    with matplotlib.rc_context(style.PLOT_STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.36 * len(drawn)), layout="constrained")
        ax = figure.subplots()
        ax.axvline(0, color=style.MUTED, linewidth=1)
        for y, e in enumerate(drawn.values()):
            if measured(e.low) and measured(e.high):
                ax.plot([e.low, e.high], [y, y], color=style.ACCENT, linewidth=3.2, alpha=0.45)
            ax.plot([e.mean or 0.0], [y], "o", color=style.ACCENT, markersize=7)
        ax.set_yticks(range(len(drawn)), list(drawn))
        ax.set_ylim(len(drawn) - 0.45, -0.55)
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
        ax.spines.left.set_visible(False)
    return figure
