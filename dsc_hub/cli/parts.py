"""Commands that run one stage: sample, merge, dataset, distill, evaluate, and rows of the reference implementation."""

from __future__ import annotations

from pathlib import Path

import click

from dsc_hub.cli.base import (
    allow_option,
    cli,
    json_option,
    print_json,
    recipe_verb,
    resolve_context,
    runs_option,
    stage_verb,
)
from dsc_hub.cli.completing import complete_override, complete_recipe


@recipe_verb
@click.option("--retry-failed", is_flag=True, help="Take up again the chains that failed.")
@click.option("--shard", metavar="I/N", help="Only the I-th of N shares of the chains; `dsc merge` puts them together.")
@json_option
def sample(
    recipe: str, overrides: tuple[str, ...], runs: Path, retry_failed: bool, shard: str | None, as_json: bool
) -> None:
    """Run the chains of the training and validation prompts.

    On N machines, or as a job array: dsc sample RECIPE --shard I/N on each, in any order, then dsc merge RECIPE.
    """
    from dsc_hub.pipeline import resolve
    from dsc_hub.pipeline.run import run_all
    from dsc_hub.runs import shards

    share = shards.parse(shard) if shard else None
    context = resolve_context(recipe, overrides, runs)
    if share:
        context = resolve.of_shard(context, share)
    run_all(context, "sampling", retry_failed)
    if as_json:
        print_json(context.run.marker("sampling"))


@cli.command()
@click.argument("recipe", shell_complete=complete_recipe)
@click.argument("overrides_and_folders", nargs=-1, metavar="[KEY.SUB=VALUE | FOLDER]...")
@allow_option
@runs_option
@json_option
def merge(recipe: str, overrides_and_folders: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Put the shards of a sampling together.

    FOLDERs are run folders that `dsc sample RECIPE --shard I/N` wrote (default: those below the run folder, where a
    shared disk has them). The overrides must be the same as there.
    """
    from dsc_hub.pipeline import run as pipeline_run

    folders = [Path(word) for word in overrides_and_folders if "=" not in word or Path(word).is_dir()]
    overrides = tuple(word for word in overrides_and_folders if Path(word) not in folders)
    context = resolve_context(recipe, overrides, runs)
    pipeline_run.merge_shards(context, folders)
    if as_json:
        print_json(context.run.marker("sampling"))


@stage_verb("dataset")
def dataset() -> None:
    """Make the training data out of the chains."""


@stage_verb("distill")
def distill() -> None:
    """Train the adapter (starts `accelerate launch` itself)."""


@cli.command()
@click.argument("recipe", shell_complete=complete_recipe)
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...", shell_complete=complete_override)
@click.option("--adapter", metavar="hub:USER/REPO[@REV]", help="Score this adapter instead of training one.")
@allow_option
@runs_option
@json_option
def evaluate(recipe: str, overrides: tuple[str, ...], adapter: str | None, runs: Path, as_json: bool) -> None:
    """Answer the test prompts with every arm, and score the answers.

    With --adapter, somebody else's adapter beside the recipe's base model: dsc evaluate quickstart --adapter
    hub:ann/kind-lora
    """
    from dsc_hub.cli import screens
    from dsc_hub.pipeline import resolve
    from dsc_hub.pipeline.run import evaluate_adapter, run_one

    if adapter is None:
        context = resolve_context(recipe, overrides, runs)
        run_one(context, "evaluation")
    else:
        context = evaluate_adapter(
            resolve_context(recipe, (*resolve.ARMS_OF_ANOTHER, *overrides, *resolve.OF_ANOTHER), runs), adapter
        )
    if as_json:
        print_json(context.run.metrics["evaluation"])
    elif adapter:
        screens.numbers(context.run)


@cli.command("import-reference")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("recipe", shell_complete=complete_recipe)
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...", shell_complete=complete_override)
@click.option("--to", "folder", type=click.Path(path_type=Path), help="Folder for the recipe (default: FILE's name).")
@runs_option
@json_option
def import_reference(
    file: Path, recipe: str, overrides: tuple[str, ...], folder: Path | None, runs: Path, as_json: bool
) -> None:
    """Take result rows of the reference implementation (a JSON list) as chains of one step, to go on from there.

    RECIPE says what the later stages do; a copy of it with the rows' prompts is written, and its run begins with these
    chains.
    """
    from dsc_hub.pipeline.import_reference import import_rows

    context, counts = import_rows(file, recipe, overrides, folder or Path(file.stem), runs)
    if as_json:
        print_json({"run": str(context.run.folder), "recipe": str(context.path), **counts})
    else:
        click.echo(f"go on:  dsc run {context.path}")
