"""Rows on disk: a JSON object a line, appended as it comes, one system call each.

A line without its newline is the mark of a kill or of a full disk. It is no row, and is cut off before the next one goes in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from pydantic import ValidationError

from dsc_hub.errors import RunError
from dsc_hub.records import from_row

T = TypeVar("T")
ANEW = "Run the stage that writes it again."


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a row can't hold a {type(value).__name__}")


class JsonlFile:
    """An append-only JSON-lines file. `way_out` says what to do about a damaged line."""

    def __init__(self, path: Path, way_out: str = ANEW) -> None:
        self.path = path
        self._way_out = way_out
        self._fd: int | None = None

    def append(self, row: Any) -> None:
        """Write a row: a dict, or a noun of records.py. It is in the file when this returns, or OSError tells why not."""
        if self._fd is None:
            self._cut_torn_line()
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        line = msgspec.json.encode(row, enc_hook=_plain) + b"\n"
        try:
            written = os.write(self._fd, line)
            if written < len(line):  # the disk filled up within the line: the rest of it raises
                os.write(self._fd, line[written:])
        except OSError as e:
            self.close()  # should a row follow, the torn one is cut off first
            e.filename = str(self.path)
            raise

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.placed())

    def as_type(self, kind: type[T]) -> Iterator[T]:
        """The rows as what they stand for (`records.from_row`); RunError for one that isn't."""
        return (self.typed(kind, at, row) for at, row in self.placed())

    def placed(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each row, and where in the file it begins, in bytes; RunError for one that is no JSON object."""
        if not self.path.is_file():
            return
        at = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError:
                    raise self.damaged(at, "not JSON") from None
                if not isinstance(row, dict):
                    raise self.damaged(at, f"expected an object, got {type(row).__name__}")
                yield at, row
                at += len(line)

    def typed(self, kind: type[T], at: int, row: dict[str, Any]) -> T:
        """The row that begins at `at` as what it stands for."""
        try:
            return from_row(kind, row)
        except ValidationError as e:
            first = e.errors()[0]
            raise self.damaged(at, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def damaged(self, at: int, why: str) -> RunError:
        """The error for the row that begins at `at`."""
        with self.path.open("rb") as file:
            number = 1 + sum(file.read(min(2**20, at - start)).count(b"\n") for start in range(0, at, 2**20))
        return RunError(f"{self.path} line {number} is damaged: {why}", self._way_out)

    def _cut_torn_line(self) -> None:
        if not self.path.is_file() or not (size := self.path.stat().st_size):
            return
        with self.path.open("rb+") as file:
            end = size
            while end > 0:  # look back block by block for the last newline
                start = max(0, end - 65536)
                file.seek(start)
                at = file.read(end - start).rfind(b"\n")
                if at >= 0:
                    end = start + at + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
