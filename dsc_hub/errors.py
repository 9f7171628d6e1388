"""Errors that a user can fix: one line with the actual and the expected value, one line with the next step.

The command line prints them without a traceback and exits with 2. Any other exception is a bug in dsc_hub and keeps its
traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

TERMINATED = 143  # exit code after SIGTERM


class DscError(Exception):
    """Base class of all errors that the user or the environment can fix.

    `message` states the actual and the expected value; `hint` the next step (may be empty).
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message

    @property
    def one_line(self) -> str:
        """The message and the next step in a line, for a list of problems."""
        return f"{self.message}: {self.hint}" if self.hint else self.message


class ConfigError(DscError):
    """Invalid recipe, override or option. `problems` lists all problems, one line each."""

    def __init__(self, message: str, hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n  ".join([self.message, *self.problems, *([self.hint] if self.hint else [])])


class DataError(DscError):
    """Prompts, chains or dataset rows are not valid input for the stage."""


class ModelError(DscError):
    """A base model or an adapter is missing, unreadable or not usable for chat."""


class MetricError(DscError):
    """A scorer can't be loaded or does not fit (missing package, label map, empty input)."""


class ServingError(DscError):
    """A model server does not start, ends, refuses requests or sends unusable replies."""


class HubError(DscError):
    """The Hub refuses: no token, no write permission, a name owned by others, or a reply that does not match."""


class RunError(DscError):
    """A run folder is not usable: in use, incomplete, disk full, read-only."""


def gather(steps: Mapping[str, Callable[[], T]], summary: str) -> dict[str, T]:
    """Run all steps and return their results by name; all problems at once.

    The DscError of a single one is raised as it is, several as a ConfigError with `summary`, in which {n} is their
    number.
    """
    done: dict[str, T] = {}
    errors: dict[str, DscError] = {}
    for name, step in steps.items():
        try:
            done[name] = step()
        except DscError as e:
            errors[name] = e
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise ConfigError(
            summary.replace("{n}", str(len(errors))), problems=[f"{name}: {e}" for name, e in errors.items()]
        )
    return done


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, or what the user may have of it


def disk_error(error: OSError) -> RunError | None:
    """Return the one-line error for a full disk or an unusable path; None for any other `OSError`."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in FULL:
        return RunError(
            f"no space left on the disk{where}", "Free some space and run the same command: what is done is kept."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return RunError(f"no access{where}: {error.strerror}", "To write run folders elsewhere, use --runs FOLDER.")
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOENT) and error.filename:
        return RunError(f"not a path that can be used{where[:200]}: {error.strerror}", "Check the path.")
    return None
