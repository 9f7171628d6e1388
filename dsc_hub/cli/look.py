"""Commands to look at runs and texts with."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dsc_hub.cli.base import (
    allow_option,
    cli,
    json_option,
    page_option,
    print_json,
    resolve_context,
    results_follow,
    run_verb,
    runs_option,
)
from dsc_hub.cli.completing import complete_override, complete_run


@cli.command()
@click.argument("reference", metavar="RECIPE | RUN", shell_complete=complete_run)
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...", shell_complete=complete_override)
@click.option("--open", "opens", is_flag=True, help="Show the page in the browser.")
@allow_option
@runs_option
@json_option
def report(reference: str, overrides: tuple[str, ...], opens: bool, runs: Path, as_json: bool) -> None:
    """Write the HTML report and the cards.

    RUN is a run folder, or a recipe's name for the run started last; a run that goes on, was stopped or failed has a
    page of what there is, and no cards. A recipe's file, or a name with overrides, means the run that it describes.
    """
    from dsc_hub.pipeline.run import report_run, run_one
    from dsc_hub.runs.lookup import current_run, names_run

    if names_run(reference, runs) and not overrides:
        run = current_run(reference, runs)
        result = report_run(run)
        click.echo(f"{run['report.html']}", err=as_json)
    else:
        context = resolve_context(reference, overrides, runs)
        run_one(context, "report")
        run_one(context, "cards")
        run, result = context.run, (context.run.marker("report") or {}).get("result", {})
    if as_json:
        print_json({"run": str(run.folder), **result})
    if opens:
        click.launch(run["report.html"].resolve().as_uri())


@run_verb
@click.option("--once", is_flag=True, help="Draw it once, and end.")
def watch(reference: str, runs: Path, once: bool) -> None:
    """Watch RUN while it goes on: stage, counts, rate, reward so far, the last chain."""
    from dsc_hub.cli.watch import watch_run
    from dsc_hub.runs.lookup import current_run

    watch_run(current_run(reference, runs), once)


@cli.group("runs", invoke_without_command=True)
@click.pass_context
@runs_option
@json_option
def runs_(context: click.Context, runs: Path, as_json: bool) -> None:
    """List the runs: what differs between them, state, verdict, size; remove some."""
    context.obj = (runs, as_json)
    if context.invoked_subcommand is None:
        _list_runs(runs, None, as_json)


@runs_.command("list")
@click.argument("recipe", required=False)
@click.option("--runs", type=click.Path(file_okay=False, path_type=Path), help="Folder that holds the run folders.")
@json_option
@click.pass_obj
def runs_list(of_group: tuple[Path, bool], recipe: str | None, runs: Path | None, as_json: bool) -> None:
    """List the runs, all of them or those of one recipe."""
    _list_runs(runs or of_group[0], recipe, as_json or of_group[1])


def _list_runs(runs: Path, recipe: str | None, as_json: bool) -> None:
    from dataclasses import asdict

    from dsc_hub.cli.tables import runs_table
    from dsc_hub.cli.terminal import out
    from dsc_hub.runs.overview import summaries

    found = summaries(runs, recipe)
    if as_json:
        print_json([asdict(summary) for summary in found])
        return
    results_follow()
    if found:
        out.print(runs_table(found))
    else:
        of_recipe = f" of {recipe}" if recipe else ""
        click.echo(f"no runs{of_recipe} in {runs}; `dsc run RECIPE` makes one, --runs names another folder")


@runs_.command("remove")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_FOLDER...")
@click.option("--yes", is_flag=True, help="Don't ask.")
def runs_remove(folders: tuple[Path, ...], yes: bool) -> None:
    """Remove run folders for good: rows, adapter, numbers. What was published stays published."""
    import shutil

    from dsc_hub.errors import ConfigError
    from dsc_hub.report.formatting import megabytes
    from dsc_hub.runs.run import Run
    from dsc_hub.system.files import folder_bytes

    unique = list({folder.resolve(): folder for folder in folders}.values())
    problems = [f"{f}: no run folder (no run.json in it)" for f in unique if not (f / "run.json").is_file()]
    problems += [f"{f}: a link; name the folder itself" for f in unique if f.is_symlink()]
    if problems:
        raise ConfigError("not everything can be removed; nothing was", problems=problems)
    for folder in unique:
        click.echo(f"{folder}  {megabytes(folder_bytes(folder))}", err=True)
    if not yes and not click.confirm(f"Remove {len(unique)} run folder{'s' * (len(unique) > 1)} for good?", err=True):
        raise ConfigError("nothing was removed", "Answer y, or give --yes.")
    for folder in unique:
        with Run(folder).lock():
            shutil.rmtree(folder)


@run_verb
@json_option
def check(reference: str, runs: Path, as_json: bool) -> None:
    """Say whether "distilled is better than its base" may be claimed of RUN: holds, fails, or not enough data; exit
    code 1 unless it holds.

    RUN is a run folder, or a recipe's name for its newest evaluated run.
    """
    from dsc_hub.cli import screens
    from dsc_hub.evaluation.claim import claim_of
    from dsc_hub.runs.lookup import find_run

    run = find_run(reference, runs)
    claim = claim_of(run)
    if as_json:
        print_json({"run": str(run.folder), **claim.model_dump()})
    else:
        results_follow()
        screens.claim(run)
    if claim.verdict != "holds":
        sys.exit(1)


@run_verb
@json_option
def show(reference: str, runs: Path, as_json: bool) -> None:
    """Show the numbers of RUN: arms, differences, what else moved, what it cost.

    RUN is a run folder, or a recipe's name for its newest evaluated run. With --json: the whole metrics.json.
    """
    from dsc_hub.cli import screens as screen
    from dsc_hub.runs.lookup import find_run
    from dsc_hub.runs.results import evaluation_of

    run = find_run(reference, runs)
    if as_json:
        evaluation_of(run)
        print_json(run.metrics)
    else:
        results_follow()
        screen.numbers(run)


@cli.command()
@click.argument("references", nargs=-1, required=True, metavar="RUN RUN...", shell_complete=complete_run)
@page_option
@runs_option
@json_option
def compare(references: tuple[str, ...], page: Path | None, runs: Path, as_json: bool) -> None:
    """Compare the arms of two or more runs, paired where their prompts agree; the first RUN is the baseline."""
    from dsc_hub.cli import screens as screen
    from dsc_hub.evaluation.compare import compare_runs as compared
    from dsc_hub.runs.lookup import find_run

    comparison = compared([find_run(r, runs) for r in references])
    if page:
        from dsc_hub.cli.tables import comparison_page

        comparison_page(page, comparison)
    if as_json:
        print_json(comparison)
    else:
        results_follow()
        screen.comparison(comparison)


@run_verb
@click.option("-n", "count", type=click.IntRange(1), default=30, show_default=True, help="How many prompts at most.")
@click.option("--judge", default="anonymous", show_default=True, help="Who judges; stays in the run folder.")
@click.option("--json", "as_json", is_flag=True, help="Ask nothing, print the count of what was judged so far as JSON.")
def blind(reference: str, runs: Path, count: int, judge: str, as_json: bool) -> None:
    """Judge pairs of answers, base and distilled, without knowing which is which.

    RUN is a run folder, or a recipe's name for its newest evaluated run.
    """
    from dsc_hub.cli.blind import judge_pairs
    from dsc_hub.evaluation.blind import counts
    from dsc_hub.runs.lookup import find_run

    run = find_run(reference, runs)
    if as_json:
        tally = counts(run)
        print_json({"run": str(run.folder), **(tally.model_dump() if tally else {"prompts": 0, "verdicts": 0})})
    else:
        judge_pairs(run, count, judge)


@run_verb
def chat(reference: str, runs: Path) -> None:
    """Talk to base and distilled at once, side by side.

    RUN is a run folder, or a recipe's name for its newest evaluated run.
    """
    from dsc_hub.cli.chat import start_chat
    from dsc_hub.runs.lookup import find_run

    start_chat(find_run(reference, runs))


@cli.command()
@click.argument("metric")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, metavar="[OPTION=VALUE]...")
@click.option("--scorer", help="A packaged scorer or a model of the Hub (default: the metric's first).")
@click.option("--column", default="text", show_default=True, help="Of JSON, CSV and Parquet.")
@allow_option
@json_option
def score(metric: str, file: Path, options: tuple[str, ...], scorer: str | None, column: str, as_json: bool) -> None:
    """Score the texts in FILE with METRIC: a shipped one, your own NAME.py, or a Space USER/NAME.

    FILE has a text a line, or is JSON, CSV or Parquet by its suffix; columns `prompt` and `kind` go along. OPTIONs are
    the metric's.
    """
    from dsc_hub.cli import screens as screen
    from dsc_hub.config.recipe_files import parse_options
    from dsc_hub.evaluation.score_file import score_file as scored
    from dsc_hub.metrics.registry import Code

    code = Code(Path(), click.get_current_context().meta["allowed_code"])
    scores = scored(metric, file, scorer, column, parse_options(options), code)
    if as_json:
        print_json(scores)
    else:
        results_follow()
        screen.scored(scores)
