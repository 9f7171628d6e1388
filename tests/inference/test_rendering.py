"""The server's rendering of a conversation is compared with the chat template before anything is sampled."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from dsc_hub.config.recipe import Recipe
from dsc_hub.errors import ServingError
from dsc_hub.inference.chat_template import ChatTemplate
from dsc_hub.inference.rendering import check_rendering
from dsc_hub.inference.servers import Endpoint
from tests import fixture_run
from tests.inference import chat_templates


def letters() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({chr(n): n for n in range(128)} | {"[UNK]": 128}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split("", "isolated"), decoders.Fuse()
    return tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "chat_template.jinja").write_text(chat_templates.QWEN3)
    letters().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def serve():
    """Start a server that renders with a template of its own, as vLLM's /tokenize does, or sends what it is given."""
    servers, asked = [], []

    def start(template: str = "", sends: dict | None = None, takes_settings: bool = True) -> Endpoint:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, self.headers["Authorization"], body))
                settings = body.get("chat_template_kwargs", {}) if takes_settings else {}
                value = sends
                if template:
                    text = ChatTemplate(template).render(body["messages"], add_generation_prompt=True, **settings)
                    value = {"tokens": letters().encode(text).ids}
                data = json.dumps(value).encode()
                self.send_response(404 if value is None else 200)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        it = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=it.serve_forever, daemon=True).start()
        servers.append(it)
        return Endpoint(f"http://127.0.0.1:{it.server_port}/v1", "m", "secret")

    start.asked = asked
    yield start
    for it in servers:
        it.shutdown()


def recipe(system: str | None = None, **settings: object) -> Recipe:
    facts = fixture_run.facts()["recipe"]
    facts["chain"]["system"] = system
    return Recipe.model_validate(
        facts | {"generation": {"extra": {"chat_template_kwargs": settings} if settings else {}}}
    )


def test_a_server_with_the_same_template_and_settings_passes(model: Path, serve):
    check_rendering([serve(chat_templates.QWEN3)], model, recipe("Be brief."))
    check_rendering([serve(chat_templates.QWEN3)], model, recipe(enable_thinking=False))
    path, key, body = serve.asked[0]
    assert (path, key, body["messages"][0]["content"]) == ("/tokenize", "Bearer secret", "Be brief.")


def test_another_template_is_an_error_that_shows_both(model: Path, serve):
    with pytest.raises(ServingError) as error:
        check_rendering([serve(chat_templates.QWEN3), serve(chat_templates.MISTRAL)], model, recipe())
    assert "[INST] Say it." in error.value.message and "<|im_start|>user\\nSay it." in error.value.message
    assert "secret" not in error.value.message


def test_settings_that_do_not_reach_the_server_are_an_error(model: Path, serve):
    with pytest.raises(ServingError, match="<think>"):
        check_rendering([serve(chat_templates.QWEN3, takes_settings=False)], model, recipe(enable_thinking=False))


@pytest.mark.parametrize("sends", [None, {}, {"tokens": []}, {"tokens": "abc"}, {"tokens": [-1]}, {"tokens": [1e99]}])
def test_of_a_server_that_shows_no_rendering_nothing_is_said(model: Path, serve, sends):
    check_rendering([serve(sends=sends)], model, recipe())


def test_of_a_model_without_tokenizer_file_nothing_is_asked(tmp_path: Path, serve):
    check_rendering([serve(chat_templates.PLAIN)], tmp_path, recipe())
    assert serve.asked == []
