"""Forks in the place of vLLM's processes on a CPU.

vLLM starts its engine, and the engine its worker, as new interpreters: each imports vLLM again, one after the other,
for 8 s. Here a fork server imports it once (vllm_parent.py), and its forks are the API server and the engine, which is
no fork of the API server, since that has threads and sockets. vLLM forbids forks on a CPU, since OpenMP reads its
settings from the environment when it is loaded. Intel's OpenMP reads them again in a child, with two faults, which
`begin` mends: the child may use one core only, and its first thread is not bound.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing import context, forkserver
from typing import Any

SERVER = "vllm.entrypoints.openai.api_server"
Kwargs = Mapping[str, Any]
starts_engine: Context | None = None  # in the API server; None: this process is another one


class Context(context.ForkServerContext):
    """Starts processes as children of the fork server, with this process's environment and cores."""

    def Process(  # type: ignore[override]  # a class in the base
        self, *, target: Callable[..., object], args: Sequence[Any] = (), kwargs: Kwargs | None = None, **more: Any
    ) -> context.ForkServerProcess:
        what = (target, args, kwargs or {}, os.sched_getaffinity(0), dict(os.environ))
        return context.ForkServerProcess(target=begin, args=what, **more)


def begin(
    target: Callable[..., object],
    args: Sequence[Any],
    kwargs: Kwargs,
    cores: Collection[int],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Call a function in a new child, which gets all of its parent's cores, and an environment (None: it has it).

    Where the environment binds OpenMP's threads to cores, this thread is bound to the first one.
    """
    if environment is not None:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    os.sched_setaffinity(0, cores)
    if bound := re.search(r"proclist=\[(\d+)", os.environ.get("KMP_AFFINITY", "")):
        import torch

        torch.zeros(1 << 20).add_(1)  # OpenMP's other threads start, with all cores to choose theirs from
        os.sched_setaffinity(0, {int(bound[1])})
    target(*args, **kwargs)


def serve(arguments: Sequence[str], forks: Context | None = None) -> None:
    """Run the server in this process. `forks` start its engine; None: it is started as vLLM does it."""
    global starts_engine
    starts_engine = forks
    if forks:  # a child of a fork server knows its address, and would yet start another one (Python 3.11 to 3.13)
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
        from vllm.utils.system_utils import set_process_title

        set_process_title("APIServer")
    sys.argv[1:] = arguments
    runpy.run_module(SERVER, run_name="__main__")
