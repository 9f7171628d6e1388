"""Imports go one way only, and a light command stays light."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "dsc_hub"
# A module imports its own package and those above it, nowhere else and at no time.
ORDER = (
    "errors",
    "records",
    "stats",
    "sample_size",
    "acceptance",
    "system",
    "local_hub",
    "config",
    "runs",
    "chain",
    "hub",
    "inference",
    "metrics",
    "data",
    "sampling",
    "distill",
    "evaluation",
    "report",
    "publish",
    "pipeline",
    "api",
    "cli",
)
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "evaluate", "vllm", "matplotlib", "huggingface_hub"}
IN_VLLM = {"inference.vllm_forks", "inference.vllm_lora", "inference.vllm_parent", "inference.vllm_start"}
# Modules that are about a heavy library, and import it at their top; all others import it where they use it.
ABOUT = {
    "distill.adapter_files": {"transformers", "peft"},
    "distill.checkpoints": {"torch", "transformers"},
    "distill.model": {"torch", "transformers"},
    "distill.output": {"torch", "transformers"},
    "distill.train": {"torch", "transformers", "datasets"},
    "distill.trainers": {"torch", "transformers", "trl"},
    "distill.validation": {"torch", "transformers"},
    "distill.config": {"transformers", "trl", "peft"},
    "distill.preflight": {"transformers", "datasets"},
    "distill.tokens": {"transformers", "trl", "datasets"},
    "inference.rounding": {"torch", "transformers"},
    "inference.vllm_lora": {"torch", "vllm"},
    "inference.vllm_parent": {"torch", "vllm"},
    **dict.fromkeys(
        ("hub.account", "hub.client", "hub.errors", "hub.push", "hub.repos", "hub.retry"), {"huggingface_hub"}
    ),
    "report.cards": {"huggingface_hub"},
    **dict.fromkeys(("report.plots", "report.style", "report.table_page", "report.text_plots"), {"matplotlib"}),
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its name below dsc_hub."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    assert len(trees) >= 60
    return trees


def imports(tree: ast.AST) -> Iterator[str]:
    """What is imported in a tree: dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names)


def at_the_top(tree: ast.AST) -> Iterator[str]:
    """What is imported when the module is."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(ast.Module([node], []))
        yield from at_the_top(node)


def test_every_package_has_a_place_in_the_order():
    parts = {name.split(".")[0] for name in modules()}
    assert parts == {*ORDER, "__init__", "__main__"}


def test_a_package_imports_only_packages_above_it():
    upward = []
    for name, tree in modules().items():
        package = name.split(".")[0]
        if package not in ORDER:
            continue
        for target in imports(tree):
            if target.startswith("dsc_hub.") and target != "dsc_hub.__version__":
                other = target.split(".")[1]
                if ORDER.index(other) > ORDER.index(package):
                    upward.append(f"{name} imports {target}")
    assert not upward


def test_modules_of_a_package_do_not_import_each_other_in_a_circle():
    graph = {
        f"dsc_hub.{name}": {
            t if f"{t.removeprefix('dsc_hub.')}" in modules_seen else t.rpartition(".")[0]
            for t in imports(tree)
            if t.startswith("dsc_hub.")
        }
        for modules_seen in [modules()]
        for name, tree in modules_seen.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in graph.get(module, ()):
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_init_files_hold_a_docstring_and_nothing_else():
    for name, tree in modules().items():
        if name.endswith(".__init__"):
            assert ast.get_docstring(tree) and len(tree.body) == 1, name


def test_a_heavy_library_is_imported_at_the_top_of_the_modules_about_it_only():
    for name, tree in modules().items():
        heavy = {target.split(".")[0] for target in at_the_top(tree)} & HEAVY
        parts = name.split(".")
        if parts[0] == "metrics" and len(parts) > 2:  # a measurement is loaded by `evaluate`, and needs it
            continue
        assert heavy <= ABOUT.get(name, set()), name
        imported = list(imports(tree))
        # What changes vLLM is imported in its own processes, and by nothing else.
        assert name in IN_VLLM or "vllm" not in {target.split(".")[0] for target in imported}, name
        theirs = ("dsc_hub.inference.vllm_lora", "dsc_hub.inference.vllm_parent")
        assert not [target for target in imported if target.startswith(theirs)], name


def test_help_is_instant_and_loads_nothing_heavy():
    code = (
        "import sys; from dsc_hub.cli.main import cli; cli(['--help'], standalone_mode=False); "
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
    code = (
        "import sys; from dsc_hub.pipeline import run, preflight; from dsc_hub.sampling import sample; "
        "from dsc_hub.distill import launcher; from dsc_hub.cli import screens; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def runs(code: str) -> None:
    """A process of its own runs this code to its end."""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(
    ("before", "unwanted"),
    [
        ("", {"torch", "transformers", "scipy.stats"}),
        # as a user's own metric may do
        ("from transformers.utils import chat_template_utils", {"torch", "transformers.pipelines", "scipy.stats"}),
    ],
)
def test_a_packaged_metric_is_loaded_without_torch_and_pipelines_can_be_imported_afterwards(
    before: str, unwanted: set[str]
):
    """`import evaluate` alone would import both, 8 s of every command that scores."""
    code = (
        f"{before}\n"
        "import sys; from dsc_hub.records import Prompt; from dsc_hub.config.sampling import ScorerConfig; "
        "from dsc_hub.metrics import loading, registry; "
        "section = ScorerConfig(metric='sentiment', scorer='vader'); "
        "scorer = loading.load_scorer(section, registry.identify_scorer(section), None); "
        "assert scorer.score(['I love it.'], [Prompt('', '', '', 'test')])[0].value > 0; "
        f"assert not {unwanted} & set(sys.modules); "
        "import scipy.stats; from transformers import pipeline; from transformers.pipelines import SUPPORTED_TASKS"
    )
    runs(code)


def test_bitsandbytes_is_imported_without_the_compiler_which_works_afterwards():
    code = (
        "import os, sys; from dsc_hub.inference.bitsandbytes_import import import_bitsandbytes as get; get(); "
        "assert 'torch._inductor.compile_fx' not in sys.modules and 'TORCHDYNAMO_DISABLE' not in os.environ; "
        "import torch; assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2; "
        "assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1"
    )
    runs(code)
