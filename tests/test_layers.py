"""The house: imports go downward only, and a light command stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "dsc_hub"
VOCABULARY = {
    "errors",
    "addresses",
    "plain_yaml",
    "explain",
    "records",
    "recorded",
    "recipe",
    "recipe_files",
    "numbers",
}
SCIENCE = {
    "chain",
    "acceptance",
    "text",
    "language",
    "hygiene",
    "claim",
    "stats",
    "side_effects",
    "diagnostics",
    "upgrade",
}
GROUND = {
    "runs",
    "rows",
    "index",
    "shards",
    "flow",
    "level",
    "engine",
    "progress",
    "machine",
    "packaged",
    "origin",
    "parquet",
    "pace",
    "models",
    "adapters",
    "keeper",
    "serving",
    "lanes",
    "generation",
    "scoring",
    "launcher",
    "hub",
    "push",
    "targets",
    "waiting",
    "preflight",
}
WANTED = {"metrics"}
BORROWED = {
    "side_effects": {"metrics"},  # the rule of refusals, pure: it lies with the metric, whose folder stands alone
    "runs": {"upgrade"},  # which makes p values anew for today's families
}
SHOWN = {"wording", "sentences", "tables", "plots"}  # numbers as people read them: used by the stages that show
STAGES = {
    "prompts",
    "sampling",
    "dataset",
    "distill",
    "distill_checks",
    "arms",
    "evaluation",
    "report",
    "cards",
    "publish",
    "publish_metric",
}
TOP = {
    "grid",
    "jobs",
    "untrusted",
    "asking",
    "stages",
    "pipeline",
    "show",
    "cli",
    "blind",
    "chat",
    "compare",
    "pull",
    "verify",
    "reference",
    "score",
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "evaluate", "vllm", "matplotlib", "huggingface_hub"}
AT_HOME = {
    "distill": {"torch", "transformers", "trl", "peft", "datasets"},
    "distill_checks": {"transformers", "trl", "peft"},
    "hub": {"huggingface_hub"},
    "push": {"huggingface_hub"},
    "targets": {"huggingface_hub"},
    "waiting": {"huggingface_hub"},
    "cards": {"huggingface_hub"},
    "plots": {"matplotlib"},
}


def imported(path: Path, everywhere: bool) -> set[str]:
    """Modules a file imports, at its top or everywhere in it; our own as their short names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else _outside_functions(tree)
    out: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out |= {f"dsc_hub.{a.name}" for a in node.names} if node.module == "dsc_hub" else {node.module}
    return {m.removeprefix("dsc_hub.").split(".")[0] if m.startswith("dsc_hub.") else m.split(".")[0] for m in out}


def _outside_functions(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            continue
        yield node
        yield from _outside_functions(node)


def modules() -> dict[str, Path]:
    found = {p.stem: p for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")} | {
        "metrics": PACKAGE / "metrics" / "__init__.py"
    }
    assert len(found) >= 30
    return found


def test_every_module_has_a_place_in_the_house():
    assert set(modules()) == VOCABULARY | SCIENCE | GROUND | WANTED | SHOWN | STAGES | TOP


@pytest.mark.parametrize(
    ("layer", "may"),
    [
        (VOCABULARY, VOCABULARY),
        (SCIENCE, VOCABULARY | SCIENCE),
        (GROUND, VOCABULARY | GROUND),
        (WANTED, VOCABULARY | SCIENCE | GROUND),
        (SHOWN, VOCABULARY | GROUND | SHOWN),
    ],
)
def test_imports_go_downward_only(layer: set[str], may: set[str]):
    ours = set(modules()) | {"local_hub"}
    for name, path in modules().items():
        if name in layer:
            assert imported(path, everywhere=True) & ours - {name} <= may | BORROWED.get(name, set()), name


def test_stages_do_not_import_the_pipeline_and_hardly_each_other():
    allowed = {
        ("distill", "distill_checks"),
        ("arms", "sampling"),  # the self-critique arm is sampling, on held-out prompts
        ("evaluation", "arms"),
        ("publish", "publish_metric"),  # a run's own metric files go up with it
    }
    for name in STAGES:
        seen = imported(PACKAGE / f"{name}.py", everywhere=True)
        assert not seen & TOP, name
        assert {(name, other) for other in seen & STAGES - {name}} <= allowed


def test_heavy_libraries_are_imported_at_the_top_of_their_own_stage_only():
    for name, path in modules().items():
        assert imported(path, everywhere=False) & HEAVY <= AT_HOME.get(name, set()), name
    for name, path in modules().items():
        assert "vllm" not in imported(path, everywhere=True), name


def test_help_is_instant_and_loads_nothing_heavy():
    code = (
        "import sys; from dsc_hub import cli; cli.cli(['--help'], standalone_mode=False); "
        f"sys.exit(','.join(sorted({HEAVY | {'pydantic', 'rich', 'openai', 'numpy', 'scipy'}!r} & set(sys.modules))) or None)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "") and "Distilled self-critique" in child.stdout
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dsc_hub", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert sorted(times)[1] < 0.3, times


def test_planning_and_sampling_load_no_torch():
    code = "import sys; from dsc_hub import pipeline, sampling, preflight, launcher, show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
