"""Import of `evaluate` without its evaluators, which no metric needs.

They import transformers' pipelines with PyTorch, and `scipy.stats`: with them `import evaluate` takes 8 s, without
them 1 s.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


class _Without(MetaPathFinder):
    """Makes what is not imported yet of some packages look uninstalled, for the thread that made this object alone."""

    def __init__(self, *packages: str) -> None:
        self.packages, self.thread = packages, threading.get_ident()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname.partition(".")[0] in self.packages and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)


def import_evaluate() -> Any:
    """Return the module `evaluate`. If this process has imported neither it nor PyTorch before, it has no evaluators.

    `evaluate` itself allows that: it works where transformers and SciPy are not installed.
    """
    if {"evaluate", "torch"} & sys.modules.keys():
        import evaluate

        return evaluate
    import datasets  # noqa: F401 - which may take what it likes

    finder: MetaPathFinder = _Without("transformers", "scipy")
    sys.meta_path.insert(0, finder)
    try:
        import evaluate
    finally:
        sys.meta_path.remove(finder)
    return evaluate
