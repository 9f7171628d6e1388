"""The command group, the options that commands share, and the kinds of commands: on a recipe, on a run, one stage."""

from __future__ import annotations

import functools
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsc_hub import __version__
from dsc_hub.cli.completing import complete_override, complete_recipe, complete_run

if TYPE_CHECKING:
    from dsc_hub.pipeline.context import RunContext

# The commands by what one wants to do; a test says which is missing.
SECTIONS = {
    "Start": ("plan", "fetch", "try", "run", "grid", "recipes", "schema"),
    "Look": ("watch", "runs", "show", "report", "check", "compare", "blind", "chat", "score"),
    "Share": ("publish", "pull", "verify", "publish-metric", "publish-report", "hub"),
    "Run parts": ("sample", "merge", "dataset", "distill", "evaluate", "import-reference"),
    "This installation": ("env", "cache", "completion"),
}


class Sections(click.Group):
    """A group whose help lists the commands by SECTIONS."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                help_width = formatter.width - width - 4
                rows = [(f"{n:<{width}}", self.commands[n].get_short_help_str(help_width)) for n in names]
                formatter.write_dl(rows)


def _be_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from dsc_hub.system import progress

        progress.console.quiet = True


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dsc")
@click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="No progress and no notes; results and errors only.",
)
def cli() -> None:
    """Distilled self-critique: prompts in, a published and measured adapter out.

    RECIPE is a packaged recipe's name (`dsc recipes list`), a YAML file, or hub:USER/REPO[@REVISION]. Any key of it can
    be overridden with KEY.SUB=VALUE behind it. RUN is a run folder, its name in `runs`, or a recipe's name or file for
    its newest run.

    Exit codes: 0 done; 1 `check`, `verify` or `grid` found something against it; 2 something for you to mend; 130
    interrupted.
    """


def results_follow() -> None:
    """All work is done and only printing is left: whoever reads it may close it early (`| head`), which ends us as
    quietly as any program of the shell. Until then a broken pipe must not kill us: servers and the Hub are spoken to
    through sockets. Nor may it kill a program that calls our verbs and reads what they print itself."""
    if sys.stdout is sys.__stdout__:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


RUNS = Path("runs")
runs_option = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=RUNS,
    show_default=True,
    help="Folder that holds the run folders.",
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON instead of tables.")


page_option = click.option(
    "--page", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write it as a page, too."
)


def print_json(value: Any) -> None:
    from dsc_hub.system.progress import clean_json

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)

    results_follow()
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


def resolve_context(recipe: str, overrides: tuple[str, ...], runs: Path) -> RunContext:
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
    f = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...", shell_complete=complete_override)(f)
    return cli.command()(click.argument("recipe", shell_complete=complete_recipe)(f))


def stage_verb(stage: str, last_too: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """A verb that runs one stage alone (and `last_too` after it)."""

    def decorate(f: Callable[..., Any]) -> click.Command:
        @functools.wraps(f)
        @json_option
        def verb(recipe: str, overrides: tuple[str, ...], runs: Path, as_json: bool) -> None:
            from dsc_hub.pipeline.run import run_one

            context = resolve_context(recipe, overrides, runs)
            run_one(context, stage)
            if last_too:
                run_one(context, last_too)
            if as_json:
                print_json(context.run.marker(stage))

        return recipe_verb(verb)

    return decorate


def run_verb(f: Callable[..., None]) -> click.Command:
    """A verb that takes RUN and --runs."""
    return cli.command()(click.argument("reference", metavar="RUN", shell_complete=complete_run)(runs_option(f)))
