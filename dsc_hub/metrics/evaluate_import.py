"""Import of `evaluate` without its evaluators, which no metric needs.

They import transformers' pipelines and PyTorch: with them `import evaluate` takes 8 s, without them 2 s (`datasets`,
`scipy.stats`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


class _Without(MetaPathFinder):
    """Makes a module look uninstalled, for imports of the thread that made this object alone."""

    def __init__(self, name: str) -> None:
        self.name, self.thread = name, threading.get_ident()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == self.name and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)


def import_evaluate() -> Any:
    """Return the module `evaluate`. If this process has not imported it or transformers before, it has no evaluators.

    `evaluate` itself allows that: it works where transformers is not installed.
    """
    if "evaluate" in sys.modules or "transformers" in sys.modules:
        import evaluate

        return evaluate
    finder: MetaPathFinder = _Without("transformers")
    sys.meta_path.insert(0, finder)
    try:
        import evaluate
    finally:
        sys.meta_path.remove(finder)
    return evaluate
