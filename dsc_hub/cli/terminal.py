"""Terminal input and output: result lines, columns, and prompts."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dsc_hub.system.progress import CleanConsole

_WIDTH = 200  # used if the width of the terminal is unknown

TWO_COLUMNS = 100  # minimum width for two texts side by side
_ASKED = sys.stdout.isatty() or "COLUMNS" in os.environ
out = CleanConsole(width=None if _ASKED else _WIDTH)


def visible(text: str) -> str:
    """Replace control characters in model text, so that it cannot control the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def line(text: str) -> None:
    """Print one line of text without interpreting markup."""
    out.print(Text(text))


def beside(texts: Sequence[tuple[str, str, str]], above: tuple[str, str] | None = None) -> None:
    """Print (title, text, caption) panels side by side, stacked on a narrow terminal; (title, text) `above` all.

    Texts are untrusted: control characters are replaced, and markup is not interpreted.
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


def ask_key(prompt: str) -> str | None:
    """Return the user's next line; None at the end of input (Ctrl-D, or the end of a file)."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "replace":  # before the first read
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        import readline  # noqa: F401  (enables line editing in `input`)
    try:
        return input(prompt)
    except EOFError:
        print()
        return None
