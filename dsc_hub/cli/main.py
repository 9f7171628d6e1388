"""The verbs of `dsc`. Parses, calls one function of the pipeline, prints the result; imports a stage only when it runs.

Exit codes: 0 done; 1 `dsc check` of a claim that does not hold (it fails, or there is not enough data); 2 the user or
the environment has something to mend (one message, no traceback); 130 interrupted. A traceback means a bug of ours.
"""

from __future__ import annotations

import codecs
import functools
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dsc_hub import __version__

if TYPE_CHECKING:
    from dsc_hub.pipeline.context import RunContext

HUB_PORT = 8765


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dsc")
def cli() -> None:
    """Distilled self-critique: prompts in, a published and measured adapter out.

    RECIPE is a packaged recipe's name (`dsc recipes list`), a YAML file, or hub:USER/REPO[@REVISION]. Any key of it can
    be overridden with KEY.SUB=VALUE behind it.
    """


def _safe_streams() -> None:
    """Every text can be printed: to a closed standard output nothing is, and where the encoding lacks a sign another
    stands for it (a minus sign must not vanish)."""
    plain = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "..."}

    def instead(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(plain.get(c, "?") for c in error.object[error.start : error.end]), error.end

    codecs.register_error("dsc", instead)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (open until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="dsc")


def _results_follow() -> None:
    """All work is done and only printing is left: whoever reads it may close it early (`| head`), which ends us as
    quietly as any program of the shell. Until then a broken pipe must not kill us: servers and the Hub are spoken to
    through sockets. Nor may it kill a program that calls our verbs and reads what they print itself."""
    if sys.stdout is sys.__stdout__:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def main() -> NoReturn:
    """Entry point: turns errors into one message and an exit code."""
    _safe_streams()
    os.umask(os.umask(0) | 0o077)  # prompts, chains and adapters are private by default; share them with chmod
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` blocks end their servers
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # send nothing that the user did not request
    # Servers started by dsc run on this machine: bypass proxies from the environment.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    try:
        cli(standalone_mode=False)
        sys.exit(0)
    except click.exceptions.Abort as e:  # raised for an interrupt, and for EOFError, which would be a bug in dsc
        if isinstance(e.__cause__, EOFError):
            raise e.__cause__ from None
        click.echo("\ninterrupted: what is finished is kept; the same command goes on from there", err=True)
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except Exception as e:
        from dsc_hub.errors import DscError, disk_error
        from dsc_hub.system.progress import clean

        known = e if isinstance(e, DscError) else disk_error(e) if isinstance(e, OSError) else None
        if known is None:
            raise
        click.echo(clean(f"{type(known).__name__}: {known}"), err=True)
        sys.exit(2)


runs_option = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that holds the run folders.",
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON instead of tables.")


def _print_json(value: Any) -> None:
    from dsc_hub.system.progress import clean_json

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)

    _results_follow()
    click.echo(clean_json(json.dumps(value, indent=2, ensure_ascii=False, default=plain)))


def _allow(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> None:
    for value in values:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", value):
            raise click.BadParameter(
                f"{value}: expected USER/NAME@COMMIT, the commit with all its 40 digits (of a shorter one there can "
                "be two)",
                context,
                parameter,
            )
    context.meta["allowed_code"] = values


allow_option = click.option(
    "--allow-code",
    multiple=True,
    metavar="USER/NAME@COMMIT",
    expose_value=False,
    callback=_allow,
    help="Let the metric code in this Space, at this commit, run here.",
)


def _resolve(recipe: str, overrides: tuple[str, ...], runs: Path) -> RunContext:
    from dsc_hub import api

    return api.resolve(recipe, overrides, runs, click.get_current_context().meta["allowed_code"])


def _in_launch(f: Callable[..., None]) -> Callable[..., None]:
    """Let the main process of a launcher run the verb; the others wait for its training, and take part in it."""

    @functools.wraps(f)
    def verb(*args: Any, runs: Path, **options: Any) -> None:
        from dsc_hub.system.launch import rank, world_size

        if world_size() == 1:
            return f(*args, runs=runs, **options)
        from dsc_hub.distill import ranks

        if rank() > 0:
            sys.exit(ranks.follow(runs))
        with ranks.lead(runs):
            return f(*args, runs=runs, **options)

    return verb


def recipe_verb(f: Callable[..., None]) -> click.Command:
    """A verb that takes RECIPE, overrides, --runs and --allow-code."""
    f = allow_option(runs_option(_in_launch(f)))
    f = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")(f)
    return cli.command()(click.argument("recipe")(f))


def stage_verb(stage: str, last_too: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """A verb that runs one stage alone (and `last_too` after it)."""

    def decorate(f: Callable[..., Any]) -> click.Command:
        @functools.wraps(f)
        @json_option
        def verb(recipe: str, overrides: tuple[str, ...], runs: Path, as_json: bool) -> None:
            from dsc_hub.pipeline.run import run_one

            context = _resolve(recipe, overrides, runs)
            run_one(context, stage)
            if last_too:
                run_one(context, last_too)
            if as_json:
                _print_json(context.run.marker(stage))

        return recipe_verb(verb)

    return decorate


@recipe_verb
@click.option("--retry-failed", is_flag=True, help="Take up again the chains that failed.")
@json_option
def run(recipe: str, overrides: tuple[str, ...], runs: Path, retry_failed: bool, as_json: bool) -> None:
    """Do everything, going on from what is done: sample, distill, evaluate, report, publish."""
    from dsc_hub.pipeline.run import run_all

    context = _resolve(recipe, overrides, runs)
    run_all(context, retry_failed=retry_failed)
    if as_json:
        _print_json({"run": str(context.run.folder), "metrics": context.run.metrics})
    else:
        _closing(context)


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
    context = _resolve(recipe, overrides, runs)
    if share:
        context = resolve.of_shard(context, share)
    run_all(context, "sampling", retry_failed)
    if as_json:
        _print_json(context.run.marker("sampling"))


@cli.command()
@click.argument("recipe")
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
    context = _resolve(recipe, overrides, runs)
    pipeline_run.merge_shards(context, folders)
    if as_json:
        _print_json(context.run.marker("sampling"))


@stage_verb("dataset")
def dataset() -> None:
    """Make the training data out of the chains."""


@stage_verb("distill")
def distill() -> None:
    """Train the adapter (starts `accelerate launch` itself)."""


@cli.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
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
        context = _resolve(recipe, overrides, runs)
        run_one(context, "evaluation")
    else:
        context = evaluate_adapter(
            _resolve(recipe, (*resolve.ARMS_OF_ANOTHER, *overrides, *resolve.OF_ANOTHER), runs), adapter
        )
    if as_json:
        _print_json(context.run.metrics["evaluation"])
    elif adapter:
        screens.numbers(context.run)


@stage_verb("report", "cards")
def report() -> None:
    """Write the HTML report and the cards."""


@stage_verb("publish")
def publish() -> None:
    """Push dataset and adapter with their cards, and read them back."""


@recipe_verb
@json_option
def plan(recipe: str, overrides: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Say what a run would do, take and write, and check all that can be checked. Writes nothing but dsc's cache."""
    from dsc_hub import api
    from dsc_hub.cli import screens

    context = _resolve(recipe, overrides, runs)
    estimate = api.plan(context)
    if as_json:
        _print_json(estimate)
    else:
        _results_follow()
        screens.show_plan(context, estimate)


@recipe_verb
@click.option("-n", "count", type=click.IntRange(1), default=8, show_default=True, help="How many prompts.")
@json_option
def try_(recipe: str, overrides: tuple[str, ...], runs: Path, count: int, as_json: bool) -> None:
    """Show a handful of whole chains, with scores, decisions and rejections, before hours are spent."""
    from dsc_hub.cli import screens
    from dsc_hub.pipeline import session

    context = _resolve(recipe, overrides, runs)
    tried, seconds, failed = session.sample_a_few(context, count)
    if as_json:
        chains = [{"prompt": prompt.text, **chain.as_row()} for prompt, chain in tried]
        _print_json({"chains": chains, "seconds": seconds, "failed": failed})
    else:
        screens.chains(context.recipe, tried, seconds, failed)


def run_verb(f: Callable[..., None]) -> click.Command:
    """A verb that takes RUN and --runs."""
    return cli.command()(click.argument("reference", metavar="RUN")(runs_option(f)))


@run_verb
@json_option
def check(reference: str, runs: Path, as_json: bool) -> None:
    """Say whether "distilled is better than its base" may be claimed of RUN: holds, fails, or not enough data; exit
    code 1 unless it holds.

    RUN is a run folder, or a recipe's name for its newest run.
    """
    from dsc_hub.cli import screens
    from dsc_hub.evaluation.claim import claim_of
    from dsc_hub.runs.run import find_run

    run = find_run(reference, runs)
    claim = claim_of(run)
    if as_json:
        _print_json({"run": str(run.folder), **claim.model_dump()})
    else:
        _results_follow()
        screens.claim(run)
    if claim.verdict != "holds":
        sys.exit(1)


@run_verb
@json_option
def show(reference: str, runs: Path, as_json: bool) -> None:
    """Show the numbers of RUN: arms, differences, what else moved, what it cost.

    RUN is a run folder, or a recipe's name for its newest run. With --json: the whole metrics.json.
    """
    from dsc_hub.cli import screens as screen
    from dsc_hub.runs.results import evaluation_of
    from dsc_hub.runs.run import find_run

    run = find_run(reference, runs)
    if as_json:
        evaluation_of(run)
        _print_json(run.metrics)
    else:
        _results_follow()
        screen.numbers(run)


@cli.command()
@click.argument("references", nargs=-1, required=True, metavar="RUN RUN...")
@runs_option
@json_option
def compare(references: tuple[str, ...], runs: Path, as_json: bool) -> None:
    """Compare the arms of two or more runs, paired where their prompts agree; the first RUN is the baseline."""
    from dsc_hub.cli import screens as screen
    from dsc_hub.evaluation.compare import compare_runs as compared
    from dsc_hub.runs.run import find_run

    comparison = compared([find_run(r, runs) for r in references])
    if as_json:
        _print_json(comparison)
    else:
        _results_follow()
        screen.comparison(comparison)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@allow_option
@runs_option
@json_option
def grid(file: Path, runs: Path, as_json: bool) -> None:
    """Run a recipe under every combination of some settings (FILE names both), sharing what they share; one table."""
    from dsc_hub.cli import screens as screen
    from dsc_hub.pipeline import grid as grids

    rows = grids.run_grid(file, runs, click.get_current_context().meta["allowed_code"])
    if as_json:
        _print_json(rows)
    else:
        _results_follow()
        screen.show_grid(rows)
    if any(row.error for row in rows):
        raise SystemExit(1)


@run_verb
@click.option("-n", "count", type=click.IntRange(1), default=30, show_default=True, help="How many prompts at most.")
@click.option("--judge", default="anonymous", show_default=True, help="Who judges; stays in the run folder.")
@click.option("--json", "as_json", is_flag=True, help="Ask nothing, print the count of what was judged so far as JSON.")
def blind(reference: str, runs: Path, count: int, judge: str, as_json: bool) -> None:
    """Judge pairs of answers, base and distilled, without knowing which is which.

    RUN is a run folder, or a recipe's name for its newest run.
    """
    from dsc_hub.cli.blind import judge_pairs
    from dsc_hub.evaluation.blind import counts
    from dsc_hub.runs.run import find_run

    run = find_run(reference, runs)
    if as_json:
        _print_json({"run": str(run.folder), **counts(run).model_dump()})
    else:
        judge_pairs(run, count, judge)


@run_verb
def chat(reference: str, runs: Path) -> None:
    """Talk to base and distilled at once, side by side.

    RUN is a run folder, or a recipe's name for its newest run.
    """
    from dsc_hub.cli.chat import start_chat
    from dsc_hub.runs.run import find_run

    start_chat(find_run(reference, runs))


@cli.command()
@click.argument("reference", metavar="REPO[@REV]")
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), help="Folder to write (default: the repo's name, here)."
)
@json_option
def pull(reference: str, folder: Path | None, as_json: bool) -> None:
    """Fetch a published dataset, adapter or recipe into a folder, checked against its manifest.

    REPO is USER/NAME, of a dataset or a model, at HF_ENDPOINT (the public Hub by default).
    """
    from dsc_hub.cli import screens
    from dsc_hub.hub.pull import pull_repo as fetched

    pulled = fetched(reference, folder)
    if as_json:
        _print_json({**asdict(pulled), "kind": pulled.kind})
    else:
        _results_follow()
        screens.pulled(pulled)


@cli.command()
@click.argument("reference", metavar="REPO[@REV]")
@click.option("--rescore", is_flag=True, help="Also score a dataset's answers again, with the packaged scorers.")
@json_option
def verify(reference: str, rescore: bool, as_json: bool) -> None:
    """Check a published dataset or adapter: files against its manifest, numbers and card made anew from its own rows.

    Exit code 1 if something differs.
    """
    from dsc_hub.cli import screens
    from dsc_hub.publish.verify import verify_repo as checked

    found, checks = checked(reference, rescore)
    if as_json:
        _print_json({"repo": found.repo, "commit": found.commit, "checks": [asdict(c) for c in checks]})
    else:
        _results_follow()
        screens.checks(found, checks)
    if any(c.agrees is False for c in checks):
        sys.exit(1)


@cli.command()
@click.argument("metric")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, metavar="[OPTION=VALUE]...")
@click.option("--scorer", help="A packaged scorer or a model of the Hub (default: the metric's first).")
@click.option("--column", default="text", show_default=True, help="Of .jsonl, .csv and .parquet.")
@allow_option
@json_option
def score(metric: str, file: Path, options: tuple[str, ...], scorer: str | None, column: str, as_json: bool) -> None:
    """Score the texts in FILE with METRIC: a shipped one, your own NAME.py, or a Space USER/NAME.

    FILE has a text a line, or is .jsonl, .csv or .parquet; columns `prompt` and `kind` go along. OPTIONs are the
    metric's.
    """
    from dsc_hub.cli import screens as screen
    from dsc_hub.config.recipe_files import parse_options
    from dsc_hub.evaluation.score_file import score_file as scored
    from dsc_hub.metrics.registry import Code

    code = Code(Path(), click.get_current_context().meta["allowed_code"])
    scores = scored(metric, file, scorer, column, parse_options(options), code)
    if as_json:
        _print_json(scores)
    else:
        _results_follow()
        screen.scored(scores)


@cli.command()
@click.argument("of", type=click.Choice(["recipe", "metrics"]), default="recipe")
def schema(of: str) -> None:
    """Print the JSON schema of recipes (for editors), or of metrics.json."""
    from dsc_hub.config.recipe import Recipe
    from dsc_hub.runs.metrics_schema import Metrics

    _print_json((Metrics if of == "metrics" else Recipe).model_json_schema())


@cli.command("publish-metric")
@click.argument("metric")
@click.option(
    "--to", type=click.Choice(["hub", "local"]), default="hub", show_default=True, help="local: the embedded Hub."
)
@click.option("--owner", help="User or organisation (default: whoever the token belongs to).")
@click.option("--name", help="Name of the Space (default: METRIC's).")
@click.option("--public", is_flag=True, help="Anybody may load it.")
@json_option
def publish_metric(metric: str, to: str, owner: str | None, name: str | None, public: bool, as_json: bool) -> None:
    """Publish METRIC, a shipped one's name or your own FILE.py, as a Space that evaluate.load("USER/METRIC") loads
    without dsc_hub."""
    from dsc_hub.pipeline.context import account_at
    from dsc_hub.publish.metric_space import name_of
    from dsc_hub.publish.metric_space import publish_metric as put

    with account_at(to, owner) as account:
        published = put(metric, account, name or name_of(metric), not public)
    if as_json:
        _print_json(published)
    else:
        click.echo(f"{published['address']}  at {published['commit'][:12]}:  {published['load']}")


@cli.command("import-reference")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
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
        _print_json({"run": str(context.run.folder), "recipe": str(context.path), **counts})
    else:
        click.echo(f"go on:  dsc run {context.path}")


@cli.group()
def recipes() -> None:
    """List the packaged recipes, copy one to edit it, or adopt one that was downloaded."""


@recipes.command("list")
@json_option
def recipes_list(as_json: bool) -> None:
    """Names of the packaged recipes and what they are for."""
    from dsc_hub.config.recipe_files import load_recipe_file, packaged_recipes

    if as_json:
        _print_json({name: load_recipe_file(path).description for name, path in packaged_recipes().items()})
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


@cli.group()
def hub() -> None:
    """The embedded Hub, for work without an account."""


@hub.command("serve")
@click.option("--port", type=click.IntRange(0, 65535), default=HUB_PORT, show_default=True)
@click.option(
    "--root", type=click.Path(file_okay=False, path_type=Path), help="Where repos lie (default: in dsc's cache folder)."
)
def hub_serve(port: int, root: Path | None) -> None:
    """Serve what was published locally, until Ctrl-C."""
    from dsc_hub.local_hub.server import default_root, serve
    from dsc_hub.system import progress

    progress.say_if_open(root or default_root())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve(root, port)


def _closing(context: RunContext) -> None:
    from dsc_hub.cli import screens

    screens.closing(context, HUB_PORT)


cli.add_command(try_, "try")
cli.commands.pop("try-", None)
