"""What was fetched with a network is found again without one, at the same commits and in the same run folder: a model, a classifier
that scores, a dataset of prompts, a Space's metric, an adapter and a recipe, from an embedded Hub that has ended by then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from dsc_hub.local_hub.server import Address, running
from tests.conftest import RECIPE, ROOT

METRIC = '''
import datasets
import evaluate


class Words(evaluate.Measurement):
    unit = "words"
    higher_is_better = True

    def _info(self):
        features = datasets.Features({"data": datasets.Value("string")})
        return evaluate.MeasurementInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, data):
        return {"scores": [float(len(text.split())) for text in data]}
'''
CARD = """---
license: cc-by-4.0
configs:
- config_name: long
  default: true
  data_files: long.jsonl
- config_name: short
  data_files: short.jsonl
---
"""


def rows(kind: str) -> bytes:
    return "".join(
        json.dumps({"goal": f"Ask for {k} in {kind} way {i}.", "topic": k}) + "\n" for k in "abcdefgh" for i in (1, 2)
    ).encode()


@dataclass
class Published:
    """An embedded Hub's root, and the commits of what it holds."""

    root: Path
    commits: dict[str, str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"ask for it a film in way".split()])}
    t = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=64, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, classifier, base: Path) -> Published:
    root = tmp_path_factory.mktemp("hub")
    stars = Path(classifier([f"{n} stars" for n in range(1, 6)]))
    with running(root) as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        for name, folder in {"base": base, "polarity": Path(classifier(["NEGATIVE", "POSITIVE"])), "stars": stars}.items():
            api.create_repo(f"local/{name}", private=True)
            api.upload_folder(repo_id=f"local/{name}", folder_path=folder)
        api.create_repo("local/wishes", repo_type="dataset", private=True)
        files = {"README.md": CARD.encode(), "long.jsonl": rows("long"), "short.jsonl": rows("short")}
        commit(api, "local/wishes", "dataset", files)
        api.create_repo("local/words", repo_type="space", space_sdk="static", private=True)
        commit(api, "local/words", "space", {"words.py": METRIC.encode()})
        api.create_repo("local/tuned", private=True)
        config = json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "local/base"})
        commit(api, "local/tuned", "model", {"adapter_config.json": config.encode(), "adapter_model.safetensors": b"x"})
        api.create_repo("local/task", repo_type="dataset", private=True)
        commit(api, "local/task", "dataset", {"recipe.yaml": RECIPE.encode(), "films.txt": b"a\nb\nc\nd\ne\nf\n"})
        kinds = {"wishes": "dataset", "words": "space", "task": "dataset"}
        names = ("base", "polarity", "stars", "wishes", "words", "tuned", "task")
        infos = {n: api.repo_info(f"local/{n}", repo_type=kinds.get(n, "model")).sha for n in names}
    return Published(root, infos)


def commit(api: HfApi, repo: str, repo_type: str, files: dict[str, bytes]) -> str:
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(repo, operations, commit_message="1", repo_type=repo_type).oid


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = yaml.safe_load(RECIPE)
    data["model"] = {"source": "local/base"}
    data["prompts"] = {
        "dataset": "local/wishes",
        "column": "goal",
        "group_column": "topic",
        "split": data["prompts"]["split"],
    }
    data["reward"] = {"metric": "sentiment", "scorer": "local/polarity"}
    data["second_scorer"] = {"metric": "sentiment", "scorer": "local/stars"}
    data["evaluation"] = {"arms": ["base"]}
    data["hygiene"] = {"language": "any"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "recipe.yaml"


def dsc(file: Path, address: Address | None, *words: str, code: int = 0, home: Path, **env: str):
    """Run dsc with a Hub, or (address None) offline, with an address at which nothing answers."""
    hub = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    if address is not None:
        hub = {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token, "HF_HUB_DISABLE_XET": "1"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    folders = {"HF_HOME": str(file.parent / "hf"), "DSC_HUB_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "dsc_hub", *words],
        cwd=file.parent,
        env=clean | hub | folders | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def run(file: Path, home: Path):
    def call(address: Address | None, *words: str, code: int = 0, **env: str):
        return dsc(file, address, *words, code=code, home=home, **env)

    return call


def test_what_was_fetched_is_planned_sampled_and_scored_without_a_network(run, file: Path, published, server: str):
    words = ["recipe.yaml", f"serving.endpoints=[{server}]"]
    with running(published.root) as address:
        fetched = json.loads(run(address, "fetch", *words, "--json").stdout)
        online = json.loads(run(address, "plan", *words, "--json").stdout)
    parts = {part["place"]: part for part in fetched["parts"]}
    commits = {place: published.commits[n] for place, n in (("model", "base"), ("prompts", "wishes"), ("reward", "polarity"), ("second_scorer", "stars"))}
    assert {place: part["commit"] for place, part in parts.items()} == commits
    assert all(part["bytes"] > 500 for part in parts.values())
    assert fetched["offline"] == f"HF_HUB_OFFLINE=1 dsc run recipe.yaml 'serving.endpoints=[{server}]'"
    assert fetched["servers"] == [f"serving.endpoints ({server.split('//')[1].split('/')[0]})"]
    offline = json.loads(run(None, "plan", *words, "--json").stdout)
    assert fetched["run"] == offline["run"] == online["run"]
    marker = json.loads(run(None, "sample", *words, "--json").stdout)
    assert marker["result"]["finished"] == marker["result"]["chains"] > 0 and marker["result"]["first_reward"] is not None
    facts = json.loads((file.parent / offline["run"] / "run.json").read_text())
    assert facts["model"]["license"] == "apache-2.0"  # of the card that was fetched
    assert facts["identity"]["prompts"] == f"local/wishes@{published.commits['wishes']}"
    # and with the network again it is the same run: nothing is left to sample
    with running(published.root) as address:
        assert "sampling: done before" in run(address, "sample", *words).stderr
