"""What a request may bring before anything of it is believed: a Host of this machine, and a body that fits its sender."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .store import Refusal

HOSTS = ["127.0.0.1", "localhost"]  # any other name is a page of a browser that was led here (DNS rebinding)
OF_A_STRANGER = 2**20  # bytes without a token
OF_A_USER = 2**29  # bytes with one: a commit with its small files; large ones go by LFS, to disk


class LimitBody:
    """Ends a request whose body grows beyond its sender's limit. Uploads by LFS have signed addresses and go to disk."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] == "PUT" and scope["path"].startswith("/_lfs/")):
            await self.app(scope, receive, send)
            return
        most, seen = OF_A_USER if _has_token(scope) else OF_A_STRANGER, 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise Refusal(413, f"The request body is larger than {most:,} bytes")
            return message

        await self.app(scope, limited, send)


def _has_token(scope: Scope) -> bool:
    value = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    return value.partition(" ")[2].strip() in scope["app"].state.users
