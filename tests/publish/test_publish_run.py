"""A whole run goes to a Hub: which requests that takes, what is told when it breaks off, and what ties the repos together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi

from dsc_hub.config.publishing import PublishConfig
from dsc_hub.errors import HubError
from dsc_hub.hub import retry
from dsc_hub.hub.account import Account, login
from dsc_hub.local_hub.app import make_app
from dsc_hub.local_hub.server import hosted
from dsc_hub.local_hub.store import Store
from dsc_hub.publish import upload
from dsc_hub.report import cards
from dsc_hub.runs.run import Run
from tests import fixture_run
from tests.hub.faults import Fault, Faulty

TOKEN = "hf_" + "t" * 34
DATASET, ADAPTER, BASE = "local/quickstart-dsc", "local/quickstart-dsc-lora", "local/smollm2-135m-instruct"


@dataclass
class Bench:
    run: Run
    account: Account
    faulty: Faulty
    folder: Path

    @property
    def api(self) -> HfApi:
        return self.account.api

    def publish(self, **how: Any) -> dict[str, Any]:
        how = PublishConfig(to="local", **how)
        return upload.publish_run(
            self.run,
            self.account,
            self.folder / "model",
            self.folder / "recipe",
            how,
            lambda: cards.build_cards(self.run),
        )

    def commits(self, repo: str, repo_type: str) -> list[str]:
        return [c.commit_id for c in self.api.list_repo_commits(repo, repo_type=repo_type)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    facts = fixture_run.facts()
    facts["repos"]["base"] = None
    facts["model"] |= {"published_as": "HuggingFaceTB/SmolLM2-135M-Instruct", "published_commit": None}
    run = fixture_run.write(tmp_path / "run", run_facts=facts)
    run["cards"].mkdir(exist_ok=True)
    for name in ("arms", "steps", "loss"):
        run[f"cards/{name}.png"].write_bytes(b"a picture")
    run["adapter/adapter_model.safetensors"].write_bytes(bytes(range(256)) * 40)
    for folder in ("model", "recipe"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipe/films.txt").write_text("Ash\n")
    (tmp_path / "model/model.safetensors").write_bytes(b"\0" * 5000)
    (tmp_path / "model/config.json").write_text("{}")
    faulty = Faulty(make_app(Store(tmp_path / "hub"), {TOKEN: "local"}))
    monkeypatch.setattr(retry, "PAUSE_S", 0.01)
    with hosted(faulty) as endpoint:
        yield Bench(run, login(None, endpoint, TOKEN), faulty, tmp_path)


def test_an_adapter_of_a_student_lies_on_the_student_at_the_commit_that_was_published(bench: Bench):
    facts = fixture_run.facts_of_a_student()
    bench.run.add_facts(**{key: facts[key] for key in ("model", "student", "recipe", "identity", "repos")})
    bench.publish(base="smollm2-135m-instruct")
    (commit, _) = bench.commits(BASE, "model")
    raw = bench.run.raw_facts
    assert raw["student"]["published_commit"] == commit and "published_commit" not in raw["model"]
    config = json.loads(Path(bench.api.hf_hub_download(ADAPTER, "adapter_config.json")).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, commit)


def kinds(faulty: Faulty) -> Counter[tuple[str, str]]:
    """How often each kind of request came."""
    return Counter((method, re.sub(r"\b[0-9a-f]{40,64}\b", "<id>", path)) for method, path in faulty.log)


def test_the_requests_of_a_publish_and_of_the_same_again(bench: Bench):
    bench.faulty.log.clear()
    first = bench.publish()
    model, dataset = f"/api/models/{ADAPTER}", f"/api/datasets/{DATASET}"
    assert kinds(bench.faulty) == {
        ("POST", "/api/validate-yaml"): 4,  # each card by us before anything goes up, and by the client with its commit
        ("POST", "/api/repos/create"): 2,
        ("GET", dataset): 4,  # it isn't there; it is; still private after the upload, and after the commit
        ("GET", model): 4,
        ("GET", f"{dataset}/tree/<id>"): 2,  # before and after
        ("GET", f"{model}/tree/<id>"): 2,
        ("POST", f"{dataset}/preupload/main"): 1,
        ("POST", f"{model}/preupload/main"): 1,
        ("POST", f"/datasets/{DATASET}.git/info/lfs/objects/batch"): 1,
        ("POST", f"/{ADAPTER}.git/info/lfs/objects/batch"): 1,
        ("PUT", "/_lfs/<id>"): 7,  # six parquet files and the adapter's weights
        ("POST", "/_lfs/<id>/verify"): 7,
        ("POST", f"{dataset}/commit/main"): 1,
        ("POST", f"{model}/commit/main"): 1,
    }
    bench.faulty.log.clear()
    assert bench.publish() == first
    assert {m for m, path in bench.faulty.log if path != "/api/validate-yaml"} <= {"GET", "HEAD"}
    assert len(bench.faulty.log) <= 2 + 2 * 4  # the cards; a repo's facts, its files and our manifest


def test_one_that_breaks_off_says_what_is_published_and_goes_on_with_the_same_call(bench: Bench):
    bench.faulty.faults = [Fault("POST", f"{ADAPTER}/commit/", 503, times=retry.TRIES)]
    with pytest.raises(HubError) as e:
        bench.publish()
    assert f"model '{ADAPTER}'" in e.value.message and "answered 503" in e.value.message
    assert f"Published: dataset at {bench.account.endpoint}/datasets/{DATASET}." in e.value.hint
    dataset = bench.commits(DATASET, "dataset")
    out = bench.publish()
    assert bench.commits(DATASET, "dataset") == dataset and out["dataset"]["commit"] == dataset[0]
    assert len(bench.commits(ADAPTER, "model")) == 2


def test_all_cards_are_checked_before_anything_goes_up(bench: Bench):
    facts = bench.run.raw_facts
    facts["recipe"]["publish"]["license"] = "no-such-licence"
    bench.run.add_facts(recipe=facts["recipe"])
    bench.faulty.log.clear()
    with pytest.raises(
        HubError, match="can't be published:\n.*dataset: .*license.*\n.*adapter: .*license.*\n.*Nothing"
    ):
        bench.publish()
    assert {path for _, path in bench.faulty.log} == {"/api/validate-yaml"}


def test_a_tag_alone_makes_no_commit_although_the_recipe_goes_along(bench: Bench):
    first = bench.publish()
    recipe = bench.run.raw_facts["recipe"]
    recipe["publish"] |= {"tag": "v1", "collection": "Films"}
    bench.run.add_facts(recipe=recipe)
    assert bench.publish(tag="v1", collection="Films") == first
    for kind in ("dataset", "adapter"):
        repo, repo_type, commit = (first[kind][k] for k in ("repo", "type", "commit"))
        assert [t.target_commit for t in bench.api.list_repo_refs(repo, repo_type=repo_type).tags] == [commit]
    path = bench.api.hf_hub_download(DATASET, "recipe.yaml", repo_type="dataset", cache_dir=bench.folder / "cache")
    published = yaml.safe_load(Path(path).read_text())["publish"]
    assert published["base"] == "smollm2-135m-instruct" and not {"tag", "collection", "revision"} & published.keys()


@pytest.mark.parametrize("after", [None, True, False])
def test_a_collection_is_made_once_and_holds_each_repo_once(bench: Bench, after: bool | None):
    bench.run.add_facts(repos=bench.run.raw_facts["repos"] | {"base": BASE})
    if after is not None:  # the connection is cut, after the work was done or before
        bench.faulty.faults = [Fault("POST", path, 0, after=after) for path in ("/api/collections$", "/items$")]
    bench.publish(collection="Kind films")
    bench.publish(collection="Kind films")
    (found,) = bench.api.list_collections(owner="local")
    assert (found.title, found.private) == ("Kind films", True)
    items = {(i.item_type, i.item_id) for i in bench.api.get_collection(found.slug).items}
    assert items == {("model", BASE), ("dataset", DATASET), ("model", ADAPTER)}
    assert len(bench.api.get_collection(found.slug).items) == 3
