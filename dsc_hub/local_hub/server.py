"""Start of the local hub: in a thread of this process during a `with` block, or in the foreground.

Several servers may use one root at the same time; they share its repos and its token. Clients need HF_ENDPOINT set
before they are imported, and HF_HUB_DISABLE_XET=1, since large files are sent over plain HTTP here.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import string
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_hub.errors import HubError
from dsc_hub.system.cache import cache_home

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.types import ASGIApp

USER = "local"
START_TIMEOUT_S = 30.0
# Time for requests in flight to finish after shutdown was requested.
SHUTDOWN_S = 3


@dataclass(frozen=True)
class Address:
    """Endpoint of a running hub, with a user and the user's token."""

    endpoint: str
    token: str
    user: str


def default_root() -> Path:
    """Return the folder of the user's local hub, in dsc's cache."""
    return cache_home() / "hub"


@contextmanager
def running(root: Path | None = None, port: int = 0) -> Iterator[Address]:
    """Run a hub on 127.0.0.1 during the block; it is ready when the block begins. Port 0 selects a free port."""
    root = Path(root or default_root())
    token, app = _token_and_app(root)
    with hosted(app, port) as endpoint:
        yield Address(endpoint, token, USER)


def serve(root: Path | None, port: int, host: str = "127.0.0.1") -> None:
    """Run a hub in the foreground, until Ctrl-C."""
    root = Path(root or default_root())
    _, app = _token_and_app(root)
    listener = _listen(host, port)
    print(f"Local hub at {_endpoint(listener)} (user {USER}, token in {root / 'token'}); Ctrl-C ends it", flush=True)
    try:
        _uvicorn(app).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


@contextmanager
def hosted(app: ASGIApp, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """Run any ASGI application in a daemon thread and yield its endpoint."""
    listener = _listen(host, port)
    endpoint, server = _endpoint(listener), _uvicorn(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="dsc-local-hub", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise HubError(f"the local hub at {endpoint} did not start")
            time.sleep(0.005)
        yield endpoint
    finally:
        server.should_exit = True
        thread.join(SHUTDOWN_S + START_TIMEOUT_S)
        listener.close()


def token_of(root: Path) -> str:
    """Return the token of the hub's only user.

    It is created at the first call, readable by its owner only, and shared by all servers.
    """
    path = root / "token"
    if not path.exists():
        letters = string.ascii_letters + string.digits
        draft = root / "tmp" / f"token-{secrets.token_hex(8)}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write("hf_" + "".join(secrets.choice(letters) for _ in range(34)))
        try:
            os.link(draft, path)  # unlike a rename this fails if another server was faster: one token wins
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    token = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch(r"hf_[A-Za-z0-9]{34}", token):
        hint = "Remove the file; a new token is made at the next start."
        raise HubError(f"{path} does not hold a token of the local hub", hint)
    return token


def _token_and_app(root: Path) -> tuple[str, Starlette]:
    """Return token and application for a root, which is created if it does not exist."""
    from .app import make_app
    from .store import Store

    try:
        store = Store(root)
        token = token_of(root)
    except OSError as error:
        hint = "Set DSC_HUB_HOME to a folder of yours."
        raise HubError(f"the local hub can't use {root}: {error.strerror}", hint) from error
    return token, make_app(store, {token: USER})


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OverflowError:
        raise HubError(f"{port} is not a port: ports go from 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = "Choose another with --port, or 0 for any free one."
            raise HubError(f"port {port} of {host} is taken by another program", hint) from error
        raise HubError(f"the local hub can't listen on {host} port {port}: {error.strerror}") from error


def _endpoint(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _uvicorn(app: ASGIApp) -> uvicorn.Server:
    import uvicorn

    # log_config=None leaves the logging of the calling program unchanged.
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)
