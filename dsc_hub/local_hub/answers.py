"""Replies of the local hub: errors with the headers that clients read, parsing of JSON bodies, pages of JSON lists."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .store import Refusal

MAX_PAGE = 1000


def refusal_response(request: Request, refusal: Refusal) -> Response:
    """Return the JSON error that the clients expect.

    They choose the exception class by X-Error-Code and show X-Error-Message.
    """
    headers = dict(refusal.headers)
    # Header bytes are latin-1 and messages may quote any path, so non-printable characters are replaced.
    headers["X-Error-Message"] = re.sub(r"[^\x20-\x7e]", "?", refusal.message)
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return JSONResponse({"error": refusal.message} | refusal.body, status_code=refusal.status, headers=headers)


def base_url(request: Request) -> str:
    """Return the address under which this client reached the hub."""
    return f"{request.url.scheme}://{request.headers.get('host') or request.url.netloc}"


def repo_url(request: Request, repo_type: str, repo_id: str) -> str:
    """Return the page address of a repo; models are at the root, as on the Hub."""
    return f"{base_url(request)}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"


def flag(value: str | None) -> bool:
    """Return whether a query parameter is true."""
    return (value or "").lower() in ("1", "true")


def wanted(body: Any, key: str, kind: type = str) -> Any:
    """Return a required field of the given type; 400 if it is missing or of another type."""
    value = body.get(key) if isinstance(body, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise Refusal(400, f'"{key}" is required')
    return value


def optional(body: Any, key: str, default: str | None = None) -> Any:
    """Return an optional text; `default` if it is missing, null or empty, 400 for another type."""
    value = body.get(key) if isinstance(body, dict) else None
    if value is not None and not isinstance(value, str):
        raise Refusal(400, f'"{key}" must be a string')
    return value or default


def parsed(raw: bytes) -> Any:
    """Return the parsed JSON body; 400 if it is invalid or has half surrogate pairs, which no reply could encode."""
    try:
        value = json.loads(raw.decode("utf-8"))
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError):
        raise Refusal(400, "The request body is not valid JSON") from None


def takes_json(handler: Callable[[Request, dict[str, Any]], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Make an endpoint of a handler that receives the JSON body and may block: it runs in the thread pool."""

    @functools.wraps(handler)
    async def endpoint(request: Request) -> Response:
        body = parsed(await request.body() or b"{}")
        if not isinstance(body, dict):
            raise Refusal(400, "The request body must be a JSON object")
        return await run_in_threadpool(handler, request, body)

    return endpoint


def page(request: Request, items: list[Any], default_size: int = MAX_PAGE) -> Response:
    """Return one page of a listing; the Link header points to the next one."""
    start = _natural(request, "cursor", 0)
    size = min(max(_natural(request, "limit", default_size), 1), MAX_PAGE)
    headers = {}
    if start + size < len(items):
        query = [(k, v) for k, v in request.query_params.multi_items() if k != "cursor"] + [("cursor", start + size)]
        headers["Link"] = f'<{base_url(request)}{request.url.path}?{urlencode(query)}>; rel="next"'
    return JSONResponse(items[start : start + size], headers=headers)


def _natural(request: Request, key: str, default: int) -> int:
    value = request.query_params.get(key) or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise Refusal(400, f'"{key}" must be a number')
    return int(value)
