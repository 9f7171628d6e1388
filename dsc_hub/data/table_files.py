"""Read rows of CSV, JSON, Parquet and text files, packed with gzip or not."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsc_hub.config.sampling import OTHER_FILES, TABLES, table_suffix
from dsc_hub.errors import DataError
from dsc_hub.system import parquet, progress
from dsc_hub.system.files import parse_json

DELIMITERS = (",", ";", "\t", "|")
FEWEST_LINES = 3  # lines of text with as many semicolons each that are taken for a table
LARGEST_CELL = 2**31 - 1  # characters; the csv module's own limit is 131,072
ARCHIVE = b"PK\x03\x04"
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def _bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if content.startswith(ARCHIVE):
        raise DataError(
            f"{path} is an archive, as a spreadsheet (.xlsx) is one inside, whatever its name says",
            "Export the spreadsheet as CSV UTF-8, or unpack the archive.",
        )
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(f"{path} can't be unpacked as gzip: {e}", "Copy it anew, or unpack it yourself.") from None


def _text(path: Path) -> str:
    """Return the text of a file in UTF-8, or with a byte order mark in UTF-16; DataError if it is none."""
    content = _bytes(path)
    encoding = next((name for bom, name in _BOMS.items() if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as e:
        shown = "UTF-8" if encoding.startswith("utf-8") else "UTF-16"
        line = content[: e.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not {shown} text: {e.reason} in line {line}, {content[e.start : e.start + 1]!r}",
            "Save it as UTF-8. Windows programs often write Windows-1252; Excel has a CSV UTF-8 of its own.",
        ) from None
    if "\0" in text:
        zeros = text.count("\0")
        kind = "UTF-16 without a byte order mark" if 3 * zeros > len(text) else "a damaged or binary file"
        raise DataError(f"{path} holds {zeros} zero bytes, as {kind} does", "Save it as UTF-8.")
    return text


def read_lines(path: Path, column: str = "prompt") -> Iterator[str]:
    """Yield the lines of a text file without blank ones; DataError if it is a table by its name or its look.

    `column` is the one that a table would have.
    """
    if reason := OTHER_FILES.get(table_suffix(path.name)):
        raise DataError(f"{path} is {reason}")
    if table_suffix(path.name) in TABLES:
        raise DataError(f"{path} is a table, expected a text file", "Save what is in its column a line each.")
    # Not splitlines(): it also splits at characters that can occur inside a prompt.
    lines = [stripped for line in _text(path).split("\n") if (stripped := line.strip())]
    if lines and (kind := _looks_like(lines, column)):
        raise DataError(
            f"{path} is read a line each, and looks like {kind}: {lines[0][:60]!r}",
            f"Give it the suffix of its kind ({', '.join(TABLES)}), or save one text a line.",
        )
    yield from lines


def _looks_like(lines: list[str], column: str) -> str | None:
    """Return what kind of table lines of text seem to be; None: texts."""
    if all(map(_is_json, lines)) or (lines[0][0] in "[{" and _is_json("\n".join(lines))):
        return "JSON"
    if any(len(cells := _cells(lines[0], d)) > 1 and column in cells for d in DELIMITERS):
        return "CSV"
    # Of texts not every line has the same number of semicolons, tabs or bars; commas are in every text.
    widths = [{len(_cells(line, d)) for line in lines} for d in DELIMITERS if d != ","]
    return "CSV" if len(lines) >= FEWEST_LINES and any(len(w) == 1 and w != {1} for w in widths) else None


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), (dict, list))
    except ValueError:
        return False


def _cells(line: str, delimiter: str) -> list[str]:
    """Return the cells of the first row in a line, which may hold carriage returns alone as ends of rows."""
    return [cell.strip() for cell in next(csv.reader([line.strip("\r").split("\r")[0]], delimiter=delimiter), [])]


def read_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, each with this column; DataError if the file cannot be read.

    Any other file is read as text: one row per line, with the line in this column.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected a file", "Name a file in it.")
    if not path.is_file():
        raise DataError(f"file {path} not found")
    if table_suffix(path.name) not in TABLES:
        for line in read_lines(path, column):
            yield {column: line}
        return
    for number, row in enumerate(read_table(path, (column,)), 1):
        check_row(row, f"{path} row {number}", {"--column": column})
        yield row


def check_row(row: Mapping[str, Any], where: str, wanted: Mapping[str, str | None]) -> None:
    """Check that the row has the columns that settings name (setting -> column; None: not required); else DataError."""
    for setting, column in wanted.items():
        if column and column not in row:
            raise DataError(
                f"{where} has no column '{column}'; it has {sorted(row)}", f"Set {setting} to one of these."
            )


def read_table(path: Path, columns: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, by its suffix. `columns` are looked for in the header of a CSV, to tell by what its
    cells are separated. DataError names the line that can't be read."""
    suffix = table_suffix(path.name)
    if suffix == ".parquet":
        if path.suffix.lower() == ".gz":
            raise DataError(f"{path} is a packed Parquet file", "Unpack it: Parquet is packed inside.")
        return parquet.rows(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, columns)
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON array, or of JSON lines, whatever the suffix says."""
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            rows = parse_json(text)
        except ValueError as e:
            raise DataError(f"{path} is not JSON: {e}") from None
        for number, row in enumerate(rows, 1):
            yield _object(row, f"{path} item {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as e:
            if number == 1 and _is_json(text):
                break  # one object over several lines
            raise DataError(f"{path} line {number} is not JSON: {e}") from None
        yield _object(row, f"{path} line {number}")
    else:
        return
    raise DataError(
        f"{path} holds one object with the keys {sorted(json.loads(text))}, expected a list of rows",
        "Save the list alone, or one object a line.",
    )


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    return row


def _csv_rows(path: Path, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LARGEST_CELL)
    text = _text(path)
    delimiter = _delimiter(path, text, columns)
    # Strict: else a quote that is never closed makes one cell of the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = begin = 0
    try:
        for cells in reader:
            if cells and not header:
                header = _header(path, cells)
            elif cells:
                number += 1
                yield _csv_row(header, cells, f"{path} row {number}")
            begin = reader.line_num
    except csv.Error as e:
        what = "a quote is never closed" if "unexpected end" in str(e) else str(e)
        raise DataError(
            f"{path} is not valid CSV: {what}, in the row that begins at line {begin + 1}",
            'A cell in double quotes writes a quote of its own twice: "She said ""no""."',
        ) from None


def _header(path: Path, cells: list[str]) -> list[str]:
    if twice := sorted({cell for cell in cells if cells.count(cell) > 1}):
        raise DataError(f"{path} has the column {twice[0]!r} {cells.count(twice[0])} times", "Rename or remove one.")
    return cells


def _csv_row(header: list[str], cells: list[str], where: str) -> dict[str, Any]:
    """Return a row by column; cells that it lacks are None."""
    if len(cells) > len(header):
        raise DataError(
            f"{where} has {len(cells)} cells, more cells than the header, which has {len(header)}",
            "Put texts that hold the separator into double quotes.",
        )
    return dict(zip(header, cells + [None] * (len(header) - len(cells)), strict=True))


def _delimiter(path: Path, text: str, columns: Collection[str]) -> str:
    """Return what separates the cells: a tab in .tsv; else what gives most of the columns, or most cells in the header;
    a comma if that is even."""
    if table_suffix(path.name) == ".tsv":
        return "\t"
    header = next((line for line in text.split("\n") if line.strip()), "")
    cells = {d: _cells(header, d) for d in DELIMITERS}
    best = max(DELIMITERS, key=lambda d: (len(set(columns) & set(cells[d])), len(cells[d])))
    if best != ",":
        progress.say(f"prompts  {path.name}: the cells are separated by {best!r}")
    return best
