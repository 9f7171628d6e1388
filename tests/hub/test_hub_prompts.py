"""Prompts from a dataset of the Hub: read at the commit that was resolved at the start, by column and group, no code of it run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from dsc_hub.config.recipe_files import load_recipe_file
from dsc_hub.local_hub.server import Address, running
from tests.conftest import RECIPE, ROOT

REPO = "local/wishes"
READ = """
import json, sys
from pathlib import Path
from dsc_hub.config import recipe_files
from dsc_hub.data import prompts
r = recipe_files.load_recipe_file(Path(sys.argv[1]), sys.argv[3:])
identity = sys.argv[2] or prompts.identify_prompts(r.prompts, Path("."))
found, dropped = prompts.load_prompts(r.prompts, Path("."), r.seed, identity)
print(json.dumps({"identity": identity, "prompts": [[p.text, p.group] for p in found], "read": dropped.read}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Address, HfApi, str]]:
    with running(tmp_path_factory.mktemp("hub")) as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        api.create_repo(REPO, repo_type="dataset", private=True)
        rows = "".join(
            json.dumps({"goal": f"Ask for {k} in way {i}.", "topic": k}) + "\n" for k in "abcdef" for i in (1, 2)
        )
        api.create_repo("local/coded", repo_type="dataset", private=True)
        code = CommitOperationAdd("coded.py", b"open('it-ran', 'w')")
        api.create_commit("local/coded", [code], commit_message="1", repo_type="dataset")
        files = {"train.jsonl": rows.encode()}
        commit = api.create_commit(
            REPO, [CommitOperationAdd(n, d) for n, d in files.items()], commit_message="1", repo_type="dataset"
        ).oid
        more = rows + json.dumps({"goal": "Ask for one thing more.", "topic": "g"}) + "\n"
        api.create_commit(
            REPO, [CommitOperationAdd("train.jsonl", more.encode())], commit_message="2", repo_type="dataset"
        )
        yield address, api, commit


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = yaml.safe_load(RECIPE)
    split = data["prompts"]["split"]
    data["prompts"] = {"dataset": REPO, "column": "goal", "group_column": "topic", "split": split}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "recipe.yaml"


def child(address: Address, file: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    mine = {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token, "HF_HOME": str(file.parent / "hf")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=file.parent,
        env=os.environ | mine | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_column_and_group_are_read_at_the_commit_of_the_start(hub, file: Path):
    address, api, old = hub
    done = child(address, file, "-c", READ, str(file), "")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identity"] == f"{REPO}@{api.dataset_info(REPO).sha}" and found["read"] == 13
    assert ["Ask for a in way 1.", "a"] in found["prompts"]
    # A run that began before the dataset moved goes on with what it began with.
    pinned = child(address, file, "-c", READ, str(file), f"{REPO}@{old}")
    assert json.loads(pinned.stdout)["read"] == 12
    named = child(address, file, "-c", READ, str(file), "", f"prompts.revision={old}")
    assert json.loads(named.stdout)["identity"] == f"{REPO}@{old}"


def test_plan_tells_what_is_wrong_in_one_message(hub, file: Path):
    address, _, _ = hub
    for override, told in (
        ("prompts.dataset=local/nosuch", "dataset 'local/nosuch' at 'main': not found"),
        ("prompts.column=text", "has no column 'text'; it has ['goal', 'topic']"),
        ("prompts.dataset_split=nosuch", "nosuch"),
        ("prompts.dataset_config=nosuch", "nosuch"),
        ("prompts.revision=nosuch", "no such revision"),
        ("prompts.dataset=local/coded", "scripts are no longer supported"),
        ("prompts.dataset=nosuch", "prompts.dataset: "),
    ):
        done = child(address, file, "-m", "dsc_hub", "plan", str(file), override)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, (override, done.stderr)
        assert address.token not in done.stderr
    assert not list(file.parent.rglob("it-ran"))
    assert child(address, file, "-m", "dsc_hub", "plan", str(file)).returncode == 0


def test_a_folder_of_the_same_name_is_never_read_in_place_of_the_dataset(hub, file: Path):
    address, api, _ = hub
    secret = file.parent / REPO / "train.jsonl"
    secret.parent.mkdir(parents=True)
    secret.write_text(json.dumps({"goal": "hush", "topic": "x"}))
    outside = file.parent.parent / "x"
    outside.mkdir(exist_ok=True)
    (outside / "train.jsonl").write_text(json.dumps({"goal": "hush", "topic": "x"}))
    for dataset in (REPO, "../x", "./x"):
        for offline in ("0", "1"):
            done = child(address, file, "-c", READ, str(file), "", f"prompts.dataset={dataset}", HF_HUB_OFFLINE=offline)
            assert done.returncode and "hush" not in done.stdout, dataset
            assert "also a folder here" in done.stderr if dataset == REPO else "dataset '." in done.stderr, done.stderr


def test_offline_the_commit_in_the_cache_is_recorded_and_not_a_name_that_moves(hub, file: Path):
    address, api, _ = hub
    first = json.loads(child(address, file, "-c", READ, str(file), "").stdout)
    again = child(address, file, "-c", READ, str(file), "", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["identity"] == first["identity"] == f"{REPO}@{api.dataset_info(REPO).sha}"


def test_offline_a_revision_is_no_path(hub, file: Path):
    (file.parent / "secret").write_text("hush")
    for revision in (str(file.parent / "secret"), "../../../../secret"):
        done = child(hub[0], file, "-c", READ, str(file), "", f"prompts.revision={revision}", HF_HUB_OFFLINE="1")
        assert done.returncode and "hush" not in done.stdout + done.stderr


def test_a_recipe_names_one_source(file: Path):
    from dsc_hub.errors import ConfigError

    with pytest.raises(ConfigError, match="give one of: path, dataset, or templates"):
        load_recipe_file(file, ["prompts.path=a.txt"])
