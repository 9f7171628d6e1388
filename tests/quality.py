"""How easy the code base is to enter, in figures: `python -m tests.quality [PACKAGE_FOLDER]`.

    rooms            files and folders that `ls` shows
    levels           of imports between rooms, the longest way down
    circles          rooms that import each other, directly or over others
    subscripts       by string keys, per 1,000 lines: data that travels without a type. run["file"] is the path of a file and
                     counts as none; the second figure counts it
    shared names     top-level names that several modules have
    longest          function, in lines, and how many are above 60
    large files      above 400 lines
    long lines       above 120 characters, docstrings and comments included

They are symptoms. A figure that is better where the code is no clearer is worth nothing.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

LONG_FUNCTION, LARGE_FILE, LONG_LINE = 60, 400, 120  # lines, lines, characters
Function = ast.FunctionDef | ast.AsyncFunctionDef


def trees(package: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def arrows(package: Path) -> dict[str, set[str]]:
    """Room -> the rooms that it imports, at any time."""
    rooms = {room_of(path, package) for path in trees(package)}
    out: dict[str, set[str]] = {room: set() for room in rooms if not room.startswith("__")}
    for path, tree in trees(package).items():
        if (here := room_of(path, package)) not in out:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dsc_hub":
                parts = node.module.split(".")[1:]
                out[here] |= {parts[0]} if parts else {a.name for a in node.names}
        out[here] &= set(out) - {here}
    return out


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Rooms from which a way leads back to them."""

    def reachable(room: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[room])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += graph[other]
        return seen

    return sorted(room for room in graph if room in reachable(room))


def levels(graph: Mapping[str, set[str]]) -> int:
    """Rooms on the longest way down; circles are left out of it."""
    depth: dict[str, int] = {}

    def of_room(room: str, above: frozenset[str]) -> int:
        if room not in depth:
            below = [of_room(other, above | {room}) for other in graph[room] if other not in above]
            depth[room] = 1 + max(below, default=0)
        return depth[room]

    return max(of_room(room, frozenset()) for room in graph)


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def string_subscripts(tree: ast.Module, with_paths: bool = True) -> int:
    found = (
        ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    )
    return sum(with_paths or of.split(".")[-1] not in ("run", "source", "other") for of in found)


def top_names(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, (*Function.__args__, ast.ClassDef))}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def figures(package: Path) -> dict[str, object]:
    code = trees(package)
    graph = arrows(package)
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in code}
    total = sum(map(len, lines.values()))
    named = Counter(name for tree in code.values() for name in top_names(tree))
    lengths = {
        f"{path.relative_to(package)}: {f.name}": f.end_lineno - f.lineno + 1
        for path, tree in code.items()
        for f in functions(tree)
    }
    longest = max(lengths, key=lambda name: lengths[name])
    return {
        "rooms": len(graph),
        "levels": levels(graph),
        "circles": ", ".join(circles(graph)) or "none",
        "lines": total,
        "subscripts": ", ".join(
            str(round(1000 * sum(string_subscripts(tree, with_paths) for tree in code.values()) / total, 1))
            for with_paths in (False, True)
        ),
        "shared names": sum(n > 1 for n in named.values()),
        "longest": f"{lengths[longest]} lines ({longest}); {sum(n > LONG_FUNCTION for n in lengths.values())} above {LONG_FUNCTION}",
        "large files": ", ".join(f"{p.relative_to(package)} {len(x)}" for p, x in lines.items() if len(x) > LARGE_FILE)
        or "none",
        "long lines": sum(len(line) > LONG_LINE for text in lines.values() for line in text),
    }


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "dsc_hub"
    for name, value in figures(package).items():
        print(f"{name:14} {value}")


if __name__ == "__main__":
    main()
