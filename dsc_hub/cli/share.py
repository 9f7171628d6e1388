"""Commands to share with: publish, pull, verify, the embedded Hub."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from dsc_hub.cli.base import cli, json_option, print_json, results_follow, run_verb, runs_option, stage_verb
from dsc_hub.system.addresses import HUB_PORT


def account_options(f: Callable[..., None]) -> Callable[..., None]:
    """Add --to and --owner: at which Hub, and whose the Space is."""
    f = click.option("--owner", help="User or organisation (default: whoever the token belongs to).")(f)
    hubs = click.Choice(["hub", "local"])
    return click.option("--to", type=hubs, default="hub", show_default=True, help="local: the embedded Hub.")(f)


@stage_verb("publish")
def publish() -> None:
    """Push dataset and adapter with their cards, and read them back."""


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
        print_json({**asdict(pulled), "kind": pulled.kind})
    else:
        results_follow()
        screens.pulled(pulled)


@cli.command()
@click.argument("reference", metavar="REPO[@REV]|RUN")
@click.option("--rescore", is_flag=True, help="Also score a dataset's answers again, with the packaged scorers.")
@runs_option
@json_option
def verify(reference: str, rescore: bool, runs: Path, as_json: bool) -> None:
    """Check a published dataset or adapter: files against its manifest, numbers and card made anew from its own rows.
    Or RUN, a run folder, its name, or a recipe's name or file: whether its files are as their stages left them.

    Exit code 1 if something differs.
    """
    from dsc_hub.cli import screens
    from dsc_hub.publish.verify import verify_repo
    from dsc_hub.publish.verify_run import verify_run
    from dsc_hub.runs.lookup import find_run

    about: dict[str, str]
    # A repo is USER/REPO; a path that exists here is never looked for on the Hub.
    if not reference.startswith("hub:") and ("/" not in reference or Path(reference.partition("@")[0]).exists()):
        if rescore:
            raise click.UsageError("--rescore is for a published dataset; `dsc evaluate` scores a run's answers")
        run = find_run(reference, runs)
        about, checks, title = {"run": str(run.folder)}, verify_run(run), f"run {run.folder}"
    else:
        found, checks = verify_repo(reference, rescore)
        about, title = {"repo": found.repo, "commit": found.commit}, f"{found.kind} {found.repo} at {found.commit}"
    if as_json:
        print_json({**about, "checks": [asdict(c) for c in checks]})
    else:
        results_follow()
        screens.checks(title, checks)
    if any(c.agrees is False for c in checks):
        sys.exit(1)


@cli.command("publish-metric")
@click.argument("metric")
@account_options
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
        print_json(published)
    else:
        click.echo(f"{published['address']}  at {published['commit'][:12]}:  {published['load']}")


@run_verb
@account_options
@click.option("--name", help="Name of the Space (default: the recipe's, and -report).")
@click.option("--public", is_flag=True, help="Anybody may open it.")
@json_option
def publish_report(
    reference: str, runs: Path, to: str, owner: str | None, name: str | None, public: bool, as_json: bool
) -> None:
    """Publish the report of RUN as a static Space, private unless --public.

    Of a recipe with a content warning the page has no chains and no answers.
    """
    from dsc_hub.pipeline.context import account_at
    from dsc_hub.publish.report_space import publish_report as put
    from dsc_hub.runs.lookup import find_run

    run = find_run(reference, runs)
    with account_at(to, owner) as account:
        published = put(run, account, name, not public)
    if as_json:
        print_json(published)
        return
    click.echo(f"{published['address']}  at {published['commit'][:12]}")
    if not published["texts"]:
        click.echo("It has no chains and no answers: the recipe has a content warning, or publish.rejected is false.")


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
