"""Metric code that a user wrote: what is wrong with its source, and where in it an error came from."""

from __future__ import annotations

import ast
import traceback
from importlib import metadata
from pathlib import Path

from dsc_hub.errors import MetricError

EXAMPLE = "README, Metrics, has an example of a metric of one's own."
_OF_EVALUATE = ("Measurement", "Metric", "Comparison", "EvaluationModule")


def check_source(path: Path) -> None:
    """MetricError, with the line, for a file that can't be a metric. Runs nothing of it."""
    try:
        tree = ast.parse(path.read_bytes(), filename=path.name)
    except SyntaxError as e:
        raise MetricError(f"metric {path.name}, line {e.lineno or 1}: {e.msg}", "Mend that line.") from None
    except (ValueError, RecursionError, MemoryError) as e:  # null bytes, no end of brackets
        raise MetricError(f"metric {path.name} is not Python text: {e}", EXAMPLE) from None
    for node in ast.walk(tree):
        # `evaluate` reads the imports by a pattern of its own and asks for a package "datasets,".
        if isinstance(node, ast.Import) and len(node.names) > 1:
            raise MetricError(
                f"metric {path.name}, line {node.lineno}: several imports in one line, which `evaluate` can't read",
                "Write one `import` a line.",
            )
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    if not any(node.bases for node in classes):
        raise MetricError(f"metric {path.name} defines no class derived from evaluate.Measurement", EXAMPLE)
    if any(ast.unparse(base).split(".")[-1] not in _OF_EVALUATE for node in classes for base in node.bases):
        return  # a base of their own may have all that a metric needs
    inside = [node for c in classes for node in ast.walk(c)]
    defined = {f.name for f in inside if isinstance(f, ast.FunctionDef)}
    defined |= {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    if missing := [name for name in ("_info", "_compute") if name not in defined]:
        raise MetricError(f"metric {path.name}: its class has no {' and no '.join(missing)}", EXAMPLE)


def relative_imports(path: Path) -> list[str]:
    """Modules that a metric imports from beside itself, as `from .helper import x` does."""
    nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.ImportFrom) and n.level]
    return sorted("." * n.level + (n.module or n.names[0].name) for n in nodes)


def packages(path: Path) -> list[str]:
    """The installed packages that a metric imports and an index has: not those that come with Python, nor what was installed
    from a folder or an address, this one included."""
    distributions = metadata.packages_distributions()
    out = set()
    for module in _imported(ast.parse(path.read_bytes())):
        names = set(distributions.get(module.partition(".")[0], ()))
        if len(names) > 1:  # a name that several packages share: the one whose file this is
            start = module.replace(".", "/")
            names = {
                n for n in names if any(str(f).startswith((f"{start}/", f"{start}.")) for f in metadata.files(n) or ())
            }
        out |= {n for n in names if metadata.distribution(n).read_text("direct_url.json") is None}
    return sorted(out - {"dsc-hub"})  # a checkout has no record of where it was installed from


def _imported(tree: ast.AST) -> set[str]:
    """Dotted names of the modules that a file imports, but for those beside it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def described(error: BaseException, file: str) -> str:
    """The error in a line, with the last line of the metric's own file on its way."""
    text = " ".join(str(error).split())[:400]
    name = "it called sys.exit" if isinstance(error, SystemExit) else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == Path(file).name]
    place = f" ({Path(file).name} line {frames[-1].lineno})" if frames else ""
    return f"{name}: {text}{place}" if text else f"{name}{place}"
