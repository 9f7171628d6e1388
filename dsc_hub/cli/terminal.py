"""The terminal: where results are printed, columns, and questions that are answered by a key."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dsc_hub.system.progress import CleanConsole

if TYPE_CHECKING:
    pass


_WIDTH = 200  # where there is no terminal to ask

TWO_COLUMNS = 100  # the narrowest terminal on which two texts stand side by side
_ASKED = sys.stdout.isatty() or "COLUMNS" in os.environ
out = CleanConsole(width=None if _ASKED else _WIDTH)


def visible(text: str) -> str:
    """Model text without control characters: it must not be able to steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def line(text: str) -> None:
    """One line of text, no markup read from it."""
    out.print(Text(text))


def beside(texts: Sequence[tuple[str, str, str]], above: tuple[str, str] | None = None) -> None:
    """(title, text, small print) side by side, one below the other where the terminal is narrow; (title, text) `above` all.

    Texts are a model's or a stranger's: control characters are taken out, and no markup is read from them.
    """
    if above:
        out.print(_panel(*above, ""))
    panels = [_panel(*t) for t in texts]
    if out.width < TWO_COLUMNS:
        for panel in panels:
            out.print(panel)
        return
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    out.print(table)


def _panel(title: str, text: str, small: str) -> Panel:
    body = Text(visible(text)) if text.strip() else Text("(empty)", "dim")
    return Panel(
        body, title=Text(title, "bold"), title_align="left", subtitle=Text(small, "dim"), subtitle_align="right"
    )


def ask(prompt: str) -> str | None:
    """The user's next line; None at the end of input (Ctrl-D, or the end of a file)."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "replace":  # once: not after the first line
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` its line editing)
    try:
        return input(prompt)
    except EOFError:
        print()
        return None
