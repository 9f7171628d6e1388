"""Result screens of `dsc`: plan, example chains, closing screen. Formats numbers, computes none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dsc_hub import stats
from dsc_hub.cli import terminal
from dsc_hub.cli.terminal import visible
from dsc_hub.config.arms import judges_claim
from dsc_hub.config.models import licences
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.stages import NAMES
from dsc_hub.evaluation.claim import claim_of
from dsc_hub.pipeline.context import RunContext
from dsc_hub.records import Chain, Role, Score
from dsc_hub.runs.results import evaluated, metrics_of
from dsc_hub.runs.run import Run
from dsc_hub.runs.test_sets import with_current_looks
from dsc_hub.system.progress import duration

if TYPE_CHECKING:
    from dsc_hub.data.prompts import Counts
    from dsc_hub.evaluation.compare import Comparison
    from dsc_hub.evaluation.score_file import ScoredFile
    from dsc_hub.hub.pull import Pulled
    from dsc_hub.pipeline.grid import GridRow
    from dsc_hub.pipeline.preflight import RunPlan, TrainingNeed
    from dsc_hub.pipeline.session import Tried
    from dsc_hub.publish.verify import Check

FEW_TEXTS = 20
LONGEST_PROMPT = 70  # characters shown of a dropped prompt

ROUNDS = (
    "at most {} of sampling and training, until the validation reward no longer rises; requests and times above are of "
    "those that are left"
)


def grid() -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


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
    table.add_row(
        "chains",
        f"{e.chains} of {r.chain.steps} step(s), {r.chain.acceptance}, requests in flight: {r.serving.concurrency}",
    )
    for stage in ("sampling", "evaluation"):
        if not e.requests[stage]:
            table.add_row(stage, "nothing left to ask for")
            continue
        s = e.seconds[stage]
        when = (
            f"about {duration(s.low)} to {duration(s.high)}, starts included "
            f"(measured here: {s.slow:.0f} to {s.fast:.0f} tokens/s)"
            if s is not None
            else "time unknown: too little of this model was sampled here yet (`dsc try -n 16` measures it)"
        )
        table.add_row(
            stage, f"{e.requests[stage]} requests, at most {e.new_tokens_at_most[stage]:,} new tokens; {when}"
        )
    for title, text in _priced_rows(e, r):
        table.add_row(title, text)
    trained = "distill" in (*e.done, *e.taken_over)
    how = f"{r.distill.objective}, {r.distill.method}; its time shows after the first steps"
    table.add_row("distill", "nothing left to train" if trained else how)
    if e.training:
        table.add_row("", Text(_training_need(e.training)))
    if r.rounds > 1:
        table.add_row("rounds", ROUNDS.format(r.rounds))
    table.add_row("disk", f"about {e.disk_bytes / 1e9:.2f} GB under {context.runs}")
    table.add_row(
        "publishes",
        (
            ("\n".join(e.repos) + ("\nprivately" if r.publish.private else "\nPUBLICLY"))
            if e.repos
            else "nothing (publish.to is none)"
        ),
    )
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
    if not judges_claim(r.evaluation.arms):
        table.add_row("claim", "none will be judged: it needs base as the first arm, and distilled")
    terminal.out.print(table)


def _training_need(need: TrainingNeed) -> str:
    """Return what training needs in a sentence, and what to do where that is more than there is."""
    quantised = f", {100 * need.quantised_share:.0f} % of them quantised" if need.quantised_share else ""
    text = (
        f"{need.trained / 1e6:.1f} of {need.parameters / 1e6:,.0f} million parameters trained{quantised}; about "
        f"{need.memory_gib:.1f} of {need.memory_there_gib:.0f} GiB of memory"
    )
    if need.has_experts:
        text += "; the experts are neither quantised nor adapted, the linear layers beside them are"
    if need.memory_gib <= need.memory_there_gib:
        return text
    return f"{text}: too much, if the estimate is right; lower per_device_train_batch_size or generation.max_new_tokens"


def _priced_rows(e: RunPlan, recipe: Recipe) -> list[tuple[str, str]]:
    """Return the rows about money and quotas; none without a price or quota in the recipe."""
    from dsc_hub.report.formatting import money

    rows = []
    if costs := e.cost_usd_at_most:
        known = [c for c in costs.values() if c is not None]
        if len(known) == len(costs):
            stages = ", ".join(f"{stage} {money(c)}" for stage, c in costs.items())
            read = sum((e.prompt_tokens_at_most or {}).values())
            text = f"at most {money(sum(known))} ({stages}), for {sum(e.new_tokens_at_most.values()):,} tokens written"
            rows.append(("price", f"{text} and about {read:,} read, were all answers of full length; judges excluded"))
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
        of = f"{groups} {split} group{'' if groups == 1 else 's'}"
        return f"{of}; a verdict needs {stats.CLAIM_GROUPS}, and 40 are a good number; {advice}"
    smallest = stats.detectable(1.0, groups, recipe.evaluation.confidence)
    unit = "standard deviations of the groups' differences"
    return f"{groups} {split} groups show a difference of {smallest:.2f} {unit} four times in five"


def _score(score: Score) -> str:
    return f"{score.value:+.2f}" if score.value is not None else f"unscored ({score.reason})"


def chains(recipe: Recipe, tried: Tried, *, shows_thoughts: bool = False) -> None:
    """Print whole chains, one panel each. Markup in model text is not interpreted."""

    def add_thought(body: Text, chain: Chain, step: int, role: Role) -> None:
        thought = tried.thoughts.get((*chain.key, step, role), "")
        if thought and shows_thoughts:
            body.append(f"thought  {visible(thought)}\n", "dim italic")

    for prompt, chain in tried.chains:
        body = Text()
        if prompt.messages:
            body.append(visible(prompt.transcript) + "\n\n", "dim")
        body.append(f"answer  {_score(chain.answer_score)}", "bold")
        body.append(f"  {chain.answer_defect}\n" if chain.answer_defect else "\n", "yellow")
        add_thought(body, chain, 0, "answer")
        body.append(visible(chain.answer) + "\n")
        for step in chain.steps:
            body.append(f"\ncritique {step.number}\n", "bold")
            add_thought(body, chain, step.number, "critique")
            body.append(visible(step.critique) + "\n", "dim")
            body.append(f"\nrevision {step.number}  {_score(step.score)}  ", "bold")
            body.append(
                "accepted\n" if step.accepted else f"rejected: {step.rejected}\n",
                "green" if step.accepted else "yellow",
            )
            add_thought(body, chain, step.number, "revision")
            body.append(visible(step.revision) + "\n")
        final = f"final: {'first answer' if not chain.state_step else f'revision {chain.state_step}'}"
        use = f"not usable: {chain.final_defect}" if chain.final_defect else _score(chain.final_score)
        terminal.out.print(
            Panel(
                body,
                title=Text(prompt.text),
                title_align="left",
                subtitle=Text(f"{final}  {use}"),
                subtitle_align="right",
            )
        )
    steps = [s for _, c in tried.chains for s in c.steps]
    if tried.thoughts and not shows_thoughts:
        terminal.out.print(f"The model thought before {len(tried.thoughts)} turns; --thoughts shows what.")
    accepted = sum(s.accepted for s in steps)
    terminal.out.print(
        f"{len(tried.chains)} chains, {tried.failed} failed, in {duration(tried.seconds)}; {accepted} of "
        f"{len(steps)} revisions accepted ({recipe.chain.acceptance})"
    )


def claim(run: Run) -> None:
    """Print the criteria of a run's claim and the verdict."""
    from dsc_hub.report.sentences import claim_sentence
    from dsc_hub.report.tables import claim_table
    from dsc_hub.report.verdicts import test_set_sentences

    judged, (metrics, evaluation) = claim_of(run), evaluated(run)
    terminal.out.print(Text(str(run.folder)))
    terminal.out.print(claim_table(evaluation))
    terminal.out.print(Text(claim_sentence(judged), "bold"))
    for sentence in test_set_sentences(evaluation, with_current_looks(run, metrics).test_set):
        terminal.out.print(Text(sentence))


def numbers(run: Run) -> None:
    """Print all tables of an evaluated run: arms and differences, side effects, cost, chains."""
    from dsc_hub.report import sentences, tables, verdicts

    metrics, evaluation = evaluated(run)
    terminal.out.print(Text(str(run.folder)))
    terminal.out.print(tables.closing_table(evaluation, metrics.blind))
    if sentence := sentences.claim_sentence(evaluation.claim):
        terminal.out.print(Text(sentence, "bold"))
    terminal.out.print(Text(verdicts.headline(evaluation)))
    terminal.out.print()
    terminal.out.print(tables.detail_table(evaluation))
    terminal.out.print(tables.side_effect_table(evaluation))
    terminal.out.print(tables.cost_table(evaluation))
    if metrics.rounds:
        terminal.out.print(Text(sentences.rounds_sentence(metrics.rounds)))
    if s := metrics.sampling:
        terminal.out.print(Text(f"{sentences.last_step_sentence(s)} {sentences.mixing_sentence(s)}"))
    terminal.out.print(Text(f"All arms ran on {evaluation.served_on}."))
    for sentence in verdicts.test_set_sentences(evaluation, with_current_looks(run, metrics).test_set):
        terminal.out.print(Text(sentence))


def comparison(compared: Comparison) -> None:
    """Print the result of `compare.compare_runs`: a table of the runs' arms and one of their differences."""
    from dsc_hub.cli.tables import comparison_tables

    for table in comparison_tables(compared):
        terminal.out.print(table)
    for note in compared.notes:
        terminal.out.print(Text(note, "yellow"))


def pulled(found: Pulled) -> None:
    """Print what was pulled, its location and the next commands."""
    table = grid()
    size = sum(p.stat().st_size for p in found.folder.rglob("*") if p.is_file())
    table.add_row(found.kind, Text(f"{found.repo}  at {found.commit}"))
    table.add_row("folder", Text(f"{found.folder}  ({size / 1e6:.1f} MB)"))
    if found.left_out:
        table.add_row(
            "not taken", Text(f"{', '.join(map(visible, found.left_out[:8]))}{' ...' * (len(found.left_out) > 8)}")
        )
    if (found.folder / "recipe.yaml").is_file():
        # Not the local file: by its Hub address the recipe is treated and checked as third-party.
        table.add_row("run it", Text(f"dsc run hub:{found.repo}@{found.commit}"))
    if found.kind == "adapter":
        table.add_row("score it", Text(f"dsc evaluate RECIPE --adapter hub:{found.repo}@{found.commit}"))
    if found.kind in ("dataset", "adapter"):
        table.add_row("check it", Text(f"dsc verify {found.repo}@{found.commit}"))
    terminal.out.print(table)


def checks(found: Pulled, results: Sequence[Check]) -> None:
    """Print the checks of `verify.verify` and their summary."""
    terminal.out.print(Text(f"{found.kind} {found.repo} at {found.commit}"))
    table = Table()
    for title in ("what", "verdict", "found"):
        table.add_column(title, overflow="fold")
    words = {True: ("agrees", "green"), False: ("differs", "bold red"), None: ("not checked", "yellow")}
    for check in results:
        word, style = words[check.agrees]
        table.add_row(Text(check.name), Text(word, style), Text(visible(check.detail)))
    terminal.out.print(table)
    off, unknown = (sum(c.agrees is verdict for c in results) for verdict in (False, None))
    said = f"{off} of {len(results)} checks found a difference." if off else "All that could be checked agrees."
    terminal.out.print(
        Text(said + (f" {unknown} could not be checked." if unknown else ""), "bold red" if off else "bold")
    )


def closing(context: RunContext, hub_port: int) -> None:
    """Print the closing screen of a run: the table, time by stage, locations, next commands."""
    from dsc_hub.report.formatting import money, sampling_cost
    from dsc_hub.report.sentences import claim_sentence
    from dsc_hub.report.tables import closing_table
    from dsc_hub.report.verdicts import headline

    metrics, facts = metrics_of(context.run), context.run.facts
    terminal.out.print()
    if evaluation := metrics.evaluation:
        terminal.out.print(closing_table(evaluation, metrics.blind))
        if sentence := claim_sentence(evaluation.claim):
            terminal.out.print(Text(sentence, "bold"))
            short = _short_folder(context.run.folder)
            terminal.out.print(
                Text(f"(each criterion: dsc check {short}; what else moved, and its cost: dsc show {short})")
            )
        terminal.out.print(Text(headline(evaluation)))
    stages = {s: marker["seconds"] for s in NAMES if (marker := context.run.marker(s))}
    terminal.out.print()
    terminal.out.print(_times(stages, context.recipe.budget_s))
    terminal.out.print()
    table = grid()
    if sampling := metrics.sampling:
        table.add_row("sampling", sampling_cost(sampling))
    if evaluation and evaluation.cost_usd is not None:
        table.add_row("evaluation", money(evaluation.cost_usd))
    marker = context.run.marker("publish")
    embedded = context.recipe.publish.to == "local"
    if marker:
        for kind, what in marker["result"].items():
            address = (
                what["address"].replace(facts.repos.endpoint, f"http://127.0.0.1:{hub_port}")
                if embedded and facts.repos.endpoint
                else what["address"]
            )
            table.add_row(
                kind, f"{address}  at {what['commit'][:12]}  ({what['files']} files, {what['bytes'] / 1e6:.1f} MB)"
            )
    table.add_row("report", str(context.run["report.html"].resolve()))
    table.add_row("run folder", str(context.run.folder.resolve()))
    terminal.out.print(table)
    if marker and embedded:
        from dsc_hub.local_hub.server import default_root

        terminal.out.print(
            Text("\nThey are on the embedded Hub, private. To read them with the public clients:\n", "bold")
        )
        terminal.out.print(
            Text(
                f"  dsc hub serve &\n  export HF_ENDPOINT=http://127.0.0.1:{hub_port} HF_TOKEN=$(cat "
                f"{_short_folder(default_root() / 'token')})\n"
                f'  python -c \'from datasets import load_dataset; print(load_dataset("{facts.repos.dataset}",'
                ' "sft"))\''
            ),
            soft_wrap=True,
        )


def _times(stages: Mapping[str, float], budget: Mapping[str, float]) -> Table:
    """Return the table of seconds by stage, with the recipe's budget if it has one."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("stage", style="bold")
    table.add_column("took", justify="right")
    if budget:
        table.add_column("budget", justify="right")
    rows = [(s, stages[s], budget.get(s)) for s in NAMES if s in stages]
    rows.append(("together", sum(stages.values()), sum(budget.values()) or None))
    for name, took, allowed in rows:
        shown = [duration(allowed) if allowed else ""] if budget else []
        table.add_row(name, Text(duration(took), "red" if allowed and took > allowed else ""), *shown)
    return table


def _short_folder(path: Path) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~", 1) if str(path).startswith(home + "/") else str(path)


def show_grid(rows: Sequence[GridRow]) -> None:
    """Print the result of `dsc grid`: the table and the locations of the runs."""
    from dsc_hub.cli.tables import grid_table

    terminal.out.print(grid_table(rows))
    reused = sum(r.sampling.reused_turns for r in rows if r.sampling)
    terminal.out.print(
        f"{len(rows)} combinations; {reused:,} turns were taken from one another. Each is a run: dsc show RUN"
    )
    for r in rows:
        terminal.out.print(Text(str(r.run)))


def scored(scores: ScoredFile) -> None:
    """Print the result of `dsc score`: the first texts and the mean."""
    from dsc_hub.report import formatting

    rows = scores.rows
    table = Table(box=None, pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("text", overflow="ellipsis", no_wrap=True)
    for row in rows[:FEW_TEXTS]:
        value = formatting.number(row.score) if row.score is not None else f"unscored: {row.reason}"
        table.add_row(value, Text(" ".join(row.text.split())))
    terminal.out.print(table)
    if len(rows) > FEW_TEXTS:
        terminal.out.print(f"... and {len(rows) - FEW_TEXTS:,} more texts (--json prints all)")
    way = "higher" if scores.higher_is_better else "lower"
    terminal.out.print(
        Text(
            f"{scores.metric}: mean {formatting.interval(scores.estimate)} over {scores.estimate.n:,} texts, "
            f"{scores.unscored:,} unscored; {scores.unit}, {way} is better; {scores.identity}"
        )
    )
