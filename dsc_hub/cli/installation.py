"""Commands about this installation: what to put into a bug report, and completion for shells."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from dsc_hub import __version__
from dsc_hub.cli.base import cli, json_option, print_json, results_follow

# Variables that change what dsc does. Others, and the values of keys and tokens, are nobody's business.
VARIABLES = {
    "DSC_HUB_HOME": "folder of dsc's cache and of the embedded Hub (default: ~/.cache/dsc_hub)",
    "HF_ENDPOINT": "address of the Hub (default: the public one)",
    "HF_HOME": "folder of the Hub's cache and login",
    "HF_HUB_OFFLINE": "1: nothing is asked of the Hub, only what is in its cache is used",
    "CUDA_VISIBLE_DEVICES": "GPUs that dsc may use",
    "NO_COLOR": "any value: no colours on the terminal",
    "COLUMNS": "width of tables, where the terminal does not say it",
    "WORLD_SIZE": "set by launchers: number of training processes",
    "SLURM_JOB_ID": "set by Slurm",
    "OMP_NUM_THREADS": "threads of libraries; dsc sets it for its children",
    "VLLM_CPU_OMP_THREADS_BIND": "cores of vLLM on a CPU (default: all that dsc may use)",
    "HTTP_PROXY": "proxy; servers on this machine are never asked through one",
    "HTTPS_PROXY": "as HTTP_PROXY",
    "NO_PROXY": "addresses without proxy",
    "LANG": "encoding of the terminal",
}
SECRETS = {
    "HF_TOKEN": "token of the Hub; else that of `hf auth login`",
    "OPENAI_API_KEY": "key of serving.endpoints, critic and judge, unless api_key_env names another variable",
    "WANDB_API_KEY": "key of the tracker, with distill.report_to: wandb",
}


@cli.command()
@json_option
def env(as_json: bool) -> None:
    """Say what a bug report needs: versions, hardware, settings. No secrets: of keys, only whether they are set."""
    sections = about_installation()
    if as_json:
        print_json(sections)
        return
    for title, values in sections.items():
        click.echo(f"{title}:")
        for name, value in values.items():
            click.echo(f"  {name}: {value}")


def about_installation() -> dict[str, dict[str, Any]]:
    """Return {section: {name: value}} of this installation, without secrets and without the user's name in paths."""
    import platform

    from dsc_hub.system import cache, machine

    names = [name for each in VARIABLES for name in (each, each.lower()) if name in os.environ]
    settings = {name: _without_home(_without_password(os.environ[name])) for name in names}
    hardware = machine.hardware()
    return {
        "dsc": {"version": __version__, "python": platform.python_version(), "system": platform.platform()},
        "libraries": machine.versions(),
        "hardware": hardware,
        "folders": {
            "cache": _without_home(str(cache.cache_home())),
            "python": _without_home(sys.prefix),
        },
        "variables": settings | {name: "set" for name in SECRETS if os.environ.get(name)},
    }


@cli.group("cache", invoke_without_command=True)
@click.pass_context
@json_option
def cache_(context: click.Context, as_json: bool) -> None:
    """List the converted models in dsc's cache, with their size; remove some."""
    if context.invoked_subcommand is None:
        _list_cache(as_json)


@cache_.command("list")
@json_option
def cache_list(as_json: bool) -> None:
    """List the converted models."""
    _list_cache(as_json)


def _list_cache(as_json: bool) -> None:
    from dataclasses import asdict

    from dsc_hub.inference.converted_models import converted_models
    from dsc_hub.report.formatting import many, megabytes
    from dsc_hub.system.cache import cache_home

    models = converted_models()
    if as_json:
        print_json([asdict(model) for model in models])
        return
    results_follow()
    for model in models:
        about = model.about or "incomplete: its conversion was killed, or is going on"
        click.echo(f"{model.name}  {megabytes(model.bytes)}  {about}")
    total = megabytes(sum(model.bytes for model in models))
    click.echo(f"{many(len(models), 'converted model')}, {total}, in {cache_home() / 'models'}")
    click.echo("Downloads are in the Hub's own cache: `hf cache ls`. Run folders: `dsc runs`.", err=True)


@cache_.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def cache_remove(names: tuple[str, ...]) -> None:
    """Remove converted models. The next run that needs one makes it anew."""
    from dsc_hub.inference.converted_models import remove_converted
    from dsc_hub.report.formatting import megabytes

    for model in remove_converted(list(dict.fromkeys(names))):
        click.echo(f"removed {model.name}  {megabytes(model.bytes)}")


def _without_password(value: str) -> str:
    """Return an address without user and password; other values as they are."""
    scheme, mark, rest = value.rpartition("://")
    return scheme + mark + rest.rpartition("@")[2]


def _without_home(path: str) -> str:
    """Return a path with ~ for the home folder, which holds the user's name."""
    home = os.path.expanduser("~").rstrip("/")
    return f"~{path.removeprefix(home)}" if home and f"{path}/".startswith(f"{home}/") else path


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: eval "$(dsc completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "dsc", "_DSC_COMPLETE").source())
