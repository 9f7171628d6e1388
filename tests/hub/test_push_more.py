"""What else can strike while something is pushed, and what must not happen then: silence for ever, tracebacks, private files in a
public repo, somebody's file written over, a token on the screen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from dsc_hub.errors import HubError
from dsc_hub.hub import push, retry
from dsc_hub.hub.account import Account, login
from dsc_hub.hub.repos import RepoTarget
from dsc_hub.local_hub.server import Address
from tests.hub.faults import Fault, Faulty, running

COMMIT, UPLOAD, ALWAYS = r"/api/datasets/local/\w+/commit/", "/_lfs/[0-9a-f]{64}$", 10**6
HOUR = {"Retry-After": "3600"}


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
    (tmp_path / "big.bin").write_bytes(os.urandom(500_000))  # of its own: what the Hub has is not sent to it again
    (tmp_path / "row.json").write_text("{}")
    return {"README.md": tmp_path / "card.md", "sft/train.bin": tmp_path / "big.bin", "row.json": tmp_path / "row.json"}


def pushed(account: Account, files: dict[str, Path], name: str, work: Path, **target: object) -> str:
    return push.push(account, RepoTarget("dataset", f"local/{name}", True, **target), files, "by a test", work)


def commits(api: HfApi, name: str) -> list[str]:
    return [c.title for c in api.list_repo_commits(f"local/{name}", repo_type="dataset")]


def opened(account: Account, name: str):
    return lambda: account.api.update_repo_settings(f"local/{name}", repo_type="dataset", private=False)


# -- waits and tracebacks


@pytest.mark.timeout(60)
def test_a_hub_that_never_answers_is_not_waited_for_without_end(account, files, faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "REPLY_S", 0.4)
    faulty.faults = [Fault("POST", COMMIT, hang=True), Fault("GET", "/api/datasets/local/hung$", hang=True)]
    faulty.faults += [Fault("GET", "/tree/", hang=True)]
    started = time.monotonic()
    pushed(account, files, "hung", tmp_path)
    assert commits(account.api, "hung") == ["by a test", "initial commit"] and time.monotonic() - started < 30


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "method", "path"), [("a", "POST", COMMIT), ("b", "POST", "/preupload/"), ("c", "PUT", UPLOAD)]
)
def test_a_hub_that_asks_to_wait_for_an_hour_is_given_up_at_once(account, files, faulty, tmp_path, name, method, path):
    faulty.faults = [Fault(method, path, 429, times=ALWAYS, headers=HOUR)]
    with pytest.raises(HubError, match="asks to wait for 1 h 00 min\n.*same command"):
        pushed(account, files, name, tmp_path)
    assert commits(account.api, name) == ["initial commit"]


def test_an_upload_that_is_refused_is_told_in_a_line_without_its_signed_address(account, files, faulty, tmp_path):
    faulty.faults = [Fault("PUT", UPLOAD, 403, body=b"<html>no</html>", headers={"Content-Type": "text/html"})]
    with pytest.raises(HubError, match="answered 403: .*/_lfs/") as e:
        pushed(account, files, "refused", tmp_path)
    assert "sig=" not in str(e.value) and commits(account.api, "refused") == ["initial commit"]


@pytest.mark.timeout(60)
def test_what_the_client_tried_again_by_itself_is_not_tried_as_often_again(
    account, files, faulty, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    faulty.faults = [Fault("POST", "/preupload/", 500, times=ALWAYS)]
    with pytest.raises(HubError, match="answered 500"):
        pushed(account, files, "often", tmp_path)
    assert faulty.count("POST", "/preupload/") == 6  # the client's


@pytest.mark.parametrize("path", ["/api/validate-yaml", COMMIT])
def test_a_page_of_a_proxy_is_borne_with(account, files, faulty, tmp_path, path: str):
    faulty.faults = [Fault("POST", path, 502, body=b"<html>bad gateway</html>", headers={"Content-Type": "text/html"})]
    name = "proxy" + str(len(path))
    pushed(account, files, name, tmp_path)
    assert commits(account.api, name) == ["by a test", "initial commit"]


# -- private and ours


def test_nothing_is_committed_into_a_repo_that_is_made_public_during_the_upload(account, files, faulty, tmp_path):
    faulty.faults = [Fault("PUT", UPLOAD, later=opened(account, "opening"))]
    with pytest.raises(HubError, match="was made public while the files were uploaded"):
        pushed(account, files, "opening", tmp_path)
    assert commits(account.api, "opening") == ["initial commit"] and faulty.count("POST", COMMIT) == 0


def test_a_repo_that_is_made_public_with_the_commit_is_told_at_once(account, files, faulty, tmp_path):
    faulty.faults = [Fault("POST", COMMIT, later=opened(account, "open"))]
    with pytest.raises(HubError, match="anybody can read .*\n.*private again"):
        pushed(account, files, "open", tmp_path)


def test_a_file_that_somebody_added_is_not_written_over_when_we_begin_to_publish_one_of_its_name(
    account, files, faulty, tmp_path
):
    pushed(account, files, "added", tmp_path)
    account.api.upload_file(
        path_or_fileobj=b"theirs", path_in_repo="notes.txt", repo_id="local/added", repo_type="dataset"
    )
    with pytest.raises(HubError, match="notes.txt"):
        pushed(account, files | {"notes.txt": files["row.json"]}, "added", tmp_path)


def test_a_file_that_somebody_changes_between_our_look_and_our_commit_is_not_written_over(
    account, files, faulty, tmp_path
):
    def quicker() -> None:
        account.api.upload_file(
            path_or_fileobj=b"by hand", path_in_repo="row.json", repo_id="local/quick", repo_type="dataset"
        )

    pushed(account, files, "quick", tmp_path)
    files["row.json"].write_text('{"new": 1}')
    faulty.faults = [Fault("POST", COMMIT, then=quicker)]
    with pytest.raises(HubError, match="row.json was changed there since"):
        pushed(account, files, "quick", tmp_path)
    assert len(commits(account.api, "quick")) == 3  # the repo's own, ours, theirs


def test_nothing_is_made_in_a_repo_that_is_not_ours(account, files, faulty, tmp_path):
    account.api.create_repo("local/theirs", repo_type="dataset", private=True)
    account.api.upload_file(path_or_fileobj=b"1", path_in_repo="a.csv", repo_id="local/theirs", repo_type="dataset")
    with pytest.raises(HubError, match="was not published by dsc"):
        pushed(account, files, "theirs", tmp_path, branch="v2")
    assert [b.name for b in account.api.list_repo_refs("local/theirs", repo_type="dataset").branches] == ["main"]


def test_a_repo_that_is_deleted_in_the_middle_is_not_made_again_behind_its_owners_back(
    account, files, faulty, tmp_path
):
    def delete() -> None:
        account.api.delete_repo("local/deleted", repo_type="dataset")

    faulty.faults = [Fault("POST", COMMIT, 500, then=delete)]
    with pytest.raises(HubError, match="is gone"):
        pushed(account, files, "deleted", tmp_path)
    assert not account.api.repo_exists("local/deleted", repo_type="dataset")


def test_a_repo_that_was_renamed_is_not_followed(account, files, faulty, tmp_path):
    pushed(account, files, "old", tmp_path)
    pushed(account, files, "new", tmp_path)
    files["row.json"].write_text("[]")
    way = {"times": ALWAYS, "leads_to": ("local/old", "local/new")}
    faulty.faults = [Fault(method, r"datasets/local/old\b", 307, **way) for method in ("GET", "HEAD")]
    with pytest.raises(HubError, match="has moved to 'local/new'"):
        pushed(account, files, "old", tmp_path)


# -- tokens


def test_a_token_with_a_line_end_in_it_is_not_shown(served):
    address, _ = served
    with pytest.raises(HubError, match="characters that no token has") as e:
        login(None, address.endpoint, address.token + "\n" + address.token)
    assert address.token not in str(e.value)


# -- tags


def test_nothing_is_committed_for_a_tag_that_is_taken(account, files, faulty, tmp_path):
    commit = pushed(account, files, "tagged", tmp_path, tag="v1")
    assert pushed(account, files, "tagged", tmp_path, tag="v1") == commit
    files["row.json"].write_text("[]")
    with pytest.raises(HubError, match=f"has the tag 'v1' at {commit[:12]}"):
        pushed(account, files, "tagged", tmp_path, tag="v1")
    assert commits(account.api, "tagged") == ["by a test", "initial commit"]
