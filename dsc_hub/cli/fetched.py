"""The screen of `dsc fetch`."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from dsc_hub.cli import terminal
from dsc_hub.cli.screens import grid
from dsc_hub.pipeline.fetch import Fetched
from dsc_hub.report.formatting import megabytes


def show_fetched(fetched: Fetched, folder: Path, offline: str, publishing: str | None) -> None:
    """Print what was fetched, the command that runs it without a network in `folder`, and the one that publishes."""
    table = grid()
    for part in fetched.parts:
        at = f" at {part.commit[:12]}" if part.commit else ""
        table.add_row(part.place, Text(f"{part.name}{at}   {part.note or megabytes(part.bytes or 0)}"))
    for server in fetched.servers:
        table.add_row("server", Text(f"{server} must be reachable while it runs"))
    table.add_row("caches", Text("\n".join(fetched.caches)))
    table.add_row("run folder", str(folder))
    if publishing:
        table.add_row("publish after", Text(f"{publishing}   (with a network; takes over what is done)"))
    table.add_row("run offline", Text(offline))
    terminal.out.print(table)
