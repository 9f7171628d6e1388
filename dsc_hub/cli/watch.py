"""`dsc watch RUN`: a run while it goes on, redrawn on the terminal until it ends."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsc_hub.cli.terminal import out
from dsc_hub.report.formatting import count, number
from dsc_hub.runs.live import View, Watched, current
from dsc_hub.runs.overview import is_running
from dsc_hub.runs.run import Run

REDRAWN_S = 1.0
SHOWN_LETTERS = 500


def watch_run(run: Run, once: bool) -> None:
    """Draw the run every second until no process works on it, or once."""
    watched = Watched(current(run), run)
    if once or not out.is_terminal:
        out.print(screen(watched.run, watched.look()))
        return
    with Live(console=out, auto_refresh=False) as live:
        while True:
            if (now := current(run)).folder != watched.run.folder:
                watched = Watched(now, run)
            live.update(screen(watched.run, watched.look()), refresh=True)
            if not is_running(run):
                return
            time.sleep(REDRAWN_S)


def screen(run: Run, view: View) -> RenderableType:
    """Return what is shown of a run at one moment."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("run", Text(str(run.folder)))
    stage = f"{view.stage}, running" if view.is_running else view.state
    table.add_row("stage", Text(f"{stage}; finished stages: {', '.join(view.done) or 'none'}"))
    if view.planned:
        rate = f", {view.per_minute:.0f} a minute" if view.per_minute else ""
        of = "of at most" if run.facts.recipe.ends_early else "of"
        table.add_row("chains", Text(f"{count(view.chains)} {of} {count(view.planned)}{rate}"))
        table.add_row("", ProgressBar(total=view.planned, completed=min(view.chains, view.planned), width=40))
    if view.proposals:
        share = f"{100 * view.accepted / view.proposals:.0f} %"
        table.add_row("revisions", Text(f"{count(view.accepted)} of {count(view.proposals)} accepted ({share})"))
    if view.reward is not None:
        table.add_row(
            "reward so far", Text(f"{number(view.reward, 3)}, mean of {count(view.clean)} chains that end clean")
        )
    if view.stage == "distill" and view.training:
        table.add_row("training", Text(view.training.removeprefix("distill").strip()))
    if view.log:
        table.add_row("log", Text(view.log))
    parts: list[RenderableType] = [table]
    if view.last and view.stage == "sampling":
        parts += [Text(""), _last_chain(view)]
    return Group(*parts)


def _last_chain(view: View) -> RenderableType:
    chain = view.last
    assert chain is not None
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("first answer", Text(chain.answer[:SHOWN_LETTERS]))
    table.add_row("end", Text(chain.final[:SHOWN_LETTERS] if chain.state_step else "the first answer"))
    before, after = chain.answer_score.value, chain.final_score.value
    table.add_row("reward", Text(f"{number(before, 3)} -> {number(after, 3)}"))
    return table
