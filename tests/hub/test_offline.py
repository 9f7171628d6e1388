"""What was fetched with a network is found again without one, at the same commits and in the same run folder: a model, a classifier
that scores, a dataset of prompts, a Space's metric, an adapter and a recipe, from an embedded Hub that has ended by then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from dsc_hub.local_hub.server import Address, running
from tests.conftest import RECIPE, ROOT

METRIC = """
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
"""
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
        for name, folder in {
            "base": base,
            "polarity": Path(classifier(["NEGATIVE", "POSITIVE"])),
            "stars": stars,
        }.items():
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
    commits = {
        place: published.commits[n]
        for place, n in (("model", "base"), ("prompts", "wishes"), ("reward", "polarity"), ("second_scorer", "stars"))
    }
    assert {place: part["commit"] for place, part in parts.items()} == commits
    assert all(part["bytes"] > 500 for part in parts.values())
    assert fetched["offline"] == f"HF_HUB_OFFLINE=1 dsc run recipe.yaml 'serving.endpoints=[{server}]'"
    assert fetched["servers"] == [f"serving.endpoints ({server.split('//')[1].split('/', maxsplit=1)[0]})"]
    offline = json.loads(run(None, "plan", *words, "--json").stdout)
    assert fetched["run"] == offline["run"] == online["run"]
    marker = json.loads(run(None, "sample", *words, "--json").stdout)
    assert (
        marker["result"]["finished"] == marker["result"]["chains"] > 0 and marker["result"]["first_reward"] is not None
    )
    facts = json.loads((file.parent / offline["run"] / "run.json").read_text())
    assert facts["model"]["license"] == "apache-2.0"  # of the card that was fetched
    assert facts["identity"]["prompts"] == f"local/wishes@{published.commits['wishes']}"
    # and with the network again it is the same run: nothing is left to sample
    with running(published.root) as address:
        assert "sampling: done before" in run(address, "sample", *words).stderr


def test_offline_names_all_that_was_resolved_and_not_fetched(run, published, server: str):
    words = ["recipe.yaml", f"serving.endpoints=[{server}]"]
    nothing = run(None, "plan", *words, code=2).stderr
    for thing in ("model 'local/base'", "dataset 'local/wishes'", "model 'local/polarity'", "model 'local/stars'"):
        assert f"{thing} at 'main': offline, and not in the cache" in nothing
    assert "Run `dsc fetch RECIPE` first" in nothing
    with running(published.root) as address:
        run(address, "plan", *words)  # fetches no weights and no classifiers
        assert "HF_HUB_OFFLINE is set" in run(address, "fetch", *words, code=2, HF_HUB_OFFLINE="1").stderr
    told = run(None, "plan", *words, code=2).stderr
    for place, name in (("model", "base"), ("reward", "polarity"), ("second_scorer", "stars")):
        line = f"{place}: model 'local/{name}' at '{published.commits[name]}': offline, and not in the cache"
        assert line in told
    assert "3 things of" in told and "prompts:" not in told and "Run `dsc fetch RECIPE` first" in told
    for verb in ("sample", "try"):
        assert "not in the cache" in run(None, verb, *words, code=2).stderr


RESOLVE = """
import sys
from pathlib import Path
from dsc_hub.hub import client
from dsc_hub.pipeline.resolve import resolve_recipe
print(resolve_recipe(sys.argv[1], sys.argv[2:], Path("runs")).run.folder)
print(client.pull_adapter("local/tuned")[1])
"""


def test_a_space_an_adapter_and_a_pulled_recipe_are_fetched_too(run, file: Path, published, server: str):
    space = f"local/words@{published.commits['words']}"
    own = ["recipe.yaml", f"serving.endpoints=[{server}]", "reward={metric: local/words, scorer: default}"]
    task = ["hub:local/task", "model.source=local/base", "evaluation.arms=[base]"]
    with running(published.root) as address:
        words = [*own, "--allow-code", space, "--adapter", "hub:local/tuned", "--json"]
        fetched = json.loads(run(address, "fetch", *words).stdout)
        online = json.loads(run(address, "fetch", *task, "--json").stdout)
    parts = {part["place"]: (part["name"], part["commit"]) for part in fetched["parts"]}
    assert parts["reward"] == ("local/words", published.commits["words"])
    assert parts["adapter"] == ("local/tuned", published.commits["tuned"])
    assert fetched["offline"].count(f"--allow-code {space}") == 1
    tried = json.loads(run(None, "try", *own, "--allow-code", space, "-n", "1", "--json").stdout)
    assert tried["chains"][0]["steps"]
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *task],
        cwd=file.parent,
        env=os.environ | {"HF_HOME": str(file.parent / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [online["run"], published.commits["tuned"]], done.stderr


READ = """
import json, sys
from dsc_hub.hub import client
out = []
for wish in sys.argv[1:]:
    config, revision = wish.split("@")
    commit = client.dataset_commit("local/moving", revision)
    out.append([commit, next(client.dataset_rows("local/moving", config or None, "train", commit))["goal"]])
print(json.dumps(out))
"""


def read(address: Address | None, cwd: Path, *wishes: str) -> list[list[str]]:
    """Read a dataset of the Hub, each wish CONFIG@REVISION; return each one's commit and first row."""
    env = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    if address is not None:
        env = {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token}
    env |= {"HF_HOME": str(cwd / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-c", READ, *wishes]
    done = subprocess.run(words, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_moved_dataset_is_read_at_the_commit_that_is_asked_for(tmp_path: Path):
    first = {"README.md": CARD.encode(), "long.jsonl": rows("long"), "short.jsonl": rows("short")}
    with running(tmp_path / "hub") as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        api.create_repo("local/moving", repo_type="dataset", private=True)
        old = commit(api, "local/moving", "dataset", first)
        known = [[old, "Ask for a in long way 1."], [old, "Ask for a in short way 1."]]
        assert read(address, tmp_path, "@main", "short@main") == known
        # The branch moves on: online the new commit is read, offline the last one that was read online.
        new = commit(api, "local/moving", "dataset", {"long.jsonl": rows("newer")})
        assert read(None, tmp_path, "@main", "short@main") == known
        assert read(address, tmp_path, "@main") == [[new, "Ask for a in newer way 1."]]
    # `datasets` alone would give the rows that it prepared last.
    moved = read(None, tmp_path, "@main", f"@{old}", f"short@{old}")
    assert moved == [[new, "Ask for a in newer way 1."], *known]


def test_rows_of_another_version_do_not_pass_for_those_of_a_commit(tmp_path: Path):
    with running(tmp_path / "hub") as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        api.create_repo("local/moving", repo_type="dataset", private=True)
        commit(api, "local/moving", "dataset", {"a.jsonl": rows("first")})
        read(address, tmp_path, "@main")
        broken = commit(api, "local/moving", "dataset", {"moving.py": b"open('it-ran', 'w')"})
        env = {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token, "HF_HOME": str(tmp_path / "hf")}
        env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
        words = [sys.executable, "-c", READ, f"@{broken}"]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode and "only another version is cached" in done.stderr, done.stdout


def test_offline_the_embedded_hub_is_reached_and_nothing_else(run, file: Path, published):
    put = json.loads(run(None, "publish-metric", "similarity", "--to", "local", "--json").stdout)
    assert put["commit"]
    check = """
import pytest
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import OfflineModeIsEnabled
from dsc_hub.hub import client
from dsc_hub.pipeline.context import account_at
with account_at("local", None) as account:
    assert account.api.whoami()["name"] == "local" and client.is_offline()
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("a/b")
print("fine")
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(file.parent / "hf"), "PYTHONPATH": str(ROOT)}
    env |= {"DSC_HUB_HOME": str(file.parent / "dsc")}
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
