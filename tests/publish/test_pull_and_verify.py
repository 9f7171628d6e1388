"""What was published can be pulled and checked by others: files, numbers, training rows and card, from the repo alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import GatedRepoError
from trl.data_utils import is_conversational

from dsc_hub.config.origin import MANIFEST, MARK
from dsc_hub.errors import ConfigError, HubError, RunError
from dsc_hub.hub import client
from dsc_hub.hub.account import login
from dsc_hub.hub.pull import is_safe, pull_repo
from dsc_hub.local_hub.server import Address, running
from dsc_hub.metrics import loading, registry
from dsc_hub.pipeline import preflight, resolve
from dsc_hub.publish import upload
from dsc_hub.publish.verify import verify_repo
from dsc_hub.records import Prompt
from dsc_hub.report import cards
from tests import small_run
from tests.conftest import FILMS, RECIPE, ROOT
from tests.data.test_conversations import TOOL, turns
from tests.hub import at_hub, faults

PROMPT = Prompt("p", "Write.", "g", "test")
DATASET, ADAPTER = "local/little-dsc", "local/little-dsc-lora"


@pytest.fixture(autouse=True)
def at_this_hub(address: Address, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's own Hub is this one, as HF_ENDPOINT and HF_TOKEN would make it, with a cache of its own."""
    at_hub.point(monkeypatch, address, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def published(address: Address, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small run, published: kind -> commit."""
    place = tmp_path_factory.mktemp("made")
    (place / "recipe").mkdir()
    (place / "recipe" / "films.txt").write_text(FILMS)
    (place / "recipe" / "recipe.yaml").write_text(RECIPE)
    run, r = small_run.make(place / "run", place / "recipe" / "recipe.yaml")
    account = login(None, address.endpoint, address.token)
    out = upload.publish_run(run, account, place, place / "recipe", r.publish, lambda: cards.build_cards(run))
    return {kind: of["commit"] for kind, of in out.items()}


def change(address: Address, repo_type: str, repo: str, **files: bytes) -> None:
    """Somebody puts other files into the repo, and a manifest that fits them."""
    api = login(None, address.endpoint, address.token).api
    names = {name.replace("__", "/"): data for name, data in files.items()}
    manifest = json.loads(Path(api.hf_hub_download(repo, MANIFEST, repo_type=repo_type)).read_text())
    for name, data in names.items():
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    names[MANIFEST] = json.dumps(manifest).encode()
    operations = [CommitOperationAdd(name, data) for name, data in names.items()]
    api.create_commit(repo, operations, commit_message="changed", repo_type=repo_type)


def verdicts(reference: str, **settings: bool) -> dict[str, bool | None]:
    return {c.name: c.agrees for c in verify_repo(reference, **settings)[1]}


def told(reference: str, name: str) -> str:
    return next(c.detail for c in verify_repo(reference)[1] if c.name == name)


def test_a_published_run_agrees_with_itself(published):
    found, checks = verify_repo(f"{DATASET}@{published['dataset']}", rescore=True)
    assert (found.kind, found.commit) == ("dataset", published["dataset"])
    names = [
        "files",
        "metrics.json",
        "prompts",
        "rows",
        "training rows",
        "numbers of the chains",
        "numbers of the evaluation",
        "scores",
        "card",
    ]
    assert [c.name for c in checks] == names and all(c.agrees for c in checks), checks
    assert "numbers made anew" in next(c.detail for c in checks if c.name == "numbers of the evaluation")
    found, checks = verify_repo(f"hub:{ADAPTER}@{published['adapter']}")
    assert found.kind == "adapter" and all(c.agrees for c in checks) and len(checks) == 6, checks


def test_a_reward_of_several_terms_is_scored_again_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "films.txt").write_text(FILMS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    plus = "reward.plus=[{scorer: textblob, weight: 0.5}]"
    run, r = small_run.make(tmp_path / "run", tmp_path / "recipe.yaml", plus)
    with running(tmp_path / "hub") as other:
        at_hub.point(monkeypatch, other, tmp_path / "cache")
        account = login(None, other.endpoint, other.token)
        upload.publish_run(run, account, tmp_path, tmp_path, r.publish, lambda: cards.build_cards(run))
        scores = next(c for c in verify_repo(DATASET, rescore=True)[1] if c.name == "scores")
    assert scores.agrees and scores.detail.startswith("reward of "), scores


def test_a_run_of_conversations_with_tools_is_published_as_such_and_agrees_with_itself(tmp_path: Path, monkeypatch):
    rows = [
        {"prompt": turns("Hello.", "Hi.", f"And film {n}?", system=f"You are {n}."), "tools": [TOOL] if n % 2 else []}
        for n in range(30)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(RECIPE)
    recipe["prompts"] = {"path": "talks.jsonl", "tools_column": "tools", "split": recipe["prompts"]["split"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run, r = small_run.make(tmp_path / "run", tmp_path / "recipe.yaml")
    with running(tmp_path / "hub") as other:
        at_hub.point(monkeypatch, other, tmp_path / "cache")
        account = login(None, other.endpoint, other.token)
        upload.publish_run(run, account, tmp_path, tmp_path, r.publish, lambda: cards.build_cards(run))
        checks = verify_repo(DATASET, rescore=True)[1]
        assert all(c.agrees for c in checks) and len(checks) == 9, checks
        folder = str(pull_repo(DATASET, tmp_path / "pulled").folder)
    pairs = datasets.load_dataset(folder, "preference", split="train", cache_dir=str(tmp_path / "datasets"))
    assert is_conversational(pairs[0]) and [m["role"] for m in pairs[0]["prompt"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert {row["tools"] for row in pairs} == {None, json.dumps([TOOL])}
    card = run["cards/dataset/README.md"].read_text()
    assert "\nSystem: You are " in card and "\n\nAssistant: Hi.\n\nUser: And film " in card
    answer = next(iter(run.rows("evaluation/answers.jsonl")))
    assert answer["prompt"].startswith("System: You are ") and answer["group"] == answer["prompt_id"]


CHEER = """
import datasets
import evaluate

class Cheer(evaluate.Measurement):
    unit = "share of exclamation marks"
    higher_is_better = True

    def _info(self):
        features = datasets.Features({"data": datasets.Value("string")})
        return evaluate.MeasurementInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, data):
        return {"scores": [len(text) % 7 / 7 for text in data]}
"""


def test_a_run_with_a_metric_of_one_s_own_is_verified_but_for_the_scores(tmp_path: Path, monkeypatch):
    (tmp_path / "films.txt").write_text(FILMS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "cheer.py").write_text(CHEER)
    run, r = small_run.make(
        tmp_path / "run", tmp_path / "recipe.yaml", "reward.metric=cheer.py", "reward.scorer=default"
    )
    with running(tmp_path / "hub") as other:
        at_hub.point(monkeypatch, other, tmp_path / "cache")
        account = login(None, other.endpoint, other.token)
        upload.publish_run(run, account, tmp_path, tmp_path, r.publish, lambda: cards.build_cards(run))
        checks = verify_repo(DATASET, rescore=True)[1]
    assert all(c.agrees is not False for c in checks), checks
    assert "reward not scored again: cheer.py" in next(c.detail for c in checks if c.name == "scores")


def test_a_metric_of_one_s_own_is_published_with_the_run_and_named_at_its_commit(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "films.txt").write_text(FILMS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "cheer.py").write_text(CHEER)
    own = ["reward.metric=cheer.py", "reward.scorer=default"]
    run, r = small_run.make(tmp_path / "run", tmp_path / "recipe.yaml", *own, "publish.metrics=true")
    with running(tmp_path / "hub") as other:
        at_hub.point(monkeypatch, other, tmp_path / "cache")
        account = login(None, other.endpoint, other.token)
        out = upload.publish_run(run, account, tmp_path, tmp_path, r.publish, lambda: cards.build_cards(run))
        space = out["metric cheer"]
        assert account.api.space_info("local/cheer").private and space["files"] == 3
        written = Path(client.pull_recipe("local/little-dsc")).read_text()
        assert f"metric: local/cheer\n  revision: {space['commit']}" in written and "cheer.py" not in written
        with pytest.raises(ConfigError, match=f"--allow-code local/cheer@{space['commit']}"):
            resolve.resolve_recipe(f"hub:{DATASET}", [], tmp_path / "runs")
        allowed = (f"local/cheer@{space['commit']}",)
        context = resolve.resolve_recipe(f"hub:{DATASET}", [], tmp_path / "runs", allowed)
        assert context.identity["reward"].endswith(allowed[0])
        section = context.recipe.reward
        scored = loading.load_scorer(section, context.identity["reward"], registry.Code(allowed=allowed)).score(
            ["abc"], [PROMPT]
        )
        assert [s.value for s in scored] == [3 / 7]
        checks = verify_repo(DATASET, rescore=True)[1]
        assert all(c.agrees is not False for c in checks), checks
        assert "reward not scored again: local/cheer" in next(c.detail for c in checks if c.name == "scores")
        # What is pushed is what scored, and nothing of it names this machine.
        (title,) = [
            c.title for c in account.api.list_repo_commits("local/cheer", repo_type="space") if "by dsc" in c.title
        ]
        assert title == "cheer.py by dsc"
        (tmp_path / "cheer.py").write_text(CHEER + "# more\n")
        with pytest.raises(RunError, match="cheer.py was changed since it scored this run"):
            upload.publish_run(run, account, tmp_path, tmp_path, r.publish, lambda: cards.build_cards(run))
        (tmp_path / "cheer.py").write_text(CHEER)
        # Without it, `plan` says what others will lack.
        mine = resolve.resolve_recipe(str(tmp_path / "recipe.yaml"), [*own, "publish.to=local"], tmp_path / "runs")
        with contextlib.suppress(ConfigError):
            preflight.check_run(mine, account)
        assert "publish.metrics=true publishes the file as a Space" in capsys.readouterr().err
        # And a name that a Space can't have is said before any work.
        (tmp_path / "cheer.py").rename(tmp_path / "9lives.py")
        mine = resolve.resolve_recipe(
            str(tmp_path / "recipe.yaml"),
            ["reward.metric=9lives.py", "reward.scorer=default", "publish.to=local", "publish.metrics=true"],
            tmp_path / "runs",
        )
        with pytest.raises(ConfigError, match="publish.metrics: 9lives.py can't be the name of a Space"):
            preflight.check_run(mine, account)


def _metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize(
    "lie",
    [
        "a mean",
        "the claim",
        "a count",
        "a score",
        "a training row",
        "a chain",
        "the card",
        "an answer",
        "a test prompt",
        "an end of an interval by the earlier rule",
    ],
)
def test_whatever_is_changed_shows(published, address, tmp_path: Path, lie: str):
    good = pull_repo(f"{DATASET}@{published['dataset']}", tmp_path / "good").folder
    numbers = _metrics(good)
    parquet = {"an answer": "evaluation/test", "a score": "evaluation/test", "a test prompt": "evaluation/test"}
    parquet |= {"a training row": "sft/train", "a chain": "chains/train"}
    files: dict[str, bytes] = {}
    if lie == "a mean":
        numbers["evaluation"]["arms"]["distilled"]["reward"]["mean"] += 0.01
    elif lie == "the claim":
        claim = numbers["evaluation"]["claim"]
        claim["verdict"] = "holds" if claim["verdict"] != "holds" else "fails"
    elif lie == "an end of an interval by the earlier rule":
        del numbers["evaluation"]["intervals"]
        numbers["evaluation"]["arms"]["distilled"]["reward"]["low"] = 0.0123
    elif lie == "a count":
        numbers["sampling"]["steps"][0]["accepted"] += 1
    elif lie == "the card":
        files["README.md"] = (good / "README.md").read_bytes().replace(b"chains finished", b"chains were finished")
    else:
        name = f"{parquet[lie]}-00000-of-00001.parquet"
        table = pq.read_table(good / name)
        rows = table.to_pylist()
        if lie == "a score":
            rows[3]["reward"] += 0.5
        elif lie == "an answer":
            rows[3]["text"] = "A wonderful, wonderful film."
        elif lie == "a test prompt":
            rows[3]["prompt_id"] = pq.read_table(good / "chains/train-00000-of-00001.parquet").to_pylist()[0][
                "prompt_id"
            ]
        elif lie == "a training row":
            rows[0]["completion"][0]["content"] += " So good."
        else:
            rows[0]["steps"][0]["rejected"] = "" if rows[0]["steps"][0]["rejected"] else "not better"
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), good / name)
        files[name.replace("/", "__")] = (good / name).read_bytes()
    if not files:
        files["metrics.json"] = json.dumps(numbers, indent=2).encode()
    change(address, "dataset", DATASET, **files)
    found = verdicts(DATASET, rescore=lie == "an answer")
    shows = {
        "a mean": "numbers of the evaluation",
        "the claim": "numbers of the evaluation",
        "an end of an interval by the earlier rule": "numbers of the evaluation",
        "a count": "numbers of the chains",
        "a score": "numbers of the evaluation",
        "a training row": "training rows",
        "a chain": "numbers of the chains",
        "the card": "card",
        "an answer": "scores",
        "a test prompt": "prompts",
    }
    assert found[shows[lie]] is False and found["files"] is True
    # Put it back for the next one.
    again = pull_repo(f"{DATASET}@{published['dataset']}", tmp_path / "again").folder
    change(address, "dataset", DATASET, **{n: (again / n.replace("__", "/")).read_bytes() for n in files})
    assert False not in verdicts(DATASET).values()


def test_files_that_nobody_listed_are_told_taken_or_not(published, address):
    api = login(None, address.endpoint, address.token).api
    names = {"note.txt": b"read me", "loader.py": b"import os"}
    for name, data in names.items():
        api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=DATASET, repo_type="dataset")
    try:
        assert told(DATASET, "files").endswith("; there besides: note.txt, loader.py (not taken)")
    finally:
        for name in names:
            api.delete_file(name, DATASET, repo_type="dataset")
    assert "besides" not in told(DATASET, "files")


def test_an_adapter_that_is_not_the_one_that_was_evaluated_shows(published, address, tmp_path: Path):
    change(address, "model", ADAPTER, **{"adapter_model.safetensors": b"other weights"})
    assert verdicts(ADAPTER)["weights"] is False
    numbers = _metrics(pull_repo(ADAPTER, tmp_path / "adapter").folder)
    numbers["evaluation"]["arms"]["distilled"]["reward"]["mean"] += 1
    change(address, "model", ADAPTER, **{"metrics.json": json.dumps(numbers).encode()})
    found = verdicts(ADAPTER)
    assert found["numbers"] is False and found["numbers of the evaluation"] is True and found["card"] is False
    assert "metrics.evaluation.arms.distilled.reward.mean" in told(ADAPTER, "numbers")


def test_a_file_that_is_not_what_the_manifest_says_is_not_taken(published, address, tmp_path: Path):
    api = login(None, address.endpoint, address.token).api
    head = api.upload_file(path_or_fileobj=b"{}", path_in_repo="metrics.json", repo_id=DATASET, repo_type="dataset").oid
    with pytest.raises(HubError, match=r"not what its manifest says: metrics\.json has another hash"):
        pull_repo(f"{DATASET}@{head}", tmp_path / "here")
    assert [p for p in tmp_path.iterdir() if "here" in p.name] == []  # nothing half-done is left
    with pytest.raises(HubError, match="manifest"):
        verify_repo(DATASET)
    assert pull_repo(f"{DATASET}@{published['dataset']}", tmp_path / "old").commit == published["dataset"]


def test_pulling_takes_data_alone_and_writes_over_nothing(published, address, tmp_path: Path):
    api = login(None, address.endpoint, address.token).api
    for name in ("evil.py", "model.bin", "deep/pickle.pkl", ".hidden/x.json"):
        api.upload_file(path_or_fileobj=b"import os", path_in_repo=name, repo_id=ADAPTER, repo_type="model")
    found = pull_repo(ADAPTER, tmp_path / "here")
    assert {"evil.py", "model.bin", "deep/pickle.pkl", ".hidden/x.json"} <= set(found.left_out)
    there = {str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file()}
    assert "adapter_model.safetensors" in there and not any(n.endswith((".py", ".bin", ".pkl")) for n in there)
    assert not any(p.is_symlink() for p in found.folder.rglob("*"))
    with pytest.raises(ConfigError, match="exists and is not empty"):
        pull_repo(ADAPTER, tmp_path / "here")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("README.md", True),
        ("sft/train-00000-of-00001.parquet", True),
        (".eval_results/little.yaml", True),
        ("LICENSE", True),
        ("../x.json", False),
        ("a/../../x.json", False),
        ("/etc/x.json", False),
        ("a\\..\\x.json", False),
        ("C:x.json", False),
        ("x.py", False),
        ("pytorch_model.bin", False),
        ("x.pkl", False),
        (".git/config.json", False),
        ("a/.ssh/x.json", False),
        ("x\x00.json", False),
        ("x\u202e.json", False),
        (" x.json", False),
        ("x" * 300 + ".json", False),
        ("", False),
    ],
)
def test_which_names_are_taken(name: str, safe: bool):
    assert is_safe(name) is safe


def test_a_name_that_leads_out_of_the_folder_is_never_fetched(published, tmp_path: Path, monkeypatch):
    # The embedded Hub refuses to hold such a name, another may not.
    honest = client.listing(DATASET)
    evil = replace(honest, files=("../evil.json", "/tmp/evil.json", "run.json"))
    monkeypatch.setattr(client, "listing", lambda reference: evil)
    found = pull_repo(f"{DATASET}@{published['dataset']}", tmp_path / "in" / "here")
    assert found.left_out == ("../evil.json", "/tmp/evil.json")
    assert {p.name for p in (tmp_path / "in").rglob("*") if p.is_file()} == {"run.json", MARK}


def test_a_link_in_the_cache_that_leads_out_is_not_followed(published, tmp_path: Path, monkeypatch):
    there = client.listing(f"{DATASET}@{published['dataset']}")
    snapshot = client.fetch(there, ["run.json"])
    fake = tmp_path / "fake" / "snapshots" / "abc"
    shutil.copytree(snapshot, fake)
    (fake / "run.json").unlink(missing_ok=True)
    (tmp_path / "secret").write_text("secret")
    (fake / "run.json").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(client, "listing", lambda reference: replace(there, files=("run.json",)))
    monkeypatch.setattr(client, "fetch", lambda there, names: fake)
    with pytest.raises(HubError, match="leads out of its repo"):
        pull_repo(DATASET, tmp_path / "here")


def test_what_is_no_repo_of_ours_is_told(address, tmp_path: Path):
    api = login(None, address.endpoint, address.token).api
    api.create_repo("local/plain", repo_type="dataset", private=True)
    api.upload_file(path_or_fileobj=b"a\n1\n", path_in_repo="a.csv", repo_id="local/plain", repo_type="dataset")
    assert pull_repo("local/plain", tmp_path / "plain").kind == "recipe"
    with pytest.raises(HubError, match="no dataset or adapter that dsc published"):
        verify_repo("local/plain")
    with pytest.raises(HubError, match="not found"):
        pull_repo("local/nosuch", tmp_path / "x")
    with pytest.raises(HubError, match="no such revision"):
        pull_repo("local/plain@nosuch", tmp_path / "x")


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_name_that_a_repo_of_another_type_has_is_told(address, kind: str):
    api = login(None, address.endpoint, address.token).api
    api.create_repo(f"local/a-{kind}", repo_type=kind, private=True, exist_ok=True, space_sdk="static")
    for look in (client.pull_adapter, lambda name: client.model_info(name, "main")):
        with pytest.raises(HubError, match=rf"local/a-{kind}'.*: a {kind} has that name at .*, expected a model"):
            look(f"local/a-{kind}")


def test_what_can_be_named_instead_of_a_revision_that_is_not_there_is_told(address):
    api = login(None, address.endpoint, address.token).api
    api.create_repo("local/tagged", private=True)
    names = ["v1", "v\u202e2", "v3" + "x" * 60, "v4", "v5", "v6"]
    for name in names:
        api.create_tag("local/tagged", tag=name)
    for look in (client.pull_adapter, client.pull_recipe):
        with pytest.raises(HubError, match="no such revision") as e:
            look("local/tagged@nosuch")
        hint = e.value.hint
        assert hint.startswith("It has main, ") and hint.endswith(" and 2 more; a commit can be named too.")
        assert "v\N{REPLACEMENT CHARACTER}2" in hint and "x\N{HORIZONTAL ELLIPSIS}" in hint and len(hint) < 120


@pytest.mark.parametrize("reference", ["a/b/c", "a", "a/b@", "@main", "a/-b", ""])
def test_what_names_no_repo_is_told_with_the_form(reference: str):
    for look in (client.pull_adapter, client.pull_recipe):
        with pytest.raises(HubError, match=rf"'{reference}' is not of the form USER/REPO\[@REVISION\]"):
            look(reference)


def test_a_hub_that_answers_badly_is_not_called_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with faults.running(tmp_path / "hub") as (there, layer):
        at_hub.point(monkeypatch, there, tmp_path / "cache")
        layer.faults.append(faults.Fault("GET", "/api/models/", 500, times=99))
        with pytest.raises(HubError, match="adapter 'hub:a/b': http.* answered 500"):
            client.pull_adapter("a/b")


def test_a_prompt_file_that_could_not_be_asked_for_is_not_called_missing(published, monkeypatch: pytest.MonkeyPatch):
    recipe = client.pull_recipe(DATASET)
    with pytest.raises(HubError, match="names the prompt file 'nosuch.txt' and doesn't hold it"):
        client.pull_beside(recipe, DATASET, "nosuch.txt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"'films.txt' of 'hub:{DATASET}': offline, and not in the cache"):
        client.pull_beside(recipe, DATASET, "films.txt")


def dsc(address: Address, cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    mine = {
        "HF_ENDPOINT": address.endpoint,
        "HF_TOKEN": address.token,
        "HF_HOME": str(cwd / "hf"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", "dsc_hub", *words],
        cwd=cwd,
        env=os.environ | mine | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_verbs(published, address, tmp_path: Path):
    reference = f"{DATASET}@{published['dataset']}"
    taken = dsc(address, tmp_path, "pull", reference, "--json")
    assert taken.returncode == 0, taken.stderr
    assert json.loads(taken.stdout)["kind"] == "dataset" and (tmp_path / "little-dsc" / "recipe.yaml").is_file()
    fine = dsc(address, tmp_path, "verify", reference)
    assert fine.returncode == 0 and "All that could be checked agrees." in fine.stdout, fine.stderr
    assert address.token not in fine.stdout + fine.stderr
    good = (tmp_path / "little-dsc" / "metrics.json").read_bytes()  # another test may have left something else there
    change(address, "dataset", DATASET, **{"README.md": b"---\nlicense: mit\n---\n# Mine\n", "metrics.json": good})
    off = dsc(address, tmp_path, "verify", DATASET, "--json")
    found = {c["name"]: c["agrees"] for c in json.loads(off.stdout)["checks"]}
    assert off.returncode == 1 and found["card"] is False
    # A token that was stored by `hf auth login` is as good as HF_TOKEN, and the place of all of it is HF_HOME.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "token").write_text(address.token)
    stored = dsc(address, tmp_path, "pull", reference, "--to", "stored", HF_TOKEN="", HF_HOME=str(tmp_path / "other"))
    assert stored.returncode == 0 and (tmp_path / "other" / "hub").is_dir(), stored.stderr
    without = dsc(address, tmp_path, "pull", reference, "--to", "without", HF_TOKEN="", HF_HOME=str(tmp_path / "none"))
    assert without.returncode == 2 and "private and not yours" in without.stderr
    # Offline, what was fetched before can be had again; what wasn't is told.
    offline = dsc(address, tmp_path, "pull", reference, "--to", "again", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and (tmp_path / "again" / "README.md").is_file(), offline.stderr
    other = dsc(address, tmp_path, "pull", ADAPTER, HF_HUB_OFFLINE="1")
    assert other.returncode == 2 and "offline" in other.stderr and "Traceback" not in other.stderr


def test_what_was_not_kept_stays_here_where_a_warning_asks_for_it(address, tmp_path: Path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "films.txt").write_text(FILMS)
    (tmp_path / "recipe" / "recipe.yaml").write_text(RECIPE)
    how = ["publish.content_warning=It may hurt.", "publish.gated=manual", "publish.private=false", "publish.tag=v1"]
    run, r = small_run.make(tmp_path / "run", tmp_path / "recipe" / "recipe.yaml", *how)
    facts = run.raw_facts
    facts["repos"] |= {"dataset": "local/harm-dsc", "adapter": "local/harm-dsc-lora"}
    run.add_facts(repos=facts["repos"])
    account = login(None, address.endpoint, address.token)
    out = upload.publish_run(run, account, tmp_path, tmp_path / "recipe", r.publish, lambda: cards.build_cards(run))
    found = pull_repo("local/harm-dsc@v1", tmp_path / "here")
    assert found.commit == out["dataset"]["commit"] and account.api.dataset_info("local/harm-dsc").gated == "manual"
    names = {str(p.relative_to(found.folder)) for p in found.folder.rglob("*.parquet")}
    assert {n.split("/")[0] for n in names} == {"sft", "evaluation"}
    rows = pq.read_table(found.folder / "evaluation" / "test-00000-of-00001.parquet").to_pylist()
    mine = pq.read_table(run["dataset"] / "evaluation" / "test-00000-of-00001.parquet").to_pylist()
    assert {row["text"] for row in rows} == {None} and [r["reward"] for r in rows] == [r["reward"] for r in mine]
    assert all(row["text"] for row in mine)  # here they stay
    every = "".join(p.read_text() for p in found.folder.rglob("*") if p.suffix in (".md", ".json", ".yaml"))
    base = next(row["text"] for row in mine if row["arm"] == "base")
    assert base not in every and "It may hurt." in every
    # What can't be seen is said to be unchecked, and is no pass.
    checked = verdicts("local/harm-dsc")
    assert checked["files"] is True and checked["rows"] is True and False not in checked.values()
    assert [n for n, v in checked.items() if v is None] == [
        "prompts",
        "training rows",
        "numbers of the chains",
        "numbers of the evaluation",
        "card",
    ]
    # Who asks without a token sees that it is there, and gets no file of it.
    anonymous = HfApi(endpoint=address.endpoint, token=False)
    assert anonymous.dataset_info("local/harm-dsc").gated == "manual"
    with pytest.raises(GatedRepoError):
        anonymous.hf_hub_download("local/harm-dsc", "metrics.json", repo_type="dataset", cache_dir=tmp_path / "c")


FEATURES = """
import json
from datasets import load_dataset
out = {}
for config in ("sft", "preference", "chains", "evaluation"):
    out[config] = {split: {k: str(v) for k, v in d.features.items()} for split, d in load_dataset("local/little-dsc", config, revision="REV").items()}
print(json.dumps(out))
"""


def test_every_config_loads_with_its_types(published, address, tmp_path: Path):
    env = os.environ | {"HF_ENDPOINT": address.endpoint, "HF_TOKEN": address.token, "HF_HOME": str(tmp_path / "hf")}
    code = FEATURES.replace("REV", published["dataset"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {c: set(of) for c, of in found.items()} == {
        "sft": {"train", "validation"},
        "preference": {"train", "validation"},
        "chains": {"train", "validation"},
        "evaluation": {"test"},
    }
    assert (
        found["evaluation"]["test"]["third"] == "Value('float64')"
    )  # there is no third scorer, and it is no text for that
    assert "'role': Value('string')" in found["sft"]["train"]["completion"]
    assert "'reward': Value('float64')" in found["chains"]["train"]["steps"]
    assert found["preference"]["train"]["margin"] == "Value('float64')"


@pytest.mark.parametrize(
    ("name", "content", "check", "told"),
    [
        (
            "recipe.yaml",
            RECIPE.replace("films.txt", "/etc/passwd"),
            "prompts",
            "prompts.values: '/etc/passwd' is not a file",
        ),
        ("recipe.yaml", RECIPE.replace("films.txt", "../../secret.txt"), "prompts", "is not a file beside the recipe"),
        ("recipe.yaml", "a: &x [1]\nb: *x\n", "prompts", "YAML aliases"),
        ("run.json", "{}", "card", "can't be read: KeyError"),
        ("run.json", '{"identity": 5, "versions": null}', "card", "can't be read: TypeError"),
        (
            "metrics.json",
            '{"schema": 4, "evaluation": 5}',
            "numbers of the evaluation",
            "can't be read: AttributeError",
        ),
        ("chains/train-00000-of-00001.parquet", "no parquet", "numbers of the chains", "can't be read"),
    ],
)
def test_whatever_a_stranger_s_repo_holds_is_told_and_reaches_nothing(
    published, address, tmp_path: Path, name: str, content: str, check: str, told: str
):
    (tmp_path / "secret.txt").write_text("my secret prompt")
    good = pull_repo(f"{DATASET}@{published['dataset']}", tmp_path / "good").folder
    change(address, "dataset", DATASET, **{name.replace("/", "__"): content.encode()})
    found = {c.name: c for c in verify_repo(DATASET)[1]}
    assert found[check].agrees is False and told in found[check].detail, found[check]
    assert not any("root:" in c.detail or "my secret" in c.detail for c in found.values())
    change(address, "dataset", DATASET, **{name.replace("/", "__"): (good / name).read_bytes()})


def test_addresses_in_a_card_are_not_asked(published, address, tmp_path: Path):
    from tests.scripted_server import make_server

    asked: list[object] = []
    inside = make_server(bodies=asked)
    handler = inside.RequestHandlerClass
    seen: list[str] = []

    class Watching(handler):  # type: ignore[valid-type, misc]
        def handle(self) -> None:
            seen.append("a connection")
            super().handle()

    inside.RequestHandlerClass = Watching
    threading.Thread(target=inside.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{inside.server_port}"
    try:
        with urllib.request.urlopen(f"{there}/v1/models") as answer:
            assert answer.status == 200 and len(seen) == 1
        api = HfApi(endpoint=address.endpoint, token=address.token)
        card = Path(
            api.hf_hub_download(DATASET, "README.md", repo_type="dataset", cache_dir=tmp_path / "c")
        ).read_text()
        head, _, body = card.removeprefix("---\n").partition("\n---\n")
        text = f"---\n{head}\nthumbnail: {there}/t.png\n---\n![x]({there}/i.png) <img src='{there}/i'>\n{body}"
        change(address, "dataset", DATASET, **{"README.md": text.encode()})
        pull_repo(DATASET, tmp_path / "out")
        checks = verify_repo(DATASET)[1]
        assert any(c.agrees is False for c in checks)
        with urllib.request.urlopen(
            urllib.request.Request(
                f"{address.endpoint}/datasets/{DATASET}", headers={"Authorization": f"Bearer {address.token}"}
            )
        ) as page:
            assert f'src="{there}' not in page.read().decode()
        assert len(seen) == 1
    finally:
        inside.shutdown()
        inside.server_close()
