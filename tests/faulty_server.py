"""A server that misbehaves in one way, for tests and for `tests.benchmarks.faults`. It answers in some share of a second.

Prompts begin with "Tell about film number N." where a fault depends on the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from dsc_hub.inference.servers import Endpoint
from tests.scripted_server import answer_to


@dataclass(frozen=True)
class Fault:
    """How a server misbehaves: `how` is a status or a name of `FaultyServer.complete`, `share` that of its tries.

    `last`: prompts from this share on are affected at each try. `room`: requests at once, more get `how`.
    `quota`: requests a window of so many seconds, more get 429; `declared`: headers say what is left of it.
    `pause_s`: seconds until the mean answer; they depend on the request and lie between 0.4 and 1.6 times as many.
    `from_s`, `until_s`: seconds since the start between which it misbehaves. `first`: share of the prompts whose first
    try is affected. `context`: tokens to which "truncates" cuts.
    """

    how: str = ""
    share: float = 0.0
    retry_after: str = ""
    last: float = 1.0
    room: int = 0
    quota: tuple[int, float] = (0, 0.0)
    declared: bool = False
    pause_s: float = 0.5
    from_s: float = 0.0
    until_s: float = math.inf
    first: float = 0.0
    context: int = 256


class FaultyServer:
    def __init__(self, fault: Fault, prompts: int) -> None:
        self.fault, self.prompts = fault, prompts
        self.dice, self.busy, self.counts = random.Random(1), 0, Counter[str]()
        self.window = (0.0, 0)  # start, requests since
        self.highest = 0  # most requests at once
        self.started, self.seen = time.monotonic(), set[str]()

    def refusal(self, body: dict[str, Any]) -> tuple[str, dict[str, str]]:
        """Return what goes wrong with a request ("": nothing) and the headers of the reply."""
        fault, headers = self.fault, {}
        if fault.quota[0]:
            limit, seconds = fault.quota
            now = time.monotonic()
            start, spent = self.window if now < self.window[0] + seconds else (now, 0)
            self.window = (start, min(limit, spent + 1))
            if fault.declared:
                headers = {
                    "x-ratelimit-limit-requests": str(limit),
                    "x-ratelimit-remaining-requests": str(limit - self.window[1]),
                    "x-ratelimit-reset-requests": f"{max(1, int(1000 * (start + seconds - now)))}ms",
                }
            return ("429" if spent >= limit else ""), headers
        match = re.search(r"film number (\d+)", body["messages"][0]["content"])
        number = int(match.group(1)) if match else 0
        fails = number >= fault.last * self.prompts or self.dice.random() < fault.share
        if len(body["messages"]) == 1 and (prompt := body["messages"][0]["content"]) not in self.seen:
            self.seen.add(prompt)
            fails = fails or self.dice.random() < fault.first
        fails = fails and fault.from_s <= time.monotonic() - self.started < fault.until_s
        return (fault.how if fails or (fault.room and self.busy >= fault.room) else ""), headers

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        how, headers = self.refusal(body)
        self.counts[how or "answered"] += 1
        if how and self.fault.retry_after:
            headers["Retry-After"] = self.fault.retry_after
        if how.isdecimal():
            return web.json_response({"error": {"message": f"scripted {how}"}}, status=int(how), headers=headers)
        self.busy += 1
        self.highest = max(self.highest, self.busy)
        try:
            text = answer_to(body)
            share = int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6
            await asyncio.sleep(self.fault.pause_s * (0.4 + 1.2 * share))
        finally:
            self.busy -= 1
        prompt_tokens = sum(round(1.3 * len(m["content"].split())) + 4 for m in body["messages"])
        if how == "truncates":
            prompt_tokens = min(prompt_tokens, self.fault.context)
        if how == "caches" and body["messages"][0]["content"].startswith("Tell"):
            prompt_tokens = 12
        message = {"role": "assistant", "content": {"null": None, "text list": [text]}.get(how, text)}
        answer = {
            "id": "x",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": {"negative": -9, "huge": 10**30}.get(how, len(text.split())),
            },
        }
        if how == "no usage":
            answer["usage"] = None
        data = json.dumps(answer)
        if how == "infinite":
            data = data.replace(f'"completion_tokens": {len(text.split())}', '"completion_tokens": 1e999')
        data = {"garbage": "<html>no JSON</html>", "nested": '{"choices":' + "[" * 200_000}.get(how, data)
        if how in ("closes", "half"):
            if how == "half":
                response = web.StreamResponse(headers={"Content-Length": "4000"})
                await response.prepare(request)
                await response.write(data.encode()[:40])
            assert request.transport is not None
            request.transport.abort()
        return web.Response(text=data, content_type="application/json", headers=headers)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})


async def start(server: FaultyServer) -> tuple[web.AppRunner, str]:
    """Start serving; return what ends it and the address."""
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_get("/v1/models", server.models)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


async def serve(fault: Fault, prompts: int) -> None:
    """Print the address and serve until ended."""
    _, url = await start(FaultyServer(fault, prompts))
    print(url, flush=True)
    await asyncio.Event().wait()


@contextmanager
def serving(fault: Fault, prompts: int = 1) -> Iterator[tuple[Endpoint, FaultyServer]]:
    """Serve in a thread; yield the endpoint and the server, whose `counts` are those of its replies."""
    server, loop = FaultyServer(fault, prompts), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, url = asyncio.run_coroutine_threadsafe(start(server), loop).result(20)
    try:
        yield Endpoint(url, "scripted", "none"), server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
