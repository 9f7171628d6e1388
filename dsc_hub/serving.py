"""vLLM as a child process: the right flags for this machine, health, its log, and no process left behind.

vLLM is never imported here. `serve(...)` yields the endpoint of a server that answers; when the block ends, is
interrupted, or this process is killed, the server and all its children end (see keeper.py).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsc_hub.errors import ConfigError, ServingError
from dsc_hub.machine import cores, openmp_library, vllm_on_cpu, without_launcher
from dsc_hub.progress import duration, moving_line
from dsc_hub.recipe import Critic, Serving
from dsc_hub.runs import read_json

BASE = "base"  # the name under which the base model is served; adapters have names of their own
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: address up to and including /v1, name of the model there, key."""

    url: str
    model: str
    api_key: str = field(repr=False)
    check: Callable[[], None] = lambda: None  # raises ServingError if the server is known to be gone


def max_lora_rank(adapter: Path) -> int:
    """The smallest --max-lora-rank that serves an adapter folder, by its adapter_config.json."""
    config = read_json(adapter / "adapter_config.json")
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
    return next((r for r in LORA_RANKS if r >= rank), rank)


def vllm_command(folder: Path, section: Serving, port: int, adapters: Mapping[str, Path], on_cpu: bool) -> list[str]:
    """The command line of one server. A pure function, so that vLLM's own parser can be asked whether it is right."""
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--served-model-name",
        BASE,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        str(section.context),
        "--max-num-seqs",
        str(min(section.concurrency, 256)),
        "--generation-config",
        "vllm",
        "--uvicorn-log-level",
        "warning",
        "--disable-uvicorn-access-log",
    ]
    if on_cpu:
        # Chunked prefill and a per-request seed together kill the CPU engine; compiling costs a minute at start.
        command += [
            "--dtype",
            "bfloat16",
            "--enforce-eager",
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            str(max(section.context, 4096)),
        ]
    else:
        command += ["--gpu-memory-utilization", str(section.gpu_memory_utilization)]
    if adapters:
        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(max(map(max_lora_rank, adapters.values()))),
            "--lora-modules",
            *(f"{name}={path}" for name, path in adapters.items()),
        ]
    return command


def vllm_environment(section: Serving, on_cpu: bool, api_key: str) -> dict[str, str]:
    """The child's environment: no launcher's variables, no look at any Hub, all cores on a CPU."""
    env = without_launcher(os.environ)
    # The key goes by the environment: a command line can be read by every user of the machine.
    env |= {
        "VLLM_API_KEY": api_key,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": env.get("VLLM_LOGGING_LEVEL", "INFO"),
    }
    env.pop("HF_TOKEN", None)  # the server loads a local folder: it has no business with the Hub
    if on_cpu:
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(section.kv_cache_gib))),
            "OMP_NUM_THREADS": str(cores()),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }
        if library := openmp_library():
            env["LD_PRELOAD"] = ":".join(filter(None, [str(library), env.get("LD_PRELOAD")]))
    return env


@contextmanager
def serve(folder: Path, section: Serving, log: Path, adapters: Mapping[str, Path] | None = None) -> Iterator[Endpoint]:
    """Start one vLLM on a model folder and yield its endpoint (model name `BASE`, adapters by their names).

    Raises ServingError with the last lines of `log` if it dies or isn't ready within `start_timeout_s`.
    """
    on_cpu = vllm_on_cpu()
    port, key = _free_port(), secrets.token_urlsafe(24)
    command = vllm_command(folder, section, port, adapters or {}, on_cpu)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        start = out.tell()  # what stands before is of an earlier server
        keeper = subprocess.Popen(
            [sys.executable, "-m", "dsc_hub.keeper", *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=vllm_environment(section, on_cpu, key),
        )

    def check() -> None:
        if keeper.poll() is not None:
            raise ServingError(
                f"vLLM ended by itself (exit code {keeper.returncode}). Its last lines:\n{_tail(log, start)}",
                f"The whole log: {log}",
            )

    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, check, section.start_timeout_s, log, start)
        yield Endpoint(f"{url}/v1", BASE, key, check)
    finally:
        _end(keeper)


def external(section: Serving) -> list[Endpoint]:
    """The endpoints a recipe or an override names, each asked whether it is there and has the model.

    ServingError: no address, refused, wrong key, the model isn't there, or several models and none named.
    """
    key = os.environ.get(section.api_key_env, "none")
    return [Endpoint(u, _model_at(u, key, section), key) for u in (url.rstrip("/") for url in section.endpoints)]


def unusable(judge: Mapping[str, Any]) -> list[str]:
    """What is wrong with the server that the options of a judge name, in a line; nothing if it is there and has the model."""
    key = judge.get("api_key_env") or Serving().api_key_env
    try:
        _one(judge["endpoint"], judge["model"], key)
    except ServingError as e:
        return [e.message]
    except ValidationError:
        return [f"api_key_env: the name of a variable has A-Z, 0-9 and '_', got {key!r}"]
    return []


def external_critic(critic: Critic | None) -> Endpoint | None:
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
    return external(Serving(endpoints=(url,), served_model=model, api_key_env=api_key_env))[0]


def _model_at(url: str, key: str, section: Serving) -> str:
    try:
        request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            names = [m["id"] for m in json.load(answer)["data"]]
    except urllib.error.HTTPError as e:
        hint = (
            f"Put its key into {section.api_key_env}."
            if e.code in (401, 403)
            else "An endpoint's address ends with /v1."
        )
        raise ServingError(f"endpoint {url} answered {e.code} {e.reason} to /models", hint) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ServingError(
            f"endpoint {url} can't be used: {getattr(e, 'reason', e)}",
            "Is the server up, and is the address like http://host:8000/v1?",
        ) from None
    if section.served_model in names:
        return str(section.served_model)
    if section.served_model or len(names) != 1:
        raise ServingError(
            f"endpoint {url} serves {', '.join(names) or 'nothing'}"
            + (f", not {section.served_model}" if section.served_model else ""),
            "Name one of these with serving.served_model.",
        )
    return str(names[0])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_until_ready(url: str, check: Callable[[], None], timeout_s: float, log: Path, start: int) -> None:
    started = time.monotonic()
    with moving_line() as line:
        while True:
            check()
            waited = time.monotonic() - started
            if waited > timeout_s:
                raise ServingError(
                    f"vLLM was not ready after {duration(timeout_s)}. Its last lines:\n{_tail(log, start)}",
                    f"Allow it longer with serving.start_timeout_s; the whole log: {log}",
                )
            line.show(f"vLLM is starting  {duration(waited)}  -> {log}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.25)


def _end(keeper: subprocess.Popen[bytes]) -> None:
    """Close the pipe: the keeper ends the server and its children. Kill what is left if even that hangs."""
    if keeper.stdin:
        keeper.stdin.close()
    try:
        keeper.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()


def _tail(log: Path, start: int, lines: int = 12) -> str:
    """The last lines of a log, the cause first if vLLM names one: its traceback ends with a summary that says nothing."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace").splitlines()
    cause = [t for t in text[-200:] if "Error" in t and "RuntimeError: Engine core initialization failed" not in t]
    shown = text[-lines:]
    if cause and cause[-1] not in shown:
        shown = [cause[-1], "...", *shown]
    return "\n".join(f"    {t[:300]}" for t in shown)
