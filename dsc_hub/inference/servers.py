"""Servers of the base model: vLLM replicas started on this machine (vllm.py), or external servers that already run.

`serve_model(...)` yields the endpoints of servers that answer; when the block ends they are ended.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from pydantic import ValidationError

from dsc_hub.config import messages
from dsc_hub.config.sampling import CriticConfig, ServingConfig
from dsc_hub.errors import ConfigError, ServingError
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
    """An OpenAI-compatible server: address up to and including /v1, model name on the server, API key."""

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


@contextmanager
def serve_model(
    folder: Path,
    section: ServingConfig,
    log: Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    places: Sequence[Sequence[str]] = ((),),
    compiled: bool = False,
    name: str = BASE,
    more: Sequence[str] = (),
) -> Iterator[list[Endpoint]]:
    """Start a vLLM server for each of `places` (see `replica_places`) and yield their endpoints.

    `name` is the model's in requests; adapters keep theirs. `more` are further arguments of vLLM. The second
    server logs to `<log>-2`, and so on.
    ServingError with the last lines of its log if a server dies or is not ready within `start_timeout_s`.
    """
    with ExitStack() as stack:
        engines = []
        for n, devices in enumerate(places, 1):
            replica_log = log if n == 1 else log.with_stem(f"{log.stem}-{n}")
            options: dict[str, Any] = {"own": devices, "compiled": compiled, "name": name, "more": more}
            engine = VllmServer(folder, section, replica_log, adapters or {}, **options)
            stack.callback(engine.end)
            engines.append(engine)
        with moving_line() as line:
            started = monotonic()
            while not all([engine.is_ready() for engine in engines]):
                line.show(f"vLLM is starting  {duration(monotonic() - started)}  -> {log}")
                sleep(0.25)
        limits = ENDS_THOUGHTS in more
        yield [
            Endpoint(f"{e.url}/v1", name, e.api_key, e.check_after_loss, e.restart, e.is_ready, limits) for e in engines
        ]


def replica_places(section: ServingConfig) -> list[tuple[str, ...]]:
    """Return the numbers of the GPUs, or on a CPU of the cores, of each replica.

    One empty tuple if nothing needs to be divided. ConfigError if the machine has too few.
    """
    replicas, per_replica = section.replicas, section.tensor_parallel
    if machine.vllm_on_cpu():
        cores = sorted(os.sched_getaffinity(0))
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treat a redirect as an ordinary reply: following it would send the key to a host that the user did not name."""

    def redirect_request(self, *args: Any) -> None:
        return None


# http and https only: with file:, ftp: or data: an address would read something that is not a server.
_opener = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
    _NoRedirect,
):
    _opener.add_handler(_handler())


def open_url(request: urllib.request.Request, timeout_s: float) -> Any:
    """Open a request without following redirects; http and https only. OSError and others as urllib raises them."""
    return _opener.open(request, timeout=timeout_s)


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


def external(section: ServingConfig) -> list[Endpoint]:
    """Return the endpoints that a recipe or an override names, after checking that each is up and serves the model.

    ServingError: unreachable address, refusal, wrong key, missing model, or several models and none named.
    """
    key = os.environ.get(section.api_key_env, "none")
    return [
        Endpoint(url, _model_at(url, key, section), key, check=partial(_served_at, url, key, section))
        for url in (url.rstrip("/") for url in section.endpoints)
    ]


def unusable(judge: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the server in a judge's options, in one line; empty if it serves the model."""
    key = judge.get("api_key_env") or ServingConfig().api_key_env
    try:
        _check_endpoint(judge["endpoint"], judge["model"], key)
    except ServingError as e:
        return [e.message]
    except ValidationError as e:
        return messages.recipe_problems(e, ServingConfig)
    return []


def external_critic(critic: CriticConfig | None) -> Endpoint | None:
    """Return the endpoint of the recipe's critic, checked as by `external`; None without a critic."""
    if critic is None:
        return None
    if not critic.endpoint:
        raise ConfigError(
            f"chain.critic: no endpoint is known at which {critic.model} can be asked",
            "Give one: chain.critic.endpoint=http://host:8000/v1",
        )
    return _check_endpoint(critic.endpoint, critic.model, critic.api_key_env)


def _check_endpoint(url: str, model: str, api_key_env: str) -> Endpoint:
    """Return the endpoint of a single server other than the base model's, checked as by `external`."""
    return external(ServingConfig(endpoints=(url,), served_model=model, api_key_env=api_key_env))[0]


def _model_at(url: str, key: str, section: ServingConfig) -> str:
    names, model = _served_at(url, key, section), section.served_model
    if model and (model in names or _answers_as(url, key, model)):
        return model
    if model or len(names) != 1:
        raise ServingError(
            f"endpoint {url} serves {', '.join(names) or 'nothing'}" + (f", not {model}" if model else ""),
            "Name one of these with serving.served_model.",
        )
    return names[0]


def _answers_as(url: str, key: str, model: str) -> bool:
    """Return whether the server answers for a model that it does not list. Requests one token.

    (`transformers serve` lists the contents of the Hub's cache.)
    """
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "seed": 0}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with open_url(request, timeout_s=120) as answer:  # the server may have to load the model first
            return bool(json.load(answer)["choices"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return False


def _served_at(url: str, key: str, section: ServingConfig) -> list[str]:
    """Return the names of the served models. ServingError if the request fails."""
    try:
        request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
        with open_url(request, timeout_s=20) as answer:
            return [str(m["id"]) for m in json.load(answer)["data"]]
    except urllib.error.HTTPError as e:
        hint = (
            f"Put its key into {section.api_key_env}."
            if e.code in (401, 403)
            else "An endpoint's address ends with /v1."
        )
        raise ServingError(f"endpoint {url} answered {e.code} {e.reason} to /models", hint) from None
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as e:
        raise ServingError(
            f"endpoint {url} can't be used: {getattr(e, 'reason', e)}",
            "Is the server up, and is the address like http://host:8000/v1?",
        ) from None
