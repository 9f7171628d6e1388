"""Metric code written by users: problems in its source, and the location of an error in it."""

from __future__ import annotations

import ast
import traceback
from importlib import metadata
from pathlib import Path

from dsc_hub.errors import MetricError

EXAMPLE = "docs/howto/own-metric.md has an example of a metric of one's own."
_OF_EVALUATE = ("Measurement", "Metric", "Comparison", "EvaluationModule")


def check_source(path: Path) -> None:
    """Raise MetricError, with the line, for a file that can't be a metric. Runs none of its code."""
    try:
        tree = ast.parse(path.read_bytes(), filename=path.name)
    except SyntaxError as e:
        raise MetricError(f"metric {path.name}, line {e.lineno or 1}: {e.msg}", "Mend that line.") from None
    except (ValueError, RecursionError, MemoryError) as e:  # null bytes, too many brackets
        raise MetricError(f"metric {path.name} is not Python text: {e}", EXAMPLE) from None
    for node in ast.walk(tree):
        # `evaluate` parses the imports with its own pattern and would require a package "datasets,".
        if isinstance(node, ast.Import) and len(node.names) > 1:
            raise MetricError(
                f"metric {path.name}, line {node.lineno}: several imports in one line, which `evaluate` can't read",
                "Write one `import` a line.",
            )
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    if not any(node.bases for node in classes):
        raise MetricError(f"metric {path.name} defines no class derived from evaluate.Measurement", EXAMPLE)
    if any(ast.unparse(base).split(".")[-1] not in _OF_EVALUATE for node in classes for base in node.bases):
        return  # a user-defined base class may define everything that a metric needs
    nodes = [node for c in classes for node in ast.walk(c)]
    defined_names = {f.name for f in nodes if isinstance(f, ast.FunctionDef)}
    defined_names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    if missing := [name for name in ("_info", "_compute") if name not in defined_names]:
        raise MetricError(f"metric {path.name}: its class has no {' and no '.join(missing)}", EXAMPLE)


def relative_imports(path: Path) -> list[str]:
    """Return the modules that a metric imports from its own folder, as `from .helper import x` does."""
    nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.ImportFrom) and n.level]
    return sorted("." * n.level + (n.module or n.names[0].name) for n in nodes)


def packages(path: Path) -> list[str]:
    """Return the installed packages that a metric imports and that a package index has.

    Excluded are the standard library and packages installed from a folder or an address, dsc_hub included.
    """
    distributions = metadata.packages_distributions()
    package_names = set()
    for module in _imported(ast.parse(path.read_bytes())):
        names = set(distributions.get(module.partition(".")[0], ()))
        if len(names) > 1:  # several packages share the module name: keep the one that contains its file
            start = module.replace(".", "/")
            names = {
                n for n in names if any(str(f).startswith((f"{start}/", f"{start}.")) for f in metadata.files(n) or ())
            }
        package_names |= {n for n in names if metadata.distribution(n).read_text("direct_url.json") is None}
    return sorted(package_names - {"dsc-hub"})  # a checkout has no record of its installation source


def _imported(tree: ast.AST) -> set[str]:
    """Return the dotted names of the modules that a file imports, without those in its own folder."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def described(error: BaseException, file: str) -> str:
    """Return the error in one line, with the last line of the metric's own file in the traceback."""
    text = " ".join(str(error).split())[:400]
    name = "it called sys.exit" if isinstance(error, SystemExit) else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == Path(file).name]
    place = f" ({Path(file).name} line {frames[-1].lineno})" if frames else ""
    return f"{name}: {text}{place}" if text else f"{name}{place}"
