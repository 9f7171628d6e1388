"""The self-contained report page of a run, report.html, and the plots that the cards use in cards/.

Reads run.json, metrics.json, the training log, chains and evaluated answers; computes no statistics and calls no model.
The page loads nothing. Text of models and prompts is escaped, or lies in it as data; a content security policy allows
one script, by its hash, and blocks anything that escaping might have missed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from dsc_hub.config.stages import NAMES, STAGES
from dsc_hub.records import Answer
from dsc_hub.report import formatting, plots, sentences, style, tables, text_plots, verdicts
from dsc_hub.report.templates import asset, page_environment
from dsc_hub.report.texts import NO_TEXTS, RunTexts, packed, shorten
from dsc_hub.runs.metrics_schema import Estimate, Evaluation, StepNumbers
from dsc_hub.runs.overview import is_running
from dsc_hub.runs.results import answers, finished_metrics
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_whole

EXAMPLES_ON_PAGE = 3
PLOT_TEXTS = {
    "differences": "Each difference between two arms with its interval, by score",
    "arms": "Mean score of each arm with its interval",
    "steps": "Mean reward by chain step, and what became of each step's proposals",
    "texts": "Reward of each chain's end against that of its first answer, and against its length",
    "waterfall": "Chains left out by reason, down to the training rows",
    "loss": "Training and validation loss by optimizer step",
    "cost": "Mean reward of each arm against the tokens generated for one answer",
}
ON_CARDS = ("arms", "steps", "loss")  # plots that are saved for the cards


def build_page(run: Run, folder: Path | None = None, has_texts: bool = True) -> dict[str, Any]:
    """Write report.html and the plots as cards/NAME.png; return the page's size in bytes and the number of plots.

    `folder`: where to, the run folder by default. Chains above MOST_CHAINS go into pages beside it,
    report/chains-2.html and so on. Without `has_texts` the page shows no chains and no answers.
    """
    folder = folder or run.folder
    facts, metrics = run.facts, finished_metrics(run)
    evaluation, sampling = metrics.evaluation, metrics.sampling
    all_texts = RunTexts(run, evaluation) if has_texts else None
    texts = all_texts.page(1) if all_texts else NO_TEXTS
    figures = plots.draw_all(metrics, run.rows("adapter/training_log.jsonl"))
    for name in figures.keys() & ON_CARDS:
        style.save_png(figures[name], folder / "cards" / f"{name}.png")
    figures |= text_plots.draw_texts(texts)
    browser = {
        "facts": facts,
        "recipe": facts.recipe,
        "css": Markup(asset("report.css")),
        "script": Markup(asset("report.js")),
        "script_hash": _hash_for_policy(asset("report.js")),
        "chain_count": len(all_texts.chains) if all_texts else 0,
        "counted": sampling.finished if sampling else None,
    }
    pages = ["report.html", *(f"report/chains-{n}.html" for n in range(2, all_texts.pages + 1))] if all_texts else []
    page = (
        _jinja_environment()
        .get_template("report.html.jinja")
        .render(
            **browser,
            texts=texts,
            other_pages=pages[1:],
            data=Markup(packed(texts)) if texts["chains"] or texts["answers"] else "",
            metrics=metrics,
            verdicts=_verdicts(evaluation),
            plots={n: Markup(style.as_svg(f, n, PLOT_TEXTS[n])) for n, f in figures.items()},
            narrow_plots={
                n: Markup(style.as_svg(f, f"narrow-{n}", PLOT_TEXTS[n])) for n, f in plots.draw_narrow(metrics).items()
            },
            arms=tables.arm_rows(evaluation) if evaluation else [],
            differences=tables.difference_rows(evaluation) if evaluation else [],
            details=tables.detail_rows(evaluation) if evaluation else [],
            side_effect_note=tables.SIDE_EFFECT_NOTE,
            side_effects=tables.side_effect_rows(evaluation) if evaluation else [],
            costs=tables.cost_rows(evaluation) if evaluation else [],
            ending=sentences.ending_sentence(sampling, facts.recipe) if sampling else "",
            last_step=sentences.last_step_sentence(sampling) if sampling else "",
            mixing=sentences.mixing_sentence(sampling) if sampling else "",
            blind=verdicts.blind_lines(metrics.blind),
            claim=sentences.claim_sentence(evaluation.claim) if evaluation else "",
            criteria=tables.claim_rows(evaluation) if evaluation else [],
            steps=step_rows(sampling.steps) if sampling else [],
            rounds_sentence=sentences.rounds_sentence(metrics.rounds) if metrics.rounds else "",
            reasons=plots.rejection_reasons(sampling.steps) if sampling else [],
            examples=_examples(run, evaluation) if evaluation and has_texts else [],
            caveats=verdicts.caveats(facts, metrics, evaluation) if evaluation else [],
            unfinished=_unfinished(run),
            model=formatting.model_name(facts.model),
            base=formatting.model_name(facts.base),
        )
    )
    write_whole(folder / "report.html", page)
    _write_more_pages(folder, all_texts, pages, browser)
    return {"bytes": len(page.encode()), "plots": len(figures)}


def _write_more_pages(folder: Path, texts: RunTexts | None, pages: Sequence[str], browser: Mapping[str, Any]) -> None:
    """Write the pages after the first one, and remove those of an earlier, longer run."""
    for old in (folder / "report").glob("chains-*.html"):
        old.unlink()
    for n, name in enumerate(pages[1:], 2):
        assert texts is not None
        some = texts.page(n)
        others = ["../report.html", *(Path(other).name for other in pages[1:] if other != name)]
        template = _jinja_environment().get_template("chains.html.jinja")
        text = template.render(**browser, texts=some, data=Markup(packed(some)), other_pages=others)
        write_whole(folder / name, text)


def _unfinished(run: Run) -> dict[str, Any]:
    """Return what is missing of a run up to its evaluation, and its last log line; nothing if it is whole."""
    stages = [s.name for s in STAGES[: NAMES.index("evaluation") + 1]]
    missing = [name for name in stages if run.marker(name) is None]
    if not missing:
        return {}
    log = run["log.txt"].read_text(encoding="utf-8", errors="replace") if run["log.txt"].is_file() else ""
    return {
        "is_running": is_running(run),
        "done": [name for name in stages if name not in missing],
        "missing": missing,
        "failed": sum(1 for _ in run.rows("failed.jsonl")),
        "log": log.splitlines()[-3:],
    }


def _hash_for_policy(script: str) -> str:
    """Return the source expression by which a content security policy allows this script alone."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _jinja_environment() -> Environment:
    env = page_environment()
    env.filters |= formatting.FILTERS | {
        "shorten": shorten,
        "stacked": _stacked,
    }
    return env


def _stacked(text: str) -> Markup:
    """Return a value with its interval below it, so that columns are narrow: from "0.1 (0.0 to 0.2)"."""
    value, bracket, rest = text.partition(" (")
    return escape(value) + Markup("<small>{}</small>").format(bracket.strip() + rest) if bracket else escape(value)


def _verdicts(evaluation: Evaluation | None) -> list[verdicts.ComparisonVerdict]:
    if evaluation is None:
        return [
            verdicts.ComparisonVerdict(
                "unmeasured", "Not evaluated: no numbers of the stage 'evaluation' are recorded."
            )
        ]
    return verdicts.verdicts(evaluation)


def step_rows(steps: Sequence[StepNumbers]) -> list[dict[str, Any]]:
    """Return one row per step: proposals = accepted + rejected by reason (+ unexplained), and the rewards."""
    reasons = plots.rejection_reasons(steps)
    return [
        {
            "step": s.step,
            "proposals": s.proposals,
            "accepted": s.accepted,
            "rejected": [s.rejected.get(r, 0) for r in reasons],
            "unexplained": plots.unexplained(s),
            "proposed": _of_n(s.reward_proposed),
            "state": _of_n(s.reward_state),
        }
        for s in steps
    ]


def _of_n(estimate: Estimate) -> str:
    """Format a mean with its interval and its number of texts."""
    return f"{formatting.interval(estimate)}, n {formatting.count(estimate.n)}"


def _examples(run: Run, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the first prompts by id (not hand-picked), and the distilled model's worst one against the base."""
    by_prompt: dict[str, dict[str, Answer]] = {}
    for row in answers(run):
        if row.sample == 0:
            by_prompt.setdefault(row.prompt_id, {})[row.arm] = row
    worst = _worst(by_prompt, evaluation)
    shown = [i for i in sorted(by_prompt) if i != worst][:EXAMPLES_ON_PAGE] + ([worst] if worst else [])
    return [
        {"title": "the distilled model's worst against the base" if i == worst else "", "arms": by_prompt[i]}
        for i in shown
    ]


def _worst(by_prompt: Mapping[str, Mapping[str, Answer]], evaluation: Evaluation) -> str | None:
    sign = 1 if evaluation.scores["reward"].higher_is_better else -1
    change = {}
    for i, arms in sorted(by_prompt.items()):
        base, distilled = (arms[a].reward if a in arms else None for a in ("base", "distilled"))
        if base is not None and distilled is not None:
            change[i] = sign * (distilled - base)
    return min(change, key=change.__getitem__) if change else None
