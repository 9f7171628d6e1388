"""Whatever strikes while something is pushed: nothing is lost, nothing goes up twice, and what stays wrong is told in a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from dsc_hub.config.origin import MANIFEST
from dsc_hub.errors import HubError
from dsc_hub.hub import push, retry
from dsc_hub.hub.account import Account, login
from dsc_hub.hub.repos import RepoTarget
from dsc_hub.local_hub.server import Address
from tests.hub.faults import Fault, Faulty, running

COMMIT = r"/api/datasets/local/\w+/commit/"
UPLOAD = r"/lfs|objects|upload"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Address, Faulty]]:
    with running(tmp_path_factory.mktemp("hub")) as it:
        yield it


@pytest.fixture
def faulty(served, monkeypatch) -> Faulty:
    monkeypatch.setattr(retry, "PAUSE_S", 0.01)
    served[1].faults.clear()
    served[1].log.clear()
    return served[1]


@pytest.fixture
def account(served) -> Account:
    return login(None, served[0].endpoint, served[0].token)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (tmp_path / "big.bin").write_bytes(os.urandom(2_000_000))  # of its own: what the Hub has is not sent to it again
    (tmp_path / "row.json").write_text("{}")
    return {"README.md": tmp_path / "card.md", "sft/train.bin": tmp_path / "big.bin", "row.json": tmp_path / "row.json"}


def pushed(account: Account, files: dict[str, Path], name: str, work: Path, **target: object) -> str:
    return push.push(account, RepoTarget("dataset", f"local/{name}", True, **target), files, "by a test", work)


def ours(api: HfApi, name: str) -> list[str]:
    """Our commits in the repo."""
    log = api.list_repo_commits(f"local/{name}", repo_type="dataset")
    return [c.commit_id for c in log if c.title == "by a test"]


def test_somebody_elses_commit_in_between_stays_and_ours_goes_on_top(account, files, faulty, tmp_path: Path):
    def quicker() -> None:
        account.api.upload_file(
            path_or_fileobj=b"x", path_in_repo="theirs.txt", repo_id="local/race", repo_type="dataset"
        )

    pushed(account, files, "race", tmp_path)
    files["row.json"].write_text('{"new": 1}')
    faulty.faults = [Fault("POST", COMMIT, then=quicker)]
    commit = pushed(account, files, "race", tmp_path)
    there = set(account.api.list_repo_files("local/race", repo_type="dataset", revision=commit))
    assert {"theirs.txt", *files, MANIFEST} <= there and len(ours(account.api, "race")) == 2


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("busy", Fault("POST", COMMIT, 429, headers={"Retry-After": "1"})),
        ("down", Fault("POST", COMMIT, 500)),
        ("gone", Fault("POST", COMMIT, 503, times=3)),
        ("cut", Fault("POST", COMMIT, 0)),
        ("stale", Fault("POST", COMMIT, 412, times=2)),
        ("look", Fault("GET", r"/tree/", 500)),
        ("info", Fault("GET", "/api/datasets/local/info$", 502)),
        ("create", Fault("POST", r"/api/repos/create", 500)),
        ("again", Fault("HEAD", r"/resolve/.*/manifest.json", 500, times=2)),
    ],
)
def test_what_passes_is_waited_for(account, files, faulty, tmp_path: Path, name: str, fault: Fault):
    if name == "again":  # our manifest is read only where there is one
        pushed(account, files | {"more.json": files["row.json"]}, name, tmp_path)
    faulty.faults = [fault]
    commit = pushed(account, files, name, tmp_path)
    assert fault.times == 0 and ours(account.api, name)[0] == commit
    assert len(ours(account.api, name)) == (2 if name == "again" else 1)


def test_a_commit_whose_reply_is_lost_is_found_and_not_made_twice(account, files, faulty, tmp_path: Path):
    faulty.faults = [Fault("POST", COMMIT, 0, after=True)]
    commit = pushed(account, files, "unheard", tmp_path)
    assert ours(account.api, "unheard") == [commit] and faulty.count("POST", COMMIT) == 1


def test_a_connection_lost_in_the_middle_of_an_upload(account, files, faulty, tmp_path: Path):
    faulty.faults = [Fault("PUT", ".", 0)]
    commit = pushed(account, files, "upload", tmp_path)
    assert faulty.faults[0].times == 0 and ours(account.api, "upload") == [commit]
    back = account.api.hf_hub_download(
        "local/upload", "sft/train.bin", repo_type="dataset", revision=commit, cache_dir=tmp_path / "cache"
    )
    assert Path(back).read_bytes() == files["sft/train.bin"].read_bytes()


@pytest.mark.parametrize(
    ("status", "told"), [(500, "answered 500"), (429, "answered 429"), (412, "answered 412"), (0, "reached")]
)
def test_what_does_not_pass_ends_with_what_to_do(account, files, faulty, tmp_path: Path, status: int, told: str):
    faulty.faults = [Fault("POST", COMMIT, status, times=99)]
    name = f"never{status}"
    with pytest.raises(HubError, match=f"(?s){told}.*Tried 6 times.*the same command goes on"):
        pushed(account, files, name, tmp_path)
    assert faulty.count("POST", COMMIT) == retry.TRIES and ours(account.api, name) == []
    faulty.faults.clear()
    commit = pushed(account, files, name, tmp_path)
    assert ours(account.api, name) == [commit]


def test_a_login_is_tried_again(served, faulty, capsys: pytest.CaptureFixture[str]):
    address, whoami = served[0], "/api/whoami-v2"
    faulty.faults = [Fault("GET", whoami, 503, times=2)]
    assert login(None, address.endpoint, address.token).owner == "local"
    assert "login: answered 503; attempt 2 of 3" in capsys.readouterr().err
    faulty.faults = [Fault("GET", whoami, 503, times=99)]
    with pytest.raises(HubError, match="answered 503") as e:
        login(None, address.endpoint, address.token)
    assert faulty.count("GET", whoami) == 6 and "Tried 6 times" not in str(e.value)
    faulty.faults = [Fault("GET", whoami, 401, times=1)]  # a wrong token is no better after a pause
    with pytest.raises(HubError):
        login(None, address.endpoint, address.token)
    assert faulty.faults[0].times == 0


def test_a_repo_made_public_in_between_gets_nothing(account, files, faulty, tmp_path: Path):
    def open_it() -> None:
        account.api.update_repo_settings("local/opened", repo_type="dataset", private=False)

    faulty.faults = [Fault("POST", COMMIT, 500, then=open_it)]
    with pytest.raises(HubError, match="is public, but the recipe publishes privately"):
        pushed(account, files, "opened", tmp_path)
    assert ours(account.api, "opened") == []


@pytest.mark.parametrize(
    ("status", "told"), [(401, "answered 401.*hf auth login"), (403, "answered 403.*write access"), (404, "is gone")]
)
def test_a_token_that_ends_and_a_repo_that_goes_are_told_at_once(account, files, faulty, tmp_path, status, told):
    headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    faulty.faults = [Fault("POST", COMMIT, status, times=9, headers=headers)]
    with pytest.raises(HubError, match=f"(?s){told}"):
        pushed(account, files, f"lost{status}", tmp_path)
    assert faulty.count("POST", COMMIT) == 1


def test_what_somebody_changed_since_is_not_written_over_unasked(account, files, faulty, tmp_path: Path):
    pushed(account, files, "edited", tmp_path)
    account.api.upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\n# By hand\n",
        path_in_repo="README.md",
        repo_id="local/edited",
        repo_type="dataset",
    )
    files["row.json"].write_text('{"new": 1}')
    with pytest.raises(HubError, match=r"README\.md was changed there since dsc published it.*\n.*publish\.overwrite"):
        pushed(account, files, "edited", tmp_path)
    pushed(account, files, "edited", tmp_path, overwrite=True)
    assert len(ours(account.api, "edited")) == 2


def test_a_pull_request_proposes_and_changes_nothing_until_it_is_merged(account, files, faulty, tmp_path: Path):
    with pytest.raises(HubError, match="not found"):  # a repo must be there to be proposed to
        pushed(account, files, "nowhere", tmp_path, pull_request=True)
    head = pushed(account, files, "proposed", tmp_path)
    files["row.json"].write_text('{"new": 1}')
    commit = pushed(account, files, "proposed", tmp_path, pull_request=True)
    assert account.api.dataset_info("local/proposed").sha == head
    there = account.api.hf_hub_download(
        "local/proposed", "row.json", repo_type="dataset", revision="refs/pr/1", cache_dir=tmp_path / "cache"
    )
    assert Path(there).read_text() == '{"new": 1}'
    assert pushed(account, files, "proposed", tmp_path, pull_request=True) == commit  # not proposed twice
    refs = account.api.list_repo_refs("local/proposed", repo_type="dataset", include_pull_requests=True)
    assert [r.ref for r in refs.pull_requests] == ["refs/pr/1"]


def test_a_branch_of_its_own_and_a_tag_that_does_not_move(account, files, faulty, tmp_path: Path):
    def push_to(branch: str, tag: str | None = None) -> str:
        return pushed(account, files, "branched", tmp_path, branch=branch, tag=tag)

    commit = push_to("v2")
    assert account.api.dataset_info("local/branched", revision="v2").sha == commit
    assert "row.json" not in account.api.list_repo_files("local/branched", repo_type="dataset")
    assert push_to("v2", "first") == push_to("v2", "first") == commit
    files["row.json"].write_text('{"new": 1}')
    with pytest.raises(HubError, match=f"has the tag 'first' at {commit[:12]}"):
        push_to("v2", "first")
    other = push_to("v2", "second")
    tags = {t.name: t.target_commit for t in account.api.list_repo_refs("local/branched", repo_type="dataset").tags}
    assert tags == {"first": commit, "second": other}


def test_the_same_again_asks_little_and_commits_nothing(account, files, faulty, tmp_path: Path):
    first = pushed(account, files, "same", tmp_path)
    faulty.log.clear()
    assert pushed(account, files, "same", tmp_path) == first
    assert faulty.count("POST", COMMIT) == 0 and faulty.count("PUT", ".") == 0
    assert len(faulty.log) <= 6, faulty.log


def test_the_token_is_in_no_message_and_no_log(account, files, faulty, tmp_path: Path, served, capfd, caplog):
    caplog.set_level("DEBUG")
    said = []
    for status in (401, 403, 412, 429, 500, 0):
        faulty.faults = [Fault("POST", COMMIT, status, times=99)]
        with pytest.raises(HubError) as e:
            pushed(account, files, f"said{status}", tmp_path)
        said.append(str(e.value))
    out = capfd.readouterr()
    assert served[0].token not in "".join([*said, out.out, out.err, caplog.text, repr(account)])


def test_a_repo_is_gated_before_a_file_is_in_it(account, files, faulty, tmp_path: Path):
    pushed(account, files, "gated", tmp_path, gated="auto")
    settings = next(i for i, (_, path) in enumerate(faulty.log) if path.endswith("/settings"))
    first_file = next(i for i, (_, path) in enumerate(faulty.log) if "/preupload/" in path)
    assert settings < first_file and account.api.dataset_info("local/gated").gated == "auto"


def test_a_collection_ties_them_together_once(account, files, faulty, tmp_path: Path):
    for name in ("one", "two"):
        pushed(account, files, name, tmp_path)
    items = [("dataset", "local/one"), ("dataset", "local/two")]
    address = push.add_to_collection(account, "Kind reviews", items, private=True)
    assert push.add_to_collection(account, "Kind reviews", items, private=True) == address
    (found,) = account.api.list_collections(owner="local")
    whole = account.api.get_collection(found.slug)
    assert [(i.item_type, i.item_id) for i in whole.items] == items and whole.private and whole.title == "Kind reviews"
    with pytest.raises(Exception, match="404"):  # nobody else sees it
        HfApi(endpoint=account.endpoint, token=False).get_collection(found.slug)
    account.api.delete_collection_item(found.slug, whole.items[0].item_object_id)
    assert [i.item_id for i in account.api.get_collection(found.slug).items] == ["local/two"]
    account.api.delete_collection(found.slug)
    assert list(account.api.list_collections(owner="local")) == []


def test_the_manifest_lists_both_hashes(account, files, faulty, tmp_path: Path):
    commit = pushed(account, files, "listed", tmp_path)
    path = account.api.hf_hub_download(
        "local/listed", MANIFEST, repo_type="dataset", revision=commit, cache_dir=tmp_path / "cache"
    )
    listed = json.loads(Path(path).read_text())["files"]
    assert set(listed) == set(files) and listed["row.json"]["size"] == 2 and len(listed["row.json"]["sha256"]) == 64
    tree = {e.path: e for e in account.api.list_repo_tree("local/listed", repo_type="dataset", recursive=True)}
    assert tree["row.json"].blob_id == listed["row.json"]["git"]
