"""The Hub variants of the packaged recipes, with tiny models of an embedded Hub in the place of the large ones: what `main` was at
the start is recorded as commits, and the classifiers are loaded at these and score."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from dsc_hub.local_hub.server import Address, running
from tests.conftest import ROOT

DESCRIBE = """
import json, sys
from pathlib import Path
from dsc_hub.metrics import loading
from dsc_hub.pipeline.resolve import resolve_recipe
from dsc_hub.records import Prompt
context = resolve_recipe(sys.argv[1], sys.argv[2:], Path("runs"))
scorers = loading.load_all(context.recipe, context.identity, context.path.parent)
prompt = Prompt("p", "Write.", "g", "test", "harmful")
scores = {name: s.score(["a good film", "bad"], [prompt] * 2) for name, s in scorers.items()}
print(json.dumps({"identity": context.identity, "scores": {n: [s.value for s in of] for n, of in scores.items()}}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, classifier) -> Iterator[tuple[Address, HfApi]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(base)
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    (base / "tokenizer.json").write_text("{}")
    folders = {
        "base": base,
        "polarity": Path(classifier(["NEGATIVE", "POSITIVE"])),
        "stars": Path(classifier([f"{n} stars" for n in range(1, 6)])),
        "hate": Path(classifier(["nothate", "hate"])),
    }
    with running(tmp_path_factory.mktemp("hub")) as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        for name, folder in folders.items():
            api.create_repo(f"local/{name}", private=True)
            api.upload_folder(repo_id=f"local/{name}", folder_path=folder)
        yield address, api


def described(hub: tuple[Address, HfApi], work: Path, *words: str) -> dict:
    address, _ = hub
    env = {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token, "HF_HOME": str(work / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, *words, "model.source=local/base"],
        cwd=work,
        env=os.environ | env | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_classifiers_of_sentiment_are_recorded_at_commits_and_score(hub, tmp_path: Path):
    found = described(
        hub, tmp_path, "sentiment/hub", "reward.scorer=local/polarity", "second_scorer.scorer=local/stars"
    )
    commit = {name: hub[1].model_info(f"local/{name}").sha for name in ("base", "polarity", "stars")}
    assert commit["base"] in found["identity"]["model"]
    assert found["identity"]["reward"] == f"sentiment/local/polarity@{commit['polarity']}"
    assert found["identity"]["second_scorer"] == f"sentiment/local/stars@{commit['stars']}"
    assert all(-1 <= v <= 1 for of in found["scores"].values() for v in of)


def test_the_classifier_of_safety_is_added_to_the_rule(hub, tmp_path: Path):
    plus = "reward.plus=[{metric: safety, scorer: local/hate, weight: 0.5}]"
    found = described(hub, tmp_path, "safety/hub", plus)
    assert found["identity"]["reward.plus.0"] == f"safety/local/hate@{hub[1].model_info('local/hate').sha}"
    assert all(0 < v < 0.5 for v in found["scores"]["reward"])  # harmful and not refused: 0, and half of p(no hate)
