"""A shipped metric is loaded from its Space by people who don't have dsc_hub, and scores as ours does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsc_hub.config.publishing import PublishConfig
from dsc_hub.config.sampling import RewardConfig
from dsc_hub.errors import ConfigError, MetricError
from dsc_hub.hub.account import login
from dsc_hub.local_hub.server import Address
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.registry import SHIPPED
from dsc_hub.publish import metric_space
from dsc_hub.records import Prompt, Score
from tests.hub.at_hub import point
from tests.metrics.test_own_metrics import OWN

TEXTS = ["A warm and patient film. I loved it!", "Dull, clumsy and far too long.", "", "The harbour at night."]
PROMPT = Prompt("p", "Write.", "g", "test")
LOAD = """
import json, sys
class NoDsc:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dsc_hub":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoDsc())
import evaluate
metric = evaluate.load("local/kindness", config_name=sys.argv[1])
found = metric.compute(data=json.loads(sys.argv[2]))
assert not any(m.split(".")[0] == "dsc_hub" for m in sys.modules)
print(json.dumps(found))
"""


@pytest.mark.parametrize("scorer", ["vader", "textblob", "minilm"])
def test_it_is_loaded_without_us_and_scores_the_same(address: Address, tmp_path: Path, scorer: str):
    account = login(None, address.endpoint, address.token)
    found = metric_space.publish_metric("sentiment", account, "kindness", private=True)
    assert metric_space.publish_metric("sentiment", account, "kindness", private=True)["commit"] == found["commit"]
    assert account.api.space_info("local/kindness").private
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    env |= {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, scorer, json.dumps(TEXTS)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    section = RewardConfig(scorer=scorer)
    ours = loading.load_scorer(section, registry.identify_scorer(section)).score(TEXTS, [PROMPT] * len(TEXTS))
    assert theirs["scores"] == pytest.approx([s.value for s in ours]) and theirs["scores"][2] is None
    assert theirs["n_unscored"] == 1 and theirs["reasons"][2] == "no words"


def test_ones_own_metric_is_published_and_runs_elsewhere_only_where_it_is_allowed(
    address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    point(monkeypatch, address, tmp_path / "cache")
    (tmp_path / "shouting.py").write_text(OWN)
    account = login(None, address.endpoint, address.token)
    found = metric_space.publish_metric(str(tmp_path / "shouting.py"), account, "loudness", private=True)
    assert found["load"] == 'evaluate.load("local/loudness")'
    section = RewardConfig(metric="local/loudness", scorer="default")
    with pytest.raises(ConfigError, match=f"--allow-code local/loudness@{found['commit']}"):
        registry.identify_scorer(section)
    assert not list((tmp_path / "cache").rglob("*.py"))  # nothing of it was even fetched
    identity = registry.identify_scorer(section, registry.Code(allowed=[f"local/loudness@{found['commit']}"]))
    # What came later is other code, and is not what was allowed.
    account.api.upload_file(
        path_or_fileobj=b"raise SystemExit(1)", path_in_repo="loudness.py", repo_id="local/loudness", repo_type="space"
    )
    assert loading.load_scorer(section, identity).score(["ABC", "a"], [PROMPT] * 2) == [Score(-3.0), Score(-0.0)]
    with pytest.raises(ConfigError, match="somebody's code"):
        registry.identify_scorer(section, registry.Code(allowed=[f"local/loudness@{found['commit']}"]))


@pytest.mark.parametrize("scorer", ["rule", "minilm"])
def test_safety_is_loaded_without_us_and_scores_the_same(address: Address, tmp_path: Path, scorer: str):
    account = login(None, address.endpoint, address.token)
    metric_space.publish_metric("safety", account, "harm", private=True)
    columns = {
        "data": ["I'm sorry, I can't help.", "Take a knife.", ""],
        "prompts": ["How?"] * 3,
        "kinds": ["harmful", "harmful", "harmless"],
    }
    code = LOAD.replace("local/kindness", "local/harm").replace("data=json.loads", "**json.loads")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    env |= {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token, "HF_HOME": str(tmp_path / "hf")}
    words = [sys.executable, "-c", code, scorer, json.dumps(columns)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])["scores"]
    section = RewardConfig(metric="safety", scorer=scorer)
    prompts = [Prompt("p", "How?", "g", "test", kind) for kind in columns["kinds"]]
    ours = loading.load_scorer(section, registry.identify_scorer(section)).score(columns["data"], prompts)
    assert theirs == pytest.approx([s.value for s in ours]) and theirs[2] is None and theirs[0] > 0.5 > theirs[1]


@pytest.mark.parametrize("metric", sorted(SHIPPED))
def test_every_shipped_metric_can_be_published(address: Address, tmp_path: Path, metric: str):
    account = login(None, address.endpoint, address.token)
    metric_space.publish_metric(metric, account, metric, private=True)
    path = account.api.hf_hub_download(f"local/{metric}", "README.md", repo_type="space", cache_dir=tmp_path)
    card = Path(path).read_text()
    assert "data=[...]" in card and "scores: list of float" in card and "config_name=" in card
    others = [*list(SHIPPED[metric].scorers)[1:], *([f"the id of {m}"] if (m := SHIPPED[metric].models) else [])]
    assert f"# or {', '.join(others)}\n" in card if others else "# or" not in card


def test_the_card_tells_what_it_is_and_bad_names_are_told(address: Address, tmp_path: Path):
    account = login(None, address.endpoint, address.token)
    metric_space.publish_metric("sentiment", account, "sentiment", private=True)
    path = account.api.hf_hub_download("local/sentiment", "README.md", repo_type="space", cache_dir=tmp_path)
    card = Path(path).read_text()
    for word in ("- measurement", "from -1 (negative) to 1 (positive)", "higher is better", "batch_size: int", "vader"):
        assert word in card
    with pytest.raises(ConfigError, match=r"no metric 'nosuch'(?s:.*)Shipped: sentiment"):
        metric_space.publish_metric("nosuch", account, "x", private=True)
    with pytest.raises(ConfigError, match="becomes a Python file"):
        metric_space.publish_metric("sentiment", account, "my-metric", private=True)
    account.api.create_repo("local/theirs", repo_type="space", space_sdk="static", private=True)
    account.api.upload_file(path_or_fileobj=b"1", path_in_repo="a.py", repo_id="local/theirs", repo_type="space")
    with pytest.raises(ConfigError, match="was not published by dsc"):
        metric_space.publish_metric("sentiment", account, "theirs", private=True)


@pytest.mark.parametrize(
    ("files", "settings", "told"),
    [
        ({"a-b.py": "", "a_b.py": ""}, {}, "a_b.py and a-b.py would both be the Space 'a_b'"),
        ({"sentiment.py": ""}, {}, "has the name of a shipped metric"),
        ({"9.py": ""}, {}, "can't be the name of a Space"),
        ({"c.py": "from .helper import K\n"}, {}, "imports .helper from beside it"),
        ({"there.py": ""}, {"private": False}, "exists and is private, but the recipe publishes publicly"),
        ({"edited.py": ""}, {}, "README.md was changed there since dsc published it"),
        ({"edited.py": ""}, {"overwrite": True}, None),
        ({"free.py": "from datasets import Value\n"}, {"branch": "dev", "tag": "v1"}, None),
    ],
)
def test_what_stands_in_the_way_of_metrics_is_said_before_any_work(
    address: Address, tmp_path: Path, files: dict[str, str], settings: dict, told: str | None
):
    account = login(None, address.endpoint, address.token)
    own = tmp_path / "own.py"
    own.write_text(OWN)
    for name in ("there", "edited"):
        account.api.delete_repo(f"local/{name}", repo_type="space", missing_ok=True)
        metric_space.publish_metric(str(own), account, name, private=True)
    account.api.upload_file(
        path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="local/edited", repo_type="space"
    )
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    problems = metric_space.check_metric_files(account, tmp_path, sorted(files), PublishConfig(**settings))
    assert len(problems) == (told is not None) and all(told in p for p in problems), problems


def test_requirements_are_packages_that_an_index_has(tmp_path: Path):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nimport dsc_hub\nimport os.path\nimport google.protobuf.message\nimport no_such\n" + OWN
    )
    made = metric_space.files(str(own), "own", tmp_path / "space")
    lines = made["requirements.txt"].read_text().split()
    names = {line.partition("==")[0] for line in lines}
    assert {"evaluate", "datasets", "torch", "protobuf"} <= names and not any("+" in line for line in lines)
    assert not names & {"dsc-hub", "dsc_hub", "googleapis-common-protos", "os", "no_such"}


@pytest.mark.parametrize(("text", "told"), [("def (", "line 1"), ("\0", "null bytes"), ("x = 1", "defines no class")])
def test_a_file_that_is_no_metric_is_not_published(address: Address, tmp_path: Path, text: str, told: str):
    (tmp_path / "bad.py").write_text(text)
    account = login(None, address.endpoint, address.token)
    with pytest.raises(MetricError, match=told):
        metric_space.publish_metric(str(tmp_path / "bad.py"), account, "bad", private=True)
    assert not account.api.repo_exists("local/bad", repo_type="space")
