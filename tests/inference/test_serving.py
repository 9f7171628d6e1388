"""vLLM's command line and environment, the keeper that ends it, and the client of any server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dsc_hub.config.recipe import Server
from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.distill import launcher
from dsc_hub.errors import MetricError, ServingError
from dsc_hub.inference import external, vllm
from dsc_hub.inference import servers as inference_servers
from dsc_hub.inference.client import Generator
from dsc_hub.inference.requests import error_message, generation_parameters
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.inference.servers import Endpoint
from dsc_hub.metrics import loading, registry
from dsc_hub.system import machine
from tests.scripted_server import make_server

LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "ACCELERATE_MIXED_PRECISION",
    "OMP_NUM_THREADS",
    "ROLE_RANK",
)


@pytest.fixture
def scripted():
    servers = []

    def start(**keys):
        server = make_server(**keys)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()


def test_no_variable_of_a_launcher_reaches_vllm(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHER:
        monkeypatch.setenv(name, "7")
    env = vllm.vllm_environment(ServingConfig(), on_cpu=False, api_key="k")
    assert not set(env) & set(LAUNCHER) and env["PATH"] == os.environ["PATH"]
    assert vllm.vllm_environment(ServingConfig(), on_cpu=True, api_key="k")["OMP_NUM_THREADS"] == str(machine.cores())


def test_what_is_not_compiled_compiles_nothing(monkeypatch: pytest.MonkeyPatch):
    """vLLM compiles a few functions by themselves, --enforce-eager or not, at their first use."""
    name = "TORCH_COMPILE_DISABLE"
    monkeypatch.delenv(name, raising=False)
    assert vllm.vllm_environment(ServingConfig(), True, "k")[name] == "1"
    for on_cpu, compiled in [(True, True), (False, False)]:
        assert name not in vllm.vllm_environment(ServingConfig(), on_cpu, "k", compiled=compiled)
    monkeypatch.setenv(name, "0")
    assert vllm.vllm_environment(ServingConfig(), True, "k")[name] == "0"


def test_the_key_is_on_no_command_line():
    command = vllm.vllm_command(Path("/m"), ServingConfig(), 1, {}, True)
    assert (
        "--api-key" not in command
        and vllm.vllm_environment(ServingConfig(), True, "secret")["VLLM_API_KEY"] == "secret"
    )
    assert "secret" not in repr(Endpoint("u", "m", "secret"))


PARSE = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
print(args.max_model_len, args.enable_lora, args.max_lora_rank, args.enforce_eager, args.enable_chunked_prefill, [m.name for m in args.lora_modules or []], args.worker_extension_cls)
"""


def test_vllms_own_parser_takes_our_command_lines(tmp_path: Path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 24}}')
    for on_cpu, adapters, expected in [
        (True, {"distilled": tmp_path}, f"2048 True 32 True False ['distilled'] {vllm.LORA_ON_CPU}"),
        (False, {}, "2048 None 16 False"),
    ]:
        command = vllm.vllm_command(tmp_path, ServingConfig(), 8000, adapters, on_cpu)
        child = subprocess.run([sys.executable, "-c", PARSE, *command[3:]], capture_output=True, text=True, env=env)
        assert child.returncode == 0, child.stderr[-2000:]
        assert child.stdout.strip().splitlines()[-1].startswith(expected)


def test_no_secret_reaches_a_child(monkeypatch: pytest.MonkeyPatch):
    secrets = (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "OPENAI_API_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "db_password",
        "PGPASSWORD",
        "GITHUB_PAT",
        "OPENAI_APIKEY",
        "MYSQL_PWD",
    )
    kept = {
        "TOKENIZERS_PARALLELISM": "false",
        "KEYBOARD": "us",
        "VLLM_MAX_TOKENS_PER_EXPERT": "4",
        "PWD": "/here",
        "CUDA_HOME": "/cuda",
        "HF_HOME": "/hf",
    }
    for name in secrets:
        monkeypatch.setenv(name, "hush-hush")
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    for env in (
        vllm.vllm_environment(ServingConfig(), on_cpu=True, api_key="k"),
        launcher._child_environment(1, on_cpu=True),
        machine.for_child(os.environ),
    ):
        assert "hush-hush" not in env.values() and kept.items() <= env.items()


def test_a_key_that_a_server_repeats_is_in_no_message():
    data = b'{"error": {"message": "bad key sk-mine-123 received"}}'
    assert error_message(data, "sk-mine-123") == "bad key [the key] received"
    assert error_message(b"[%s]" % data, "sk-mine-123") == "bad key [the key] received"
    assert error_message(b"there is none", "none") == "there is none"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_never_takes_a_key_to_another_host(monkeypatch: pytest.MonkeyPatch, code: int):
    seen: list[str] = []

    class Thief(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}')

        do_POST = do_GET

        def log_message(self, *args: object) -> None: ...

    def redirecting(to: str) -> type[BaseHTTPRequestHandler]:
        class Redirecting(Thief):
            def do_GET(self) -> None:
                self.send_response(code)
                self.send_header("Location", to)
                self.end_headers()

            do_POST = do_GET

        return Redirecting

    monkeypatch.setenv("OPENAI_API_KEY", "hush-hush")
    with at(Thief) as thief, at(redirecting(f"{thief}/v1/models")) as url:
        with pytest.raises(ServingError, match=f"answered {code}"):
            external.external(ServingConfig(endpoints=(f"{url}/v1",)))
        with pytest.raises(ServingError, match=f"answered {code}"):
            connect(f"{url}/v1", "m")
        external.check_up(f"{url}/v1", "hush-hush")
        assert inference_servers.prefix_cache([Endpoint(f"{url}/v1", "m", "hush-hush")]) == [None]
        section = ScorerConfig(metric="judge", scorer="guard", options={"endpoint": f"{url}/v1", "model": "m"})
        with pytest.raises(MetricError, match=f"answered {code}"):
            loading.load_scorer(section, registry.identify_scorer(section))
    assert seen == []


@contextmanager
def at(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def connect(url: str, model: str) -> Endpoint:
    """The endpoint after the trial of a run with default settings."""
    server, settings = Server(external.BASE, url, "OPENAI_API_KEY", model), GenerationConfig()
    messages = [{"role": "user", "content": "Say yes."}]
    return external.connect(
        external.endpoint_of(server), server, generation_parameters(settings), messages, settings.extra, 5
    )


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter: it ended between opening and reading
        return False


# A server in the shape of vLLM: a child in a session of its own, which doesn't care for SIGTERM.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
keeper = subprocess.Popen([sys.executable, "-m", "dsc_hub.system.supervisor", sys.executable, "-c", sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_and_its_children_are_gone_when_we_are_killed(tmp_path: Path, how: signal.Signals):
    note = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, STUBBORN, str(note)])
    deadline = time.monotonic() + 30
    while not (note.is_file() and len(note.read_text().split()) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(p) for p in note.read_text().split()]
    assert all(map(_alive, pids))
    parent.send_signal(how)
    parent.wait()
    deadline = time.monotonic() + 30
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, pids))


def ask(endpoints: list[Endpoint], n: int = 1, timeout_s: float = 20) -> list:
    async def go():
        async with Generator(endpoints, GenerationConfig(), timeout_s) as g:
            return await asyncio.gather(*(g.complete([{"role": "user", "content": f"q{i}"}], seed=i) for i in range(n)))

    return asyncio.run(go())


def test_answers_come_with_their_tokens_and_the_same_seed_gives_the_same_answer(scripted):
    end = Endpoint(scripted(), "scripted", "k")
    a, b = ask([end], 3), ask([end], 3)
    assert (
        a == b
        and len({c.text for c in a}) == 3
        and all(c.finish_reason == "stop" and c.prompt_tokens == 10 and c.new_tokens > 0 for c in a)
    )


@pytest.mark.parametrize(("logprobs", "nats"), [(True, (1 + 1 + 3) / 3), (False, None)])
def test_surprise_at_a_text_is_what_vllm_tells_of_a_prompt_or_absent(scripted, logprobs: bool, nats: float | None):
    async def go():
        async with Generator([Endpoint(scripted(logprobs=logprobs), "scripted", "k")], GenerationConfig(), 20) as g:
            return await g.surprise("abcd")

    assert asyncio.run(go()) == (None if nats is None else pytest.approx(nats))


def test_a_beginning_stays_at_its_server_until_that_has_enough_to_do(scripted):
    urls = [scripted(pause=0.05), scripted(pause=0.05)]

    def busy(concurrency: int, questions: list[str]) -> list[int]:
        async def go():
            ends = [Endpoint(u, "scripted", "k") for u in urls]
            async with Generator(ends, GenerationConfig(), 20, concurrency=concurrency) as g:
                jobs = [g.complete([{"role": "user", "content": q}], seed=i) for i, q in enumerate(questions)]
                tasks = [asyncio.create_task(context) for context in jobs]
                await asyncio.sleep(0.02)
                now = [server.busy for server in g._pool.all]
                await asyncio.gather(*tasks)
                return now

        return asyncio.run(go())

    assert sorted(busy(8, ["q"] * 8)) == [0, 8]  # the chains of a prompt share what is in the cache
    assert busy(4, ["q"] * 8) == [4, 4]
    assert sorted(busy(64, [f"q{i}" for i in range(32)])) > [6, 6]  # different beginnings spread


def test_a_refused_request_costs_itself_and_a_wrong_key_stops_the_run(scripted):
    with pytest.raises(RequestFailed, match="answered 400: .*too long"):
        ask([Endpoint(scripted(fail_after=0), "scripted", "k")])
    with pytest.raises(ServingError, match="answered 401: wrong key") as e:
        ask([Endpoint(scripted(key="right"), "scripted", "wrong")])
    assert not isinstance(e.value, RequestFailed)


def test_an_endpoint_that_is_down_or_wrong_is_named_with_what_to_do(scripted, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ServingError, match=r"endpoint http://127.0.0.1:1/v1 can't be used: .*refused"):
        external.external(ServingConfig(endpoints=("http://127.0.0.1:1/v1",)))
    with pytest.raises(ServingError, match="answered 401.*\n.*OPENAI_API_KEY"):
        external.external(ServingConfig(endpoints=(scripted(key="right"),)))
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    (end,) = external.external(ServingConfig(endpoints=(scripted(key="right") + "/",)))
    assert end.model == "scripted" and end.url.endswith("/v1")


def test_a_model_that_a_server_has_but_does_not_list_is_found_by_its_name(scripted):
    assert connect(scripted(models=()), "/models/mine").model == "/models/mine"
    with pytest.raises(ServingError, match="c .*answered 404.*does not exist.*\n.*lists a, b: .*serving.served_model"):
        connect(scripted(models=("a", "b"), others=False), "c")
    with pytest.raises(ServingError, match="serves nothing that it lists\n.*serving.served_model"):
        external.external(ServingConfig(endpoints=(scripted(models=()),)))
    with pytest.raises(ServingError, match="serves a, b\n.*serving.served_model"):
        external.external(ServingConfig(endpoints=(scripted(models=("a", "b")),)))


def test_the_error_that_ended_a_server_is_shown_before_its_last_lines():
    log = [
        "(EngineCore pid=7) INFO 11-26 10:00:00 [core.py:1] loading",
        "(EngineCore pid=7) ERROR 11-26 10:00:01 [core.py:2] torch.OutOfMemoryError: CUDA out of memory.",
        *[f"(EngineCore pid=7) ERROR 11-26 10:00:01 [core.py:2]   File {n}" for n in range(20)],
        "(APIServer pid=6)     raise RuntimeError(",
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    shown = vllm.last_words(log).splitlines()
    assert (
        "CUDA out of memory" in shown[0] and shown[1].strip() == "..." and shown[2:] == [f"    {t}" for t in log[-12:]]
    )
    assert vllm.last_words(["ready", "ValueError: no such model"]).splitlines() == [
        "    ready",
        "    ValueError: no such model",
    ]
    long_ago = ["ValueError: of a request", *["busy"] * 300]
    assert "ValueError" not in vllm.last_words(long_ago) and vllm.last_words([]) == ""
