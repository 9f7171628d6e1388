"""Requests to servers with the standard library: http and https only, and no redirect is followed."""

from __future__ import annotations

import urllib.request
from typing import Any


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treat a redirect as an ordinary reply: following it would send the key to a host that the user did not name."""

    def redirect_request(self, *args: Any) -> None:
        return None


# http and https only: with file:, ftp: or data: an address would read something that is not a server.
_opener = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
    _NoRedirect,
):
    _opener.add_handler(_handler())


def open_url(request: urllib.request.Request, timeout_s: float) -> Any:
    """Open a request and return the reply; errors as in urllib (HTTPError for a redirect, too)."""
    return _opener.open(request, timeout=timeout_s)
