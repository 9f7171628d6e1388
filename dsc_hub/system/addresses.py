"""Validation of model server addresses and of the names of environment variables with API keys."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

HUB_PORT = 8765  # of `dsc hub serve`

_KEY_NAME = re.compile(r"(?:[A-Z][A-Z0-9_]*_)?API_(?:KEY|TOKEN)")
# Variables of that form for other services: clouds, hubs, trackers, code hosts, package registries.
_OTHER_ACCOUNTS = re.compile(
    r"(?:AWS|GCP|GCLOUD|GOOGLE_CLOUD|HF|HUGGING\w*|CF|BITBUCKET|CIRCLE|CIRCLECI|TRAVIS|HEROKU|VERCEL|NETLIFY|FLY"
    r"|WANDB|COMET|NEPTUNE|MLFLOW|CLEARML"
    r"|GITHUB|GH|GITLAB|KAGGLE"
    r"|DOCKER|NPM|PYPI|TWINE|CLOUDFLARE|DIGITALOCEAN|VAULT|STRIPE|SLACK|SENTRY|DATADOG|DD)_.*"
)


def checked_address(url: str) -> str:
    """Return the address of an OpenAI-compatible server, up to and including /v1; ValueError if it is invalid."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises ValueError for an invalid port
    except ValueError as e:
        raise ValueError(f"should be an address like http://host:8000/v1, got {url!r:.100} ({e})") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "an address holds no user or password: it is shown and logged; put the key into a variable (api_key_env)"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f]", url):
        raise ValueError(f"should be an address like http://host:8000/v1, got {url!r:.100}")
    return url


def checked_key_name(name: str) -> str:
    """Return the name of a variable that may hold a model server's key; ValueError for any other name.

    In particular, variables with credentials for clouds, hubs and code hosts are refused.
    """
    if not _KEY_NAME.fullmatch(name) or _OTHER_ACCOUNTS.fullmatch(name):
        raise ValueError(
            "should name a variable for a model server's key, as OPENAI_API_KEY (its name ends with API_KEY or "
            "API_TOKEN, and is not "
            f"one of a cloud, hub or code host), got {name!r:.60}; put the key into such a variable"
        )
    return name


def host(url: str) -> str:
    """Return the host of an address, with the port if there is one."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def is_open(url: str) -> bool:
    """Return whether requests to this address cross a network unencrypted."""
    parts = urlsplit(url)
    if parts.scheme != "http":
        return False
    name = parts.hostname or ""
    try:
        return not ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name != "localhost" and not name.endswith(".localhost")
