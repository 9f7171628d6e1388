"""Progress output: one line per event, and a progress line for running work.

On a terminal the progress line is redrawn in place; elsewhere it is printed every `PLAIN_EVERY_S` seconds. All output
goes to stderr, so that stdout is reserved for results.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from dsc_hub.system import machine

PLAIN_EVERY_S = 15.0
# Control characters: C0 except line feed and tab, delete, C1, and bidirectional overrides.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Replace each control character of a text by the replacement character.

    Output of models, servers and third-party recipes must not move the cursor, change colours or reverse a line.
    """
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text)


def clean_json(text: str) -> str:
    """Escape control characters in JSON text; the value stays the same."""
    return _OBEYED.sub(lambda m: f"\\u{ord(m.group()):04x}", text)


def stop_printing() -> None:
    """Send what is still printed to stderr nowhere: its reader is gone, or its disk is full. Work goes on."""
    with suppress(OSError, ValueError):  # a test's stderr has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def never_ends_work() -> Iterator[None]:
    """Let a failure of stderr, which has nothing but progress, end nothing."""
    try:
        yield
    except OSError:
        stop_printing()


class CleanConsole(Console):
    """A console that cleans all text at rendering time, in any renderable; without markup and links.

    Where the reader of results (stdout) is gone the process ends, as rich does it; without one of progress it goes on.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(markup=False, highlight=False, **keys)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
            yield segment if segment.control else Segment(clean(segment.text), style)

    def on_broken_pipe(self) -> None:
        if not self.stderr:
            super().on_broken_pipe()
        stop_printing()


console = CleanConsole(stderr=True, soft_wrap=True)
_log: Path | None = None


def log_to(path: Path | None) -> None:
    """Let `say` also append to this file from now on."""
    global _log
    _log = path


def say(text: str) -> None:
    """Print one line for the user, and append it with a timestamp to the run's log. Markup is not interpreted."""
    with never_ends_work():
        console.print(Text(text))
    if _log is not None:
        with _log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {clean(text)}\n")


_said: set[str] = set()


def say_once(text: str) -> None:
    """Do as `say`, unless this process has said the same before."""
    if text not in _said:
        _said.add(text)
        say(text)


def say_if_open(folder: Path) -> None:
    """Warn if all users of this machine can read a folder with the user's prompts, answers or repos."""
    if machine.is_open_to_all(folder):
        say(
            f"{folder} can be read by all users of this machine; to be its only reader:  chmod go= "
            f"{shlex.quote(str(folder))}"
        )


def duration(seconds: float) -> str:
    """Format seconds as `42 s`, `3 min 05 s` or `2 h 10 min`."""
    s = int(round(seconds))
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


class Meter:
    """Remaining time of a task that counts up to a total."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def left(self, begun: int = 0) -> str:
        """Return the remaining time at the mean rate so far; "" before there is one.

        `begun` counts what is at work, which is half done on average: without it the first seconds of many requests at
        once would count for nothing.
        """
        seconds = time.monotonic() - self.started
        if not self.done or seconds < 1:
            return ""
        done = self.done + begun / 2
        return f"  left {duration(max(0.0, seconds / done * (self.total - done)))}"


class Line:
    """The progress line. `show(text)` may be called at any rate; redraws are throttled."""

    def __init__(self, live: Live | None) -> None:
        self._live, self._last = live, time.monotonic() if live is None else -math.inf

    def show(self, text: str | Callable[[], str]) -> None:
        now = time.monotonic()
        if now - self._last < (PLAIN_EVERY_S if self._live is None else 0.1):
            return
        self._last, message = now, text if isinstance(text, str) else text()
        with never_ends_work():
            if self._live is not None:
                self._live.update(Text(message, no_wrap=True, overflow="ellipsis"))
            elif not console.quiet:
                print(clean(message), file=sys.stderr, flush=True)


@contextmanager
def moving_line() -> Iterator[Line]:
    """Yield a progress line: redrawn on a terminal, else printed at intervals. It is removed at the end."""
    if not console.is_terminal:
        yield Line(None)
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        yield Line(live)
