"""Processes of vLLM as forks: what a new interpreter would have had, they have too."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection

from dsc_hub.inference import vllm_forks

NORMS = """
import torch
from vllm import ir
from dsc_hub.inference import vllm_parent

torch.manual_seed(0)
x, residual, weight = torch.randn(7, 576).bfloat16(), torch.randn(7, 576).bfloat16(), torch.randn(576).bfloat16()
for op, given in [(ir.ops.rms_norm, (x, weight, 1e-5)), (ir.ops.fused_add_rms_norm, (x, residual, weight, 1e-5))]:
    expected = op.impls["native"].impl_fn(*(g.clone() if torch.is_tensor(g) else g for g in given))
    with op.set_priority(["vllm_c", "native"]):
        assert op.dispatch(*given).provider == "vllm_c"
        torch.testing.assert_close(op(*given), expected)
"""
CORES = sorted(os.sched_getaffinity(0))


def tell(pipe: Connection) -> None:
    pipe.send((dict(os.environ), os.sched_getaffinity(0)))


def test_a_child_has_the_environment_and_the_cores_of_the_process_that_starts_it(monkeypatch):
    context = vllm_forks.Context()
    monkeypatch.setenv("OF_THE_FORK_SERVER", "1")
    multiprocessing.forkserver.ensure_running()
    try:
        monkeypatch.delenv("OF_THE_FORK_SERVER")
        monkeypatch.setenv("SET_LATER", "2")
        os.sched_setaffinity(0, CORES[:1])
        here, away = context.Pipe()
        child = context.Process(target=tell, args=(away,))
        child.start()
        environment, cores = here.recv()
        child.join()
        assert environment.get("SET_LATER") == "2" and "OF_THE_FORK_SERVER" not in environment and cores == {CORES[0]}
    finally:
        os.sched_setaffinity(0, CORES)
        multiprocessing.forkserver._forkserver._stop()  # as CPython's tests do


def test_the_first_thread_is_bound_where_openmp_binds_the_others():
    code = (
        "import os; from dsc_hub.inference.vllm_forks import begin; "
        f"begin(lambda: print(os.sched_getaffinity(0)), (), {{}}, {set(CORES)})"
    )

    def cores_with(bound: str) -> str:
        environment = os.environ | {"KMP_AFFINITY": bound}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        ).stdout.strip()

    assert cores_with(f"granularity=fine,explicit,proclist=[{CORES[-1]}]") == str({CORES[-1]})
    assert cores_with("none") == str(set(CORES))


def test_vllms_own_kernels_for_norms_are_those_of_pytorch():
    done = subprocess.run([sys.executable, "-c", NORMS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
