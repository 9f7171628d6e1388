"""The plots of a finished run, drawn from recorded numbers: arms with intervals, reward and acceptance by step, losses.

Each figure is drawn once and saved twice: as SVG for the report, with colours as CSS variables so that it follows the
page's light or dark theme, and as PNG for the cards. A plot without data is left out.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsc_hub.report.formatting import SCORE_TITLES, arm_name, count, interval, measured, number
from dsc_hub.runs.metrics_schema import Estimate, Evaluation, Metrics, Sampling, StepNumbers

INK, MUTED, LINE = "#1f2328", "#656d77", "#d5dae0"
# Accepted proposals and the tuned model share the accent colour; the rest is muted.
ACCENT, SECOND, QUIET = "#0b7a75", "#b8661a", "#818b98"
ARM_COLOURS = {"base": QUIET, "self_critique": SECOND, "distilled": ACCENT}
REASON_COLOURS = ("#c9b79a", "#d99a6c", "#b57c8e", "#8f8fb8", "#a9b4bf", "#c7a3c9")
MOST_LINES = 3  # lines of the unit label below an axis
# Colour in the drawing -> CSS variable of the page.
CSS_NAMES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SECOND: "second", QUIET: "quiet"} | {
    colour: f"reason{i}" for i, colour in enumerate(REASON_COLOURS)
}
_STYLE: dict[Any, Any] = {
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


def draw_all(metrics: Metrics, training_log: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Return the plots that have data, by name: `arms`, `steps`, `loss`."""
    with matplotlib.rc_context(_STYLE):
        drawn = {"arms": arms(metrics.evaluation), "steps": steps(metrics.sampling), "loss": loss(training_log)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def arms(evaluation: Evaluation | None) -> Figure | None:
    """Draw a dot with its interval per arm, one panel per score."""
    if evaluation is None:
        return None
    scores = evaluation.score_names
    names = list(evaluation.arms)
    figure = Figure(figsize=(9 + 2 * (len(scores) > 2), 1.25 + 0.46 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for ax, s in zip(panels, scores, strict=True):
        score = evaluation.scores[s]
        for y, arm in enumerate(names):
            estimate = evaluation.arms[arm].score(s)
            if measured(estimate.mean):
                _dot(ax, estimate.mean, estimate, y, ARM_COLOURS.get(arm, QUIET))
            else:
                ax.text(
                    0.5,
                    y,
                    interval(estimate),
                    color=MUTED,
                    ha="center",
                    va="center",
                    transform=ax.get_yaxis_transform(),
                )
        ax.set_title(f"{SCORE_TITLES[s].capitalize()}: {_short_reason(score.name)}")
        way = "higher" if score.higher_is_better else "lower"
        ax.set_xlabel("\n".join(textwrap.wrap(f"{score.unit}, {way} is better", 44)[:MOST_LINES]))
        ax.grid(axis="y", visible=False)
        ax.spines.left.set_visible(False)
        ax.margins(x=0.16)
        ax.locator_params(axis="x", nbins=6)
    panels[0].set_yticks(range(len(names)), [arm_name(a) for a in names])
    panels[0].set_ylim(len(names) - 0.45, -0.65)
    return figure


def _dot(ax: Axes, mean: float, estimate: Estimate, y: float, colour: str) -> None:
    if measured(estimate.low) and measured(estimate.high):
        ax.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=3.2, alpha=0.45, solid_capstyle="round")
    ax.plot([mean], [y], "o", color=colour, markersize=8)
    ax.annotate(number(mean), (mean, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)


def steps(sampling: Sampling | None) -> Figure | None:
    """Draw the reward of proposals and states by step (left), and the outcome of each step's proposals (right)."""
    if sampling is None or not sampling.steps:
        return None
    figure = Figure(figsize=(9, 2.6 + 0.24 * min(len(sampling.steps), 24)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _reward_by_step(left, sampling)
    _fate_of_proposals(right, sampling.steps)
    return figure


def _reward_by_step(ax: Axes, sampling: Sampling) -> None:
    state = [(0, sampling.first_reward), *((s.step, s.reward_state) for s in sampling.steps)]
    proposed = [(s.step, s.reward_proposed) for s in sampling.steps]
    for points, colour, label, shift in (
        (proposed, SECOND, "proposed", 0.06),
        (state, ACCENT, "state of the chain", -0.06),
    ):
        drawn = [(step + shift, e.mean, e) for step, e in points if measured(e.mean)]
        for x, _, e in drawn:
            if measured(e.low) and measured(e.high):
                ax.plot([x, x], [e.low, e.high], color=colour, linewidth=2.6, alpha=0.45, solid_capstyle="round")
        xs, ys = [x for x, *_ in drawn], [y for _, y, _ in drawn]
        ax.plot(xs, ys, "o-" if label != "proposed" else "o", color=colour, markersize=6.5, linewidth=1.6, label=label)
    ax.set_title("Mean reward by step")
    ax.set_xlabel("step (0 is the first answer)")
    ax.set_xticks(range(len(state)) if len(state) <= 13 else range(0, len(state), 8))
    ax.set_xlim(-0.4, len(state) - 0.6)
    ax.grid(axis="x", visible=False)
    ax.legend(frameon=False, loc="best", fontsize=9)


def rejection_reasons(step_rows: Iterable[StepNumbers]) -> list[str]:
    """Return all rejection reasons, in order of first appearance."""
    return list(dict.fromkeys(reason for s in step_rows for reason in s.rejected))


def unexplained(step: StepNumbers) -> int:
    """Return the number of proposals neither accepted nor rejected with a reason; 0 if the counts are consistent."""
    return int(step.proposals - step.accepted - sum(step.rejected.values()))


def _fate_of_proposals(ax: Axes, step_rows: Sequence[StepNumbers]) -> None:
    reasons = rejection_reasons(step_rows)
    parts = [("accepted", ACCENT, [s.accepted for s in step_rows])]
    parts += [
        (r, REASON_COLOURS[i % len(REASON_COLOURS)], [s.rejected.get(r, 0) for s in step_rows])
        for i, r in enumerate(reasons)
    ]
    if any(unexplained(s) for s in step_rows):
        parts.append(("not accounted for", LINE, [max(0, unexplained(s)) for s in step_rows]))
    ys, offsets = [s.step for s in step_rows], [0] * len(step_rows)
    most = max([s.proposals for s in step_rows] + [1])
    for name, colour, widths in parts:
        ax.barh(ys, widths, left=offsets, color=colour, height=0.56, label=_short_reason(name), linewidth=0)
        for y, x, w in zip(ys, offsets, widths, strict=True):
            if w > 0.06 * most and len(ys) <= 12:
                ax.text(
                    x + w / 2,
                    y,
                    count(w),
                    ha="center",
                    va="center",
                    color="#ffffff" if colour == ACCENT else "#26221c",
                    fontsize=9,
                )
        offsets = [a + w for a, w in zip(offsets, widths, strict=True)]
    ax.set_title("What became of the proposals")
    ax.set_yticks(ys if len(ys) <= 12 else ys[::8], [f"step {y}" for y in (ys if len(ys) <= 12 else ys[::8])])
    ax.set_ylim(max(ys) + (0.5 if len(ys) > 1 else 0.8), min(ys) - (0.5 if len(ys) > 1 else 0.8))
    ax.set_xlim(0, most)
    ax.grid(axis="y", visible=False)
    ax.spines.left.set_visible(False)
    ax.legend(
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.1),
        ncols=2,
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
        columnspacing=1.4,
    )


def _short_reason(text: str) -> str:
    # A leading underscore would hide the entry from the legend.
    return (text if len(text) <= 34 else text[:33] + "…").replace("\n", " ").lstrip("_") or "(no name)"


def loss(training_log: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Draw the training loss as a line, the validation loss as points joined by a line."""
    rows = [r for r in training_log if "step" in r]
    train = [(r["step"], r["loss"]) for r in rows if measured(r.get("loss"))]
    validation = [(r["step"], r["eval_loss"]) for r in rows if measured(r.get("eval_loss"))]
    if not train:
        return None
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    ax = figure.subplots()
    ax.plot(
        *zip(*train, strict=True), color=QUIET, linewidth=1.6, marker="o" if len(train) < 3 else "", label="training"
    )
    if validation:
        ax.plot(
            *zip(*validation, strict=True), color=ACCENT, linewidth=1.6, marker="o", markersize=6, label="validation"
        )
    ax.set_title("Loss on the completion (nats per token)")
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.grid(axis="x", visible=False)
    ax.legend(frameon=False, fontsize=9)
    return figure


def as_svg(figure: Figure, name: str, title: str = "") -> str:
    """Return the figure as an SVG element without header and metadata, with CSS variables as colours. Deterministic."""
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
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
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, dpi=150, metadata={"Software": None})
