"""Pool of servers: chooses the server of a request, and brings unreachable servers back.

All requests with the same beginning (system message and prompt) prefer the same server, by a hash, so that its prefix
cache is used; if it is at its limit they go to the least busy one. An unreachable server is restarted, or checked until
it is back, while its requests go to the others. A server that fails one request after the other rests (rests.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from dsc_hub.errors import ServingError
from dsc_hub.inference import retries
from dsc_hub.inference.concurrency import BACK, FIRST, ConcurrencyLimit
from dsc_hub.inference.quota import Quota
from dsc_hub.inference.rests import RESTS, FailureStreak
from dsc_hub.inference.retries import Again, RequestFailed, ServerGone
from dsc_hub.inference.servers import Endpoint
from dsc_hub.inference.task_pool import Stopped
from dsc_hub.system.progress import say

Concurrency = int | Literal["auto"]
T = TypeVar("T")
RESTARTS = 4  # tries to restart a server that we started
PROBES = 20  # health checks of an external server: about ten minutes, since it may have to load its model
CONTRADICTIONS = 10  # requests in a row that a server refuses and others accept, before it is given up
CONTRADICTIONS_AT_FIRST = 3  # the same of a server that has answered nothing yet


@dataclass(eq=False)
class PooledServer:
    """A server of a pool.

    `busy` is the number of its requests in flight. `probe` is a running health check. `restart_task` is set while the
    server is unreachable and being brought back, `rest_task` while it rests. `failure` is the reason why it was given
    up. `contradictions`: requests since its last answer that it refused and another server accepted. `counts_prompts`:
    whether its prompt tokens can be relied on; `count_check` is a running check whether it cuts prompts.
    """

    pool: ServerPool
    endpoint: Endpoint
    limit: ConcurrencyLimit
    proxy: str | None = None
    busy: int = 0
    probe: asyncio.Task[str | None] | None = None
    restart_task: asyncio.Task[None] | None = None
    rest_task: asyncio.Task[None] | None = None
    rests_firmly: bool = False  # answers to requests sent before do not end the rest
    streak: FailureStreak = field(default_factory=FailureStreak)
    quota: Quota = field(default_factory=Quota)
    answered: int = 0
    contradictions: int = 0
    counts_prompts: bool = True
    count_check: asyncio.Task[bool] | None = None
    failure: ServingError | None = None  # permanent

    @property
    def is_up(self) -> bool:
        return self.restart_task is None and self.failure is None

    @property
    def is_open(self) -> bool:
        return self.is_up and self.rest_task is None

    @property
    def has_room(self) -> bool:
        return self.is_open and self.busy < self.limit.now and not self.quota.wait_s(time.monotonic())


@dataclass(eq=False)
class _Waiter:
    beginning: str
    avoid: Collection[PooledServer]
    full: Collection[PooledServer]
    place: asyncio.Future[PooledServer]


@dataclass(eq=False)
class ServerPool:
    """Servers of the same model. `concurrency`: limit of each, or a tuple with one per server; `first_of_many` is where
    `auto` begins for one that takes many requests.

    `retries` is the generator's counter, in which "server back" is counted; `answered` counts the answered requests,
    `failed_in_a_row` the requests that failed for good since the last answer. `known` sends a request again that was
    answered before, to see whether a server still answers; `latest` sends the last one that was not.
    """

    endpoints: Sequence[Endpoint]
    concurrency: Concurrency | tuple[Concurrency, ...]
    retries: Counter[str]
    first_of_many: int = FIRST
    answered: int = 0
    failed_in_a_row: int = 0
    known: Callable[[PooledServer], Awaitable[object]] | None = None
    latest: Callable[[PooledServer], Awaitable[object]] | None = None
    all: list[PooledServer] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        limits = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency,) * len(self.endpoints)
        self.all = [
            PooledServer(self, e, ConcurrencyLimit(n, self.first_of_many if e.takes_many else FIRST), _proxy_of(e.url))
            for e, n in zip(self.endpoints, limits, strict=True)
        ]
        self._waiting: list[_Waiter] = []
        self._timer: asyncio.TimerHandle | None = None  # set while requests wait for a quota
        self._known_check: asyncio.Task[bool] | None = None
        # A health check of a silent server takes long: keep it out of the threads that resolve host names.
        self._threads = ThreadPoolExecutor(max(1, len(self.all)), "servers")

    def limit(self) -> int:
        """Return the concurrency limit of all servers that take requests; if all rest, of those that are up."""
        up = [server for server in self.all if server.is_up]
        return sum(server.limit.now for server in [s for s in up if s.is_open] or up)

    async def acquire(
        self, beginning: str, avoid: Collection[PooledServer] = (), full: Collection[PooledServer] = ()
    ) -> PooledServer:
        """Return a server with a free place; give the place back with `release`.

        Waits while all servers are at their limit or none takes requests; ServingError if none will come back. The same
        beginning prefers the same server, so no state per chain is needed. The servers to `avoid` are chosen only if no
        other takes requests, the `full` ones only if no other has a free place.
        """
        waiter = _Waiter(beginning, avoid, full, asyncio.get_running_loop().create_future())
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
                server.quota.spend()
                waiter.place.set_result(server)
            else:
                waiting.append(waiter)
                if not any(server.has_room for server in self.all):
                    waiting += self._waiting[n + 1 :]
                    break
        self._waiting = waiting
        now = time.monotonic()
        waits = [s.quota.wait_s(now) for s in self.all if waiting and s.is_open and s.busy < s.limit.now]
        if self._timer is None and (wait_s := min(waits, default=0.0)):
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._quota_renewed)

    def _quota_renewed(self) -> None:
        self._timer = None
        self._let_in()

    def _choose(self, waiter: _Waiter) -> PooledServer | None:
        usable = [server for server in self.all if server.is_open]
        usable = [server for server in usable if server not in waiter.avoid] or usable
        free = [server for server in usable if server.has_room]
        free = [server for server in free if server not in waiter.full] or free
        if len(usable) < 2 or not free:
            return free[0] if free else None
        first = max(usable, key=lambda server: _affinity(server.endpoint.url, waiter.beginning))  # rendezvous hashing
        return first if first in free else min(free, key=lambda server: server.busy / server.limit.now)

    def _all_failed(self) -> ServingError | None:
        return self.all[-1].failure if all(server.failure for server in self.all) else None

    def others(self, excluded: Collection[PooledServer], with_room: bool = False) -> bool:
        """Return whether a server takes requests (`with_room`: at once) that is not among the excluded ones."""
        return any((s.has_room if with_room else s.is_open) and s not in excluded for s in self.all)

    def succeeded(self, server: PooledServer, number: int, refused_by: Mapping[PooledServer, RequestFailed]) -> None:
        """Record the answer to a request (its number at the server), after it was refused by some servers."""
        self.answered += 1
        self.failed_in_a_row = 0
        server.answered += 1
        server.contradictions = 0
        server.streak.answered(number)
        if server.rest_task and not server.rests_firmly:
            # What it refused is back, so that those in flight, and this one, are what it can carry.
            server.limit.lower(server.busy)
            server.rest_task.cancel()
            server.rest_task = None
            server.streak.resume_early()
        for other, error in refused_by.items():
            self._contradicted(other, error)

    def _contradicted(self, server: PooledServer, error: RequestFailed) -> None:
        server.contradictions += 1
        most = CONTRADICTIONS if server.answered else CONTRADICTIONS_AT_FIRST
        if server.contradictions >= most and server.failure is None:
            self.retire(
                server,
                ServingError(
                    f"{error.message}; other servers accepted {server.contradictions} such requests",
                    "All servers of a run need the same model, context and parameters.",
                ),
            )

    def failed(self, server: PooledServer, error: Again, number: int) -> None:
        """Record a failed try (its number at the server); the server rests if it fails all that is sent."""
        if error.is_overload and server.quota.wait_s(time.monotonic()):
            server.streak.dropped(number)  # it has said until when its quota is used up
            return
        if error.is_overload:
            server.limit.refused()
        should_rest = server.streak.failed(number)
        if should_rest and server.is_open and (error.is_overload or self.others([server])):
            server.rests_firmly = server.streak.is_trial or not error.is_overload
            server.streak.rests += 1
            pause_s = max(error.wait_s or 0.0, retries.backoff(server.streak.rests - 1))
            server.rest_task = asyncio.create_task(self._rest(server, error, pause_s))

    async def _rest(self, server: PooledServer, error: Again, pause_s: float) -> None:
        """Send a server nothing for some time. After the second rest it gets one request alone before all others."""
        started = time.monotonic()
        while True:
            await asyncio.sleep(pause_s)
            if server.failure or server.streak.rests == 1:
                break
            if server.streak.rests == 2:
                say(f"{error}\n  it gets no requests but one from time to time, until it answers again")
            if server.restart_task is None and await self._answers(server):
                server.streak.rests = 0
                break
            server.streak.rests += 1
            pause_s = retries.backoff(server.streak.rests - 1)
            if server.streak.rests > RESTS:
                seconds = time.monotonic() - started
                failure = ServingError(
                    f"{error}; it has not answered for {seconds:.0f} s",
                    "What is finished is kept; run the same command again when the server has room.",
                )
                server.rest_task = None
                self.retire(server, failure)
                return
        if not server.rests_firmly:
            server.limit.lower(int(server.limit.now * BACK))
        server.rest_task = None
        server.streak.resume()
        self._let_in()

    async def _answers(self, server: PooledServer) -> bool:
        """Return whether a server answers a request that was answered before, or else the latest that was not."""
        if (ask := self.known or self.latest) is None:
            return True
        try:
            await ask(server)
        except (Again, ServerGone, ServingError):
            return False
        except Stopped:  # Ctrl-C: what waits for the server must wake up and see that, too
            return True
        return True

    async def still_answers(self, server: PooledServer) -> bool:
        """Return whether a server answers a request again that was answered before; False if none was."""
        if self.known is None or not server.is_up:
            return False
        if self._known_check is None:  # one for all requests that failed together
            self._known_check = asyncio.ensure_future(self._answers(server))
            self._known_check.add_done_callback(self._forget_check)
        return await asyncio.shield(self._known_check)

    def _forget_check(self, check: asyncio.Task[bool]) -> None:
        self._known_check = None

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
            longest_s, first_s = retries.LONGEST_S, 2 * retries.WAIT_S
            await asyncio.sleep(min(longest_s, first_s * 4**n) * random.uniform(0.75, 1.25))
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
        tasks = [task for s in self.all for task in (s.restart_task, s.rest_task, s.count_check)]
        for task in (*tasks, self._known_check):
            if task:
                task.cancel()
        if self._timer:
            self._timer.cancel()
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
