"""Access to recorded facts by name; a missing name is an error that names the stage that should have written it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsc_hub.config.stages import writer_of
from dsc_hub.errors import DataError


class Recorded(Mapping[str, Any]):
    """A recorded JSON object: `facts["a"]["b"]` or `facts.a.b`. A missing name raises DataError with its stage.

    `null` is a value (not measured) and is returned as None. `get` and `in` are for optional names.
    """

    def __init__(self, value: Mapping[str, Any], file: str, path: tuple[str, ...] = ()) -> None:
        self._value, self._file, self._path = value, file, path

    def __getitem__(self, key: str) -> Any:
        path = (*self._path, str(key))
        if key not in self._value:
            raise DataError(f"{self._file} has no '{'.'.join(path)}'", self._way_out(path))
        return _wrap(self._value[key], self._file, path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._value else default

    def __contains__(self, key: object) -> bool:
        return key in self._value

    def __iter__(self) -> Iterator[str]:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def _way_out(self, path: tuple[str, ...]) -> str:
        if self._file == "run.json":
            return "It is recorded when a run starts: run the recipe again with `dsc run`."
        stage = writer_of(path[0])
        return (
            f"The stage '{stage}' should have recorded it: remove {stage}.done.json from the run folder and run again."
        )


def _wrap(value: Any, file: str, path: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return Recorded(value, file, path)
    if isinstance(value, list):
        return [_wrap(v, file, (*path, str(i))) for i, v in enumerate(value)]
    return value
