"""Conversion of the client library's exceptions into `HubError` with a readable message."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx2  # the HTTP library of huggingface_hub, which passes on its transport errors
from huggingface_hub import (
    HfApi,
    constants,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from dsc_hub.errors import DscError, HubError, disk_error

UNREACHED = "Is the network up, and HF_ENDPOINT right?"

# exceptions that the client raises
_FAILURES = (HfHubHTTPError, RevisionResolutionError, httpx2.TransportError, OSError, ValueError)
_NOT_CACHED = (LocalEntryNotFoundError, RevisionResolutionError)


@contextmanager
def as_hub_error(what: str, endpoint: str, go_on: str = "") -> Iterator[None]:
    """Convert the client's exceptions into an error with a one-line message.

    `go_on` is the hint if the Hub is busy or unreachable. None of the client's messages contains the token.
    """
    try:
        yield
    except _FAILURES as e:
        raise _as_error(e, what, endpoint, go_on) from None


def _as_error(e: BaseException, what: str, endpoint: str, go_on: str) -> DscError:
    if isinstance(e, GatedRepoError):
        return HubError(
            f"{what}: access is gated at {endpoint}",
            f"Ask for access on its page, and log in with `hf auth login` (endpoint {endpoint}).",
        )
    if isinstance(e, RepositoryNotFoundError):
        if kind := _other_kind(e, endpoint):
            return HubError(
                f"{what}: a {kind} has that name at {endpoint}, expected a {e.repo_type}",
                "Adapters and base models are model repos, prompts and rows dataset repos.",
            )
        return HubError(
            f"{what}: not found at {endpoint}, or private and not yours",
            "Check the name; private repos need HF_TOKEN or `hf auth login`.",
        )
    if isinstance(e, RevisionNotFoundError):
        return HubError(f"{what}: no such revision at {endpoint}", _revisions(e, endpoint))
    if isinstance(e, HFValidationError):
        return HubError(f"{what}: not a repo name", "A repo is USER/NAME; a local folder starts with ./ or /.")
    if isinstance(e, HfHubHTTPError):
        status = e.response.status_code if e.response is not None else 0
        hint = {
            401: "The token isn't valid there: set HF_TOKEN or run `hf auth login` again.",
            403: "The token has no right to do that: it needs write access to this namespace.",
            412: go_on or "Somebody else changed the repo in the meantime; publish again.",
        }.get(status, go_on if status == 429 or status >= 500 else "")
        return HubError(f"{what}: {endpoint} answered {status}: {one_line(e.server_message or str(e))}", hint)
    if isinstance(e, _NOT_CACHED) and isinstance(e.__cause__, _FAILURES):
        # The request failed, and the client then reports only that the cache has no copy.
        return _as_error(e.__cause__, what, endpoint, go_on)
    if isinstance(e, (OfflineModeIsEnabled, *_NOT_CACHED)) and constants.is_offline_mode():
        return HubError(
            f"{what}: offline, and not in the cache",
            "Run `dsc fetch RECIPE` first, where there is a network, with the same HF_HOME; or unset HF_HUB_OFFLINE.",
        )
    if isinstance(e, json.JSONDecodeError):
        return HubError(
            f"{what}: {endpoint} answered something that is no JSON",
            go_on or "Is there a proxy before it, or is it down?",
        )
    if isinstance(e, ValueError):
        return HubError(f"{what}: refused before it was sent: {one_line(str(e))}")
    if isinstance(e, OSError) and (disk := disk_error(e)):
        return disk
    return HubError(f"{what}: {endpoint} can't be reached: {one_line(str(e)) or type(e).__name__}", go_on or UNREACHED)


def one_line(text: str) -> str:
    """Return the message of a client or a Hub as one line.

    Addresses lose their query, which may be signed, and anything that looks like a token is masked.
    """
    text = re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]*", r"\1", " ".join(text.split()))
    return re.sub(r"\bhf_\w{8,}", "hf_...", text)[:400]


def _other_kind(e: RepositoryNotFoundError, endpoint: str) -> str | None:
    """Return the type of another repo with the requested name, if the user's Hub has one."""
    if endpoint != constants.ENDPOINT or not e.repo_id:
        return None
    try:
        kinds = [kind for kind in ("model", "dataset", "space") if kind != e.repo_type]
        return next((kind for kind in kinds if HfApi().repo_exists(e.repo_id, repo_type=kind)), None)
    except _FAILURES:  # optional detail: the error is still that the repo was not found
        return None


def _revisions(e: RevisionNotFoundError, endpoint: str) -> str:
    """Return a hint with the existing revisions. Their names are untrusted: made printable and truncated."""
    names: list[str] = []
    if endpoint == constants.ENDPOINT and e.repo_id:
        with suppress(*_FAILURES):  # optional detail
            refs = HfApi().list_repo_refs(e.repo_id, repo_type=e.repo_type)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
    if not names:
        return "Name a branch, a tag or a commit of it."
    shown = ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) for name in names[:5]]
    shown = [name if len(name) <= 40 else f"{name[:39]}\N{HORIZONTAL ELLIPSIS}" for name in shown]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"It has {', '.join(shown)}{more}; a commit can be named too."
