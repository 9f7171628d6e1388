"""Rows on disk: one JSON object per line, each appended with one system call.

A last line without a newline is the result of a killed process or a full disk. It is not a row: readers skip it, and
it is truncated before the next row is appended.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from pydantic import ValidationError

from dsc_hub.errors import RunError
from dsc_hub.records import from_row
from dsc_hub.system.files import parse_json

T = TypeVar("T")
RERUN = "Run the stage that writes it again."


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to the Python type."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a row can't hold a {type(value).__name__}")


class JsonlFile:
    """An append-only JSON-lines file. `hint` is the hint shown for a damaged line."""

    def __init__(self, path: Path, hint: str = RERUN) -> None:
        self.path = path
        self._hint = hint
        self._fd: int | None = None

    def append(self, row: Any) -> None:
        """Append a row: a dict or a record of records.py. It is in the file on return; otherwise OSError is raised."""
        if self._fd is None:
            self._cut_torn_line()
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        line = msgspec.json.encode(row, enc_hook=_plain) + b"\n"
        try:
            written = os.write(self._fd, line)
            if written < len(line):  # the disk filled up within the line: this second write raises
                os.write(self._fd, line[written:])
        except OSError as e:
            self.close()  # the next append truncates the torn line first
            e.filename = str(self.path)
            raise

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.with_offsets())

    def as_type(self, kind: type[T]) -> Iterator[T]:
        """Yield the rows as `kind` (`records.from_row`); RunError for a row that does not validate."""
        return (self.typed(kind, offset, row) for offset, row in self.with_offsets())

    def with_offsets(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (byte offset, row) for each row; RunError for a line that is not a JSON object."""
        if not self.path.is_file():
            return
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    row = parse_json(line)
                except ValueError:
                    raise self.damaged(offset, "not JSON") from None
                if not isinstance(row, dict):
                    raise self.damaged(offset, f"expected an object, got {type(row).__name__}")
                yield offset, row
                offset += len(line)

    def typed(self, kind: type[T], at: int, row: dict[str, Any]) -> T:
        """Validate the row at byte offset `at` as `kind`; RunError if it does not validate."""
        try:
            return from_row(kind, row)
        except ValidationError as e:
            first = e.errors()[0]
            raise self.damaged(at, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def damaged(self, at: int, why: str) -> RunError:
        """Return the error for the row at byte offset `at`, with its line number."""
        with self.path.open("rb") as file:
            number = 1 + sum(file.read(min(2**20, at - start)).count(b"\n") for start in range(0, at, 2**20))
        return RunError(f"{self.path} line {number} is damaged: {why}", self._hint)

    def _cut_torn_line(self) -> None:
        if not self.path.is_file() or not (size := self.path.stat().st_size):
            return
        with self.path.open("rb+") as file:
            end = size
            while end > 0:  # search backwards, block by block, for the last newline
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
