"""Commands to start with: recipes, plan, try, run, grid."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import click

from dsc_hub.cli.base import (
    RUNS,
    allow_option,
    cli,
    json_option,
    page_option,
    print_json,
    recipe_verb,
    resolve_context,
    results_follow,
    runs_option,
)
from dsc_hub.system.addresses import HUB_PORT


@recipe_verb
@json_option
def plan(recipe: str, overrides: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Say what a run would do, take and write, and check all that can be checked. Writes nothing but dsc's cache."""
    from dsc_hub import api
    from dsc_hub.cli import planned

    context = resolve_context(recipe, overrides, runs)
    estimate = api.plan(context)
    if as_json:
        print_json(estimate)
    else:
        results_follow()
        planned.show_plan(context, estimate)


@recipe_verb
@click.option("--adapter", metavar="hub:USER/REPO[@REV]", help="This adapter too, for `dsc evaluate --adapter`.")
@json_option
def fetch(recipe: str, overrides: tuple[str, ...], runs: Path, adapter: str | None, as_json: bool) -> None:
    """Fetch all that a run will load (model, scorers, prompts), so that it runs without a network: HF_HUB_OFFLINE=1."""
    from dsc_hub import api
    from dsc_hub.cli.fetched import show_fetched

    context = resolve_context(recipe, overrides, runs)
    fetched = api.fetch(context, adapter)
    command = _run_command(recipe, overrides, runs)
    publishing = command if context.recipe.publish.to == "hub" else None
    # Without a network nothing can be published to the user's Hub.
    offline, folder = f"HF_HUB_OFFLINE=1 {command}", context.run.folder
    if publishing:
        offline = f"{offline} publish.to=none"
        folder = resolve_context(recipe, (*overrides, "publish.to=none"), runs).run.folder
    if as_json:
        print_json({"run": str(folder), **asdict(fetched), "offline": offline, "publishing": publishing})
    else:
        results_follow()
        show_fetched(fetched, folder, offline, publishing)


def _run_command(recipe: str, overrides: tuple[str, ...], runs: Path) -> str:
    allowed = click.get_current_context().meta["allowed_code"]
    options = [word for code in allowed for word in ("--allow-code", code)]
    options += ["--runs", str(runs)] if runs != RUNS else []
    return shlex.join(["dsc", "run", recipe, *options, *overrides])


@recipe_verb
@click.option("-n", "count", type=click.IntRange(1), default=8, show_default=True, help="How many prompts.")
@click.option("--thoughts", is_flag=True, help="Show what the model thought before each turn, too.")
@json_option
def try_(recipe: str, overrides: tuple[str, ...], runs: Path, count: int, thoughts: bool, as_json: bool) -> None:
    """Show a handful of whole chains, with scores, decisions and rejections, before hours are spent."""
    from dsc_hub.cli import screens
    from dsc_hub.pipeline import session

    context = resolve_context(recipe, overrides, runs)
    tried = session.sample_a_few(context, count)
    if as_json:
        chains = [{"prompt": prompt.transcript, **chain.as_row()} for prompt, chain in tried.chains]
        numbers = {"seconds": tried.seconds, "failed": tried.failed}
        listed = [
            {"prompt_id": key[0], "chain": key[1], "step": key[2], "role": key[3], "thought": thought}
            for key, thought in tried.thoughts.items()
        ]
        print_json({"chains": chains, **numbers} | ({"thoughts": listed} if thoughts else {}))
    else:
        screens.chains(context.recipe, tried, shows_thoughts=thoughts)


@recipe_verb
@click.option("--retry-failed", is_flag=True, help="Take up again the chains that failed.")
@json_option
def run(recipe: str, overrides: tuple[str, ...], runs: Path, retry_failed: bool, as_json: bool) -> None:
    """Do everything, going on from what is done: sample, distill, evaluate, report, publish."""
    from dsc_hub.pipeline.run import run_all

    context = resolve_context(recipe, overrides, runs)
    run_all(context, retry_failed=retry_failed)
    if as_json:
        print_json({"run": str(context.run.folder), "metrics": context.run.metrics})
    else:
        from dsc_hub.cli import screens

        screens.closing(context, HUB_PORT)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@page_option
@allow_option
@runs_option
@json_option
def grid(file: Path, page: Path | None, runs: Path, as_json: bool) -> None:
    """Run a recipe under every combination of some settings (FILE names both), sharing what they share; one table."""
    from dsc_hub.cli import screens as screen
    from dsc_hub.pipeline import grid as grids

    rows = grids.run_grid(file, runs, click.get_current_context().meta["allowed_code"])
    if page:
        from dsc_hub.cli.tables import grid_page

        grid_page(page, rows)
    if as_json:
        print_json(rows)
    else:
        results_follow()
        screen.show_grid(rows)
    if any(row.error for row in rows):
        raise SystemExit(1)


@cli.command()
@click.argument("of", type=click.Choice(["recipe", "metrics"]), default="recipe")
def schema(of: str) -> None:
    """Print the JSON schema of recipes (for editors), or of metrics.json."""
    from dsc_hub.config.recipe import Recipe
    from dsc_hub.runs.metrics_schema import Metrics

    print_json((Metrics if of == "metrics" else Recipe).model_json_schema())


@cli.group()
def recipes() -> None:
    """List the packaged recipes, copy one to edit it, or adopt one that was downloaded."""


@recipes.command("list")
@json_option
def recipes_list(as_json: bool) -> None:
    """Names of the packaged recipes and what they are for."""
    from dsc_hub.config.recipe_files import load_recipe_file, packaged_recipes

    if as_json:
        print_json({name: load_recipe_file(path).description for name, path in packaged_recipes().items()})
        return
    for name, path in packaged_recipes().items():
        click.echo(f"{name:<16} {load_recipe_file(path).description}")


@recipes.command("copy")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def recipes_copy(name: str, folder: Path | None) -> None:
    """Copy a packaged recipe and its files into FOLDER (default: its name, here)."""
    from dsc_hub.config.recipe_files import copy

    target, own = copy(name, folder)
    click.echo(f"{target}/recipe.yaml, named {own}, is yours to edit:  dsc run {target}/recipe.yaml")


@recipes.command("adopt")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--yes", is_flag=True, help="Don't ask.")
def recipes_adopt(folder: Path, yes: bool) -> None:
    """Make a downloaded FOLDER your own: its recipes may then name servers, keys, local folders and code of yours.

    Shows first what each of its files would contact, read and run.
    """
    from dsc_hub.config import origin, untrusted
    from dsc_hub.errors import ConfigError
    from dsc_hub.system.progress import say

    found, where = origin.to_adopt(folder)
    for line in untrusted.reach_of(found):
        say(f"  {line}")
    question = f"{found} was downloaded from {where}. Is it your own from now on, with all that it may get?"
    try:
        agreed = yes or click.confirm(question, err=True)
    except click.Abort:  # no terminal, or Ctrl-C
        agreed = False
    if not agreed:
        raise ConfigError(f"{folder} was not adopted", "Answer y, or give --yes.")
    origin.adopt(folder)
    click.echo(f"{folder} is yours")


cli.add_command(try_, "try")
cli.commands.pop("try-", None)
