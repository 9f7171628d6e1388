"""How plots look, and how they are saved: as SVG for the report, as PNG for the cards.

An SVG has colours as CSS variables, so that it follows the page's light or dark theme. The colours can be told apart
with any common colour blindness; the palette is Okabe and Ito's, toned down.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, LINE = "#1f2328", "#656d77", "#d5dae0"
# Accepted proposals and the tuned model share the accent colour; the rest is muted.
ACCENT, SECOND, QUIET = "#0b7a75", "#b8661a", "#818b98"
REASON_COLOURS = ("#c9b79a", "#d99a6c", "#b57c8e", "#8f8fb8", "#a9b4bf", "#c7a3c9")
ARM_COLOURS = {"base": QUIET, "self_critique": SECOND, "distilled": ACCENT, "teacher": REASON_COLOURS[3]}
# Colour in the drawing -> CSS variable of the page.
CSS_NAMES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SECOND: "second", QUIET: "quiet"} | {
    colour: f"reason{i}" for i, colour in enumerate(REASON_COLOURS)
}
PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.edgecolor": LINE,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
}


def as_svg(figure: Figure, name: str, title: str = "") -> str:
    """Return the figure as an SVG element without header and metadata, with CSS variables as colours. Deterministic."""
    text = io.StringIO()
    with matplotlib.rc_context(PLOT_STYLE | {"svg.hashsalt": name}):
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its style element would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.S)
    for colour, css in CSS_NAMES.items():
        svg = svg.replace(colour, f"var(--{css})")
    # Two figures on one page must not share ids, or one would be clipped by the other's frame.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    svg = re.sub(r"'DejaVu Sans'", "var(--font)", svg)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" ([^>]*?)width="[^"]*"',
        rf'<svg role="img" aria-label="{html.escape(title)}" \1\2',
        svg,
        count=1,
    )


def save_png(figure: Figure, path: Path) -> None:
    """Save the figure as PNG on white, 1,350 pixels wide: sharp on a card and well under 100 kB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(PLOT_STYLE):
        figure.savefig(path, dpi=150, metadata={"Software": None})
