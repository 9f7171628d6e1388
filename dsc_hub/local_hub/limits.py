"""Limits that apply before a request is processed: the allowed Host values, and the size of the body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .store import Refusal

HOSTS = ["127.0.0.1", "localhost"]  # any other name comes from DNS rebinding in a browser
OF_A_STRANGER = 2**20  # maximum bytes without a token
# maximum bytes with a token: a commit with its small files; large ones are sent by LFS and written to disk
OF_A_USER = 2**29


class LimitBody:
    """Middleware that refuses a body larger than its sender's limit.

    LFS uploads are exempt: they have signed addresses and are written to disk.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] == "PUT" and scope["path"].startswith("/_lfs/")):
            await self.app(scope, receive, send)
            return
        limit, received = OF_A_USER if _has_token(scope) else OF_A_STRANGER, 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise Refusal(413, f"The request body is larger than {limit:,} bytes")
            return message

        await self.app(scope, limited, send)


def _has_token(scope: Scope) -> bool:
    value = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    return value.partition(" ")[2].strip() in scope["app"].state.users
