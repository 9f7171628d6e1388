"""Which server takes a request, and what becomes of one that is gone.

All requests that begin alike (system message and prompt) prefer the same server, by a hash, so that its prefix cache serves them;
when it has enough to do they go to the least busy one. A server that is gone is started again, or looked for, while its requests
go to the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from dsc_hub.errors import ServingError
from dsc_hub.inference.concurrency import ConcurrencyLimit
from dsc_hub.inference.servers import Endpoint
from dsc_hub.system.progress import say

Concurrency = int | Literal["auto"]
T = TypeVar("T")
RESTARTS = 4  # tries to start a server of our own again
PROBES = 20  # tries to find a server of others again: some ten minutes, as it may have to load its model
WAIT_S, LONGEST_S = 0.5, 30.0  # before something is tried again, longer each time; with jitter


class ServerGone(Exception):
    """The server is gone with the request."""


@dataclass(eq=False)
class PooledServer:
    """A server, one `of` several. `busy`: requests that it has now; `looking`: whether it is still there; `revival`: it is not, and is
    being brought back; `gone`: why it was given up."""

    pool: ServerPool
    endpoint: Endpoint
    limit: ConcurrencyLimit
    proxy: str | None = None
    busy: int = 0
    probe: asyncio.Task[str | None] | None = None
    restart_task: asyncio.Task[None] | None = None
    failure: ServingError | None = None  # for good

    @property
    def is_up(self) -> bool:
        return self.restart_task is None and self.failure is None

    @property
    def has_room(self) -> bool:
        return self.is_up and self.busy < self.limit.now


@dataclass(eq=False)
class _Waiter:
    beginning: str
    avoid: PooledServer | None
    place: asyncio.Future[PooledServer]


@dataclass(eq=False)
class ServerPool:
    """Servers of the same model. `concurrency`: requests at each, or a tuple with one for each. `retries` is the generator's counter,
    which gets "server back"; `answered` counts the requests that were done."""

    endpoints: Sequence[Endpoint]
    concurrency: Concurrency | tuple[Concurrency, ...]
    retries: Counter[str]
    answered: int = 0
    all: list[PooledServer] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        each = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency,) * len(self.endpoints)
        self.all = [
            PooledServer(self, e, ConcurrencyLimit(n), _proxy_of(e.url))
            for e, n in zip(self.endpoints, each, strict=True)
        ]
        self._waiting: list[_Waiter] = []
        # Looking at a server that says nothing takes long: not in the threads that look up names for all the others.
        self._threads = ThreadPoolExecutor(max(1, len(self.all)), "servers")

    def limit(self) -> int:
        """How many requests they should have now, all together."""
        return sum(server.limit.now for server in self.all if server.is_up)

    async def acquire(self, beginning: str, avoid: PooledServer | None = None) -> PooledServer:
        """A place at a server; `release` it back. Waits while all have enough to do or none is up; ServingError if none will be.

        The same beginning prefers the same server: nothing needs to be remembered of any chain. One to `avoid` is taken only
        where no other is up.
        """
        waiter = _Waiter(beginning, avoid, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._let_in()
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled():
                self.release(waiter.place.result())
            raise

    def release(self, server: PooledServer) -> None:
        """Give a place back."""
        server.busy -= 1
        self._let_in()

    def _let_in(self) -> None:
        """Places for those who wait, in the order in which they came."""
        left: list[_Waiter] = []
        for n, waiter in enumerate(self._waiting):
            if waiter.place.done():  # cancelled
                continue
            if failure := self._all_failed():
                waiter.place.set_exception(failure)
            elif server := self._choose(waiter):
                server.busy += 1
                waiter.place.set_result(server)
            else:
                left.append(waiter)
                if not any(server.has_room for server in self.all):
                    left += self._waiting[n + 1 :]
                    break
        self._waiting = left

    def _choose(self, waiter: _Waiter) -> PooledServer | None:
        up = [server for server in self.all if server.is_up]
        up = [server for server in up if server is not waiter.avoid] or up
        free = [server for server in up if server.has_room]
        if len(up) < 2 or not free:
            return free[0] if free else None
        first = max(up, key=lambda server: _hash(server.endpoint.url, waiter.beginning))  # rendezvous hashing
        return first if first.has_room else min(free, key=lambda server: server.busy / server.limit.now)

    def _all_failed(self) -> ServingError | None:
        return self.all[-1].failure if all(server.failure for server in self.all) else None

    async def check_health(self, server: PooledServer) -> None:
        """Called when a request got no answer, or one that a proxy may have given. Raises ServerGone if the server is gone, too; then it is
        brought back, if it can be."""
        if server.is_up:
            if server.probe is None:  # one look for all that broke off together
                server.probe = asyncio.ensure_future(self._probe(server))
            if (why := await asyncio.shield(server.probe)) is None:
                return
            if server.is_up:
                server.restart_task = asyncio.create_task(self._restart(server, why))
        raise ServerGone(f"{server.endpoint.url} is gone")

    async def _probe(self, server: PooledServer) -> str | None:
        """Why it is gone; None if it is there."""
        try:
            await self._in_thread(server.endpoint.check)
        except (ServingError, OSError) as e:
            return _told(e)
        finally:
            server.probe = None
        return None

    def retire(self, server: PooledServer, error: ServingError) -> None:
        """This server won't be asked again; `acquire` raises the error when there is no other."""
        server.failure = error
        self._let_in()
        if self._all_failed() is None:
            say(f"{error.message}\n  it is not asked any more; its requests go to the others")

    async def _restart(self, server: PooledServer, why: str) -> None:
        """Wait for a server that is gone, or start it again, until it is up or given up."""
        try:
            error = await self._try_to_restart(server, why)
        except Exception as e:  # a full disk under the log: nobody waits for this task, so the requests must be told
            error = ServingError(f"{server.endpoint.url} could not be brought back: {type(e).__name__}: {e}")
        finally:
            server.restart_task = None
        if error:
            self.retire(server, error)
        else:
            self._let_in()

    async def _try_to_restart(self, server: PooledServer, why: str) -> ServingError | None:
        """None when it is back, else why not."""
        others = any(other.is_up for other in self.all)
        say(f"{why}\n  {'its requests go to the others; ' if others else ''}trying to bring it back")
        tries = RESTARTS if server.endpoint.restart else PROBES
        for n in range(tries):
            await asyncio.sleep(min(LONGEST_S, 2 * WAIT_S * 4**n) * random.uniform(0.75, 1.25))
            try:
                await self._bring_back(server.endpoint)
            except (ServingError, OSError) as e:
                why = _told(e)
            else:
                say(f"{server.endpoint.url} is back")
                self.retries["server back"] += 1
                return None
        return ServingError(
            f"{server.endpoint.url} did not come back in {tries} tries: {why}",
            "What is finished is kept; run the same command again when it can be reached.",
        )

    async def _bring_back(self, endpoint: Endpoint) -> None:
        """Start a server of our own again, or look whether another's is there. ServingError if it is not."""
        if endpoint.restart is None:
            await self._in_thread(endpoint.check)
            return
        await self._in_thread(endpoint.restart)
        while not await self._in_thread(endpoint.is_ready):
            await asyncio.sleep(0.25)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End what is under way; a server that is being started is waited for, so that it can be ended."""
        for server in self.all:
            if server.restart_task:
                server.restart_task.cancel()
        self._threads.shutdown(cancel_futures=True)


def _told(error: ServingError | OSError) -> str:
    return error.message if isinstance(error, ServingError) else str(error)


def _hash(url: str, beginning: str) -> bytes:
    return hashlib.blake2b(f"{url} {beginning}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)
