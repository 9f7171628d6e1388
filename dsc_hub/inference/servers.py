"""Servers of the base model: vLLM replicas started on this machine (vllm.py). external.py has those that already run.

`serve_model(...)` yields the endpoints of servers that answer; when the block ends they are ended.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from dsc_hub.config.serving import ServingConfig
from dsc_hub.errors import ConfigError
from dsc_hub.inference.http import open_url
from dsc_hub.inference.requests import RequestForm
from dsc_hub.inference.vllm import BASE, ENDS_THOUGHTS, VllmServer
from dsc_hub.system import machine
from dsc_hub.system.progress import duration, moving_line

# Compilation on a CPU by the arithmetic of the processor: extra seconds of startup, and the share of the time per token
# that it saves; measured with SmolLM2-135M on two cores. With matrix units (AMX) the rest of a step weighs more; in
# float32 on AVX2 the rest is a third of it (117 to 126 tokens/s eager, 163 compiled).
COMPILING = {"amx": (60.0, 0.13), "bfloat16": (60.0, 0.02), "float32": (150.0, 0.25)}
# Highest throughput measured, in tokens per second; used if the speed of a model is unknown on this machine.
FASTEST = 700.0


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: address up to and including /v1, model name on the server, API key.

    `form` says which parameters it takes, and under which names. `extra` are parameters that are sent in place of
    `generation.extra`, which is meant for the base: of a critic; None: `generation.extra` is sent.
    """

    url: str
    model: str
    api_key: str = field(repr=False)
    # All three may take seconds. `check`, called after a failed request, raises ServingError if the server is
    # unreachable.
    check: Callable[[], object] = lambda: None
    # only of a server that we started; it is up again when `is_ready` returns True
    restart: Callable[[], None] | None = None
    is_ready: Callable[[], bool] = lambda: True
    ends_thoughts: bool = False  # whether it takes `thinking_token_budget`
    form: RequestForm = field(default_factory=dict, hash=False)
    extra: Mapping[str, Any] | None = field(default=None, hash=False)
    takes_many: bool = False  # whether it is known to work at many requests at once


@contextmanager
def serve_model(
    folder: Path,
    section: ServingConfig,
    log: Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    places: Sequence[Sequence[str]] = ((),),
    compiled: bool = False,
    more: Sequence[str] = (),
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[list[Endpoint]]:
    """Start a vLLM server for each of `places` (see `replica_places`) and yield their endpoints.

    In requests the model is called BASE; adapters keep their names. `more` are further arguments of vLLM. The second
    server logs to `<log>-2`, and so on. `meanwhile` is called while they start; on GPUs before, since what it loads may
    take memory there, and vLLM measures what is free.
    ServingError with the last lines of its log if a server dies or is not ready within `start_timeout_s`.
    """
    on_cpu = machine.vllm_on_cpu()
    if not on_cpu:
        meanwhile()
    with ExitStack() as stack:
        engines = []
        for n, devices in enumerate(places, 1):
            replica_log = log if n == 1 else log.with_stem(f"{log.stem}-{n}")
            options: dict[str, Any] = {"own": devices, "compiled": compiled, "more": more}
            engine = VllmServer(folder, section, replica_log, adapters or {}, **options)
            stack.callback(engine.end)
            engines.append(engine)
        with moving_line() as line:
            started = monotonic()
            if on_cpu:
                meanwhile()
            while not all([engine.is_ready() for engine in engines]):
                line.show(f"vLLM is starting  {duration(monotonic() - started)}  -> {log}")
                sleep(0.25)
        yield [
            Endpoint(
                f"{e.url}/v1",
                BASE,
                e.api_key,
                e.check_after_loss,
                e.restart,
                e.is_ready,
                ends_thoughts=ENDS_THOUGHTS in more,
                takes_many=True,
            )
            for e in engines
        ]


def replica_places(section: ServingConfig) -> list[tuple[str, ...]]:
    """Return the numbers of the GPUs, or on a CPU of the cores, of each replica.

    One empty tuple if nothing needs to be divided. ConfigError if the machine has too few.
    """
    replicas, per_replica = section.replicas, section.tensor_parallel
    if machine.vllm_on_cpu():
        cores = sorted(os.sched_getaffinity(0))[: machine.cores()]
        n = 1 if replicas == "auto" else replicas
        if per_replica > 1 or n > len(cores):
            raise ConfigError(
                f"serving: {n} replicas of {per_replica} can't run on {len(cores)} cores",
                "On a CPU a replica has a core or more, and serving.tensor_parallel is 1.",
            )
        share = len(cores) // n
        return [()] if n == 1 else [tuple(map(str, cores[i * share : (i + 1) * share])) for i in range(n)]
    visible = machine.visible_gpus()
    n = max(1, len(visible) // per_replica) if replicas == "auto" else replicas
    if n * per_replica > len(visible):
        raise ConfigError(
            f"serving: {n} replicas of {per_replica} need {n * per_replica} GPUs, here are {len(visible)}",
            "Lower serving.replicas or serving.tensor_parallel.",
        )
    return [tuple(visible[i * per_replica : (i + 1) * per_replica]) for i in range(n)]


def worth_compiling(new_tokens: int, tokens_per_s: float | None) -> bool:
    """Return whether compilation on a CPU saves more time over `new_tokens` tokens than it adds to the startup.

    `tokens_per_s`: throughput measured on this machine; None if it was never measured.
    """
    starting_s, saved_share = COMPILING["amx" if machine.has_amx() else machine.cpu_dtype()]
    return new_tokens / (tokens_per_s or FASTEST) * saved_share > starting_s


def prefix_cache(endpoints: Iterable[Endpoint]) -> list[tuple[int, int] | None]:
    """Return per server the prompt tokens found in its prefix cache and those looked up, since its start.

    None for a server that does not report them (vLLM does).
    """
    return [_prefix_cache_of(e) for e in endpoints]


def _prefix_cache_of(endpoint: Endpoint) -> tuple[int, int] | None:
    request = urllib.request.Request(
        f"{endpoint.url.removesuffix('/v1')}/metrics", headers={"Authorization": f"Bearer {endpoint.api_key}"}
    )
    try:
        with open_url(request, timeout_s=20) as answer:
            text = answer.read().decode("utf-8", "replace")
    except (OSError, HTTPException, ValueError):
        return None
    counts = []
    for name in ("hits", "queries"):
        pattern = rf"^vllm:prefix_cache_{name}(?:_total)?(?:{{.*}})? (\S+)$"
        counts.append([float(value) for value in re.findall(pattern, text, re.MULTILINE)])
    return (int(sum(counts[0])), int(sum(counts[1]))) if all(counts) else None


def cache_use(before: Iterable[tuple[int, int] | None], after: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    """Return the tokens found and looked up between two results of `prefix_cache`.

    A server that reported nothing in one of them is left out; one that was restarted in between counts from its start.
    """
    hits = queries = 0
    for old, new in zip(before, after, strict=True):
        if old and new:
            old = (0, 0) if new[0] < old[0] or new[1] < old[1] else old
            hits, queries = hits + new[0] - old[0], queries + new[1] - old[1]
    return hits, queries
