"""Replicas, their places and environments, and when compiling pays: what can't run here is checked as far as it can be."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dsc_hub.config import recipe_files
from dsc_hub.config.serving import ServingConfig
from dsc_hub.errors import ConfigError
from dsc_hub.inference import servers, vllm
from dsc_hub.inference.client import Generator
from dsc_hub.inference.concurrency import FIRST
from dsc_hub.inference.servers import Endpoint
from dsc_hub.system import machine
from tests.conftest import ROOT


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def have(n: int, visible: str | None = None) -> None:
        monkeypatch.setattr(machine, "vllm_on_cpu", lambda: False)
        monkeypatch.setattr(machine, "gpus", lambda: ("H100",) * n)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


def test_each_replica_has_gpus_of_its_own(gpus):
    gpus(8)
    assert servers.replica_places(ServingConfig()) == [(str(i),) for i in range(8)]
    assert servers.replica_places(ServingConfig(tensor_parallel=4)) == [("0", "1", "2", "3"), ("4", "5", "6", "7")]
    assert servers.replica_places(ServingConfig(replicas=2)) == [("0",), ("1",)]
    gpus(8, "5,GPU-1f,7")
    assert servers.replica_places(ServingConfig()) == [("5",), ("GPU-1f",), ("7",)]
    with pytest.raises(ConfigError, match="4 replicas of 1 need 4 GPUs, here are 3"):
        servers.replica_places(ServingConfig(replicas=4))
    gpus(1)
    with pytest.raises(ConfigError, match="1 replicas of 2 need 2 GPUs"):
        servers.replica_places(ServingConfig(tensor_parallel=2))


def test_on_a_cpu_replicas_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "vllm_on_cpu", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 6, 7, 8})
    assert servers.replica_places(ServingConfig()) == [()]
    assert servers.replica_places(ServingConfig(replicas=2)) == [("2", "3"), ("6", "7")]
    for wrong in ({"replicas": 6}, {"tensor_parallel": 2}):
        with pytest.raises(ConfigError, match="can't run on 5 cores"):
            servers.replica_places(ServingConfig(**wrong))


def test_what_is_a_replicas_own_is_in_its_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert vllm.vllm_environment(ServingConfig(), False, "k", ("2", "3"))["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert vllm.vllm_environment(ServingConfig(), False, "k")["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    on_cpu = vllm.vllm_environment(ServingConfig(), True, "k", ("6", "7"))
    assert (on_cpu["VLLM_CPU_OMP_THREADS_BIND"], on_cpu["OMP_NUM_THREADS"]) == ("6,7", "2")


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.loads(sys.stdin.read()):
    a = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    print(a.tensor_parallel_size, a.pipeline_parallel_size, a.data_parallel_size, a.max_num_seqs, a.block_size, a.enforce_eager)
"""


def test_vllms_own_parser_takes_our_command_lines_and_those_of_the_documentation(tmp_path: Path):
    import json

    ours = [
        vllm.vllm_command(tmp_path, ServingConfig(tensor_parallel=4, concurrency=300), 8000, {}, False)[3:],
        vllm.vllm_command(tmp_path, ServingConfig(), 8000, {}, True)[3:],
        vllm.vllm_command(tmp_path, ServingConfig(concurrency=5), 8000, {}, True, compiled=True)[3:],
    ]
    shown = re.findall(r"^vllm serve (.*)$", (ROOT / "docs" / "howto" / "gpus.md").read_text(), re.MULTILINE)
    theirs = [shlex.split(line.replace("FIRST", "10.0.0.1")) for line in shown]
    assert len(theirs) == 3
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(ours + theirs), capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = [line.split() for line in done.stdout.strip().splitlines()[-6:]]
    assert [p[0] for p in parsed] == ["4", "1", "1", "8", "1", "1"] and [p[2] for p in parsed[4:]] == ["16", "16"]
    assert parsed[3][1] == "2" and [p[3] for p in parsed[:3]] == ["300", "256", "5"]
    assert parsed[1][4:] == ["32", "True"] and parsed[2][5] == "False"


AVX2 = frozenset({"avx", "avx2", "fma"})
AVX512_BF16 = AVX2 | {"avx512f", "avx512bw", "avx512_bf16"}
AMX = AVX512_BF16 | {"amx_bf16", "amx_tile"}


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (AMX, "bfloat16"),
        (AVX512_BF16, "bfloat16"),
        (frozenset({"asimd", "bf16"}), "bfloat16"),
        (AVX2, "float32"),
        (AVX2 | {"avx512f", "avx512bw", "avx512_vnni"}, "float32"),
        (frozenset({"asimd"}), "float32"),
        (frozenset(), "float32"),
    ],
)
def test_a_cpu_serves_and_trains_in_bfloat16_only_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], dtype: str
):
    from dsc_hub.distill import model

    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    command = vllm.vllm_command(Path("/m"), ServingConfig(), 1, {}, True)
    assert command[command.index("--dtype") + 1] == dtype
    assert str(model.compute_dtype(on_cpu=True)) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("tokens", "speed", "flags", "pays"),
    [
        (100_000, 660.0, AMX, False),
        (400_000, 660.0, AMX, True),
        (400_000, 6600.0, AMX, False),
        (400_000, 500.0, AVX512_BF16, False),
        (3_000_000, 500.0, AVX512_BF16, True),
        (60_000, 120.0, AVX2, False),
        (90_000, 120.0, AVX2, True),
        (200_000, None, AMX, False),
        (400_000, None, AMX, True),
        (0, None, AMX, False),
    ],
)
def test_compiling_is_weighed_against_the_length_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tokens: int, speed: float | None, flags: frozenset[str], pays: bool
):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    assert servers.worth_compiling(tokens, speed) is pays


METRICS = """# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="base"} 79802.0
vllm:prefix_cache_queries_total{engine="1",model_name="base"} 198.0
vllm:prefix_cache_queries_created{engine="0",model_name="base"} 1.79e+09
vllm:prefix_cache_hits_total{engine="0",model_name="base"} 4.3776e+04
vllm:external_prefix_cache_hits_total{engine="0",model_name="base"} 5.0
"""


def test_the_prefix_caches_rate_is_read_where_a_server_tells_it():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = self.path == "/metrics" and self.headers["Authorization"] == "Bearer k"
            self.send_response(200 if told else 404)
            self.end_headers()
            self.wfile.write(METRICS.encode() if told else b"")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    assert servers.prefix_cache([Endpoint(url, "m", "k")]) == [(43_776, 80_000)]
    assert (
        servers.prefix_cache([Endpoint(url, "m", "wrong"), Endpoint("http://127.0.0.1:1/v1", "m", "k")]) == [None] * 2
    )
    server.shutdown()


def test_what_the_prefix_cache_gave_is_that_of_servers_that_told_it_twice():
    assert servers.cache_use([(10, 100), (5, 50)], [(60, 200), (5, 50)]) == (50, 100)
    assert servers.cache_use([(0, 100), None, (1, 2)], [None, (7, 7), (500, 600)]) == (499, 598)
    assert servers.cache_use([(900, 1000)], [(30, 40)]) == (30, 40)  # started anew in between
    assert servers.cache_use([(900, 1000)], [(300, 5000)]) == (300, 5000)


@pytest.mark.parametrize("value", ["0", "5000", "many", "1.5", "[0]"])
@pytest.mark.parametrize("key", ["concurrency", "replicas"])
def test_a_wrong_number_of_requests_or_replicas_is_told_once(recipe_file: Path, key: str, value: str):
    with pytest.raises(ConfigError) as e:
        recipe_files.load_recipe_file(recipe_file, [f"serving.{key}={value}"])
    assert len(e.value.problems) == 1 and f"serving.{key}: should be a whole number from 1 to" in e.value.problems[0]


def test_each_endpoint_may_have_a_number_of_its_own(recipe_file: Path):
    def told(concurrency: str) -> str:
        override = [f"serving.concurrency={concurrency}", "serving.endpoints=[http://a/v1, http://b/v1]"]
        with pytest.raises(ConfigError) as e:
            recipe_files.load_recipe_file(recipe_file, override)
        return "\n".join(e.value.problems)

    found = recipe_files.load_recipe_file(
        recipe_file, ["serving.concurrency=[64, auto]", "serving.endpoints=[http://a/v1, http://b/v1]"]
    )
    assert found.serving.concurrency == (64, "auto")
    ends = [Endpoint(f"http://{name}/v1", "m", "k") for name in "ab"]

    async def go() -> tuple[int, list[int]]:
        async with Generator(ends, found.generation, 20, concurrency=found.serving.concurrency) as g:
            return g.level(), [server.limit.now for server in g._pool.all]

    assert asyncio.run(go()) == (64 + FIRST, [64, FIRST])
    assert "3 numbers for 2 endpoints; give one for each" in told("[1, 2, 3]")
    with pytest.raises(ConfigError, match="0 numbers for 0 endpoints"):
        recipe_files.load_recipe_file(recipe_file, ["serving.concurrency=[]"])
    assert "should be a whole number from 1 to 4096, or auto, got 0" in told("[1, 0]")


def test_further_parameters_are_sent_as_they_are_and_ours_are_not_to_be_set(recipe_file: Path, dsc):
    from tests.scripted_server import make_server

    bodies: list[dict] = []
    server = make_server(bodies=bodies)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    extra = "generation.extra={top_k: 20, chat_template_kwargs: {enable_thinking: false}}"
    address = f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]"
    dsc("sample", str(recipe_file), extra, address, code=0)
    assert bodies and all(b["top_k"] == 20 and b["chat_template_kwargs"] == {"enable_thinking": False} for b in bodies)
    with pytest.raises(ConfigError) as e:
        recipe_files.load_recipe_file(recipe_file, ["generation.extra={seed: 1, top_k: 20}"])
    assert "extra.seed is set by dsc itself" in str(e.value)
    for section in ("generation.extra", "chain.critic.extra"):
        override = f"{section}={{chat_template_kwargs: {{enable_thinking: false, continue_final_message: true}}}}"
        with pytest.raises(ConfigError, match="extra.chat_template_kwargs.continue_final_message is no setting"):
            recipe_files.load_recipe_file(recipe_file, [override, "chain.critic.model=critic"])
    for value in ("[1, 2]", "hello", "{1: 2}"):
        with pytest.raises(ConfigError, match="extra.chat_template_kwargs: expected names with a value each, got"):
            recipe_files.load_recipe_file(recipe_file, [f"generation.extra.chat_template_kwargs={value}"])
    server.shutdown()


def test_a_plan_tells_that_there_are_too_few_processors(recipe_file: Path, dsc):
    told = dsc("plan", str(recipe_file), "serving.replicas=1000", "distill.processes=1000", code=2).stderr
    assert "1000 replicas of 1 can't run on" in told and "distill.processes: 1000" in told
