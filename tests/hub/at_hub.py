"""The Hub's clients of this process pointed at a test's own Hub, as HF_ENDPOINT and HF_TOKEN would have done at their import."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from dsc_hub.local_hub.server import Address


def point(monkeypatch: pytest.MonkeyPatch, address: Address, cache: Path) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", address.token)
