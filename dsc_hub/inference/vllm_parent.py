"""Imported by the fork server of vllm_start.py, whose children are vLLM's API server and engine: imports what they and
the worker need. The engine forks the worker, so that it gets the settings of OpenMP that vLLM then has in the
environment.

vLLM 0.32 has its kernels for norms on x86, too, and calls them on GPUs only. They take a quarter of the time of the
same in PyTorch, which were a tenth of a small model's. (Its kernel for SiLU is slower than PyTorch.)
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing import context
from typing import Any

import torch
from vllm import ir
from vllm.model_executor.models import registry
from vllm.utils import system_utils

from dsc_hub.inference import vllm_forks
from dsc_hub.inference.vllm_forks import SERVER, Kwargs, begin


class Context(context.ForkContext):
    """Starts processes as forks of this one, with its cores."""

    def Process(  # type: ignore[override]  # a class in the base
        self, *, target: Callable[..., object], args: Sequence[Any] = (), kwargs: Kwargs | None = None, **more: Any
    ) -> context.ForkProcess:
        what = (target, args, kwargs or {}, os.sched_getaffinity(0))
        return context.ForkProcess(target=begin, args=what, **more)


_forks = Context()
system_utils.get_mp_context = lambda: vllm_forks.starts_engine or _forks
importlib.import_module(SERVER)
del sys.modules[SERVER]  # which runs as __main__; what it imports stays
for _name in ("engine.async_llm", "engine.core", "executor.multiproc_executor", "worker.cpu_worker"):
    importlib.import_module(f"vllm.v1.{_name}")
registry._run_in_subprocess = lambda fn: fn()  # looks at the model's class; in a new interpreter for GPUs alone
importlib.import_module("vllm.kernels.vllm_c")
for _op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
    if _kernel := _op.impls.get("vllm_c"):
        _kernel.supported = hasattr(torch.ops._C, _op.name)  # `--ir-op-priority` decides which are used
