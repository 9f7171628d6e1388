"""Start vLLM's API server on a CPU; its other processes are forked from one that has imported vLLM.

    python -m dsc_hub.inference.vllm_start ARGUMENTS OF THE SERVER
    python -m dsc_hub.inference.vllm_start --arguments-later

The second way imports vLLM, then reads the arguments and the API key from standard input: a line of JSON.

On a CPU vLLM starts its engine, and the engine its worker, as new interpreters: each imports vLLM again, one after the
other, for 8 s. Forks of a fork server (vllm_parent.py) have imported it. vLLM forbids them on a CPU, since OpenMP reads
its settings from the environment when it is loaded. Intel's OpenMP reads them again in a child, with two faults, which
`begin` mends: the child may use one core only, and its first thread is not bound. With GNU's OpenMP a fork may hang, so
the server starts without forks there.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing import context, forkserver
from typing import Any

SERVER = "vllm.entrypoints.openai.api_server"
PARENT = "dsc_hub.inference.vllm_parent"
LATER = "--arguments-later"
Kwargs = Mapping[str, Any]


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


def main() -> None:
    if "libiomp" in os.environ.get("LD_PRELOAD", ""):
        forks = Context()
        forks.set_forkserver_preload([PARENT])
        forkserver.ensure_running()  # it imports vLLM while this process does
        from vllm.utils import system_utils

        system_utils.get_mp_context = lambda: forks
    if sys.argv[1:] == [LATER]:
        importlib.import_module(SERVER)
        del sys.modules[SERVER]  # which runs as __main__ below; what it imports stays
        if not (line := sys.stdin.readline()):
            return  # no server is wanted any more
        given = json.loads(line)
        sys.argv[1:] = given["arguments"]
        os.environ["VLLM_API_KEY"] = given["api_key"]
    runpy.run_module(SERVER, run_name="__main__")


if __name__ == "__main__":
    main()
