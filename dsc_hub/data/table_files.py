"""Read rows of CSV, JSON lines, Parquet and text files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsc_hub.config.sampling import TABLES
from dsc_hub.errors import DataError
from dsc_hub.records import Message, Tool, prompt_id
from dsc_hub.system import parquet


@dataclass(frozen=True, slots=True)
class PromptCells:
    """What a row says of a prompt; `group` is "" if it names none, so that the prompt is its own group."""

    text: str
    group: str = ""
    kind: str = ""
    messages: tuple[Message, ...] = ()  # as in Prompt
    tools: tuple[Tool, ...] = ()

    @property
    def id(self) -> str:
        return prompt_id(self.text, self.messages, self.tools)

    @property
    def split_group(self) -> str:
        """The named group, or the prompt itself: its text, of a conversation its id."""
        return self.group or (self.id if self.messages else self.text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})", "Save it as UTF-8.") from None


def read_lines(path: Path) -> Iterator[str]:
    # Not splitlines(): it also splits at characters that can occur inside a prompt.
    yield from (stripped for line in _text(path).split("\n") if (stripped := line.strip()))


def read_rows(path: Path, column: str) -> Iterator[dict[str, object]]:
    """Yield the rows of a .jsonl, .csv or .parquet file, each with this column; DataError if the file cannot be read.

    Any other file is read as text: one row per line, with the line in this column.
    """
    if not path.is_file():
        raise DataError(f"file {path} not found")
    if path.suffix not in TABLES:
        for line in read_lines(path):
            yield {column: line}
        return
    for number, row in enumerate(read_table(path), 1):
        check_row(row, f"{path} row {number}", {"--column": column})
        yield row


def check_row(row: Mapping[str, object], where: str, wanted: Mapping[str, str | None]) -> None:
    """Check that the row has the columns that settings name (setting -> column; None: not required); else DataError."""
    if None in row:  # the csv module's key for cells beyond the header
        raise DataError(f"{where} has more cells than the header", "Put texts with commas into double quotes.")
    for setting, column in wanted.items():
        if column and column not in row:
            raise DataError(
                f"{where} has no column '{column}'; it has {sorted(row)}", f"Set {setting} to one of these."
            )


def read_table(path: Path) -> Iterator[dict[str, object]]:
    if path.suffix == ".parquet":
        yield from parquet.rows(path)
    elif path.suffix == ".csv":
        try:
            yield from map(dict, csv.DictReader(io.StringIO(_text(path), newline="")))
        except csv.Error as e:
            raise DataError(f"{path} is not valid CSV: {e}") from None
    else:
        for number, line in enumerate(_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{path} line {number} is not JSON: {e}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number}: expected an object, got {type(row).__name__}")
            yield row
