"""Talking to base and distilled at once, against a scripted server: what each is sent, what is shown, what is forgotten."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dsc_hub.cli import chat, terminal
from dsc_hub.errors import RunError
from dsc_hub.inference import base_model, servers
from dsc_hub.inference.client import Completion
from dsc_hub.runs.run import Run
from tests import fixture_run, scripted_server
from tests.conftest import ROOT, interrupt_once


@contextlib.contextmanager
def served(**settings) -> Iterator[str]:
    server = scripted_server.make_server(**{"models": ("base", "distilled")} | settings)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def run_of(folder: Path, endpoint: str = "", *, system: str | None = None, context: int = 2048, adapter=True) -> Run:
    facts = fixture_run.facts()
    facts["recipe"]["serving"] |= {"endpoints": [endpoint] if endpoint else [], "served_model": "base"}
    facts["recipe"]["serving"]["context"] = context
    facts["recipe"]["chain"]["system"] = system
    run = fixture_run.write(folder, run_facts=facts)
    if adapter:
        run["adapter/adapter_model.safetensors"].write_bytes(b"weights")
        run.finish("distill", "x", 1.0, {})
    return run


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=text, width=140, highlight=False))
    return text


def typed(monkeypatch, *lines: str) -> None:
    left = list(lines)
    monkeypatch.setattr(terminal, "ask_key", lambda prompt: left.pop(0) if left else None)


def said(text: io.StringIO) -> str:
    return " ".join(text.getvalue().split())


# -- what both have said


def by_words(text: str) -> int:
    return len(text.split())


def talk_of(context: int, room: int = 10, system: str | None = None) -> chat.Talk:
    return chat.Talk(system, context, room, by_words)


def done(text: str, prompt_tokens: int, new_tokens: int) -> Completion:
    return Completion(text, "stop", prompt_tokens, new_tokens)


def test_each_arm_has_its_own_history_under_the_same_system_text():
    talk = talk_of(1000, system="Be kind.")
    talk.take("q1", {"base": done("b1", 9, 1), "distilled": done("d1", 9, 1)})
    talk.take("q2", {"base": done("b2", 9, 1), "distilled": done("d2", 9, 1)})
    assert [(m["role"], m["content"]) for m in talk.messages("distilled", "q3")] == [
        ("system", "Be kind."),
        ("user", "q1"),
        ("assistant", "d1"),
        ("user", "q2"),
        ("assistant", "d2"),
        ("user", "q3"),
    ]
    assert [m["content"] for m in talk.messages("base", "q3")] == ["Be kind.", "q1", "b1", "q2", "b2", "q3"]
    talk.forget()
    assert [m["content"] for m in talk.messages("base", "q")] == ["Be kind.", "q"] and talk.asked == 0
    assert talk_of(1000).messages("base", "q") == [{"role": "user", "content": "q"}]


def test_the_oldest_exchanges_are_forgotten_just_when_the_context_is_full():
    # Template 30 tokens (32 of the prompt without a question of 2 words). First exchange: 2 + 20 of the base, 2 + 5 of the
    # distilled; second: 82 - 52 = 30 of the base, 60 - 37 = 23 of the distilled.
    talk = talk_of(107, room=10)
    talk.take("one two", {"base": done("b", 32, 20), "distilled": done("d", 32, 5)})
    talk.take("three four", {"base": done("b", 62, 20), "distilled": done("d", 40, 20)})
    assert [e.tokens for e in talk.said["base"]] == [22, 30] and [e.tokens for e in talk.said["distilled"]] == [7, 23]
    # 30 + 22 + 30, 12 for the question's turn, 10 for the answer: 104, which leaves 3 for the question.
    assert talk.make_room("a b c") == 0
    assert talk.make_room("a b c d") == 1
    assert [len(e) for e in talk.said.values()] == [1, 1]  # both forget, or they would answer to different questions
    assert talk.make_room("word " * 500) == 1 and not any(talk.said.values())
    assert talk.make_room("word " * 500) == 0  # nothing is left to forget: the server says what it thinks
    assert talk.asked == 2


def test_tokens_are_the_tokenizers_own_or_bytes_by_three(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    assert (
        base_model.estimated_counter(tmp_path)("six by") == 2 and base_model.estimated_counter(tmp_path)("sevenby") == 3
    )
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert base_model.estimated_counter(tmp_path)("a a whatever") == 3


# -- a conversation


def test_both_are_asked_the_same_with_one_seed_and_shown_side_by_side(tmp_path, screen, monkeypatch):
    bodies: list[dict] = []
    with served(bodies=bodies) as url:
        run = run_of(tmp_path, url, system="Be kind.")
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        typed(monkeypatch, "  ", "Hello?", "More.", "/new", "Hello?", "/nwe", "/quit", "never asked")
        chat.start_chat(run)
    assert len(bodies) == 6 and "never asked" not in str(bodies)
    for pair in (bodies[:2], bodies[2:4], bodies[4:]):
        assert {b["model"] for b in pair} == {"base", "distilled"} and len({b["seed"] for b in pair}) == 1
        assert all((b["temperature"], b["top_p"], b["max_tokens"]) == (0.8, 1.0, 128) for b in pair)
    base = [b for b in bodies if b["model"] == "base"]
    distilled = [b for b in bodies if b["model"] == "distilled"]
    assert [len(b["messages"]) for b in base] == [2, 4, 2] and base[0]["seed"] == base[2]["seed"] != base[1]["seed"]
    own = scripted_server.answer_to(distilled[0])
    assert distilled[1]["messages"][2]["content"] == own != base[1]["messages"][2]["content"]
    assert all(b["messages"][0] == {"role": "system", "content": "Be kind."} for b in bodies)
    lines = screen.getvalue().splitlines()
    assert sum("base" in line and "distilled" in line for line in lines) >= 3  # titles in one line: two columns
    assert "32 tokens, ended by itself" in said(screen) and "/nwe is no command" in said(screen)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before  # it writes nothing into the run


def test_a_held_out_prompt_is_asked_with_the_seed_of_its_evaluation():
    from dsc_hub.chain.chain import seed_of
    from dsc_hub.config.recipe import Recipe
    from dsc_hub.records import prompt_id

    bodies: list[dict] = []
    with served(bodies=bodies) as url:
        recipe = Recipe.model_validate(fixture_run.RECIPE)
        chat._answer(recipe, [servers.Endpoint(url, "base", "key")], talk_of(2048), "Tell me of Ash.")
    assert {b["seed"] for b in bodies} == {seed_of(recipe.seed, prompt_id("Tell me of Ash."), 0, 0, "answer")}


@pytest.mark.parametrize("at_once", [True, False])
def test_both_are_asked_at_once_or_one_after_the_other(tmp_path, screen, at_once):
    with served(pause=1.0) as url:
        run = run_of(tmp_path, url)
        endpoints, recipe = [servers.Endpoint(url, "base", "key")], run.facts.recipe
        chat._answer(recipe, endpoints, talk_of(2048), "warm up", True)
        started = time.monotonic()
        chat._answer(recipe, endpoints, talk_of(2048), "Hello?", at_once)
        assert (1.0 <= time.monotonic() - started < 1.9) == at_once


@pytest.mark.parametrize("external", [False, True])
def test_base_and_adapter_share_a_batch_only_on_servers_of_our_own(tmp_path, screen, monkeypatch, external):
    seen = []
    restart = None if external else lambda: None
    endpoint = servers.Endpoint("http://127.0.0.1:1/v1", "base", "key", restart=restart)
    monkeypatch.setattr(chat, "_endpoints", lambda *_: contextlib.nullcontext([endpoint]))
    monkeypatch.setattr(chat, "_answer", lambda *settings: seen.append(settings[-1]))
    typed(monkeypatch, "Hello?")
    chat.start_chat(run_of(tmp_path, "http://127.0.0.1:1/v1" if external else ""))
    assert seen == [not external]


def test_a_narrow_terminal_shows_one_above_the_other(tmp_path, monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=text, width=70, highlight=False))
    with served() as url:
        typed(monkeypatch, "Hello?")
        chat.start_chat(run_of(tmp_path, url))
    lines = text.getvalue().splitlines()
    at = [next(i for i, line in enumerate(lines) if f"─ {arm} ─" in line) for arm in ("base", "distilled")]
    assert at[0] + 2 < at[1]


def test_ctrl_c_cancels_the_answer_and_not_the_program(tmp_path, screen, monkeypatch):
    bodies: list[dict] = []
    with served(pause=3.0, bodies=bodies) as url:
        run = run_of(tmp_path, url)
        started = time.monotonic()
        talk = talk_of(2048)
        interrupt_once(lambda: len(bodies) >= 2)
        chat._answer(run.facts.recipe, [servers.Endpoint(url, "base", "key")], talk, "Hello?", True)
        assert time.monotonic() - started < 2.5 and len(bodies) == 2
    assert "cancelled" in said(screen) and not any(talk.said.values()) and talk.asked == 0


def test_ctrl_c_at_the_prompt_drops_the_line(screen, monkeypatch):
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "ask_key", interrupted)
    assert chat._read_question() == "" and "/quit or Ctrl-D ends" in said(screen)


def test_an_answer_that_fails_leaves_no_trace(tmp_path, screen, monkeypatch):
    bodies: list[dict] = []
    with served(fail_after=3, bodies=bodies) as url:
        typed(monkeypatch, "one", "two", "three")
        chat.start_chat(run_of(tmp_path, url))
    assert "answered 400" in said(screen) and said(screen).count("not part of the conversation") == 2
    assert [len(b["messages"]) for b in bodies] == [1, 1, 3, 3, 3, 3]


def test_forgetting_is_told(tmp_path, screen, monkeypatch):
    bodies: list[dict] = []
    with served(bodies=bodies) as url:
        typed(monkeypatch, *(f"{n} is what I want to know more about" for n in range(5)))
        # An exchange takes 42 tokens, the server says; a question 12, its turn 12, the answer up to 128: 194.
        chat.start_chat(run_of(tmp_path / "a", url, context=193))
        assert said(screen).count("no longer fits 193 tokens: the oldest exchange is forgotten.") == 4
        assert {len(b["messages"]) for b in bodies} == {1}
        typed(monkeypatch, *(f"{n} is what I want to know more about" for n in range(2)))
        chat.start_chat(run_of(tmp_path / "b", url, context=194))
    assert "no longer fits 194" not in said(screen) and len(bodies[-1]["messages"]) == 3


def test_control_characters_do_not_reach_the_terminal(tmp_path, monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=text, width=140, force_terminal=True, color_system=None))
    monkeypatch.setattr(scripted_server, "answer_to", lambda body: "\x1b[2J\x07[bold]shown[/bold]\u202e")
    with served() as url:
        typed(monkeypatch, "Hello?")
        chat.start_chat(run_of(tmp_path, url))
    assert text.getvalue().count("[bold]shown[/bold]") == 2
    assert not any(c in text.getvalue() for c in "\x1b\x07\u202e")


# -- the server


def with_template(folder: Path) -> Path:
    """A folder of weights, as far as it is read before a server is started."""
    folder.mkdir(exist_ok=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def test_our_own_server_gets_model_and_adapter_and_ends_whatever_happens(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path / "run")
    folder = tmp_path / "model"
    folder.mkdir()
    run.add_facts(model=run.raw_facts["model"] | {"folder": str(folder)})
    rounded = with_template(tmp_path / "rounded")  # what QLoRA trained on and the arms were scored on
    monkeypatch.setattr(
        "dsc_hub.inference.weights.quantise_roundtrip", lambda plain, identity, settings: plain == folder and rounded
    )
    given, ended = [], []

    @contextlib.contextmanager
    def serve(*settings, **more):
        given.append(settings)
        try:
            yield [servers.Endpoint("http://127.0.0.1:1/v1", "base", "key")]  # nobody is there
        finally:
            ended.append(True)

    monkeypatch.setattr(servers, "serve_model", serve)
    monkeypatch.setattr("dsc_hub.inference.retries.RETRIES", 0)
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))
    typed(monkeypatch, "Hello?")
    chat.start_chat(run)
    assert "can't be reached" in said(screen)
    typed(monkeypatch, "/quit")
    chat.start_chat(run)
    assert len(ended) == 2 and given[0][0] == rounded and given[0][3] == {"distilled": run["adapter"]}
    assert tmp_path / "run" not in given[0][2].parents


@pytest.mark.parametrize("is_student", [False, True])
def test_servers_without_the_adapter_are_not_asked(tmp_path, screen, monkeypatch, capsys, is_student):
    """They have none if they only wrote the chains; those of a teacher don't have the base either, whatever they name."""
    models = ("base", "distilled") if is_student else ("base",)
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "dsc_hub.inference.weights.quantise_roundtrip", lambda plain, identity, _: with_template(tmp_path / identity)
    )
    loaded = []
    monkeypatch.setattr(
        servers, "serve_model", lambda folder, *_, **__: contextlib.nullcontext(loaded.append(folder) or [])
    )
    typed(monkeypatch, "/quit")
    with served(models=models, others=False) as url:
        run = run_of(tmp_path / "run", url)
        facts = fixture_run.facts_of_a_student() if is_student else run.raw_facts
        facts["recipe"]["serving"]["endpoints"] = [url]
        facts["student" if is_student else "model"]["folder"] = str(tmp_path)
        run.add_facts(**facts)
        chat.start_chat(run)
    said_in_log = capsys.readouterr().err
    assert [folder.name for folder in loaded] == [run.raw_facts["identity"]["student" if is_student else "model"]]
    assert ("list no model distilled; so base and adapter are served here" in said_in_log) is not is_student
    assert ("--lora-modules distilled=" in said_in_log) is not is_student


def test_what_is_missing_is_told(tmp_path, screen):
    with pytest.raises(RunError, match="no finished adapter") as e:
        chat.start_chat(run_of(tmp_path / "a", adapter=False))
    assert "dsc distill" in str(e.value)
    half = run_of(tmp_path / "b")
    half.unfinish("distill")  # weights of a training that is not finished
    with pytest.raises(RunError, match="no finished adapter"):
        chat.start_chat(half)
    with pytest.raises(RunError, match="the base model is no longer at"):
        chat.start_chat(run_of(tmp_path / "c"))
    broken = run_of(tmp_path / "e")
    broken.add_facts(recipe={"name": "x"})
    with pytest.raises(RunError, match="can't read"):
        chat.start_chat(broken)


def test_the_verb_reads_lines_from_a_pipe_and_says_in_one_message_what_is_missing(tmp_path):
    def dsc(*words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "dsc_hub", "chat", *words]
        return subprocess.run(command, env=env, cwd=tmp_path, input=lines, capture_output=True, text=True, timeout=60)

    with served() as url:
        run_of(tmp_path / "runs" / "quickstart" / "abc", url)
        done = dsc("quickstart", lines="Hello?\n/quit\n")
    (line,) = done.stderr.splitlines()
    assert (
        done.returncode == 0
        and line.startswith("serving.endpoints  asks 127.0.0.1:")
        and "ended by itself" in done.stdout
    ), done.stderr
    run_of(tmp_path / "runs" / "quickstart" / "abc", adapter=False).unfinish("distill")
    done = dsc("quickstart")
    assert done.returncode == 2 and "no finished adapter" in done.stderr and "Traceback" not in done.stderr
