"""The self-contained report page of a run, report.html, and the plots that the cards use in cards/.

Reads run.json, metrics.json, the training log and the evaluated answers; computes no statistics and calls no model. The
page has no scripts and loads no external resources. Text of models and prompts is escaped, and a content security
policy blocks anything that escaping might have missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsc_hub.report import formatting, plots, sentences, tables, verdicts
from dsc_hub.report.recorded import Recorded
from dsc_hub.runs.results import answers, evaluated
from dsc_hub.runs.run import Run
from dsc_hub.system.files import packaged_folder, write_whole

EXAMPLES_ON_PAGE = 3
LONGEST_TEXT = 4000  # characters of one answer; a model that never stops must not fill the page
PLOT_TEXTS = {
    "arms": "Mean score of each arm with its interval",
    "steps": "Mean reward by chain step, and what became of each step's proposals",
    "loss": "Training and validation loss by optimizer step",
}


def build_page(run: Run) -> dict[str, Any]:
    """Write report.html and the plots as cards/NAME.png; return the page's size in bytes and the number of plots."""
    recorded = evaluated(run) if run.marker("evaluation") else run.metrics
    facts, metrics = Recorded(run.facts, "run.json"), Recorded(recorded, "metrics.json")
    figures = plots.draw_all(metrics, run.rows("adapter/training_log.jsonl"))
    for name, figure in figures.items():
        plots.save_png(figure, run["cards"] / f"{name}.png")
    page = (
        _jinja_environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            recipe=facts.recipe,
            metrics=metrics,
            verdicts=_verdicts(metrics),
            plots={n: Markup(plots.as_svg(f, n, PLOT_TEXTS[n])) for n, f in figures.items()},
            arms=tables.arm_rows(metrics) if "evaluation" in metrics else [],
            differences=tables.difference_rows(metrics) if "evaluation" in metrics else [],
            details=tables.detail_rows(metrics) if "evaluation" in metrics else [],
            side_effect_note=tables.SIDE_EFFECT_NOTE,
            side_effects=tables.side_effect_rows(metrics) if "evaluation" in metrics else [],
            costs=tables.cost_rows(metrics) if "evaluation" in metrics else [],
            last_step=sentences.last_step_sentence(metrics) if "sampling" in metrics else "",
            mixing=sentences.mixing_sentence(metrics) if "sampling" in metrics else "",
            blind=verdicts.blind_lines(metrics),
            claim=sentences.claim_sentence(metrics) if "evaluation" in metrics else "",
            criteria=tables.claim_rows(metrics) if "evaluation" in metrics else [],
            steps=step_rows(metrics) if "sampling" in metrics else [],
            reasons=plots.rejection_reasons(metrics.sampling.steps) if "sampling" in metrics else [],
            examples=_examples(run, metrics),
            caveats=verdicts.caveats(facts, metrics) if "evaluation" in metrics else [],
            source=formatting.model_source(facts.model),
            model=formatting.model_name(facts.model),
        )
    )
    write_whole(run["report.html"], page)
    return {"bytes": len(page.encode()), "plots": len(figures)}


def _jinja_environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(packaged_folder("model_cards")),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= formatting.FILTERS | {
        "shorten": _shorten,
    }
    return env


def _verdicts(metrics: Recorded) -> list[verdicts.ComparisonVerdict]:
    if "evaluation" not in metrics:
        return [
            verdicts.ComparisonVerdict(
                "unmeasured", "Not evaluated: no numbers of the stage 'evaluation' are recorded."
            )
        ]
    return verdicts.verdicts(metrics)


def step_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per step: proposals = accepted + rejected by reason (+ unexplained), and the rewards."""
    reasons = plots.rejection_reasons(metrics["sampling"]["steps"])
    return [
        {
            "step": s["step"],
            "proposals": s["proposals"],
            "accepted": s["accepted"],
            "rejected": [s["rejected"].get(r, 0) for r in reasons],
            "unexplained": plots.unexplained(s),
            "proposed": _of_n(s["reward_proposed"]),
            "state": _of_n(s["reward_state"]),
        }
        for s in metrics["sampling"]["steps"]
    ]


def _of_n(estimate: Mapping[str, Any]) -> str:
    """Format a mean with its interval and its number of texts."""
    return f"{formatting.interval(estimate)}, n {formatting.count(estimate['n'])}"


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} […] ({len(text):,} characters, cut here)"


def _examples(run: Run, metrics: Recorded) -> list[dict[str, Any]]:
    """Return the first prompts by id (not hand-picked), and the distilled model's worst one against the base."""
    if "evaluation" not in metrics:
        return []
    by_prompt: dict[str, dict[str, Any]] = {}
    for row in answers(run):
        if row["sample"] == 0:
            by_prompt.setdefault(row["prompt_id"], {})[row["arm"]] = row
    worst = _worst(by_prompt, metrics)
    shown = [i for i in sorted(by_prompt) if i != worst][:EXAMPLES_ON_PAGE] + ([worst] if worst else [])
    return [
        {"title": "the distilled model's worst against the base" if i == worst else "", "arms": by_prompt[i]}
        for i in shown
    ]


def _worst(by_prompt: Mapping[str, Mapping[str, Any]], metrics: Recorded) -> str | None:
    sign = 1 if metrics.evaluation.scores.reward.higher_is_better else -1
    change = {
        i: sign * (arms["distilled"]["reward"] - arms["base"]["reward"])
        for i, arms in sorted(by_prompt.items())
        if all(a in arms and formatting.measured(arms[a]["reward"]) for a in ("base", "distilled"))
    }
    return min(change, key=change.__getitem__) if change else None
