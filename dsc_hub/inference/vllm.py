"""One vLLM server as a child process: command line, health check, log, restart, and no process left behind.

vLLM is never imported here. When a `VllmServer` is ended, or this process is killed, the server and all its children
end (see system/supervisor.py).
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from dsc_hub.config.serving import ServingConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference.adapters import max_lora_rank
from dsc_hub.inference.concurrency import MOST
from dsc_hub.inference.vllm_forks import SERVER
from dsc_hub.inference.vllm_process import START, importing_early, start_process
from dsc_hub.system.endings import shown_ending
from dsc_hub.system.machine import cores, cpu_dtype, for_child, has_quota, openmp_preload, vllm_on_cpu
from dsc_hub.system.progress import duration

BASE = "base"  # model name of the base model; adapters have names of their own
ENDS_THOUGHTS = "--reasoning-config"  # with it, a request can limit its thought
BLOCK_ON_CPU = 32  # tokens; with the default of 128 most of the common prefix of turns fills no whole block
NORMS_ON_CPU = '{"rms_norm": ["vllm_c", "native"], "fused_add_rms_norm": ["vllm_c", "native"]}'  # see vllm_parent.py
LORA_ON_CPU = "dsc_hub.inference.vllm_lora.Worker"  # faster than vLLM's own, and never applied to the base's requests
GOING_S = 15.0  # maximum seconds from the death of one vLLM process to the end of all of them
ON_CPU_AT_ONCE = 256  # maximum number of sequences in a batch
# The last line of a traceback, plain or logged: "(EngineCore pid=7) ERROR 11-26 10:00:00 [core.py:12] ValueError: ..."
_ERROR = re.compile(r"(\([^)]*\) )?(ERROR [^\]]*\] )?[\w.]+(Error|Exception)(: |\s*$)")
_SAYS_NOTHING = ("Engine core initialization failed", "EngineCore encountered an issue")


def default_max_num_seqs(section: ServingConfig, on_cpu: bool) -> int:
    """Return the maximum number of sequences in a batch: the number of concurrent requests, if that is known."""
    limit = ON_CPU_AT_ONCE if on_cpu else MOST
    if section.concurrency == "auto":
        return limit
    assert isinstance(section.concurrency, int)  # a list is valid only for external servers
    return min(section.concurrency, limit)


def vllm_command(
    folder: Path,
    section: ServingConfig,
    port: int,
    adapters: Mapping[str, Path],
    on_cpu: bool,
    compiled: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """Return the command line of one server. Pure, so that it can be checked with vLLM's own parser.

    `compiled`: compile on a CPU, which takes a minute at the start (on a GPU vLLM always compiles). `more`: arguments
    of the model (`thinking_models.vllm_arguments`).
    """
    command = [
        sys.executable,
        "-m",
        START if on_cpu else SERVER,
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
        "--generation-config",
        "vllm",
        "--uvicorn-log-level",
        "warning",
        "--disable-uvicorn-access-log",
    ]
    if on_cpu:
        # The combination of chunked prefill and a per-request seed crashes the CPU engine.
        # Without a process of its own for the worker (`uni`, VLLM_ENABLE_V1_MULTIPROCESSING=0) the server is ready
        # after 40 s instead of 55, and writes 0.65 to 0.75 as many tokens/s.
        command += [
            "--dtype",
            cpu_dtype(),
            "--no-enable-chunked-prefill",
            "--block-size",
            str(BLOCK_ON_CPU),
            "--max-num-batched-tokens",
            str(max(section.context, 4096)),
            *([] if compiled else ["--enforce-eager", "--ir-op-priority", NORMS_ON_CPU]),
        ]
    else:
        command += ["--gpu-memory-utilization", str(section.gpu_memory_utilization)]
        command += ["--tensor-parallel-size", str(section.tensor_parallel)]
    command += ["--max-num-seqs", str(default_max_num_seqs(section, on_cpu))]
    if adapters:
        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(max(map(max_lora_rank, adapters.values()))),
            "--lora-modules",
            *(f"{name}={path}" for name, path in adapters.items()),
            *(("--worker-extension-cls", LORA_ON_CPU) if on_cpu else ()),
        ]
    return [*command, *more]


def vllm_environment(
    section: ServingConfig, on_cpu: bool, api_key: str, own: Sequence[str] = (), compiled: bool = False
) -> dict[str, str]:
    """Return the child's environment: without a launcher's variables, and without access to any Hub.

    `own`: numbers of the cores or GPUs reserved for this server; empty: on a CPU all cores, else the GPUs that the
    environment selects. Under a quota of processors only the number of the cores counts. `compiled`: see
    `vllm_command`.
    """
    env = for_child(os.environ)
    # The key is passed in the environment: a command line is readable by every user of the machine.
    env |= {
        "VLLM_API_KEY": api_key,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": env.get("VLLM_LOGGING_LEVEL", "INFO"),
    }
    if on_cpu:
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(section.kv_cache_gib))),
            "OMP_NUM_THREADS": str(len(own) or cores()),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }
        if has_quota():  # of processors, not of certain cores: other containers would be bound to the same ones
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        elif own:
            env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(own)
        env |= openmp_preload(env)
        if (
            not compiled
        ):  # --enforce-eager leaves out single functions: the first log-probabilities of a prompt took 9 s
            env.setdefault("TORCH_COMPILE_DISABLE", "1")
    elif own:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return env


@contextmanager
def imported_early(section: ServingConfig, log: Path) -> Iterator[None]:
    """Import vLLM while the block does what must be done before a server starts (vllm_process.importing_early).

    Nothing is done on a GPU, or for replicas, which have cores of their own.
    """
    if not vllm_on_cpu() or section.replicas not in ("auto", 1):
        yield
        return
    with importing_early(vllm_environment(section, True, ""), log):
        yield


class VllmServer:
    """One server of a model folder; adapters keep their names. The constructor starts it."""

    def __init__(
        self,
        folder: Path,
        section: ServingConfig,
        log: Path,
        adapters: Mapping[str, Path],
        *,
        own: Sequence[str] = (),
        compiled: bool = False,
        more: Sequence[str] = (),
    ) -> None:
        on_cpu = vllm_on_cpu()
        self._port, self.api_key = _free_port(), secrets.token_urlsafe(24)
        self.url, self.log, self._timeout_s = f"http://127.0.0.1:{self._port}", log, section.start_timeout_s
        self._command = vllm_command(folder, section, self._port, adapters, on_cpu, compiled, more)
        self._environment = vllm_environment(section, on_cpu, self.api_key, own, compiled)
        self.start()

    def start(self) -> None:
        """Start the server; it is ready when `is_ready` returns True."""
        self._process = start_process(self._command, self._environment, self.log)
        self.started = time.monotonic()

    def check(self) -> None:
        """Raise ServingError with the last lines of the log if the server has ended."""
        if (code := self._process.exit_code) is not None:
            raise ServingError(
                f"vLLM ended by itself ({shown_ending(code)}). Its last lines:\n{self._tail()}",
                f"The whole log: {self.log}",
            )

    def check_after_loss(self) -> None:
        """Raise ServingError with the last lines of the log if the server has ended or is ending.

        Called when the connection of a request was lost.
        """
        deadline = time.monotonic() + GOING_S
        while True:
            self.check()
            try:
                with socket.create_connection(("127.0.0.1", self._port), timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise ServingError(
                        f"vLLM takes no connections any more. Its last lines:\n{self._tail()}",
                        f"The whole log: {self.log}",
                    ) from None
                time.sleep(0.2)

    def restart(self) -> None:
        """End the remaining processes of the server and start it again."""
        self.end()
        self.start()

    def is_ready(self) -> bool:
        """Return whether the server answers its health check.

        ServingError if it has ended, or if it is not ready `serving.start_timeout_s` seconds after its start.
        """
        self.check()
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (OSError, HTTPException):
            pass
        if time.monotonic() - self.started > self._timeout_s:
            raise ServingError(
                f"vLLM was not ready after {duration(self._timeout_s)}. Its last lines:\n{self._tail()}",
                f"Allow it longer with serving.start_timeout_s; the whole log: {self.log}",
            )
        return False

    def end(self) -> None:
        """End the server and all its processes."""
        self._process.end()

    def _tail(self) -> str:
        if not self.log.exists():  # a log of several processes, which another one removed
            return ""
        with self.log.open("rb") as file:
            file.seek(self._process.log_from)
            return last_words(file.read().decode("utf-8", "replace").splitlines())


def last_words(log: Sequence[str], lines: int = 12) -> str:
    """Return the last lines of a server's log, preceded by the error that ended it.

    vLLM's own last lines only report that there was an error.
    """
    shown = list(log[-lines:])
    causes = [t for t in log[-200:] if _ERROR.match(t) and not any(words in t for words in _SAYS_NOTHING)]
    if causes and causes[-1] not in shown:
        shown = [causes[-1], "...", *shown]
    return "\n".join(f"    {t.rstrip()[:300]}" for t in shown)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
