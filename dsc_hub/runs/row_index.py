"""Where rows stand, by their keys: the keys are held in memory, 20 bytes each, and the rows stay on disk.

A run may have more rows than memory. `RowIndex` finds a row by its key or goes through all of them in the order of their
keys; `OrderedRows` and `StoredPrompts` are such rows as what they stand for.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from dsc_hub.records import Prompt, from_row, word
from dsc_hub.runs.jsonl import JsonlFile

T = TypeVar("T")
Key = tuple[str, int]  # an id (16 hex digits of a hash), and a number below 2**32 that tells apart what it names
KeyOf = Callable[[Mapping[str, Any]], Key | None]  # of a row; None: the row is left out
_FILE = 48  # a place is the number of a file above so many bits that say where in it the row begins
_AT = (1 << _FILE) - 1


def chain_key(row: Mapping[str, Any]) -> Key:
    """Of a line of chains.jsonl or failed.jsonl."""
    return row["prompt_id"], row["number"]


def turn_key(row: Mapping[str, Any]) -> Key:
    """Of a line of turns.jsonl: chain, step and role in one number."""
    role = ("answer", "critique", "revision").index(row["role"])
    return row["prompt_id"], row["chain"] << 16 | row["step"] << 8 | role


def request_key(row: Mapping[str, Any]) -> Key | None:
    """Of a line of turns.jsonl: what was asked, and the seed. None for one that doesn't tell."""
    return (row["request"], row["seed"]) if row.get("request") else None


class RowIndex:
    """The rows of some files by their keys; of two with the same key the later one. A torn last line is no row.

    RunError for a damaged row. Reads what stands in the files when it is made.
    """

    def __init__(self, files: Iterable[JsonlFile], key: KeyOf) -> None:
        self._files = list(files)
        self._open: dict[int, BinaryIO] = {}
        ids, numbers, places = array("Q"), array("I"), array("Q")
        for which, rows in enumerate(self._files):
            for at, row in rows.placed():
                try:
                    found = key(row)
                except (LookupError, TypeError, ValueError) as e:
                    raise rows.damaged(at, f"no key: {e}") from None
                if found is not None:
                    ids.append(word(found[0]))
                    numbers.append(found[1])
                    places.append(which << _FILE | at)
        self._ids, self._numbers = np.frombuffer(ids, np.uint64), np.frombuffer(numbers, np.uint32)
        self._places = np.frombuffer(places, np.uint64)
        del ids, numbers, places  # each array goes when its sorted copy is there: all at once would be twice the memory
        # Stable: of equal keys the later row stays behind the earlier one.
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
        """The row, or None."""
        at = self._at(key)
        return None if at is None else json.loads(self._line(int(self._places[at])))

    def lines(self) -> Iterator[bytes]:
        """The rows as they stand in their files, in the order of their keys."""
        for place in self._places:
            yield self._line(int(place))

    def as_type(self, kind: type[T]) -> Iterator[T]:
        """The rows as what they stand for, in the order of their keys; RunError for one that isn't."""
        for place in map(int, self._places):
            yield self._files[place >> _FILE].typed(kind, place & _AT, json.loads(self._line(place)))

    def _at(self, key: Key) -> int | None:
        if not len(self._ids):
            return None
        id_ = np.uint64(word(key[0]))
        first = int(np.searchsorted(self._ids, id_))
        last = int(np.searchsorted(self._ids, id_, "right"))
        at = first + int(np.searchsorted(self._numbers[first:last], np.uint32(key[1])))
        return at if at < last and self._numbers[at] == key[1] else None

    def _line(self, place: int) -> bytes:
        which, at = place >> _FILE, place & _AT
        if (file := self._open.get(which)) is None:
            file = self._open[which] = self._files[which].path.open("rb")
        file.seek(at)
        return file.readline()

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()


class OrderedRows(Generic[T]):
    """The rows of a file as what they stand for, in the order of their keys; read anew each time one goes through them."""

    def __init__(self, rows: JsonlFile, kind: type[T], key: KeyOf) -> None:
        self._index, self._kind = RowIndex([rows], key), kind

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[T]:
        return self._index.as_type(self._kind)


class StoredPrompts(Mapping[str, Prompt]):
    """The prompts of a file by their ids, in the file's order, and of them those of some splits that are to be kept (by their
    ids); none of them is held."""

    def __init__(self, rows: JsonlFile, *splits: str, keep: Callable[[str], bool] = bool) -> None:
        self._rows, self._splits, self._keep = rows, splits, keep
        self._index = RowIndex([rows], lambda row: (row["id"], 0) if self._is_in(row["id"], row["split"]) else None)
        self._last: Prompt | None = None

    def _is_in(self, id_: str, split: str) -> bool:
        return split in self._splits and self._keep(id_)

    def __getitem__(self, id_: str) -> Prompt:
        if self._last is None or self._last.id != id_:  # chains in order ask for the same prompt again and again
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
    """What can be gone through again and again, because it is made each time."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T]:
        return self._make()
