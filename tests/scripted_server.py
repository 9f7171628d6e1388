"""An OpenAI-compatible server with scripted answers, for tests of everything but the model.

python -m tests.scripted_server [--port N] [--pause S] [--key KEY] [--fail-after N] [--model NAME]

prints its address and serves until ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "503", "closes", "hangs", "garbage", "no text", "half")
HANG_S = 3.0
TRIAL = "Say yes."


def answer_to(body: dict) -> str:
    """Words that depend on the request alone, with a sentiment that differs from answer to answer."""
    request = [
        body["messages"],
        body.get("seed", body.get("random_seed")),
        *(["adapter"] if body["model"] == "distilled" else []),
    ]
    digest = hashlib.sha256(json.dumps(request).encode()).digest()
    moods = ("dreadful", "dull", "plain", "pleasant", "wonderful", "superb")
    nouns = ("plot", "music", "acting", "camera", "script", "ending", "opening", "casting")
    forms = (
        "I found the {} {} in scene {}.",
        "Its {} seemed {} to me after {}.",
        "They say such {} is {}, take {}.",
        "And what {}: {} as no {} is!",
    )
    return " ".join(form.format(nouns[b % 8], moods[b // 8 % 6], b) for form, b in zip(forms, digest[:4], strict=True))


# -- servers that refuse parameters, each in the words of an API of its kind


def _openai(message: str, param: str, code: str) -> tuple[int, Any]:
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def reasoning_model(body: dict) -> tuple[int, Any] | None:
    """As newer models behind OpenAI's API: another name of the length, and their own temperature and top_p."""
    if "max_tokens" in body:
        told = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return _openai(told, "max_tokens", "unsupported_parameter")
    for name in ("temperature", "top_p"):
        if body.get(name, 1) != 1:
            told = f"Unsupported value: '{name}' does not support {body[name]} with this model. Only the default (1) value is supported."
            return _openai(told, name, "unsupported_value")
    return None


def one_of_two(body: dict) -> tuple[int, Any] | None:
    """As newer Claude models behind a gateway: temperature or top_p, with no field that says which."""
    if {"temperature", "top_p"} <= body.keys():
        told = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
        return 400, {"error": {"message": f"BadRequestError: BedrockException - {json.dumps({'message': told})}"}}
    return None


def strict_fields(body: dict) -> tuple[int, Any] | None:
    """As Mistral's API: the seed has another name, and what it doesn't know is forbidden, in pydantic's form."""
    known = {"model", "messages", "temperature", "top_p", "max_tokens", "random_seed"}
    wrong = [
        {"type": "extra_forbidden", "loc": ["body", k], "msg": "Extra inputs are not permitted", "input": body[k]}
        for k in body.keys() - known
    ]
    message = {"detail": wrong}
    return (422, {"object": "error", "message": message, "type": "invalid_request_error"}) if wrong else None


def without_seed(body: dict) -> tuple[int, Any] | None:
    """As Gemini's compatible route: a list around the error, all unknown names in one text."""
    known = {"model", "messages", "temperature", "top_p", "max_tokens"}
    wrong = [f'Invalid JSON payload received. Unknown name "{k}": Cannot find field.' for k in body.keys() - known]
    told = {"code": 400, "message": "\n".join(wrong), "status": "INVALID_ARGUMENT"}
    return (400, [{"error": told}]) if wrong else None


def wordless(body: dict) -> tuple[int, Any] | None:
    """A gateway that says no name."""
    return (400, {"detail": "extra fields not permitted"}) if {"seed", "random_seed"} & body.keys() else None


REFUSING = {f.__name__: f for f in (reasoning_model, one_of_two, strict_fields, without_seed, wordless)}


def is_trial(body: dict) -> bool:
    """Whether it is a request that tests the server before a run."""
    return any(TRIAL in message["content"] for message in body.get("messages", []))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


def make_server(
    port: int = 0,
    pause: float = 0.0,
    key: str = "",
    fail_after: int | None = None,
    models: Sequence[str] = ("scripted",),
    others: bool = True,
    bodies: list[dict] | None = None,
    logprobs: bool = False,
    answer: Callable[[dict], str] | None = None,
    fault: Callable[[dict, int], str] | None = None,
    refuse: Callable[[dict], tuple[int, Any] | None] | None = None,
    listing: Callable[[], tuple[int, Any]] | None = None,
    trials: list[dict] | None = None,
) -> ThreadingHTTPServer:
    """`refuse` gives status and body of the answer to a request that holds what the server does not take (see REFUSING);
    `listing` those to /models. `fault` says of a request, and how often it came before, what goes wrong with it ("": nothing): a status, or one
    of FAULTS. `answer` gives a text, or a whole choice (a dict with finish_reason, message). `models` are those it
    lists, `others`: does it answer under other names as well? `bodies` gets every request that was let in,
    but for those that test the server before a run: `trials` gets these, and neither `answer` nor `fail_after` sees them. With
    `logprobs` it tells, as vLLM does, how likely a prompt's tokens are (here its letters: -1 nat for each, but -3 for
    the last); without, it has no such route."""
    asked = 0
    came: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _send(self, code: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _go_wrong(self, how: str) -> None:
            if how.isdecimal():
                self._send(int(how), {"error": {"message": f"scripted {how}"}})
                return
            if how == "no text":
                self._send(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []})
                return
            if how == "garbage":
                data = b"<html>no JSON</html>"
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
            self.close_connection = True
            if how == "hangs":
                time.sleep(HANG_S)
            if how == "half":
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "4000")
                self.end_headers()
                self.wfile.write(b'{"id": "x", "choices": [{"index": 0, "mess')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def _allowed(self) -> bool:
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                self._send(401, {"error": {"message": "wrong key"}})
                return False
            return True

        def do_GET(self) -> None:
            if self.path == "/health":
                self._send(200, {})
            elif self._allowed() and listing is not None:
                self._send(*listing())
            elif self._allowed():
                self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

        def do_POST(self) -> None:
            nonlocal asked
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._allowed():
                return
            if not self.path.endswith("/completions"):
                self._send(404, {"error": {"message": "no such route"}})
                return
            with lock:
                asked += not is_trial(body)
                before = came[key_of := json.dumps(body, sort_keys=True)]
                came[key_of] += 1
            if fault is not None and (how := fault(body, before)):
                self._go_wrong(how)
                return
            if refuse is not None and (refusal := refuse(body)):
                self._send(*refusal)
                return
            if is_trial(body):
                if trials is not None:
                    trials.append(body)
            elif bodies is not None:
                bodies.append(body)
            if not others and body["model"] not in models:
                self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
                return
            if fail_after is not None and asked > fail_after:
                self._send(400, {"error": {"message": "this request is too long for me"}})
                return
            time.sleep(pause)
            if self.path.endswith("/v1/completions"):
                if not logprobs:
                    self._send(404, {"error": {"message": "no such route"}})
                    return
                told = [{str(ord(c)): {"logprob": -1.0, "rank": 1, "decoded_token": c}} for c in body["prompt"]]
                told[-1][str(ord(body["prompt"][-1]))]["logprob"] = -3.0
                choice = {"index": 0, "finish_reason": "length", "text": "x", "prompt_logprobs": [None, *told[1:]]}
                self._send(
                    200, {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
                )
                return
            text = "Yes." if is_trial(body) else (answer or answer_to)(body)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            if isinstance(text, dict):  # a whole choice
                choice, text = {**choice, **text}, ""
            self._send(
                200,
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                    "usage": {
                        "prompt_tokens": 10,
                        "completion_tokens": len(text.split()),
                        "total_tokens": 10 + len(text.split()),
                    },
                },
            )

        def log_message(self, *args: object) -> None:
            pass

    return _Server(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--key", default="")
    parser.add_argument("--fail-after", type=int)
    a = parser.parse_args()
    it = make_server(a.port, a.pause, a.key or os.environ.get("VLLM_API_KEY", ""), a.fail_after, [a.model])
    print(f"http://127.0.0.1:{it.server_port}/v1", flush=True)
    it.serve_forever()
