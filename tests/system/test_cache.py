"""A cache that can't be written ends nothing that can do without it; what needs it names DSC_HUB_HOME."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc_hub.errors import RunError
from dsc_hub.inference import weights
from dsc_hub.system import cache, hashing


@pytest.fixture(params=["below a file", "no folder", "a file"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("")
    home = {
        "below a file": tmp_path / "file" / "home",
        "no folder": Path("/proc/no/home"),
        "a file": tmp_path / "file",
    }[request.param]
    monkeypatch.setenv("DSC_HUB_HOME", str(home))
    return home


def test_what_can_be_made_again_is_made_again(unwritable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashing, "LARGE", 1)
    (tmp_path / "large.bin").write_bytes(b"x" * 10)
    assert hashing.file_hash(tmp_path / "large.bin") == hashing.file_hash(tmp_path / "large.bin")
    cache.remember_value("pace.json", "model", 3)
    assert cache.recall_value("pace.json", "model") is None


def test_what_needs_it_names_the_variable(unwritable: Path, tmp_path: Path):
    for needs_it in (
        cache.writable_home,
        lambda: cache.store_value("adopted.json", "a", 1),
        lambda: weights.converted("m", "quantise_weights", [], {}, "a model"),
    ):
        with pytest.raises(RunError, match="can't be written") as e:
            needs_it()
        assert "DSC_HUB_HOME" in e.value.hint and str(unwritable) in e.value.message


def test_where_it_can_be_written_it_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "new" / "home"))
    cache.remember_value("pace.json", "model", 3)
    cache.store_value("pace.json", "other", [4])
    assert (cache.recall_value("pace.json", "model"), cache.recall_value("pace.json", "other")) == (3, [4])
    assert cache.writable_home() == tmp_path / "new" / "home"
