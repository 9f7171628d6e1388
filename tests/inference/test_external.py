"""What a server of others takes of a request, learned from its refusals over HTTP, and what is said if it is unusable."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from dsc_hub.config import recipe_files
from dsc_hub.config.recipe import Server
from dsc_hub.config.serving import GenerationConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference import external, requests
from dsc_hub.inference.client import Generator
from dsc_hub.inference.concurrency import FIRST, FIRST_OF_MANY
from dsc_hub.inference.servers import Endpoint
from tests.scripted_server import REFUSING

MESSAGES = [{"role": "user", "content": "Say no."}]
PARAMETERS = {"seed": 0, "temperature": 0.8, "top_p": 0.9, "max_tokens": 16}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "BUSY_WAIT_S", 0.01)
    monkeypatch.setattr(external, "_forms", {})
    monkeypatch.setattr(external, "_connections", {})
    monkeypatch.setattr(external, "_owned", {})


@pytest.fixture
def connect(start: Callable[..., Any]) -> Callable[..., Endpoint]:
    """Start a server (`keys` of make_server), and connect to it with these parameters."""

    def go(parameters: dict[str, Any] | None = None, extra: dict[str, Any] | None = None, **keys: Any) -> Endpoint:
        url = f"http://127.0.0.1:{start(**keys).server_port}/v1"
        return connect_to(url, parameters, extra)

    return go


def connect_to(url: str, parameters: dict[str, Any] | None = None, extra: dict[str, Any] | None = None) -> Endpoint:
    server = Server(external.BASE, url, "OPENAI_API_KEY", "scripted")
    used = PARAMETERS | (parameters or {})
    return external.connect(external.endpoint_of(server), server, used, MESSAGES, extra or {}, 5.0)


FORMS = {
    "reasoning_model": {"max_tokens": "max_completion_tokens", "temperature": None, "top_p": None},
    "one_of_two": {"top_p": None},
    "strict_fields": {"seed": "random_seed"},
    "without_seed": {"seed": None},
    "wordless": {"seed": None},
}


@pytest.mark.parametrize("kind", REFUSING)
def test_what_a_server_refuses_is_learned_and_nothing_else_is_left_out(connect: Callable[..., Endpoint], kind: str):
    bodies: list[dict] = []
    endpoint = connect(refuse=REFUSING[kind], bodies=bodies)
    assert endpoint.form == FORMS[kind]
    assert len(bodies) == 1  # the others were refused
    sent = {form or name for name, form in FORMS[kind].items() if form}
    kept = PARAMETERS.keys() - FORMS[kind].keys()
    assert bodies[0].keys() == {"model", "messages"} | sent | kept


def test_a_server_that_takes_all_gets_all_in_one_request(connect: Callable[..., Endpoint]):
    bodies: list[dict] = []
    assert connect(bodies=bodies, extra={"top_k": 5}).form == {}
    assert bodies == [{"model": "scripted", "messages": MESSAGES, **PARAMETERS, "top_k": 5}]


def test_a_server_is_tested_once_for_each_setting(start: Callable[..., Any], capsys: pytest.CaptureFixture[str]):
    bodies: list[dict] = []
    url = f"http://127.0.0.1:{start(refuse=REFUSING['without_seed'], bodies=bodies).server_port}/v1"
    first, again = connect_to(url), connect_to(url, {"seed": 7})
    assert first.form == again.form == {"seed": None} and len(bodies) == 1
    assert capsys.readouterr().err.count("does not take seed") == 1
    connect_to(url, {"temperature": 0.0})  # another value may be refused
    assert len(bodies) == 2


@pytest.mark.parametrize(
    ("parameters", "left_out", "changes"),
    [
        ({"temperature": 0.8, "top_p": 1.0}, "top_p", []),
        ({"temperature": 1.0, "top_p": 0.9}, "temperature", []),
        ({"temperature": 0.8, "top_p": 0.9}, "top_p", ["top_p"]),
        ({"temperature": 1.0, "top_p": 1.0}, "top_p", []),
    ],
)
def test_of_temperature_and_top_p_the_one_that_changes_nothing_is_left_out(
    connect: Callable[..., Endpoint], parameters: dict, left_out: str, changes: list[str]
):
    endpoint = connect(parameters, refuse=REFUSING["one_of_two"])
    assert endpoint.form == {left_out: None}
    assert requests.changes_sampling(endpoint.form, PARAMETERS | parameters) == changes


def test_a_temperature_that_can_not_be_set_is_said_clearly(
    connect: Callable[..., Endpoint], capsys: pytest.CaptureFixture[str]
):
    connect({"top_p": 1.0}, refuse=REFUSING["reasoning_model"])
    said = " ".join(capsys.readouterr().err.split())
    assert "does not take max_tokens; it is sent as max_completion_tokens" in said
    assert "does not take temperature; it is left out: answers are drawn with the server's own temperature" in said
    assert "NOT with 0.8" in said and "top_p" not in said


VALUES = [  # refusals of a value, which the user has to change
    "max_tokens is too large: 4096. This model supports at most 2048 completion tokens, whereas you provided 4096.",
    "Invalid 'temperature': decimal above maximum value. Expected a value <= 0.5, but got 0.8 instead.",
    "This model's maximum context length is 10 tokens. However, you requested 16 output tokens (max_tokens).",
    "The model `scripted` does not exist",
]


@pytest.mark.parametrize("said", VALUES)
def test_a_refused_value_is_the_users_to_change_and_nothing_is_left_out(connect: Callable[..., Endpoint], said: str):
    asked: list[dict] = []

    def refuse(body: dict) -> tuple[int, Any]:
        asked.append(body)
        return 400, {"error": {"message": said, "param": "temperature", "code": "invalid_value"}}

    with pytest.raises(ServingError) as e:
        connect(refuse=refuse)
    assert said in e.value.message and len(asked) == 1


def test_a_parameter_of_extra_that_is_refused_is_not_dropped_in_silence(connect: Callable[..., Endpoint]):
    def refuse(body: dict) -> tuple[int, Any] | None:
        return (
            (400, {"error": {"message": "Unrecognized request argument supplied: top_k"}}) if "top_k" in body else None
        )

    with pytest.raises(ServingError, match="Unrecognized request argument supplied: top_k\n.*generation.extra"):
        connect(extra={"top_k": 5}, refuse=refuse)


def test_a_length_that_goes_by_no_name_is_an_error_and_never_left_out(connect: Callable[..., Endpoint]):
    def refuse(body: dict) -> tuple[int, Any] | None:
        name = next((k for k in ("max_tokens", "max_completion_tokens") if k in body), None)
        return (400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}}) if name else None

    with pytest.raises(ServingError, match="Unsupported parameter: 'max_completion_tokens'"):
        connect(refuse=refuse)


def test_the_field_of_an_error_counts_more_than_the_request_that_it_repeats():
    error = {"error": {"message": f"unsupported: {json.dumps(PARAMETERS)}", "param": "seed"}}
    assert requests.next_form(400, json.dumps(error).encode(), {}, PARAMETERS) == {"seed": "random_seed"}
    assert requests.next_form(500, json.dumps(error).encode(), {}, PARAMETERS) is None


LISTINGS: dict[str, Callable[[], tuple[int, Any]]] = {
    "bare list": lambda: (200, [{"id": "scripted"}]),
    "plain names": lambda: (200, ["scripted"]),
    "of other names": lambda: (200, {"models": [{"name": "scripted"}]}),
    "missing": lambda: (404, {"error": "no such route"}),
    "not allowed": lambda: (405, {"detail": "Method Not Allowed"}),
    "other models": lambda: (200, {"data": [{"id": "some/thing-else"}]}),
    "no list": lambda: (200, {"message": "hello"}),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_list_of_models_is_a_courtesy(start: Callable[..., Any], connect: Callable[..., Endpoint], kind: str):
    assert connect(listing=LISTINGS[kind]).model == "scripted"
    url = f"http://127.0.0.1:{start(listing=LISTINGS[kind]).server_port}/v1"
    section = external.ServingConfig(endpoints=(url,))
    if kind in ("missing", "not allowed", "no list"):
        with pytest.raises(ServingError, match="/models.*\n.*serving.served_model"):
            external.external(section)
    elif kind != "other models":
        assert external.external(section)[0].model == "scripted"
    external.check_up(url, "k")  # it is there, whatever it lists


@pytest.mark.parametrize(
    ("owner", "first"),
    [("vllm", FIRST_OF_MANY), ("sglang", FIRST_OF_MANY), ("llamacpp", FIRST), (None, FIRST), (["vllm"], FIRST)],
)
def test_a_server_that_takes_many_requests_gets_more_from_the_start(start: Callable[..., Any], owner: Any, first: int):
    entry = {"id": "m", "object": "model"} | ({} if owner is None else {"owned_by": owner})
    url = f"http://127.0.0.1:{start(listing=lambda: (200, {'data': [entry]})).server_port}/v1"
    for name in ("m", None):  # whether or not the recipe names the model
        section = external.ServingConfig(endpoints=(url,), served_model=name)
        (endpoint,) = external.external(section)

        assert level_of(endpoint, tokens=128) == first
        assert level_of(endpoint, tokens=1024) == FIRST  # on a slow CPU 256 such requests would time out


def level_of(endpoint: Endpoint, tokens: int) -> int:
    async def level() -> int:
        async with Generator([endpoint], GenerationConfig(max_new_tokens=tokens), 600.0) as generator:
            return generator.level()

    return asyncio.run(level())


def test_who_owns_a_servers_models_is_asked_once_and_each_server_by_itself(start: Callable[..., Any]):
    asked: list[int] = []

    def listing() -> tuple[int, Any]:
        asked.append(1)
        return 200, {"data": [{"id": "m", "owned_by": "vllm"}]}

    def missing() -> tuple[int, Any]:
        asked.append(1)
        return 404, {"detail": "Not Found"}

    urls = [f"http://127.0.0.1:{start(listing=one).server_port}/v1" for one in (listing, missing)]
    section = external.ServingConfig(endpoints=tuple(urls), served_model="m")
    for _ in range(3):
        assert [endpoint.takes_many for endpoint in external.external(section)] == [True, False]
    assert len(asked) == 2


def test_what_is_wrong_is_said_with_key_address_and_what_to_do(
    connect: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
):
    def refusing(status: int, said: str) -> Any:
        return lambda body: (status, {"error": {"message": said}})

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    with pytest.raises(ServingError) as e:
        connect(refuse=refusing(401, "Incorrect API key provided: sk-secret-1234"))
    assert "sk-secret" not in str(e.value) and "[the key]" in e.value.message
    assert "serving.endpoints: scripted at http://127.0.0.1:" in e.value.message
    assert "OPENAI_API_KEY" in e.value.message and "OPENAI_API_KEY" in e.value.hint
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ServingError, match="OPENAI_API_KEY is not set"):
        connect(key="right")
    with pytest.raises(ServingError, match="no more credit\n.*account"):
        connect(refuse=refusing(402, "no more credit"))
    with pytest.raises(ServingError, match="sent what is no JSON object: .*no JSON.*\n.*/v1"):
        connect(fault=lambda body, before: "garbage")
    with pytest.raises(ServingError, match="can't be used: .*refused\n.*Is the server up"):
        connect_to("http://127.0.0.1:1/v1")


def test_a_server_that_is_busy_at_first_is_waited_for(connect: Callable[..., Endpoint]):
    assert connect(fault=lambda body, before: ("429", "503", "closes", "")[min(before, 3)]).form == {}
    with pytest.raises(ServingError, match="answered 429 .*scripted 429\n.*asked 4 times.*quota"):
        connect(fault=lambda body, before: "429")


@pytest.mark.parametrize("key", ["sk-verysecret123\r\n", " sk-verysecret123 "])
def test_what_was_copied_along_with_a_key_is_left_out(monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setenv("SOME_API_KEY", key)
    assert external.key_in("SOME_API_KEY") == "sk-verysecret123"


@pytest.mark.parametrize("key", ["sk-very\nsecret123", "sk-verysecret123…"])
def test_a_key_that_no_header_can_hold_is_named_by_its_variable_alone(monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setenv("SOME_API_KEY", key)
    with pytest.raises(ServingError, match="SOME_API_KEY holds characters that no key has") as error:
        external.key_in("SOME_API_KEY")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "choice",
    [{"message": {"role": "assistant", "content": None}}, {"message": {"role": "assistant"}}, {"message": "Yes."}],
)
def test_an_answer_that_the_run_could_not_use_is_refused_before_it(connect: Callable[..., Endpoint], choice: dict):
    with pytest.raises(ServingError, match=r"an answer without text or usage"):
        connect(answer=lambda body: choice)


def test_what_one_recipe_learned_is_not_told_of_another(recipe_file, start: Callable[..., Any]):
    """Two cells of a grid ask one server: only the one whose temperature it refused is changed by that."""
    url = f"http://127.0.0.1:{start(refuse=REFUSING['reasoning_model']).server_port}/v1"
    cells = [
        recipe_files.load_recipe_file(
            recipe_file,
            [f"serving.endpoints=[{url}]", "serving.served_model=scripted", f"generation.temperature={t:g}"],
        )
        for t in (0.7, 1.0)
    ]
    for cell in cells:
        external.connect_base(external.external(cell.serving), cell)
    assert [[c.changes for c in external.connections(cell)] for cell in cells] == [[("temperature",)], [()]]


def test_prompts_with_tools_are_tried_with_tools(recipe_file, start: Callable[..., Any]):
    bodies: list[dict] = []
    url = f"http://127.0.0.1:{start(trials=bodies).server_port}/v1"
    recipe = recipe_files.load_recipe_file(recipe_file, [f"serving.endpoints=[{url}]", "serving.served_model=scripted"])
    external.connect_base(external.external(recipe.serving), recipe)
    with_tools = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"tools_column": "tools"})})
    external.connect_base(external.external(recipe.serving), with_tools)
    assert ["tools" in body for body in bodies] == [False, True] and bodies[1]["tool_choice"] == "none"
