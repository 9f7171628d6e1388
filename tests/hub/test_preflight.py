"""Before any work: every problem at once, what a token may do, and what nobody is asked for twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from dsc_hub.errors import HubError
from dsc_hub.hub import account as hub_account
from dsc_hub.hub import push as hub_push
from dsc_hub.hub import repos
from dsc_hub.hub.repos import RepoTarget
from dsc_hub.local_hub.app import make_app
from dsc_hub.local_hub.server import hosted
from dsc_hub.local_hub.store import Store
from tests.hub.faults import Faulty

TOKEN = "hf_" + "t" * 34


@dataclass
class Bench:
    endpoint: str
    faulty: Faulty
    work: Path
    rights: dict[str, dict] = field(default_factory=dict)

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=TOKEN)

    def login(self) -> hub_account.Account:
        return hub_account.login(None, self.endpoint, TOKEN)

    def push(self, text: str = "{}", **how: Any) -> str:
        (self.work / "row.json").write_text(text)
        target = RepoTarget("dataset", "local/data", **({"private": True} | how))
        return hub_push.push(
            hub_account.Account(self.endpoint, "local", TOKEN),
            target,
            {"row.json": self.work / "row.json"},
            "m",
            self.work,
        )

    def told(self, *of: RepoTarget) -> list[str]:
        return repos.check_targets(self.login(), of)


DATA, NEW = RepoTarget("dataset", "local/data", True), RepoTarget("model", "local/new", True)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    rights: dict[str, dict] = {}
    faulty = Faulty(make_app(Store(tmp_path / "hub"), {TOKEN: "local"}, rights))
    with hosted(faulty) as endpoint:
        yield Bench(endpoint, faulty, tmp_path, rights)


def test_everything_is_told_at_once_and_nothing_is_written(bench: Bench):
    bench.push(private=False)
    bench.api.upload_file(path_or_fileobj=b"1", path_in_repo="row.json", repo_id="local/data", repo_type="dataset")
    bench.api.create_tag("local/data", tag="v1", repo_type="dataset")
    bench.push("[]", private=False, overwrite=True)
    bench.api.upload_file(path_or_fileobj=b"2", path_in_repo="row.json", repo_id="local/data", repo_type="dataset")
    bench.api.create_repo("local/theirs")
    bench.api.upload_file(path_or_fileobj=b"1", path_in_repo="a.csv", repo_id="local/theirs")
    bench.faulty.log.clear()
    told = bench.told(
        RepoTarget("dataset", "local/data", True, tag="v1"),
        RepoTarget("model", "local/theirs", False),
        RepoTarget("model", "local/two--dashes", True),
        RepoTarget("dataset", "somebody/x", True),
        RepoTarget("dataset", "local/none", True, pull_request=True),
    )
    expected = (
        "exists and is public",
        "row.json was changed there since dsc published it",
        "has the tag 'v1' at",
        "was not published by dsc",
        "two--dashes': not a repo name",
        "this token may not make it",
        "a pull request needs a repo that does",
    )
    assert len(told) == len(expected), told
    for text, problem in zip(expected, told, strict=True):
        assert text in problem
    assert {method for method, _ in bench.faulty.log} <= {"GET", "HEAD"}


def test_a_repo_that_is_fine_and_one_that_will_be_made_are_no_problem(bench: Bench):
    bench.push(branch="v2", tag="v1")
    assert bench.told(DATA, RepoTarget("dataset", "local/data", True, branch="v2", tag="v1"), NEW) == []
    assert bench.told(RepoTarget("dataset", "local/data", True, branch="v3")) == []


def scoped(*entities: tuple[str, str]) -> dict[str, Any]:
    rows = [{"entity": {"type": t, "name": n}, "permissions": ["repo.content.read", "repo.write"]} for t, n in entities]
    reads = {"entity": {"type": "user", "name": "local"}, "permissions": ["repo.content.read"]}
    return {"role": "fineGrained", "fineGrained": {"canReadGatedRepos": True, "global": [], "scoped": [reads, *rows]}}


def test_a_fine_grained_token_is_taken_at_its_scopes(bench: Bench):
    bench.push()
    for scopes, named in ((scoped(), "nothing"), (scoped(("org", "acme"), ("user", "ann")), "acme, ann")):
        bench.rights[TOKEN] = scopes
        with pytest.raises(HubError, match=f"may not write to repos of 'local', but to: {named}\n"):
            bench.login()
    bench.rights[TOKEN] = scoped(("dataset", "local/data"))  # for one repo alone: enough for that one
    (problem,) = bench.told(DATA, NEW)
    assert "model 'local/new' doesn't exist, and this token may not make it" in problem
    bench.push("[]")
    bench.rights[TOKEN] = scoped(("dataset", "local/other"))
    (problem,) = bench.told(DATA)
    assert "answered 403" in problem
    bench.rights[TOKEN] = scoped(("user", "local"))
    assert bench.told(DATA, NEW) == []
    bench.rights[TOKEN] = scoped(("some-new-kind", "x"))  # what we don't know is left to the Hub
    assert bench.login().may_write("model", "local/new")


def test_a_read_only_token_is_refused_at_the_door_and_a_lost_right_in_the_middle(bench: Bench):
    bench.rights[TOKEN] = {"role": "read"}
    with pytest.raises(HubError, match="can only read\n.*write access"):
        bench.login()
    with pytest.raises(HubError, match="answered 403.*\n.*write access"):
        bench.push()


def test_private_repos_do_not_go_into_a_public_collection(bench: Bench):
    bench.push()
    account = bench.login()
    assert repos.collection_is_public(account, "Open") == []
    bench.api.create_collection("Open", namespace="local", private=False)
    (problem,) = repos.collection_is_public(account, "Open")
    assert "the collection 'Open' exists and is public" in problem
    with pytest.raises(HubError, match="the collection 'Open' exists and is public"):
        hub_push.add_to_collection(account, "Open", [("dataset", "local/data")], private=True)
    (found,) = bench.api.list_collections(owner="local")
    assert bench.api.get_collection(found.slug).items == []
    hub_push.add_to_collection(account, "Open", [("dataset", "local/data")], private=False)


def test_a_file_that_no_hub_takes_is_refused_before_anything_is_sent(bench: Bench):
    with (bench.work / "weights.bin").open("wb") as file:
        file.truncate(repos.LARGEST_FILE + 1)  # sparse: it takes no room
    account = bench.login()
    bench.faulty.log.clear()
    with pytest.raises(HubError, match="weights.bin is larger than 50 GB"):
        hub_push.push(account, DATA, {"weights.bin": bench.work / "weights.bin"}, "m", bench.work)
    assert bench.faulty.log == []
