"""The plots of a run, drawn from recorded numbers: arms, differences, reward and acceptance by step, losses, losses of
chains, costs.

Each figure is drawn once and saved twice, as SVG for the report and as PNG for the cards. A plot without data is left
out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dsc_hub.report.formatting import SCORE_TITLES, arm_name, count, difference_name, interval, measured, number
from dsc_hub.report.style import ACCENT, ARM_COLOURS, LINE, MUTED, PLOT_STYLE, QUIET, REASON_COLOURS, SECOND
from dsc_hub.runs.metrics_schema import Dataset, Estimate, Evaluation, Metrics, Sampling, StepNumbers

NEARLY_ALIKE = 3  # costs within this factor are drawn on a linear axis
MOST_LINES = 3  # lines of the unit label below an axis


def draw_all(metrics: Metrics, training_log: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Return the plots that have data, by name: `differences`, `arms`, `steps`, `waterfall`, `loss`, `cost`."""
    with matplotlib.rc_context(PLOT_STYLE):
        drawn = {
            "differences": forest_plot(metrics.evaluation),
            "arms": arms(metrics.evaluation),
            "steps": steps(metrics.sampling),
            "waterfall": became_of_chains(metrics.dataset),
            "loss": loss(training_log),
            "cost": cost(metrics.evaluation),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_narrow(metrics: Metrics) -> dict[str, Figure]:
    """Return the plots of `draw_all` that a phone needs in another form, by name: their panels below each other."""
    with matplotlib.rc_context(PLOT_STYLE):
        drawn = {
            "differences": forest_plot(metrics.evaluation, is_narrow=True),
            "arms": arms(metrics.evaluation, is_narrow=True),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def forest_plot(evaluation: Evaluation | None, is_narrow: bool = False) -> Figure | None:
    """Draw a forest plot: each difference between two arms with its interval around zero, one panel per score."""
    if evaluation is None or not evaluation.differences:
        return None
    pairs = list(evaluation.differences)
    figure, panels = _panels(evaluation, len(pairs), is_narrow)
    for ax, s in zip(panels, evaluation.score_names, strict=True):
        ax.axvline(0, color=MUTED, linewidth=1)
        for y, pair in enumerate(pairs):
            difference = evaluation.differences[pair][s]
            colour = ARM_COLOURS.get(pair.split(" - ")[0], QUIET)
            _estimate(ax, difference, y, colour)
        ax.set_xlabel(f"difference, {'right' if evaluation.scores[s].higher_is_better else 'left'} is better")
    panels[0].set_yticks(range(len(pairs)), [difference_name(p) for p in pairs])
    return figure


def became_of_chains(dataset: Dataset | None) -> Figure | None:
    """Draw what became of the chains: those left out by reason, down to the training and validation rows."""
    if dataset is None or not dataset.dropped:
        return None
    rows = sum(dataset.sft.values())
    dropped = sorted(dataset.dropped.items(), key=lambda item: -item[1])
    total = rows + sum(dataset.dropped.values())
    bars, left = [("finished chains", 0, total, QUIET)], total
    for reason, n in dropped:
        left -= n
        bars.append((reason, left, n, SECOND))
    bars.append(("rows to train and validate on", 0, rows, ACCENT))
    figure = Figure(figsize=(9, 0.9 + 0.34 * len(bars)), layout="constrained")
    ax = figure.subplots()
    for y, (_, start, n, colour) in enumerate(bars):
        ax.barh(y, n, left=start, color=colour, height=0.6, linewidth=0)
        ax.annotate(count(n), (start + n, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(bars)), [_short_reason(label) for label, *_ in bars])
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, 1.08 * total)
    ax.set_title("What became of the chains")
    ax.grid(axis="y", visible=False)
    ax.spines.left.set_visible(False)
    return figure


def cost(evaluation: Evaluation | None) -> Figure | None:
    """Draw the mean reward of each arm against the tokens of an answer (logarithmic if they differ much)."""
    if evaluation is None:
        return None
    points = [
        (arm, numbers.new_tokens_mean, numbers.reward.mean, numbers.reward)
        for arm, numbers in evaluation.arms.items()
        if numbers.new_tokens_mean and measured(numbers.reward.mean)
    ]
    if len(points) < 2:
        return None
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    ax = figure.subplots()
    for arm, tokens, mean, reward in points:
        colour = ARM_COLOURS.get(arm, QUIET)
        if measured(reward.low) and measured(reward.high):
            ax.plot([tokens, tokens], [reward.low, reward.high], color=colour, linewidth=3.2, alpha=0.45)
        ax.plot([tokens], [mean], "o", color=colour, markersize=8, label=arm_name(arm))
    # Within one step of 1, 2, 5 a logarithmic axis has no tick.
    are_near = max(p[1] for p in points) < NEARLY_ALIKE * min(p[1] for p in points)
    ax.set_xscale("linear" if are_near else "log")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True) if are_near else LogLocator(subs=(1, 2, 5), numticks=8))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: count(round(value)))
    ax.margins(x=0.18, y=0.2)
    ax.set_title("What a better answer costs")
    ax.set_xlabel("tokens generated for one answer, critiques, revisions and candidates included")
    ax.set_ylabel("mean reward", color=MUTED)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def arms(evaluation: Evaluation | None, is_narrow: bool = False) -> Figure | None:
    """Draw a dot with its interval per arm, one panel per score."""
    if evaluation is None:
        return None
    names = list(evaluation.arms)
    figure, panels = _panels(evaluation, len(names), is_narrow)
    for ax, s in zip(panels, evaluation.score_names, strict=True):
        score = evaluation.scores[s]
        for y, arm in enumerate(names):
            _estimate(ax, evaluation.arms[arm].score(s), y, ARM_COLOURS.get(arm, QUIET))
        way = "higher" if score.higher_is_better else "lower"
        ax.set_xlabel("\n".join(textwrap.wrap(f"{score.unit}, {way} is better", 44)[:MOST_LINES]))
    panels[0].set_yticks(range(len(names)), [arm_name(a) for a in names])
    return figure


def _panels(evaluation: Evaluation, rows: int, is_narrow: bool) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with one panel per score, which share their rows; side by side, or below each other."""
    scores = evaluation.score_names
    n, height = len(scores), 1.25 + 0.46 * rows
    figure = Figure(figsize=(4.6, height * n) if is_narrow else (9 + 2 * (n > 2), height), layout="constrained")
    down, across = (n, 1) if is_narrow else (1, n)
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for ax, s in zip(panels, scores, strict=True):
        ax.set_title(f"{SCORE_TITLES[s].capitalize()}: {_short_reason(evaluation.scores[s].name)}")
        ax.grid(axis="y", visible=False)
        ax.spines.left.set_visible(False)
        ax.margins(x=0.16)
        ax.locator_params(axis="x", nbins=6)
    panels[0].set_ylim(rows - 0.45, -0.65)
    return figure, panels


def _estimate(ax: Axes, estimate: Estimate, y: float, colour: str) -> None:
    """Draw a mean as a dot with its interval, or say that there is none."""
    if not measured(estimate.mean):
        rows = ax.get_yaxis_transform()
        ax.text(0.5, y, interval(estimate), color=MUTED, ha="center", va="center", transform=rows)
        return
    if measured(estimate.low) and measured(estimate.high):
        ax.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=3.2, alpha=0.45, solid_capstyle="round")
    ax.plot([estimate.mean], [y], "o", color=colour, markersize=8)
    ax.annotate(number(estimate.mean), (estimate.mean, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)


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
