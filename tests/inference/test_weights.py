"""Conversion of weights: what happens around it. The conversions themselves run for real in tests/e2e."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsc_hub.errors import ModelError
from dsc_hub.inference import weights


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the child processes, in a home of their own."""
    commands: list[list[str]] = []
    run = subprocess.run

    def counted(command: list[str], **keys: object) -> object:
        commands.append(command)
        return run(command, **keys)

    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", counted)
    return commands


def convert(function: str = "Path") -> Path:  # Path(folder) is a conversion that writes nothing
    return weights.converted("some-model", function, [], {"source": "somewhere"}, "the model")


def test_of_two_that_need_the_same_model_one_converts_and_the_other_waits(conversions, tmp_path: Path, capsys):
    with ThreadPoolExecutor(2) as both:
        one, other = (both.submit(convert) for _ in range(2))
        assert one.result() == other.result() == tmp_path / "models" / "some-model"
    assert len(conversions) == 1 and "another process converts the model" in capsys.readouterr().err
    assert convert() == one.result() and len(conversions) == 1


def test_what_a_killed_conversion_left_is_removed_and_not_taken_for_a_model(conversions, tmp_path: Path):
    for name in ("some-model.part", "some-model"):  # the second: without complete.json
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "half.safetensors").write_bytes(b"half")
    folder = convert()
    assert [p.name for p in folder.iterdir()] == ["complete.json"]
    assert {p.name for p in folder.parent.iterdir()} == {"some-model", ".some-model.lock"}


def test_a_conversion_that_fails_says_why_and_leaves_nothing(conversions, tmp_path: Path):
    with pytest.raises(ModelError, match="could not convert the model: .*") as raised:
        convert("absent")
    assert "absent" in str(raised.value)
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".some-model.lock"]
