"""The report as a static Space: private, one page, no local paths, and without texts where the recipe asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsc_hub.errors import ConfigError, RunError
from dsc_hub.hub.account import Account, login
from dsc_hub.local_hub.server import Address
from dsc_hub.publish.report_space import publish_report
from tests import fixture_run


@pytest.fixture
def account(address: Address) -> Account:
    return login(None, address.endpoint, address.token)


def page_at(account: Account, repo: str, folder: Path) -> str:
    path = account.api.hf_hub_download(repo, "index.html", repo_type="space", cache_dir=folder)
    return Path(path).read_text(encoding="utf-8")


def test_it_is_one_private_page_and_the_same_again_commits_nothing(account: Account, tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    published = publish_report(run, account, None, private=True)
    assert published["repo"] == "local/quickstart-report" and published["texts"] is True
    info = account.api.space_info(published["repo"])
    assert info.private and info.sdk == "static"
    page = page_at(account, published["repo"], tmp_path)
    assert 'id="data"' in page and "Read all of it" in page and str(run.folder) not in page
    assert publish_report(run, account, None, private=True)["commit"] == published["commit"]
    assert not run["index.html"].exists()


def test_with_a_content_warning_no_text_leaves(account: Account, tmp_path: Path):
    facts = fixture_run.facts()
    facts["recipe"]["publish"] |= {"content_warning": "These texts are harsh."}
    run = fixture_run.write(tmp_path / "run", run_facts=facts)
    published = publish_report(run, account, "harsh", private=True)
    page = page_at(account, "local/harsh", tmp_path)
    texts = {json.loads(line)["text"] for line in run["evaluation/answers.jsonl"].read_text().splitlines()}
    assert published["texts"] is False and not any(text in page for text in texts)
    assert 'id="data"' not in page and "Read some of it" not in page and "The chains" in page


def test_what_can_not_be_published_is_an_error(account: Account, tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    with pytest.raises(ConfigError, match="can't be the name of a Space"):
        publish_report(run, account, "../x", private=True)
    run.unfinish("distill")
    run["log.txt"].write_text(f"sampling  -> {run.folder.resolve()}/chains.jsonl\n")
    with pytest.raises(RunError, match="would publish the local path"):
        publish_report(run, account, None, private=True)
