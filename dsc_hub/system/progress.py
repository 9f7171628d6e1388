"""What the user sees while work goes on: lines for what happened, one line that moves for what is going on.

On a terminal the moving line is drawn over itself; elsewhere it is printed plainly every `PLAIN_EVERY_S` seconds. All of
it goes to stderr, so that stdout is left to results.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from dsc_hub.system import machine

PLAIN_EVERY_S = 15.0
# What a terminal obeys instead of showing: C0 but line feed and tab, delete, C1, and marks that override the reading direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """The text with a replacement character for each one that a terminal would obey: models, servers and recipes of others
    may not move the cursor, recolour what stands there, or turn a line round."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text)


def clean_json(text: str) -> str:
    """JSON with those characters as escapes: the same value."""
    return _OBEYED.sub(lambda m: f"\\u{ord(m.group()):04x}", text)


class CleanConsole(Console):
    """A console on which all text is cleaned at the last moment, whatever it was put into; no markup is read from it, and no
    link is made."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(markup=False, highlight=False, **keys)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
            yield segment if segment.control else Segment(clean(segment.text), style)


console = CleanConsole(stderr=True, soft_wrap=True)
_log: Path | None = None


def log_to(path: Path | None) -> None:
    """From now on, `say` also appends to this file."""
    global _log
    _log = path


def say(text: str) -> None:
    """One line for the user, and the same line with the time in the run's log. No markup is read from it."""
    console.print(Text(text))
    if _log is not None:
        with _log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {clean(text)}\n")


def say_if_open(folder: Path) -> None:
    """Say that a folder with the user's prompts, answers or repos can be read by all users of this machine, if it can."""
    if machine.is_open_to_all(folder):
        say(
            f"{folder} can be read by all users of this machine; to be its only reader:  chmod go= {shlex.quote(str(folder))}"
        )


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    s = int(round(seconds))
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


class Meter:
    """Rate and time left of a stage that counts up to a total."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def left(self) -> str:
        """Time left at the mean rate so far; empty before there is one."""
        seconds = time.monotonic() - self.started
        if not self.done or seconds < 1:
            return ""
        return f"  left {duration(max(0.0, seconds / self.done * (self.total - self.done)))}"


class Line:
    """The moving line. `show(text)` as often as you like; it is drawn as often as a person can read."""

    def __init__(self, live: Live | None) -> None:
        self._live, self._last = live, time.monotonic()

    def show(self, text: str | Callable[[], str]) -> None:
        now = time.monotonic()
        if now - self._last < (PLAIN_EVERY_S if self._live is None else 0.1):
            return
        self._last, told = now, text if isinstance(text, str) else text()
        if self._live is not None:
            self._live.update(Text(told, no_wrap=True, overflow="ellipsis"))
        else:
            print(clean(told), file=sys.stderr, flush=True)


@contextmanager
def moving_line() -> Iterator[Line]:
    """A line that moves on a terminal and is repeated now and then elsewhere; gone at the end (say the result yourself)."""
    if not console.is_terminal:
        yield Line(None)
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        yield Line(live)
