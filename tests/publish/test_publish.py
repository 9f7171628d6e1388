"""Publishing to a real server over HTTP: one commit, read back, ours stays ours, private stays private."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from dsc_hub.config.origin import MANIFEST
from dsc_hub.config.recipe import Recipe
from dsc_hub.errors import HubError
from dsc_hub.hub import account as account_module
from dsc_hub.hub import push as push_
from dsc_hub.hub import repos
from dsc_hub.hub.account import Account, login
from dsc_hub.hub.repos import RepoTarget
from dsc_hub.local_hub.server import Address
from dsc_hub.publish import bundle
from dsc_hub.runs.facts import RunFacts
from tests import fixture_run
from tests.hub.at_hub import point


@pytest.fixture
def account(address: Address) -> Account:
    return login(None, address.endpoint, address.token)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (tmp_path / "big.bin").write_bytes(bytes(range(256)) * 50_000)
    (tmp_path / "row.json").write_text("{}")
    return {"README.md": tmp_path / "card.md", "sft/train.bin": tmp_path / "big.bin", "row.json": tmp_path / "row.json"}


def push(account: Account, files: dict[str, Path], tmp_path: Path, name: str, private: bool = True) -> str:
    return push_.push(account, RepoTarget("dataset", f"local/{name}", private), files, "by a test", tmp_path)


def listing(account: Account, name: str) -> set[str]:
    return set(account.api.list_repo_files(f"local/{name}", repo_type="dataset")) - {".gitattributes"}


def test_everything_goes_up_in_one_commit_privately_and_comes_back_the_same(account, files, tmp_path: Path):
    commit = push(account, files, tmp_path, "one")
    log = account.api.list_repo_commits("local/one", repo_type="dataset")
    assert [c.commit_id for c in log][0] == commit and len(log) == 2  # the first is the repo's own
    assert account.api.dataset_info("local/one").private
    assert listing(account, "one") == {*files, MANIFEST}
    back = account.api.hf_hub_download(
        "local/one", "sft/train.bin", repo_type="dataset", revision=commit, cache_dir=tmp_path / "cache"
    )
    assert Path(back).read_bytes() == files["sft/train.bin"].read_bytes()


def test_publishing_the_same_again_changes_nothing(account, files, tmp_path: Path):
    assert push(account, files, tmp_path, "same") == push(account, files, tmp_path, "same")
    assert len(account.api.list_repo_commits("local/same", repo_type="dataset")) == 2


def test_what_we_no_longer_publish_goes_and_what_others_added_stays(account, files, tmp_path: Path):
    push(account, files, tmp_path, "less")
    account.api.upload_file(
        path_or_fileobj=b"notes", path_in_repo="notes.txt", repo_id="local/less", repo_type="dataset"
    )
    push(account, {k: v for k, v in files.items() if k != "row.json"}, tmp_path, "less")
    assert listing(account, "less") == {"README.md", "sft/train.bin", "notes.txt", MANIFEST}


def test_a_private_push_into_a_public_repo_is_refused_before_a_byte_goes(account, files, tmp_path: Path):
    account.api.create_repo("local/open", repo_type="dataset", private=False)
    with pytest.raises(HubError, match="is public"):
        push(account, files, tmp_path, "open")
    assert listing(account, "open") == set()
    assert "exists and is public" in repos.check_targets(account, [RepoTarget("dataset", "local/open", True)])[0]
    assert repos.check_targets(account, [RepoTarget("dataset", "local/open", False)]) == []


def test_a_repo_that_is_not_ours_is_told_and_a_free_name_is_fine(account, files, tmp_path: Path):
    account.api.create_repo("local/theirs", repo_type="dataset", private=True)
    account.api.upload_file(path_or_fileobj=b"1", path_in_repo="a.csv", repo_id="local/theirs", repo_type="dataset")
    push(account, files, tmp_path, "ours")
    with pytest.raises(HubError, match="was not published by dsc"):
        push(account, files, tmp_path, "theirs")
    account.api.create_repo("local/fake", repo_type="dataset", private=True)
    account.api.upload_file(
        path_or_fileobj=b'{"files": {}}', path_in_repo=MANIFEST, repo_id="local/fake", repo_type="dataset"
    )
    assert "was not published by dsc" in repos.check_targets(account, [RepoTarget("dataset", "local/fake", True)])[0]
    assert "was not published by dsc" in repos.check_targets(account, [RepoTarget("dataset", "local/theirs", True)])[0]
    assert (
        repos.check_targets(
            account,
            [
                RepoTarget("dataset", "local/ours", True),
                RepoTarget("dataset", "local/free", True),
                RepoTarget("model", "local/ours", True),
            ],
        )
        == []
    )


EVE, MALLORY = repos.Stranger("eve/film", "e" * 64), repos.Stranger("mallory/film", "f" * 64)


def theirs(name: str, by: repos.Stranger, **more: object) -> RepoTarget:
    return RepoTarget("dataset", f"local/{name}", True, named_by=by, **more)


def test_a_strangers_recipe_does_not_choose_a_repo_of_ones_own(account, files, tmp_path: Path):
    push(account, files, tmp_path, "mine")
    before = account.api.dataset_info("local/mine").sha
    row = {"row.json": files["row.json"]}
    with pytest.raises(
        HubError, match=r"local/mine' exists, and its name was chosen by a recipe of somebody else \(eve/film\)"
    ):
        push_.push(account, theirs("mine", EVE), row, "by a test", tmp_path)
    assert account.api.dataset_info("local/mine").sha == before
    (problem,) = repos.check_targets(account, [theirs("mine", EVE)])
    assert "(eve/film): Choose the names: publish.dataset" in problem
    # One that this recipe made is published again; another stranger's is not touched.
    push_.push(account, theirs("new", EVE), files, "by a test", tmp_path)
    push_.push(account, theirs("new", EVE), row, "by a test", tmp_path)
    assert repos.check_targets(account, [theirs("new", EVE), theirs("free", EVE)]) == []
    assert "mallory/film" in repos.check_targets(account, [theirs("new", MALLORY)])[0]


def test_nor_one_that_holds_a_card_alone_nor_a_branch(account, files, tmp_path: Path):
    account.api.create_repo("local/card", repo_type="dataset", private=True)
    assert repos.check_targets(account, [theirs("card", EVE)]) == []  # nothing is in it
    account.api.upload_file(
        path_or_fileobj=b"# Mine\n", path_in_repo="README.md", repo_id="local/card", repo_type="dataset"
    )
    work = RepoTarget("dataset", "local/branch", True, branch="dev")
    push_.push(account, work, files, "by a test", tmp_path)
    for target in (theirs("card", EVE), theirs("branch", EVE, branch="dev")):
        assert "eve/film" in repos.check_targets(account, [target])[0]
        with pytest.raises(HubError, match="eve/film"):
            push_.push(account, target, {"row.json": files["row.json"]}, "by a test", tmp_path)
    assert set(account.api.list_repo_files("local/branch", repo_type="dataset", revision="dev")) >= set(files)


def test_what_this_very_recipe_published_is_published_again_by_it(account, files, tmp_path: Path):
    """One's own run, pulled and run again: the repo holds the recipe that names it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine\n")
    push(account, files | {"recipe.yaml": recipe}, tmp_path, "again")
    same = repos.Stranger("local/again", repos.signature(recipe)["sha256"])
    assert repos.check_targets(account, [theirs("again", same)]) == []


def test_a_base_model_that_is_there_already_is_that_base_whoever_names_it(account, tmp_path: Path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights" * 2_000_000)
    base = RepoTarget("model", "local/base", True)
    push_.push(account, base, {"model.safetensors": weights}, "by a test", tmp_path)
    named = replace(base, named_by=EVE)
    assert "eve/film" in repos.check_targets(account, [named])[0]
    assert repos.check_targets(account, [replace(base, named_by=EVE.with_weights([weights]))]) == []
    weights.write_bytes(b"other" * 2_000_000)
    assert "eve/film" in repos.check_targets(account, [replace(base, named_by=EVE.with_weights([weights]))])[0]


def test_what_the_hub_holds_is_compared_with_what_was_sent(
    account, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = HfApi.create_commit

    def changed_on_the_way(self, repo_id, operations, **keys):
        answer = original(self, repo_id, operations, **keys)
        return (
            original(self, repo_id, [CommitOperationAdd("row.json", b"other")], **(keys | {"parent_commit": None}))
            or answer
        )

    monkeypatch.setattr(HfApi, "create_commit", changed_on_the_way)
    with pytest.raises(HubError, match="does not hold what was sent: row.json differ"):
        push(account, files, tmp_path, "differs")


def test_login_tells_no_token_wrong_token_and_somebody_elses_name(address: Address, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(account_module, "get_token", lambda: None)
    with pytest.raises(HubError, match="no token"):
        login(None, address.endpoint)
    with pytest.raises(HubError, match="answered 401.*\n.*HF_TOKEN"):
        login(None, address.endpoint, "hf_wrongwrongwrongwrongwrongwrongwrong")
    with pytest.raises(HubError, match="'acme' is somebody else's .* belongs to local"):
        login("acme", address.endpoint, address.token)
    with pytest.raises(HubError, match="can't be reached"):
        login(None, "http://127.0.0.1:1", address.token)


def test_the_token_is_in_no_representation_and_no_message(account, address: Address):
    assert address.token not in repr(account)
    with pytest.raises(HubError) as e:
        push_.push(
            Account(address.endpoint, "local", address.token),
            RepoTarget("dataset", "other/x", True),
            {},
            "m",
            Path("/tmp"),
        )
    assert address.token not in str(e.value)


def test_an_invalid_card_is_refused_by_the_endpoint(account, files, tmp_path: Path):
    files["README.md"].write_text("---\nlicense: no-such-licence\n---\n")
    with pytest.raises(HubError, match="badcard"):
        push(account, files, tmp_path, "badcard")
    assert "license" in repos.check_card(account, "dataset", {"license": "no-such-licence"})[0]
    assert repos.check_card(account, "dataset", {"license": "mit", "language": ["en"]}) == []


@pytest.mark.parametrize(
    ("scopes", "fine"),
    [
        ([{"entity": {"type": "user", "name": "ann"}, "permissions": ["repo.content.read", "repo.write"]}], True),
        ([{"entity": {"type": "user", "name": "ann"}, "permissions": ["repo.content.read"]}], False),
        ([{"entity": {"type": "org", "name": "acme"}, "permissions": ["repo.write"]}], False),
        ([], False),
        (None, True),  # nothing is said: the Hub will tell
    ],
)
def test_a_fine_grained_token_must_be_able_to_write_there(monkeypatch: pytest.MonkeyPatch, scopes, fine: bool):
    # The embedded Hub has one kind of token; this is what the public one answers for such.
    token = {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scopes}}
    me = {"name": "ann", "orgs": [], "auth": {"accessToken": token}}
    monkeypatch.setattr(HfApi, "whoami", lambda self: me)
    if fine:
        assert login(None, "http://127.0.0.1:1", "hf_x").owner == "ann"
    else:
        with pytest.raises(HubError, match="may not write to repos of 'ann'"):
            login(None, "http://127.0.0.1:1", "hf_x")


def test_a_published_recipe_names_commits_everywhere_and_nothing_of_this_machine():
    facts = fixture_run.facts()
    reward = {"metric": "own/brevity.py", "scorer": "default", "options": {"endpoint": "http://10.0.0.1", "votes": 3}}
    reward["plus"] = [{"metric": "privacy", "scorer": "ann/ner", "options": {"api_key_env": "KEY"}, "revision": "main"}]
    facts["recipe"] |= {"reward": reward}
    facts["recipe"]["chain"] |= {"veto": {"similarity": 0.5, "scorer": "ann/encoder", "revision": "main"}}
    facts["recipe"]["chain"]["critic"] = {"model": "big", "endpoint": "http://10.0.0.2/v1", "api_key_env": "MY_API_KEY"}
    facts["identity"] |= {"reward.plus.0": f"privacy/ann/ner@{'a' * 40}", "chain.veto": f"similarity/x@{'b' * 40}"}
    told = bundle._public_recipe(RunFacts.model_validate(facts))
    assert told["reward"]["metric"] == "brevity.py" and told["reward"]["options"] == {"votes": 3}
    assert told["reward"]["plus"][0]["revision"] == "a" * 40 and told["reward"]["plus"][0]["options"] == {}
    assert told["chain"]["veto"]["revision"] == "b" * 40
    facts["recipe"]["chain"]["veto"]["scorer"] = "/data/private/encoder"
    facts["recipe"]["reward"]["scorer"] = "./private/model"
    local = bundle._public_recipe(RunFacts.model_validate(facts))
    assert (local["chain"]["veto"]["scorer"], local["reward"]["scorer"]) == ("encoder", "model")
    assert facts["recipe"]["reward"]["options"]["endpoint"], "the run's own facts stay as they are"
    assert told["chain"]["critic"] == {"model": "big", "extra": {}}


def test_a_student_and_its_teacher_are_published_as_others_can_load_them(tmp_path: Path):
    facts = fixture_run.facts_of_a_student()
    facts["student"] |= {"source": "/data/private/small", "id": "small", "published_as": "local/small"}
    facts["recipe"]["student"]["source"] = "/data/private/small"
    facts["identity"]["student"] = "/data/private/small@abc"
    it = RunFacts.model_validate(facts)
    recipe = Recipe.model_validate(bundle._public_recipe(it))  # can be read, and run with an address
    assert recipe.model.source == "api:big-<b>-model" and recipe.student and recipe.student.source == "local/small"
    text = bundle._public_facts(it, "adapter", tmp_path).read_text()
    assert "/data/private" not in text and fixture_run.MODEL_FOLDER not in text and "api.example.com" not in text
    public = RunFacts.model_validate_json(text)
    assert public.base.published_as == "local/small" and public.model.source == "api:big-<b>-model"
    assert public.identity["student"].startswith("./small@")
    assert bundle.model_folders(it) == [fixture_run.MODEL_FOLDER]


def test_an_embedded_hub_that_hf_endpoint_names_gets_large_files_over_plain_http(
    address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    point(monkeypatch, address, tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    account = login(None)
    (tmp_path / "weights.safetensors").write_bytes(b"0" * 11_000_000)
    made = {"weights.safetensors": tmp_path / "weights.safetensors"}
    commit = push_.push(account, RepoTarget("model", "local/large", True), made, "large", tmp_path)
    assert account.api.model_info("local/large").sha == commit
