"""`dsc cache`: converted models are listed with what they are and their size, and removed by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsc_hub.errors import ConfigError
from dsc_hub.inference import converted_models
from dsc_hub.inference.weights import COMPLETE


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    for name, size, about in (
        ("small-1", 10, {"source": "package:small", "sha256": "a"}),
        ("rounded-2", 1000, {"identity": "acme/large@b", "quantization": {"load_in_4bit": True}}),
        ("rounded-3.part", 100, None),
    ):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * size)
        if about:
            (folder / COMPLETE).write_text(json.dumps(about))
    return tmp_path


def test_they_are_listed_with_what_they_are(home: Path):
    found = converted_models.converted_models()
    assert [(m.name, m.about) for m in found] == [
        ("rounded-2", "acme/large@b, rounded as training sees it"),
        ("rounded-3.part", ""),
        ("small-1", "package:small, converted"),
    ]
    assert found[0].bytes == 1000 + (home / "models" / "rounded-2" / COMPLETE).stat().st_size


def test_they_are_removed_by_name_and_nothing_else_is(home: Path):
    with pytest.raises(ConfigError, match=r"\.\./\.\., nosuch: not in"):
        converted_models.remove_converted(["small-1", "../..", "nosuch"])
    assert len(converted_models.converted_models()) == 3
    assert [m.name for m in converted_models.remove_converted(["small-1", "rounded-3.part"])] == [
        "small-1",
        "rounded-3.part",
    ]
    assert [m.name for m in converted_models.converted_models()] == ["rounded-2"]


def test_an_empty_cache_is_said(tmp_path: Path, dsc):
    shown = dsc("cache", code=0, DSC_HUB_HOME=str(tmp_path / "none"))
    assert "0 converted models, 0.0 MB" in shown.stdout
    assert "There are: none" in dsc("cache", "remove", "x", code=2, DSC_HUB_HOME=str(tmp_path / "none")).stderr
