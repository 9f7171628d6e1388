"""Servers of the base model: vLLM replicas of our own on this machine (vllm.py), or addresses that already run.

`serve(...)` yields the endpoints of servers that answer; when the block ends they end.
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
from dsc_hub.config.recipe import CriticConfig, ServingConfig
from dsc_hub.errors import ConfigError, ServingError
from dsc_hub.inference.vllm import BASE, VllmServer
from dsc_hub.system import machine
from dsc_hub.system.progress import duration, moving_line

# Compiling on a CPU, SmolLM2-135M on two cores: so many seconds longer until it is ready, and such a share less time for each
# token, by what the processor multiplies with. With matrix units (AMX) the rest of a step weighs more; in float32 on AVX2 the
# rest is a third of it (117 to 126 tokens/s eager, 163 compiled).
COMPILING = {"amx": (60.0, 0.13), "bfloat16": (60.0, 0.02), "float32": (150.0, 0.25)}
# The most tokens a second that were seen, for a model whose speed isn't known here yet.
FASTEST = 700.0


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: address up to and including /v1, name of the model there, key."""

    url: str
    model: str
    api_key: str = field(repr=False)
    # All three may take seconds. `check`, after a request broke off: raises ServingError if the server is gone.
    check: Callable[[], object] = lambda: None
    restart: Callable[[], None] | None = None  # of a server of our own; it is there again when `is_ready`
    is_ready: Callable[[], bool] = lambda: True


@contextmanager
def serve(
    folder: Path,
    section: ServingConfig,
    log: Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    places: Sequence[Sequence[str]] = ((),),
    compiled: bool = False,
) -> Iterator[list[Endpoint]]:
    """Start a vLLM for each of `places` (`replica_places`) and yield their endpoints: model name `BASE`, adapters by their
    names. The second one logs to `<log>-2`, and so on.

    Raises ServingError with the last lines of its log if one dies or isn't ready within `start_timeout_s`.
    """
    with ExitStack() as stack:
        engines = []
        for n, own in enumerate(places, 1):
            own_log = log if n == 1 else log.with_stem(f"{log.stem}-{n}")
            engine = VllmServer(folder, section, own_log, adapters or {}, own=own, compiled=compiled)
            stack.callback(engine.end)
            engines.append(engine)
        with moving_line() as line:
            started = monotonic()
            while not all([engine.is_ready() for engine in engines]):
                line.show(f"vLLM is starting  {duration(monotonic() - started)}  -> {log}")
                sleep(0.25)
        yield [Endpoint(f"{e.url}/v1", BASE, e.api_key, e.check_after_loss, e.restart, e.is_ready) for e in engines]


def replica_places(section: ServingConfig) -> list[tuple[str, ...]]:
    """The GPUs, or on a CPU the cores, of each replica, by their numbers; one empty place where nothing needs to be shared out.

    ConfigError if the machine has too few.
    """
    wanted, each = section.replicas, section.tensor_parallel
    if machine.vllm_on_cpu():
        cores = sorted(os.sched_getaffinity(0))
        n = 1 if wanted == "auto" else wanted
        if each > 1 or n > len(cores):
            raise ConfigError(
                f"serving: {n} replicas of {each} can't run on {len(cores)} cores",
                "On a CPU a replica has a core or more, and serving.tensor_parallel is 1.",
            )
        share = len(cores) // n
        return [()] if n == 1 else [tuple(map(str, cores[i * share : (i + 1) * share])) for i in range(n)]
    visible = machine.visible_gpus()
    n = max(1, len(visible) // each) if wanted == "auto" else wanted
    if n * each > len(visible):
        raise ConfigError(
            f"serving: {n} replicas of {each} need {n * each} GPUs, here are {len(visible)}",
            "Lower serving.replicas or serving.tensor_parallel.",
        )
    return [tuple(visible[i * each : (i + 1) * each]) for i in range(n)]


def worth_compiling(new_tokens: int, tokens_per_s: float | None) -> bool:
    """On a CPU: does a run of so many tokens gain by it more than the start loses? `tokens_per_s`: as measured here; None: never."""
    starting_s, saves = COMPILING["amx" if machine.has_amx() else machine.cpu_dtype()]
    return new_tokens / (tokens_per_s or FASTEST) * saves > starting_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like another: followed, it would take the key to a host that nobody named."""

    def redirect_request(self, *args: Any) -> None:
        return None


# http and https alone: with file:, ftp: or data: an address would read what is no server.
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


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    return _opener.open(request, timeout=timeout_s)


def prefix_cache(endpoints: Iterable[Endpoint]) -> list[tuple[int, int] | None]:
    """Of each server: prompt tokens that it found in its prefix cache, and all that it looked for there, since it started; None
    where it doesn't tell (vLLM does)."""
    return [_prefix_cache_of(e) for e in endpoints]


def _prefix_cache_of(endpoint: Endpoint) -> tuple[int, int] | None:
    request = urllib.request.Request(
        f"{endpoint.url.removesuffix('/v1')}/metrics", headers={"Authorization": f"Bearer {endpoint.api_key}"}
    )
    try:
        with _open(request, timeout_s=20) as answer:
            text = answer.read().decode("utf-8", "replace")
    except (OSError, HTTPException, ValueError):
        return None
    found = []
    for what in ("hits", "queries"):
        pattern = rf"^vllm:prefix_cache_{what}(?:_total)?(?:{{.*}})? (\S+)$"
        found.append([float(value) for value in re.findall(pattern, text, re.MULTILINE)])
    return (int(sum(found[0])), int(sum(found[1]))) if all(found) else None


def cache_use(before: Iterable[tuple[int, int] | None], after: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    """Tokens found and looked for between two looks at `prefix_cache`. A server that was silent at one of them is left out; one that
    was started anew in between counts from its start."""
    found = looked_up = 0
    for then, now in zip(before, after, strict=True):
        if then and now:
            then = (0, 0) if now[0] < then[0] or now[1] < then[1] else then
            found, looked_up = found + now[0] - then[0], looked_up + now[1] - then[1]
    return found, looked_up


def external(section: ServingConfig) -> list[Endpoint]:
    """The endpoints a recipe or an override names, each asked whether it is there and has the model.

    ServingError: no address, refused, wrong key, the model isn't there, or several models and none named.
    """
    key = os.environ.get(section.api_key_env, "none")
    return [
        Endpoint(url, _model_at(url, key, section), key, check=partial(_served_at, url, key, section))
        for url in (url.rstrip("/") for url in section.endpoints)
    ]


def unusable(judge: Mapping[str, Any]) -> list[str]:
    """What is wrong with the server that the options of a judge name, in a line; nothing if it is there and has the model."""
    key = judge.get("api_key_env") or ServingConfig().api_key_env
    try:
        _one(judge["endpoint"], judge["model"], key)
    except ServingError as e:
        return [e.message]
    except ValidationError as e:
        return messages.problems(e, ServingConfig)
    return []


def external_critic(critic: CriticConfig | None) -> Endpoint | None:
    """Where the critic of a recipe is asked, looked at as `external` does; None without one."""
    if critic is None:
        return None
    if not critic.endpoint:
        raise ConfigError(
            f"chain.critic: no endpoint is known at which {critic.model} can be asked",
            "Give one: chain.critic.endpoint=http://host:8000/v1",
        )
    return _one(critic.endpoint, critic.model, critic.api_key_env)


def _one(url: str, model: str, api_key_env: str) -> Endpoint:
    """A single server that is named apart from the base's, looked at as `external` does."""
    return external(ServingConfig(endpoints=(url,), served_model=model, api_key_env=api_key_env))[0]


def _model_at(url: str, key: str, section: ServingConfig) -> str:
    names, named = _served_at(url, key, section), section.served_model
    if named and (named in names or _answers_as(url, key, named)):
        return named
    if named or len(names) != 1:
        raise ServingError(
            f"endpoint {url} serves {', '.join(names) or 'nothing'}" + (f", not {named}" if named else ""),
            "Name one of these with serving.served_model.",
        )
    return names[0]


def _answers_as(url: str, key: str, model: str) -> bool:
    """Is there a model that the server doesn't list? (`transformers serve` lists what is in the Hub's cache.) Asks for one token."""
    asked = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "seed": 0}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(asked).encode(), headers)
    try:
        with _open(request, timeout_s=120) as answer:  # it may load the model first
            return bool(json.load(answer)["choices"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return False


def _served_at(url: str, key: str, section: ServingConfig) -> list[str]:
    """Names of the models there. ServingError if it can't be asked."""
    try:
        request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
        with _open(request, timeout_s=20) as answer:
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
