"""Pool of servers: chooses the server of a request, and brings unreachable servers back.

All requests with the same beginning (system message and prompt) prefer the same server, by a hash, so that its prefix
cache is used; if it is at its limit they go to the least busy one. An unreachable server is restarted, or checked until
it is back, while its requests go to the others.
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
RESTARTS = 4  # tries to restart a server that we started
PROBES = 20  # health checks of an external server: about ten minutes, since it may have to load its model
WAIT_S, LONGEST_S = 0.5, 30.0  # pause before a retry, and its maximum; longer each time, with jitter


class ServerGone(Exception):
    """The server became unreachable during the request."""


@dataclass(eq=False)
class PooledServer:
    """A server of a pool.

    `busy` is the number of its requests in flight. `probe` is a running health check. `restart_task` is set while the
    server is unreachable and being brought back. `failure` is the reason why it was given up.
    """

    pool: ServerPool
    endpoint: Endpoint
    limit: ConcurrencyLimit
    proxy: str | None = None
    busy: int = 0
    probe: asyncio.Task[str | None] | None = None
    restart_task: asyncio.Task[None] | None = None
    failure: ServingError | None = None  # permanent

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
    """Servers of the same model. `concurrency`: limit of each, or a tuple with one per server.

    `retries` is the generator's counter, in which "server back" is counted; `answered` counts the answered requests.
    """

    endpoints: Sequence[Endpoint]
    concurrency: Concurrency | tuple[Concurrency, ...]
    retries: Counter[str]
    answered: int = 0
    all: list[PooledServer] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        limits = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency,) * len(self.endpoints)
        self.all = [
            PooledServer(self, e, ConcurrencyLimit(n), _proxy_of(e.url))
            for e, n in zip(self.endpoints, limits, strict=True)
        ]
        self._waiting: list[_Waiter] = []
        # A health check of a silent server takes long: keep it out of the threads that resolve host names.
        self._threads = ThreadPoolExecutor(max(1, len(self.all)), "servers")

    def limit(self) -> int:
        """Return the concurrency limit of all servers that are up together."""
        return sum(server.limit.now for server in self.all if server.is_up)

    async def acquire(self, beginning: str, avoid: PooledServer | None = None) -> PooledServer:
        """Return a server with a free place; give the place back with `release`.

        Waits while all servers are at their limit or none is up; ServingError if none will come back. The same
        beginning prefers the same server, so no state per chain is needed. The server to `avoid` is chosen only if no
        other is up.
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
        """Assign free places to the waiting requests, in order of arrival."""
        waiting: list[_Waiter] = []
        for n, waiter in enumerate(self._waiting):
            if waiter.place.done():  # cancelled
                continue
            if failure := self._all_failed():
                waiter.place.set_exception(failure)
            elif server := self._choose(waiter):
                server.busy += 1
                waiter.place.set_result(server)
            else:
                waiting.append(waiter)
                if not any(server.has_room for server in self.all):
                    waiting += self._waiting[n + 1 :]
                    break
        self._waiting = waiting

    def _choose(self, waiter: _Waiter) -> PooledServer | None:
        up = [server for server in self.all if server.is_up]
        up = [server for server in up if server is not waiter.avoid] or up
        free = [server for server in up if server.has_room]
        if len(up) < 2 or not free:
            return free[0] if free else None
        first = max(up, key=lambda server: _affinity(server.endpoint.url, waiter.beginning))  # rendezvous hashing
        return first if first.has_room else min(free, key=lambda server: server.busy / server.limit.now)

    def _all_failed(self) -> ServingError | None:
        return self.all[-1].failure if all(server.failure for server in self.all) else None

    async def check_health(self, server: PooledServer) -> None:
        """Check a server after a request without reply, or with one that a proxy may have sent.

        Raises ServerGone if the server is unreachable; then it is brought back if possible.
        """
        if server.is_up:
            if server.probe is None:  # one health check for all requests that failed together
                server.probe = asyncio.ensure_future(self._probe(server))
            if (reason := await asyncio.shield(server.probe)) is None:
                return
            if server.is_up:
                server.restart_task = asyncio.create_task(self._restart(server, reason))
        raise ServerGone(f"{server.endpoint.url} is gone")

    async def _probe(self, server: PooledServer) -> str | None:
        """Return why the server is unreachable; None if it is reachable."""
        try:
            await self._in_thread(server.endpoint.check)
        except (ServingError, OSError) as e:
            return _error_message(e)
        finally:
            server.probe = None
        return None

    def retire(self, server: PooledServer, error: ServingError) -> None:
        """Send no more requests to this server; `acquire` raises the error if there is no other."""
        server.failure = error
        self._let_in()
        if self._all_failed() is None:
            say(f"{error.message}\n  it is not asked any more; its requests go to the others")

    async def _restart(self, server: PooledServer, why: str) -> None:
        """Restart an unreachable server, or wait for it, until it is up or given up."""
        try:
            error = await self._try_to_restart(server, why)
        # e.g. the log's disk is full: this task is never awaited, so the waiting requests must get the error
        except Exception as e:
            error = ServingError(f"{server.endpoint.url} could not be brought back: {type(e).__name__}: {e}")
        finally:
            server.restart_task = None
        if error:
            self.retire(server, error)
        else:
            self._let_in()

    async def _try_to_restart(self, server: PooledServer, why: str) -> ServingError | None:
        """Return None if the server is back, else the error."""
        others = any(other.is_up for other in self.all)
        say(f"{why}\n  {'its requests go to the others; ' if others else ''}trying to bring it back")
        tries = RESTARTS if server.endpoint.restart else PROBES
        for n in range(tries):
            await asyncio.sleep(min(LONGEST_S, 2 * WAIT_S * 4**n) * random.uniform(0.75, 1.25))
            try:
                await self._bring_back(server.endpoint)
            except (ServingError, OSError) as e:
                why = _error_message(e)
            else:
                say(f"{server.endpoint.url} is back")
                self.retries["server back"] += 1
                return None
        return ServingError(
            f"{server.endpoint.url} did not come back in {tries} tries: {why}",
            "What is finished is kept; run the same command again when it can be reached.",
        )

    async def _bring_back(self, endpoint: Endpoint) -> None:
        """Restart a server that we started, or check whether an external one is up. ServingError if it is not."""
        if endpoint.restart is None:
            await self._in_thread(endpoint.check)
            return
        await self._in_thread(endpoint.restart)
        while not await self._in_thread(endpoint.is_ready):
            await asyncio.sleep(0.25)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Cancel running tasks; wait for a server that is being started, so that it can be ended."""
        for server in self.all:
            if server.restart_task:
                server.restart_task.cancel()
        self._threads.shutdown(cancel_futures=True)


def _error_message(error: ServingError | OSError) -> str:
    return error.message if isinstance(error, ServingError) else str(error)


def _affinity(url: str, beginning: str) -> bytes:
    return hashlib.blake2b(f"{url} {beginning}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _proxy_of(url: str) -> str | None:
    """Return the proxy that the environment sets for an address; None if there is none."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)
