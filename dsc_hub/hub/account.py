"""An account at a Hub: the user of a token, and the permissions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from dsc_hub import __version__
from dsc_hub.errors import HubError
from dsc_hub.hub.errors import as_hub_error
from dsc_hub.hub.retry import with_retries
from dsc_hub.system.addresses import HUB_PORT

LOGIN_TRIES, LOGIN_REPLY_S = 3, 20.0  # somebody waits, and a wrong address is no better after a minute
# permissions of a fine-grained token, either of which is sufficient
WRITING = frozenset({"repo.write", "repo.content.write"})


@dataclass(frozen=True)
class Account:
    """A user at an endpoint, with the token (never printed)."""

    endpoint: str
    owner: str
    token: str = field(repr=False)
    names: tuple[str, ...] = ()  # the user, and the organisations with write access
    # Namespaces and `TYPE:NAMESPACE/NAME` that a fine-grained token may write to; None: whatever its user may.
    scopes: frozenset[str] | None = None
    is_embedded: bool = False  # of the embedded Hub, whose address ends with the command

    def may_write(self, repo_type: str, repo: str) -> bool:
        """Return whether the repo is writable, without a request: for an existing repo the Hub decides."""
        namespace = repo.partition("/")[0]
        writable = self.names if self.scopes is None else self.scopes
        return namespace in writable or f"{repo_type}:{repo}" in writable

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token, library_name="dsc_hub", library_version=__version__)


def _scopes(access: Mapping[str, Any]) -> frozenset[str] | None:
    """Return what a fine-grained token may write to, according to `whoami`; None for other tokens or unknown scopes."""
    if access.get("role") != "fineGrained" or (scoped := (access.get("fineGrained") or {}).get("scoped")) is None:
        return None
    scopes = set()
    for scope in scoped:
        entity = scope.get("entity") or {}
        if not WRITING & set(scope.get("permissions") or ()):
            continue
        if entity.get("type") not in ("user", "org", *constants.REPO_TYPES_MAPPING.values()):
            return None  # an unknown type: the Hub decides
        is_namespace = entity["type"] in ("user", "org")
        scopes.add(str(entity.get("name")) if is_namespace else f"{entity['type']}:{entity.get('name')}")
    return frozenset(scopes)


def login(owner: str | None, endpoint: str | None = None, token: str | None = None) -> Account:
    """Return the account of the token at the endpoint; check write access to `owner`.

    HubError: no token, an invalid or read-only one, or one that belongs to another owner.
    """
    endpoint = endpoint or constants.ENDPOINT
    token = token or get_token()
    if urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1"):
        # A Hub on this machine is the embedded one: large files are transferred over plain HTTP there.
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        constants.HF_HUB_DISABLE_XET = True
    if not token:
        raise HubError(
            f"no token for {endpoint}: publishing needs one with write access",
            "Set HF_TOKEN or run `hf auth login`; publish.to=local needs no account, publish.to=none publishes "
            "nothing.",
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the client would print it in its message about an invalid header
        raise HubError(
            "the token holds spaces or other characters that no token has", "Set HF_TOKEN to the token alone."
        )
    with as_hub_error("token", endpoint):
        api = HfApi(endpoint=endpoint, token=token)
        user: dict[str, Any] = with_retries("login", api.whoami, LOGIN_TRIES, LOGIN_REPLY_S)
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(f"the token for {endpoint} can only read", "Make one with write access and set HF_TOKEN.")
    names = (user["name"], *(o["name"] for o in user.get("orgs", ()) if o.get("roleInOrg") != "read"))
    if owner and owner not in names:
        raise HubError(
            f"'{owner}' is somebody else's at {endpoint}: the token belongs to {', '.join(names)}",
            "Set publish.owner to one of these.",
        )
    owner, scopes = owner or user["name"], _scopes(access)
    if scopes is not None and owner not in {s.rpartition(":")[2].partition("/")[0] for s in scopes}:
        raise HubError(
            f"the fine-grained token for {endpoint} may not write to repos of '{owner}', but to: "
            f"{', '.join(sorted(scopes)) or 'nothing'}",
            "Give it write access to repos of that namespace, on its page in your settings.",
        )
    return Account(endpoint, owner, token, names, scopes)


def web_address(account: Account, repo_type: str, repo: str) -> str:
    """Return the address of a repo's page; of the embedded Hub that at which `dsc hub serve` shows it."""
    endpoint = f"http://127.0.0.1:{HUB_PORT}" if account.is_embedded else account.endpoint
    return f"{endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo}"


def prepare_for_embedded(endpoint: str) -> None:
    """Prepare the client for the embedded Hub: it is reachable even in offline mode, in which nothing else is."""
    if constants.is_offline_mode():
        set_client_factory(lambda: _client_for(endpoint))
    disable_progress_bars()  # transfers take seconds on the local disk


def _client_for(endpoint: str) -> httpx2.Client:
    """Return a client for one Hub: as the library's own in offline mode, it refuses requests to any other."""

    def refuse_others(request: httpx2.Request) -> None:
        if request.url.netloc.decode() != urlsplit(endpoint).netloc:
            raise OfflineModeIsEnabled(f"{request.url.host}: HF_HUB_OFFLINE is set")

    return httpx2.Client(event_hooks={"request": [refuse_others]}, follow_redirects=True, timeout=None)
