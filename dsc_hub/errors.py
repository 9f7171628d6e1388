"""The errors that a user can mend: one line that says what was got and expected, one that says what to do next.

The command line prints them without a traceback and exits with 2. Anything else that escapes is a bug of ours and keeps
its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class DscError(Exception):
    """Base of all errors that are the user's or the environment's to mend.

    `message` says what was got and what was expected; `hint` says what to do next (may be empty).
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(DscError):
    """A recipe, an override or an option is wrong. `problems` holds every one of them, one line each."""

    def __init__(self, message: str, hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n  ".join([self.message, *self.problems, *([self.hint] if self.hint else [])])


class DataError(DscError):
    """Prompts, chains or dataset rows are not what the stage needs."""


class ModelError(DscError):
    """A base model or an adapter can't be found, read or used for chat."""


class MetricError(DscError):
    """A scorer can't be loaded or doesn't fit (missing package, label map, empty input)."""


class ServingError(DscError):
    """A model server doesn't start, dies, refuses or answers what can't be used."""


class HubError(DscError):
    """The Hub refuses: no token, no right to write, a name that is somebody else's, an answer that doesn't match."""


class RunError(DscError):
    """A run folder can't be used: in use, incomplete, disk full, read-only."""


def disk_error(error: OSError) -> RunError | None:
    """The one-line error for a disk that is full or a path that can't be used as it is; None for any other `OSError`."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(
            f"no space left on the disk{where}", "Free some space and run the same command: what is done is kept."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return RunError(f"no access{where}: {error.strerror}", "To write run folders elsewhere, use --runs FOLDER.")
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOENT) and error.filename:
        return RunError(f"not a path that can be used{where[:200]}: {error.strerror}", "Check the path.")
    return None
