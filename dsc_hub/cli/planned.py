"""The screen of `dsc plan`."""

from __future__ import annotations

from rich.text import Text

from dsc_hub import stats
from dsc_hub.cli import terminal
from dsc_hub.cli.screens import grid
from dsc_hub.cli.terminal import visible
from dsc_hub.config.arms import judges_claim
from dsc_hub.config.models import licences
from dsc_hub.config.recipe import Recipe
from dsc_hub.data.prompts import Counts
from dsc_hub.pipeline.context import RunContext
from dsc_hub.pipeline.estimate import TrainingNeed
from dsc_hub.pipeline.preflight import RunPlan
from dsc_hub.report.formatting import money
from dsc_hub.system.progress import duration

GOOD_NUMBER = 40  # of groups: half a spread is shown four times in five
LONGEST_PROMPT = 70  # characters shown of a dropped prompt

AFTER_A_LOOK = (
    "the claim stays undecided. Choose settings with evaluation.split=validation, and claim on test prompts that no "
    "choice was made on"
)
ROUNDS = (
    "at most {} of sampling and training, until the validation reward no longer rises; requests and times above are of "
    "those that are left"
)


def show_plan(context: RunContext, e: RunPlan) -> None:
    """Print the plan of a run."""
    r = context.recipe
    table = grid()
    split = "  ".join(f"{n} {s} ({e.groups[s]} groups)" for s, n in e.prompts.items())
    table.add_row("recipe", f"{r.name}  {context.path}")
    for place, model in context.models.items():
        at = f" at {model.commit[:12]}" if model.commit else ", whose lengths can't be checked"
        table.add_row(place, f"{model.id}  ({model.source}{at})")
    table.add_row(
        "prompts",
        f"{split}   dropped: {e.dropped.duplicates} duplicate, {e.dropped.overlaps} overlapping",
    )
    for line in _dropped(e.dropped):
        table.add_row("", Text(line, "dim"))
    table.add_row("to compare", _comparable(e.groups[r.evaluation.split], r))
    at_most = "at most " if r.ends_early else ""
    table.add_row(
        "chains",
        f"{at_most}{e.chains} of {r.chain.steps} step(s), {r.chain.acceptance}, "
        f"requests in flight: {r.serving.concurrency}",
    )
    if limits := _limits(r):
        table.add_row("until", limits)
    for stage in ("sampling", "evaluation"):
        may_end_early = stage == "sampling" and (r.ends_early or r.chain.good_enough is not None)
        table.add_row(stage, _asked(e, stage, may_end_early))
    for title, text in _priced_rows(e, r):
        table.add_row(title, text)
    trained = "distill" in (*e.done, *e.taken_over)
    how = f"{r.distill.objective}, {r.distill.method}; its time shows after the first steps"
    table.add_row("distill", "nothing left to train" if trained else how)
    if e.training:
        table.add_row("", Text(_training_need(e.training)))
    if r.rounds > 1:
        table.add_row("rounds", ROUNDS.format(r.rounds))
    table.add_row("disk", "\n".join(map(str, e.disk)))
    publishes = "\n".join([*(e.repos or ()), "privately" if r.publish.private else "PUBLICLY"])
    table.add_row("publishes", publishes if e.repos else "nothing (publish.to is none)")
    if e.repos:
        licence, _ = licences(r, context.base.license)
        table.add_row("licence", licence or "unknown: the cards will say so; set publish.license")
    table.add_row("run folder", str(context.run.folder))
    table.add_row("done already", ", ".join(e.done) or "nothing")
    donors: dict[str, list[str]] = {}
    for stage, folder in e.taken_over.items():
        donors.setdefault(folder, []).append(stage)
    for folder, stages in donors.items():
        table.add_row("taken over", f"{', '.join(stages)}  from {folder}")
    if e.looks:
        others = "1 other adapter was" if e.looks == 1 else f"{e.looks} other adapters were"
        table.add_row("first look", f"{others} scored on these test prompts before: {AFTER_A_LOOK}")
    if not judges_claim(r.evaluation.arms):
        table.add_row("claim", "none will be judged: it needs base as the first arm, and distilled")
    terminal.out.print(table)


def _limits(r: Recipe) -> str:
    """Return what ends the sampling before all chains are finished; "" if nothing does."""
    limits = [f"{r.dataset.rows:,} training rows"] if r.dataset.rows else []
    if r.budget and r.budget.tokens:
        limits.append(f"{r.budget.tokens:,} new tokens")
    if r.budget and r.budget.hours:
        limits.append(f"{r.budget.hours:g} hours of sampling")
    return " or ".join(limits)


def _asked(e: RunPlan, stage: str, may_end_early: bool) -> str:
    """Return what a stage asks of its servers, and how long that takes."""
    if not e.requests[stage]:
        return "nothing left to ask for"
    s, at_most = e.seconds[stage], "at most " if may_end_early else ""
    when = (
        f"{at_most}about {duration(s.low)} to {duration(s.high)}, starts included "
        f"(at {s.slow:.0f} to {s.fast:.0f} tokens/s with so many requests, from what was measured here)"
        if s is not None
        else "time unknown: too little of this model was sampled here yet (`dsc try -n 16` measures it)"
    )
    return f"{at_most}{e.requests[stage]} requests, at most {e.new_tokens_at_most[stage]:,} new tokens; {when}"


def _training_need(need: TrainingNeed) -> str:
    """Return what training needs in a sentence, and what to do where that is more than there is."""
    quantised = f", {100 * need.quantised_share:.0f} % of them quantised" if need.quantised_share else ""
    text = (
        f"{need.trained / 1e6:.1f} of {need.parameters / 1e6:,.0f} million parameters trained{quantised}; about "
        f"{need.memory_gib:.1f} of {need.memory_available_gib:.0f} GiB of memory"
    )
    if need.has_experts:
        text += "; the experts are neither quantised nor adapted, the linear layers beside them are"
    if need.memory_gib <= need.memory_available_gib:
        return text
    return f"{text}: too much, if the estimate is right; lower per_device_train_batch_size or generation.max_new_tokens"


def _priced_rows(e: RunPlan, recipe: Recipe) -> list[tuple[str, str]]:
    """Return the rows about money and quotas; none without a price or quota in the recipe."""
    rows = []
    if costs := e.cost_usd_at_most:
        known = [c for c in costs.values() if c is not None]
        if len(known) == len(costs):
            stages = ", ".join(f"{stage} {money(c)}" for stage, c in costs.items())
            read = sum((e.prompt_tokens_at_most or {}).values())
            text = f"at most {money(sum(known))} ({stages}), with about {read:,} tokens read"
            rows.append(("price", f"{text}, were all answers of full length; judges excluded"))
        else:
            rows.append(("price", "unknown: chain.critic.price is missing ({input: 0, output: 0} if it costs nothing)"))
    for stage, time in (e.quota_seconds or {}).items():
        if time is not None:
            parts = [f"its requests in {duration(time.requests_s)} at least"] if time.requests_s is not None else []
            if time.tokens_s is not None:
                parts.append(f"its tokens in {duration(time.tokens_s)}, were all answers of full length")
            rows.append(("quota", f"{stage}: {', '.join(parts)}"))
    return rows


def _dropped(dropped: Counts) -> list[str]:
    """Return lines about the first dropped prompts and the prompts that they duplicate."""
    lines = [f"duplicate: {_start(d.text)} of {_start(d.kept)}" for d in dropped.first_duplicates]
    lines += [
        f"overlap: {_start(d.text)} with the training prompt {_start(d.kept)} in '{d.shared}' "
        "(prompts.drop_overlaps=false keeps it)"
        for d in dropped.first_overlaps
    ]
    if dropped.ungrouped:
        lines.append(f"{dropped.ungrouped} prompts have no group in prompts.group_column: each is its own")
    return lines


def _start(text: str) -> str:
    return repr(visible(text if len(text) <= LONGEST_PROMPT else f"{text[:LONGEST_PROMPT]}..."))


def _comparable(groups: int, recipe: Recipe) -> str:
    """Return the difference that the evaluation's groups can detect, before anything is measured."""
    split = recipe.evaluation.split
    if groups < stats.CLAIM_GROUPS:
        advice = f"give more groups, or a larger share of them to {split} (all three of prompts.split add up to 1)"
        count = f"{groups} {split} group{'' if groups == 1 else 's'}"
        return f"{count}; a verdict needs {stats.CLAIM_GROUPS}, and {GOOD_NUMBER} are a good number; {advice}"
    smallest = stats.detectable(1.0, groups, recipe.evaluation.confidence)
    few = f"; {GOOD_NUMBER} are a good number" if groups < GOOD_NUMBER else ""
    return (
        f"{groups} {split} groups: a mean difference of {smallest:.2f} times the groups' own spread (the standard "
        f"deviation of their differences) is shown four times in five, a smaller one less often{few}"
    )
