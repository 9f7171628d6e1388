"""Index of rows by key: the keys are held in memory, 20 bytes each; the rows stay on disk.

The rows of a run may not fit in memory. `RowIndex` looks up a row by its key, or iterates over all rows in key order.
`OrderedRows` and `StoredPrompts` return the rows as typed records.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from dsc_hub.records import Prompt, from_row, id_as_uint64
from dsc_hub.runs.jsonl import JsonlFile

T = TypeVar("T")
Key = tuple[str, int]  # an id (16 hex digits of a hash), and a number below 2**32 that makes the key unique
KeyOf = Callable[[Mapping[str, Any]], Key | None]  # key of a row; None: the row is not indexed
_FILE = 48  # a place packs the file number (high bits) and the row's byte offset (low _FILE bits)
_AT = (1 << _FILE) - 1


def chain_key(row: Mapping[str, Any]) -> Key:
    """Return the key of a row of chains.jsonl or failed.jsonl."""
    return row["prompt_id"], row["number"]


def turn_key(row: Mapping[str, Any]) -> Key:
    """Return the key of a row of turns.jsonl; its number packs chain index, step and role."""
    role = ("answer", "critique", "revision").index(row["role"])
    return row["prompt_id"], row["chain"] << 16 | row["step"] << 8 | role


def request_key(row: Mapping[str, Any]) -> Key | None:
    """Return the request digest and the seed of a row of turns.jsonl; None for a row without a digest."""
    return (row["request"], row["seed"]) if row.get("request") else None


class RowIndex:
    """Rows of several files by key. Of two rows with the same key the later one counts; a torn last line is ignored.

    The constructor reads the files as they are at that moment; RunError for a damaged row.
    """

    def __init__(self, files: Iterable[JsonlFile], key: KeyOf) -> None:
        self._files = list(files)
        self._open: dict[int, BinaryIO] = {}
        ids, numbers, places = array("Q"), array("I"), array("Q")
        for file_number, rows in enumerate(self._files):
            for offset, row in rows.with_offsets():
                try:
                    row_key = key(row)
                except (LookupError, TypeError, ValueError) as e:
                    raise rows.damaged(offset, f"no key: {e}") from None
                if row_key is not None:
                    ids.append(id_as_uint64(row_key[0]))
                    numbers.append(row_key[1])
                    places.append(file_number << _FILE | offset)
        self._ids, self._numbers = np.frombuffer(ids, np.uint64), np.frombuffer(numbers, np.uint32)
        self._places = np.frombuffer(places, np.uint64)
        del ids, numbers, places  # frees each array once its sorted copy exists; keeping all would double the memory
        # The sort is stable: among equal keys the later row stays after the earlier one.
        self._take(np.lexsort((self._numbers, self._ids)))
        same = (self._ids[1:] == self._ids[:-1]) & (self._numbers[1:] == self._numbers[:-1])
        if same.any():
            self._take(np.flatnonzero(~np.append(same, False)))

    def _take(self, order: np.ndarray) -> None:
        self._ids = self._ids[order]
        self._numbers = self._numbers[order]
        self._places = self._places[order]

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, key: Key) -> bool:
        return self._at(key) is not None

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return the row with this key, or None."""
        position = self._at(key)
        return None if position is None else json.loads(self._line(int(self._places[position])))

    def lines(self) -> Iterator[bytes]:
        """Yield the raw lines of the rows, in key order."""
        for place in self._places:
            yield self._line(int(place))

    def as_type(self, kind: type[T]) -> Iterator[T]:
        """Yield the rows as `kind`, in key order; RunError for a row that does not validate."""
        for place in map(int, self._places):
            yield self._files[place >> _FILE].typed(kind, place & _AT, json.loads(self._line(place)))

    def _at(self, key: Key) -> int | None:
        if not len(self._ids):
            return None
        id_ = np.uint64(id_as_uint64(key[0]))
        first = int(np.searchsorted(self._ids, id_))
        last = int(np.searchsorted(self._ids, id_, "right"))
        position = first + int(np.searchsorted(self._numbers[first:last], np.uint32(key[1])))
        return position if position < last and self._numbers[position] == key[1] else None

    def _line(self, place: int) -> bytes:
        file_number, offset = place >> _FILE, place & _AT
        if (file := self._open.get(file_number)) is None:
            file = self._open[file_number] = self._files[file_number].path.open("rb")
        file.seek(offset)
        return file.readline()

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()


class OrderedRows(Generic[T]):
    """Rows of a file as `kind`, in key order; each iteration reads them from disk again."""

    def __init__(self, rows: JsonlFile, kind: type[T], key: KeyOf) -> None:
        self._index, self._kind = RowIndex([rows], key), kind

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[T]:
        return self._index.as_type(self._kind)


class StoredPrompts(Mapping[str, Prompt]):
    """Prompts of a file by id, in file order, restricted to `splits` and to the ids for which `keep` is true.

    The prompts stay on disk; only the last one looked up is cached.
    """

    def __init__(self, rows: JsonlFile, *splits: str, keep: Callable[[str], bool] = bool) -> None:
        self._rows, self._splits, self._keep = rows, splits, keep
        self._index = RowIndex([rows], lambda row: (row["id"], 0) if self._is_in(row["id"], row["split"]) else None)
        self._last: Prompt | None = None

    def _is_in(self, id_: str, split: str) -> bool:
        return split in self._splits and self._keep(id_)

    def __getitem__(self, id_: str) -> Prompt:
        if self._last is None or self._last.id != id_:  # chains in order look up the same prompt repeatedly
            if (row := self._index.get((id_, 0))) is None:
                raise KeyError(id_)
            self._last = from_row(Prompt, row)
        return self._last

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        return (prompt.id for prompt in self.values())

    def values(self) -> Reiterable[Prompt]:  # type: ignore[override]
        return Reiterable(lambda: (p for p in self._rows.as_type(Prompt) if self._is_in(p.id, p.split)))


class Reiterable(Generic[T]):
    """An iterable that can be iterated repeatedly: `make` returns a new iterator each time."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T]:
        return self._make()
