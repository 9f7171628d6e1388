"""The plots of a run's texts: reward before and after, reward against length. Drawn from what the browser shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsc_hub.report.style import ACCENT, MUTED, PLOT_STYLE, QUIET

MOST_POINTS = 1500  # of a scatter plot: more only make the page heavy; every k-th chain is drawn
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")


def draw_texts(texts: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figure `texts` if there are chains with rewards: before and after, and against length."""
    ends = [end for end in map(_ends, _some(texts["chains"])) if end is not None]
    if not ends:
        return {}
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _before_and_after(left, ends)
        _by_length(right, ends)
    return {"texts": figure}


def _some(chains: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return chains[:: max(1, -(-len(chains) // MOST_POINTS))]


def _ends(chain: Mapping[str, Any]) -> tuple[float | None, float, int, bool] | None:
    """Return a chain's (reward of a clean first answer, reward of its clean end, length of that, gave a row?)."""
    first, last = chain["answer"], chain["answer"]
    for step in chain["steps"]:
        last = last if step["rejected"] else step
    if last["reward"] is None or last.get("defect"):
        return None
    before = None if first.get("defect") else first["reward"]
    return before, last["reward"], _length(last["text"]), chain["row"]


def _length(text: str) -> int:
    """Return the length of a text: its words, and the letters of scripts without spaces."""
    return len(_NO_SPACES.findall(text)) + len(_NO_SPACES.sub(" ", text).split())


def _before_and_after(ax: Axes, ends: Sequence[tuple[float | None, float, int, bool]]) -> None:
    for is_row, colour, label in ((False, QUIET, "no training row"), (True, ACCENT, "training row")):
        points = [(before, after) for before, after, _, row in ends if row is is_row and before is not None]
        if points:
            ax.plot(*zip(*points, strict=True), "o", color=colour, markersize=3.5, alpha=0.55, mew=0, label=label)
    ax.axline((0, 0), slope=1, color=MUTED, linewidth=1)
    ax.set_title("Reward of first answer and end, by chain")
    ax.set_xlabel("clean first answer")
    ax.set_ylabel("clean end of the chain", color=MUTED)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8.5, loc="best", handletextpad=0.2)


def _by_length(ax: Axes, ends: Sequence[tuple[float | None, float, int, bool]]) -> None:
    for is_row, colour in ((False, QUIET), (True, ACCENT)):
        points = [(length, after) for _, after, length, row in ends if row is is_row]
        if points:
            ax.plot(*zip(*points, strict=True), "o", color=colour, markersize=3.5, alpha=0.55, mew=0)
    ax.set_title("Reward against length")
    ax.set_xlabel("words of the text at the end")
    ax.set_ylabel("reward", color=MUTED)
