"""The embedded Hub with things going wrong on purpose: a layer before it that counts requests and lets some of them fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsc_hub.local_hub import server
from dsc_hub.local_hub.server import Address


@dataclass
class Fault:
    """What happens to the next `times` requests of this method and path.

    status: this is answered, and nothing done; 0: the connection is closed in the middle of the reply, `after` the work was
    done or before it. `then` is called before the request goes on (somebody else does something at that moment), `later`
    once it was served and before its reply is out. `hang`: there is no reply, for as long as the client waits.
    """

    method: str
    path: str
    status: int = 200
    after: bool = False
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    then: Callable[[], Any] | None = None
    later: Callable[[], Any] | None = None
    hang: bool = False
    leads_to: tuple[str, str] | None = None  # old and new name of a repo that was renamed
    body: bytes = b'{"error": "on purpose"}'


class Faulty:
    """An ASGI application before another: `faults` strike in their order, `log` holds (method, path) of every request."""

    def __init__(self, app: Any) -> None:
        self.app, self.faults, self.log = app, list[Fault](), list[tuple[str, str]]()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        method, path = scope["method"], scope["path"]
        self.log.append((method, path))
        fault = next((f for f in self.faults if f.times and f.method == method and re.search(f.path, path)), None)
        if fault is None:
            return await self.app(scope, receive, send)
        fault.times -= 1
        if fault.then:
            import anyio

            await anyio.to_thread.run_sync(fault.then)
        if fault.hang:
            while (await receive())["type"] != "http.disconnect":
                pass
            return None
        if fault.leads_to:
            query = scope["query_string"].decode()
            fault.headers = {"Location": path.replace(*fault.leads_to) + (f"?{query}" if query else "")}
        if fault.later:
            return await self._then_later(fault.later, scope, receive, send)
        if fault.status == 200 and not fault.after:
            return await self.app(scope, receive, send)
        if fault.after:

            async def unheard(message: dict) -> None:
                return None

            await self.app(scope, receive, unheard)
        headers = [(k.lower().encode(), v.encode()) for k, v in fault.headers.items()]
        if fault.status in (0, 200):  # a reply that is cut off
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b'{"', "more_body": False})
            return None
        await send({"type": "http.response.start", "status": fault.status, "headers": headers})
        await send({"type": "http.response.body", "body": fault.body})
        return None

    async def _then_later(self, later: Callable[[], Any], scope: dict, receive: Any, send: Any) -> None:
        import anyio

        reply: list[dict] = []

        async def keep(message: dict) -> None:
            reply.append(message)

        await self.app(scope, receive, keep)
        await anyio.to_thread.run_sync(later)
        for message in reply:
            await send(message)

    def count(self, method: str, path: str) -> int:
        return sum(m == method and bool(re.search(path, p)) for m, p in self.log)


@contextmanager
def running(root: Path) -> Iterator[tuple[Address, Faulty]]:
    """The embedded Hub over `root` with the layer before it."""
    token, app = server._token_and_app(root)
    faulty = Faulty(app)
    with server.hosted(faulty) as endpoint:
        yield Address(endpoint, token, server.USER), faulty
