"""A few random cases of each kind with every test run; ten minutes of each with `make long`. See tests/fuzz.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dsc_hub.config import untrusted
from tests import fuzz


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("target", "most"),
    [("recipes", 100), ("tables", 200), ("texts", 40), ("runs", 5), ("hub", 1000), ("pull", 10), ("verify", 10)],
)
def test_a_few_damaged_inputs_are_errors_for_users(target: str, most: int):
    n, findings = fuzz.fuzz(target, 120, seed=1, most=most)
    assert n and not findings, "\n\n".join(findings)


@pytest.mark.long
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_ten_minutes_of_damaged_inputs_are_errors_for_users(target: str):
    n, findings = fuzz.fuzz(target, 600, seed=random.randrange(10**6))
    print(f"{target}: {n} cases in 600 s, {len(findings)} findings")
    assert not findings, "\n\n".join(findings)


def test_a_traceback_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise KeyError("chain")

    monkeypatch.setattr(untrusted, "read_untrusted", broken)
    n, findings = fuzz.fuzz("recipes", 60, most=3)
    assert n == 3 and len(findings) == 1 and "KeyError: 'chain'" in findings[0]
