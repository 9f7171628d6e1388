"""The entry point of `dsc`: signals, streams, and errors as one message and an exit code.

Exit codes: 0 done; 1 `dsc check` of a claim that does not hold (it fails, or there is not enough data), `dsc verify` of
a repo that differs, `dsc grid` with a run that failed; 2 the user or the environment has something to mend (one
message, no traceback); 130 interrupted. A traceback means a bug of ours.

Commands parse, call one function of the pipeline and print the result; they import a stage only when it runs.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import io
import os
import signal
import sys
from typing import NoReturn

import click

from dsc_hub.cli import installation, look, parts, share, start  # the commands register themselves
from dsc_hub.cli.base import cli
from dsc_hub.errors import TERMINATED, DscError, disk_error

__all__ = ["cli", "installation", "look", "main", "parts", "share", "start"]


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


class _AtExit:
    """Ends the process once everything that was registered to happen at its exit has happened.

    Python would then look for garbage cycles among all objects, which takes 2 s where torch is loaded.
    """

    code = 1  # that of an exception which nobody expected

    def __call__(self) -> None:
        with contextlib.suppress(OSError):  # a pipe that nobody reads any more: Python ends with the code for that
            sys.stdout.flush()
            sys.stderr.flush()
            if "torch" in sys.modules:
                os._exit(self.code)


def _run_command() -> int:
    """Run the command that the arguments name and return the exit code; errors become one message."""
    kept = "what is finished is kept; the same command goes on from there"
    try:
        cli(standalone_mode=False, prog_name="dsc")
    except SystemExit as e:
        if e.code == TERMINATED:
            click.echo(f"terminated: {kept}", err=True)
        if isinstance(e.code, str):
            raise
        return e.code or 0
    except click.exceptions.Abort as e:  # raised for an interrupt, and for EOFError, which would be a bug in dsc
        if isinstance(e.__cause__, EOFError):
            raise e.__cause__ from None
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending: a further Ctrl-C would only add a traceback
        click.echo(f"\ninterrupted: {kept}", err=True)
        return 130
    except click.ClickException as e:
        e.show()
        if isinstance(e, click.NoSuchOption) and "." in e.option_name:
            key = e.option_name.lstrip("-")
            click.echo(f"Keys of a recipe are set without dashes: {key}=VALUE", err=True)
        return 2
    except Exception as e:
        from dsc_hub.system.progress import clean

        known = e if isinstance(e, DscError) else disk_error(e) if isinstance(e, OSError) else None
        if known is None:
            raise
        click.echo(clean(f"{type(known).__name__}: {known}"), err=True)
        return 2
    return 0


def main() -> NoReturn:
    """Entry point."""
    at_exit = _AtExit()
    atexit.register(at_exit)  # the first to be registered is the last to be called
    _safe_streams()
    os.umask(os.umask(0) | 0o077)  # prompts, chains and adapters are private by default; share them with chmod
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that `with` blocks end their servers
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # send nothing that the user did not request
    # Servers started by dsc run on this machine: bypass proxies from the environment.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    at_exit.code = _run_command()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(at_exit.code)
