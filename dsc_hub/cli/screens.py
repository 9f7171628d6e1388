"""Result screens of `dsc`: example chains, numbers, closing screen. Formats numbers, computes none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dsc_hub.chain.hygiene import CUT
from dsc_hub.cli import terminal
from dsc_hub.cli.terminal import visible
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
    from dsc_hub.evaluation.compare import Comparison
    from dsc_hub.evaluation.score_file import ScoredFile
    from dsc_hub.hub.pull import Pulled
    from dsc_hub.pipeline.grid import GridRow
    from dsc_hub.pipeline.session import Tried
    from dsc_hub.publish.verify import Check

FEW_TEXTS = 20


def grid() -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


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
        is_clean = not chain.answer_defect
        for step in chain.steps:
            body.append(f"\ncritique {step.number}", "bold")
            body.append(f"  {CUT}\n" if (*chain.key, step.number, "critique") in tried.cut else "\n", "yellow")
            add_thought(body, chain, step.number, "critique")
            body.append(visible(step.critique) + "\n", "dim")
            body.append(f"\nrevision {step.number}  {_score(step.score)}  ", "bold")
            # Beside a text with a defect any clean one is accepted, whatever it scores.
            accepted = "accepted" if is_clean or step.defect else "accepted: the first clean text"
            body.append(
                f"{accepted}\n" if step.accepted else f"rejected: {step.rejected}\n",
                "green" if step.accepted else "yellow",
            )
            is_clean = not step.defect if step.accepted else is_clean
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
    n_accepted = sum(s.accepted for s in steps)
    if defects := Counter(c.answer_defect for _, c in tried.chains if c.answer_defect):
        reasons = ", ".join(f"{reason} {n}" for reason, n in defects.most_common())
        terminal.out.print(f"First answers with a defect: {defects.total()} of {len(tried.chains)} ({reasons})")
    terminal.out.print(
        f"{len(tried.chains)} chains, {tried.failed} failed, in {duration(tried.seconds)}; {n_accepted} of "
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
    from dsc_hub.cli.tables import comparison_sentences, comparison_tables

    for table in comparison_tables(compared):
        terminal.out.print(table)
    for sentence in comparison_sentences(compared):
        terminal.out.print(Text(sentence))
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


def checks(title: str, results: Sequence[Check]) -> None:
    """Print the checks of a repo or a run folder and their summary."""
    terminal.out.print(Text(title))
    table = Table()
    for column in ("what", "verdict", "found"):
        table.add_column(column, overflow="fold")
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
    terminal.out.print(_times(stages, metrics.server_starts, context.recipe.budget_s))
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


def _times(stages: Mapping[str, float], starts: Mapping[str, float], budget: Mapping[str, float]) -> Table:
    """Return the table of seconds by stage: of it vLLM's starts, and the recipe's budget, where there are any."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("stage", style="bold")
    table.add_column("took", justify="right")
    if starts:
        table.add_column("start of vLLM", justify="right")
    if budget:
        table.add_column("budget", justify="right")
    rows = [(s, stages[s], budget.get(s)) for s in NAMES if s in stages]
    rows.append(("together", sum(stages.values()), sum(budget.values()) or None))
    started = {**starts, "together": sum(starts.values())}
    for name, took, allowed in rows:
        shown = [duration(started[name]) if name in started else ""] if starts else []
        shown += [duration(allowed) if allowed else ""] if budget else []
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
