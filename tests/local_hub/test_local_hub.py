"""The local hub, spoken to by the real, unmodified clients over HTTP.

Whatever reads HF_ENDPOINT at import, or uploads large files, runs in a child process with its own HF_HOME; `HfApi` with
an endpoint and plain HTTP requests run here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dsc_hub.errors import HubError
from dsc_hub.local_hub.app import make_app
from dsc_hub.local_hub.server import Address, default_root, hosted, running, token_of
from dsc_hub.local_hub.store import Refusal, Store, clean_path, is_repo_id

SERVE = "import sys; from dsc_hub.local_hub.server import serve; serve(sys.argv[1], 0)"
GUEST = "hf_" + "g" * 34


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub for the tests that only need one; each uses repos of its own."""
    with running(tmp_path_factory.mktemp("shared") / "hub") as address:
        yield address


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def child_env(address: Address, home: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": address.endpoint,
        "HF_TOKEN": address.token,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def client(address: Address, home: Path, code: str) -> dict:
    """Run code in a fresh process against the hub; what it printed last, as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = child_env(address, home)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def served(root: Path):
    """`serve` in a process of its own; the process and its endpoint."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(root)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("Local hub at http://127.0.0.1:"), process.stderr.read()
        yield process, line.split()[3]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def http(address: Address, method: str, path: str, token: str | None = None, **kwargs) -> httpx.Response:
    """One raw request, with the path sent as it is written."""
    headers = kwargs.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    return httpx.request(method, address.endpoint + path, headers=headers, timeout=30, **kwargs)


def raw_commit(address: Address, repo: str, *operations: tuple[str, dict], token: str = "", **header) -> httpx.Response:
    """A commit as it travels, for requests that the clients refuse to send."""
    rows = [{"key": "header", "value": {"summary": "raw"} | header}, *({"key": k, "value": v} for k, v in operations)]
    body = "\n".join(json.dumps(row) for row in rows)
    return http(address, "POST", f"/api/models/{repo}/commit/main", token or address.token, content=body)


def added(path: str, text: str = "x") -> tuple[str, dict]:
    return "file", {"path": path, "content": text, "encoding": "utf-8"}


# -- what the clients do


def test_a_small_and_a_large_file_come_back_byte_for_byte_in_a_fresh_cache(hub, tmp_path):
    sent = client(
        hub,
        tmp_path / "sender",
        """
        import hashlib, json, random
        from huggingface_hub import CommitOperationAdd, HfApi
        api = HfApi()
        first = api.create_repo("round-trip", private=True)
        again = api.create_repo("round-trip", private=True, exist_ok=True)
        large = random.Random(1).randbytes(12_000_000)
        small = "grüße\\n".encode()
        operations = [CommitOperationAdd("notes/small.txt", small), CommitOperationAdd("large.dat", large)]
        commit = api.create_commit("local/round-trip", operations, commit_message="both")
        sha = hashlib.sha256(large).hexdigest()
        print(json.dumps({"url": first, "again": again, "commit": commit.oid, "sha": sha}))
    """,
    )
    assert sent["url"] == sent["again"] == f"{hub.endpoint}/local/round-trip"
    got = client(
        hub,
        tmp_path / "receiver",
        """
        import hashlib, json, pathlib
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        small = hf_hub_download("local/round-trip", "notes/small.txt")
        folder = pathlib.Path(snapshot_download("local/round-trip"))
        files = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        info = HfApi().model_info("local/round-trip", files_metadata=True)
        lfs = {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}
        sha = hashlib.sha256((folder / "large.dat").read_bytes()).hexdigest()
        print(json.dumps({"small": pathlib.Path(small).read_text(), "files": files, "commit": folder.name, "lfs": lfs,
                          "private": info.private, "sha": sha}))
    """,
    )
    assert got["small"] == "grüße\n"
    assert got["sha"] == sent["sha"] == hashlib.sha256(random.Random(1).randbytes(12_000_000)).hexdigest()
    assert got["commit"] == sent["commit"]
    assert got["lfs"] == {"large.dat": sent["sha"]}
    assert got["files"].pop(".gitattributes") > 0
    assert got["files"] == {"notes/small.txt": 8, "large.dat": 12_000_000}
    assert got["private"] is True


def test_two_dataset_configs_and_a_model_pushed_by_one_process_load_in_another(hub, tmp_path):
    pushed = client(
        hub,
        tmp_path / "pusher",
        """
        import json, torch
        from datasets import Dataset, DatasetDict
        from transformers import LlamaConfig, LlamaForCausalLM
        rows = Dataset.from_dict({"text": ["a", "b", "ü"], "stars": [1.0, 2.0, 5.0]})
        rows.push_to_hub("local/pairs", config_name="kept", private=True)
        both = DatasetDict({"train": rows, "test": rows.select([2])})
        both.push_to_hub("local/pairs", config_name="all", private=True)
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                             vocab_size=64)
        model = LlamaForCausalLM(config).eval()
        model.push_to_hub("local/tiny-llama", private=True)
        print(json.dumps({"logits": model(torch.tensor([[1, 2, 3]])).logits.sum(-1).tolist()}))
    """,
    )
    pulled = client(
        hub,
        tmp_path / "puller",
        """
        import json, torch
        from datasets import get_dataset_config_names, load_dataset
        from transformers import AutoModelForCausalLM
        both = load_dataset("local/pairs", "all")
        model = AutoModelForCausalLM.from_pretrained("local/tiny-llama").eval()
        print(json.dumps({"configs": sorted(get_dataset_config_names("local/pairs")),
                          "kept": load_dataset("local/pairs", "kept", split="train").to_list(),
                          "all": {name: len(split) for name, split in both.items()},
                          "layers": model.config.num_hidden_layers,
                          "logits": model(torch.tensor([[1, 2, 3]])).logits.sum(-1).tolist()}))
    """,
    )
    assert pulled["configs"] == ["all", "kept"]
    assert pulled["kept"] == [{"text": "a", "stars": 1.0}, {"text": "b", "stars": 2.0}, {"text": "ü", "stars": 5.0}]
    assert pulled["all"] == {"train": 3, "test": 1}
    assert pulled["layers"] == 2
    assert pulled["logits"] == pushed["logits"]


def test_files_and_folders_can_be_deleted_and_history_still_has_them(api):
    api.create_repo("editing")
    paths = ["a.txt", "dir/b.txt", "dir/sub/c.txt", "keep.txt"]
    add = [CommitOperationAdd(path, path.encode()) for path in paths]
    cut = [CommitOperationDelete("a.txt"), CommitOperationDelete("dir/")]
    before = api.create_commit("local/editing", add, commit_message="add")
    api.create_commit("local/editing", cut, commit_message="cut")
    assert api.list_repo_files("local/editing") == [".gitattributes", "keep.txt"]
    assert api.list_repo_files("local/editing", revision=before.oid) == [".gitattributes", *paths]
    assert [c.title for c in api.list_repo_commits("local/editing")] == ["cut", "add", "initial commit"]
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("local/editing", [CommitOperationDelete("a.txt")], commit_message="again")
    assert refused.value.response.status_code == 404


def test_branches_and_tags_with_slashes_are_made_read_and_deleted(api):
    api.create_repo("refs")
    api.create_branch("local/refs", branch="try/one")
    there = api.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id="local/refs", revision="try/one")
    api.create_tag("local/refs", tag="v1/rc", revision="try/one")
    assert api.file_exists("local/refs", "f", revision="v1/rc") and not api.file_exists("local/refs", "f")
    refs = api.list_repo_refs("local/refs")
    assert {b.name: b.target_commit for b in refs.branches}["try/one"] == there.oid
    assert [t.name for t in refs.tags] == ["v1/rc"]
    with pytest.raises(HfHubHTTPError) as taken:
        api.create_branch("local/refs", branch="try/one")
    assert taken.value.response.status_code == 409
    api.delete_branch("local/refs", branch="try/one")
    api.delete_tag("local/refs", tag="v1/rc")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("local/refs", revision="try/one")


def test_a_long_tree_arrives_in_pages_with_folders_and_last_commits(api, hub):
    api.create_repo("tree")
    files = [CommitOperationAdd(f"d{i}/f{i}.txt", b"%d" % i) for i in range(7)]
    api.create_commit("local/tree", files, commit_message="seven")
    page = http(hub, "GET", "/api/models/local/tree/tree/main?recursive=true&limit=4", hub.token)
    seen = page.json()
    while "next" in page.links:
        page = httpx.get(page.links["next"]["url"], headers={"Authorization": f"Bearer {hub.token}"})
        seen += page.json()
    assert len(seen) == 15 and len({row["path"] for row in seen}) == 15
    found = api.get_paths_info("local/tree", ["d1", "d1/f1.txt", "no", ".gitattributes"], expand=True)
    assert {entry.path: entry.last_commit.title for entry in found} == {
        "d1": "seven",
        "d1/f1.txt": "seven",
        ".gitattributes": "initial commit",
    }


def test_listings_know_author_search_and_visibility(api, hub):
    api.create_repo("needle-public")
    api.create_repo("needle-private", private=True)
    api.create_repo("needle-data", repo_type="dataset")
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    mine = {m.id for m in api.list_models(author="local", search="NEEDLE")}
    assert mine == {"local/needle-public", "local/needle-private"}
    assert [m.id for m in stranger.list_models(search="needle")] == ["local/needle-public"]
    assert [d.id for d in api.list_datasets(search="needle")] == ["local/needle-data"]
    assert list(api.list_models(author="nobody")) == []
    api.update_repo_settings("local/needle-public", visibility="private")
    assert api.model_info("local/needle-public").private is True
    api.delete_repo("local/needle-public")
    assert [m.id for m in api.list_models(search="needle")] == ["local/needle-private"]
    assert not api.repo_exists("local/needle-public")


def test_a_card_is_checked_and_its_metadata_becomes_tags(api, hub):
    api.create_repo("card")
    card = "---\nlicense: mit\ndate: 2024-01-01\nscore: .nan\ntags: [rlaif]\n---\n# Hi\n"
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="local/card")
    info = api.model_info("local/card")
    assert info.tags == ["rlaif", "license:mit"] and info.card_data.license == "mit"
    check = {"content": "---\nlicense: nonsense\n---\n", "repoType": "model"}
    refused = http(hub, "POST", "/api/validate-yaml", json=check)
    assert refused.status_code == 400 and '"license" must be one of' in refused.json()["errors"][0]["message"]


# -- who may do what


def test_a_commit_on_a_stale_parent_is_refused_with_412(api):
    api.create_repo("stale")
    base = api.model_info("local/stale").sha
    api.create_commit("local/stale", [CommitOperationAdd("a", b"1")], commit_message="first", parent_commit=base)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("local/stale", [CommitOperationAdd("b", b"2")], commit_message="second", parent_commit=base)
    assert refused.value.response.status_code == 412
    assert api.list_repo_files("local/stale") == [".gitattributes", "a"]


def test_a_wrong_token_is_refused_even_for_public_repos(api, hub):
    api.create_repo("open")
    answer = http(hub, "GET", "/api/models/local/open", "hf_" + "0" * 34)
    assert answer.status_code == 401 and "x-error-code" not in answer.headers
    assert answer.headers["x-error-message"] == "Invalid credentials in Authorization header"
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(endpoint=hub.endpoint, token="hf_" + "0" * 34).whoami()
    assert refused.value.response.status_code == 401
    assert api.whoami()["name"] == "local"


def test_without_a_token_public_repos_can_be_read_and_private_ones_do_not_exist(api, hub, tmp_path):
    for name, private in (("seen", False), ("unseen", True)):
        api.create_repo(name, private=private)
        api.upload_file(path_or_fileobj=b"text", path_in_repo="f.txt", repo_id=f"local/{name}")
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    assert Path(stranger.hf_hub_download("local/seen", "f.txt", cache_dir=tmp_path)).read_bytes() == b"text"
    with pytest.raises(RepositoryNotFoundError):
        stranger.hf_hub_download("local/unseen", "f.txt", cache_dir=tmp_path)
    for path in ("", "/tree/main", "/refs", "/commits/main", "/revision/main", "/auth-check"):
        hidden, absent = (http(hub, "GET", f"/api/models/local/{name}{path}") for name in ("unseen", "absent"))
        assert (hidden.status_code, hidden.json()) == (absent.status_code, absent.json()) == (401, absent.json())
    assert raw_commit(hub, "local/seen", added("g"), token=GUEST).status_code == 401
    assert http(hub, "POST", "/api/models/local/seen/commit/main", content=b"{}").status_code == 401


def test_another_user_sees_no_private_repo_and_writes_nowhere(tmp_path):
    store, owner = Store(tmp_path / "hub"), "hf_" + "o" * 34
    with hosted(make_app(store, {owner: "local", GUEST: "guest"})) as endpoint:
        mine, guest = HfApi(endpoint=endpoint, token=owner), HfApi(endpoint=endpoint, token=GUEST)
        mine.create_repo("public")
        mine.create_repo("private", private=True)
        assert [m.id for m in guest.list_models()] == ["local/public"]
        with pytest.raises(RepositoryNotFoundError):
            guest.model_info("local/private")
        address = Address(endpoint, GUEST, "guest")
        assert raw_commit(address, "local/public", added("f")).status_code == 403
        assert raw_commit(address, "local/private", added("f")).status_code == 404
        for refused in (
            http(address, "PUT", "/api/models/local/public/settings", GUEST, json={"visibility": "private"}),
            http(address, "DELETE", "/api/repos/delete", GUEST, json={"name": "public", "organization": "local"}),
            http(address, "POST", "/api/models/local/public/branch/b", GUEST, json={}),
            http(
                address,
                "POST",
                "/local/public.git/info/lfs/objects/batch",
                GUEST,
                json={"operation": "upload", "objects": [{"oid": "0" * 64, "size": 1}]},
            ),
        ):
            assert refused.status_code == 403
        assert mine.list_repo_files("local/public") == [".gitattributes"]


def test_a_token_may_do_less_than_its_user(tmp_path):
    reads, narrow = "hf_" + "r" * 34, "hf_" + "n" * 34
    scoped = [
        {"entity": {"type": "model", "name": "local/a"}, "permissions": ["repo.content.read", "repo.write"]},
        {"entity": {"type": "user", "name": "local"}, "permissions": ["repo.content.read"]},
    ]
    rights = {reads: {"role": "read"}, narrow: {"role": "fineGrained", "fineGrained": {"scoped": scoped}}}
    app = make_app(Store(tmp_path / "hub"), {t: "local" for t in (reads, narrow, "hf_" + "o" * 34)}, rights)
    with hosted(app) as endpoint:
        full, reading, writing = (HfApi(endpoint=endpoint, token=t) for t in ("hf_" + "o" * 34, reads, narrow))
        assert writing.whoami()["auth"]["accessToken"]["fineGrained"]["scoped"] == scoped
        for name in ("a", "b"):
            full.create_repo(name, private=True)
        writing.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id="local/a")
        assert reading.model_info("local/a").private
        for refused in (
            lambda: writing.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id="local/b"),
            lambda: writing.create_repo("c"),
            lambda: reading.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id="local/a"),
            lambda: reading.auth_check("local/a", write=True),
        ):
            with pytest.raises(HfHubHTTPError, match="403"):
                refused()


def test_a_foreign_namespace_is_refused_with_403(api):
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo("somebody/thing")
    assert refused.value.response.status_code == 403
    assert 'under the namespace "somebody"' in str(refused.value)


# -- hostile requests


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/x", "a\\b", "..\\x", "a\0b", "a//b", "./a", ".git/config", ""],
)
def test_a_path_that_could_leave_the_folder_is_refused_with_422(api, hub, path):
    api.create_repo("paths", exist_ok=True)
    sha = hashlib.sha256(b"").hexdigest()
    assert raw_commit(hub, "local/paths", added("fine"), added(path)).status_code == 422
    assert raw_commit(hub, "local/paths", ("lfsFile", {"path": path, "oid": sha, "size": 0})).status_code == 422
    preupload = {"files": [{"path": path, "size": 1, "sample": ""}]}
    assert http(hub, "POST", "/api/models/local/paths/preupload/main", hub.token, json=preupload).status_code == 422
    with pytest.raises(Refusal):
        clean_path(path)
    assert api.list_repo_files("local/paths") == [".gitattributes"]


@pytest.mark.parametrize(
    "path",
    [
        "/local/reads/resolve/main/..%2F..%2F..%2Fmeta.json",
        "/local/reads/resolve/..%2F..%2Fmain/f",
        "/local/..%2F..%2Ftoken/resolve/main/f",
        "/..%2F..%2Fx/y/resolve/main/f",
        "/api/models/..%2F..%2Fx/y",
        "/api/models/local/reads/revision/..%2Frefs",
        "/api/models/local/reads/tree/main/..%2F..",
        "/_lfs/..%2F..%2Ftoken",
    ],
)
def test_an_address_cannot_read_what_is_not_a_file_of_a_repo(api, hub, path):
    api.create_repo("reads", exist_ok=True)
    assert http(hub, "GET", path, hub.token).status_code in (404, 405)


def test_repo_names_that_git_or_a_disk_would_trip_over_are_refused(hub):
    assert is_repo_id("local/Fine_1.0-x") and is_repo_id("local/a")
    for name in ("..", ".", "a/b", "a..b", "a--b", "x.git", "-a", "a b", "a\0", "", "ü", "x" * 97):
        answer = http(hub, "POST", "/api/repos/create", hub.token, json={"name": name})
        assert answer.status_code == 400, name


def test_large_uploads_need_a_signed_address_and_the_announced_bytes(api, hub):
    api.create_repo("uploads")
    data = b"abc" * 1000
    oid = hashlib.sha256(data).hexdigest()
    wish = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}

    def batch() -> dict:
        return http(hub, "POST", "/local/uploads.git/info/lfs/objects/batch", hub.token, json=wish).json()["objects"][0]

    upload = batch()["actions"]["upload"]["href"]
    assert httpx.put(upload.partition("?")[0], content=data).status_code == 403
    assert httpx.put(upload, content=b"other").status_code == 400
    pointer = "lfsFile", {"path": "w.bin", "algo": "sha256", "oid": oid, "size": len(data)}
    assert raw_commit(hub, "local/uploads", pointer).status_code == 400
    assert httpx.put(upload, content=data).status_code == 200
    assert "actions" not in batch()
    assert raw_commit(hub, "local/uploads", pointer).status_code == 200


def test_malformed_requests_are_refused_not_crashed_on(api, hub):
    api.create_repo("malformed")
    base = "/api/models/local/malformed"
    for method, path, body in (
        ("POST", f"{base}/commit/main", b"not json"),
        ("POST", f"{base}/commit/main", b'{"key": "file"}'),
        ("POST", f"{base}/commit/main", b'{"key": "header", "value": {"summary": "s", "parentCommit": 7}}'),
        ("POST", f"{base}/preupload/main", b"[]"),
        ("POST", f"{base}/preupload/main", b'{"files": [7]}'),
        ("POST", f"{base}/preupload/main", b'{"files": [{"path": "a"}]}'),
        ("POST", "/api/repos/create", b"{}"),
        ("POST", "/api/repos/create", b'{"name": "x", "type": "../../x"}'),
        ("POST", f"{base}/tag/main", b"{}"),
        ("POST", f"{base}/branch/a..b", b"{}"),
        ("GET", f"{base}/tree/main?cursor=-1", None),
        (
            "POST",
            "/local/malformed.git/info/lfs/objects/batch",
            b'{"operation": "upload", "objects": [{"oid": "../x", "size": 1}]}',
        ),
        ("DELETE", "/api/repos/delete", b'{"name": "malformed", "type": "../repos/model"}'),
        ("POST", f"{base}/commit/main", rb'{"key": "header", "value": {"summary": "\ud800"}}'),
        ("POST", f"{base}/discussions", b"{}"),
        ("GET", "/api/nothing", None),
        ("GET", "/x%FF%0Ay/z", None),
    ):
        answer = http(hub, method, path, hub.token, content=body)
        assert 400 <= answer.status_code < 500 or answer.status_code == 501, (path, body, answer.status_code)
    assert raw_commit(hub, "local/malformed", added("d/ü \" '.txt")).status_code == 200


# -- files over HTTP


def test_a_range_request_gets_that_part_of_the_file(api, hub):
    api.create_repo("ranges")
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="f.txt", repo_id="local/ranges")
    path = "/local/ranges/resolve/main/f.txt"
    part = http(hub, "GET", path, headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"345", "bytes 3-5/10")
    rest = http(hub, "GET", path, headers={"Range": "bytes=7-"})
    assert (rest.status_code, rest.content) == (206, b"789")
    assert http(hub, "GET", path, headers={"Range": "bytes=10-"}).status_code == 416
    head = http(hub, "HEAD", path)
    assert head.headers["content-length"] == "10" and head.content == b""
    assert head.headers["x-repo-commit"] == api.model_info("local/ranges").sha
    # printf 0123456789 | git hash-object --stdin
    assert head.headers["etag"] == '"ad471007bd7f5983d273b9584e5629230150fd54"'
    missing = http(hub, "HEAD", "/local/ranges/resolve/main/none")
    assert missing.status_code == 404
    assert missing.headers["x-error-code"] == "EntryNotFound" and "x-repo-commit" in missing.headers


def test_the_pages_show_files_escape_everything_and_keep_private_repos_to_their_owner(api, hub):
    api.create_repo("page", repo_type="dataset")
    api.create_repo("page-private", private=True)
    card = b"---\npretty_name: <b>bold</b>\n---\n<script>alert(1)</script>"
    operations = [CommitOperationAdd("<img src=x>'.txt", b"12"), CommitOperationAdd("README.md", card)]
    api.create_commit("local/page", operations, commit_message="<i>msg</i>", repo_type="dataset")
    page, index = http(hub, "GET", "/datasets/local/page"), http(hub, "GET", "/")
    assert page.status_code == index.status_code == 200
    for text in (page.text, index.text):
        assert not any(tag in text for tag in ("<img", "<script", "<b>", "<i>")) and "&lt;i&gt;msg" in text
    assert "dataset, public" in page.text and "2 B" in page.text
    assert "page-private" not in index.text and "&lt;b&gt;bold" in index.text
    private = http(hub, "GET", "/local/page-private")
    assert private.status_code == 401 and private.headers["www-authenticate"].startswith("Basic ")
    signed_in = httpx.get(f"{hub.endpoint}/local/page-private", auth=("local", hub.token))
    assert signed_in.status_code == 200 and "model, private" in signed_in.text
    assert "page-private" in httpx.get(hub.endpoint, auth=("local", hub.token)).text
    # The browser repeats Basic on its own, so it must not be enough to change anything.
    url, delete = f"{hub.endpoint}/api/repos/delete", {"name": "page-private"}
    assert httpx.request("DELETE", url, json=delete, auth=("local", hub.token)).status_code == 401


# -- the server


def test_everything_is_still_there_after_a_restart(tmp_path):
    with running(tmp_path / "hub") as first:
        api = HfApi(endpoint=first.endpoint, token=first.token)
        api.create_repo("kept", repo_type="dataset", private=True)
        api.upload_file(path_or_fileobj=b"text", path_in_repo="a/f.txt", repo_id="local/kept", repo_type="dataset")
        api.create_tag("local/kept", tag="v1", repo_type="dataset")
        before = api.dataset_info("local/kept", files_metadata=True)
    with running(tmp_path / "hub") as second:
        assert second.token == first.token and second.user == "local"
        api = HfApi(endpoint=second.endpoint, token=second.token)
        assert api.dataset_info("local/kept", revision="v1", files_metadata=True) == before
        assert http(second, "GET", "/datasets/local/kept/resolve/v1/a/f.txt", second.token).content == b"text"
    with pytest.raises(httpx.ConnectError):
        http(second, "GET", "/")


def test_an_upload_address_outlives_a_restart_and_is_of_no_use_at_another_hub(tmp_path):
    data = b"large" * 1000
    oid = hashlib.sha256(data).hexdigest()
    wish = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    with running(tmp_path / "hub") as first:
        HfApi(endpoint=first.endpoint, token=first.token).create_repo("kept")
        answer = http(first, "POST", "/local/kept.git/info/lfs/objects/batch", first.token, json=wish).json()
        href = answer["objects"][0]["actions"]["upload"]["href"].removeprefix(first.endpoint)
    with running(tmp_path / "hub") as second:
        assert http(second, "PUT", href, content=data).status_code == 200
        assert http(second, "PUT", href.replace(oid, "0" * 64), content=data).status_code == 403
    with running(tmp_path / "other") as other:
        assert http(other, "PUT", href, content=data).status_code == 403


def test_a_full_disk_is_said_to_the_client_and_changes_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "hub"))

    with running(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("kept")
        before = api.model_info("local/kept").sha
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(HfHubHTTPError, match="No space left on the disk of the local hub") as e:
            api.upload_file(path_or_fileobj=b"text", path_in_repo="f.txt", repo_id="local/kept")
        assert e.value.response.status_code == 507
        monkeypatch.undo()
        assert api.model_info("local/kept").sha == before
        api.upload_file(path_or_fileobj=b"text", path_in_repo="f.txt", repo_id="local/kept")


def test_a_server_killed_in_the_middle_of_an_upload_loses_nothing_and_keeps_no_half_file(tmp_path):
    root, data = tmp_path / "hub", random.Random(2).randbytes(3_000_000)
    oid = hashlib.sha256(data).hexdigest()
    wish = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    batch = "/local/killed.git/info/lfs/objects/batch"
    with served(root) as (process, endpoint):
        address = Address(endpoint, token_of(root), "local")
        HfApi(endpoint=endpoint, token=address.token).create_repo("killed")
        assert raw_commit(address, "local/killed", added("before")).status_code == 200
        objects = http(address, "POST", batch, address.token, json=wish).json()["objects"]
        url = httpx.URL(objects[0]["actions"]["upload"]["href"])
        with socket.create_connection((url.host, url.port)) as upload:
            head = f"PUT {url.raw_path.decode()} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(data)}\r\n\r\n"
            upload.sendall(head.encode() + data[: len(data) // 2])
            while not any(f.stat().st_size for f in (root / "tmp").iterdir()):
                pass  # until the first bytes are on disk
            process.kill()
            process.wait()
    assert list((root / "tmp").iterdir())  # it was killed in the middle
    assert Store(root).blob_size(oid) is None
    with running(root) as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        assert api.list_repo_files("local/killed") == [".gitattributes", "before"]
        action = http(address, "POST", batch, address.token, json=wish).json()["objects"][0]["actions"]
        assert httpx.put(action["upload"]["href"], content=data).status_code == 200
        pointer = "lfsFile", {"path": "w.bin", "algo": "sha256", "oid": oid, "size": len(data)}
        assert raw_commit(address, "local/killed", pointer).status_code == 200
        assert http(address, "GET", "/local/killed/resolve/main/w.bin").content == data


def test_two_servers_over_one_root_lose_no_commit_of_each_other(tmp_path):
    root = tmp_path / "hub"
    with running(root) as here, served(root) as (_, endpoint):
        there = Address(endpoint, here.token, "local")
        HfApi(endpoint=here.endpoint, token=here.token).create_repo("shared")

        def commit(n: int) -> int:
            return raw_commit((here, there)[n % 2], "local/shared", added(f"f{n:02}")).status_code

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(commit, range(40))) == [200] * 40
        files = [f"f{n:02}" for n in range(40)]
        for address in (here, there):
            api = HfApi(endpoint=address.endpoint, token=address.token)
            assert api.list_repo_files("local/shared") == [".gitattributes", *files]
            assert len(api.list_repo_commits("local/shared")) == 41
        HfApi(endpoint=there.endpoint, token=here.token).delete_repo("local/shared")
        assert http(here, "GET", "/api/models/local/shared", here.token).status_code == 404


def test_the_token_and_the_repos_are_their_owners_alone(tmp_path):
    with running(tmp_path / "hub") as address:
        token = tmp_path / "hub" / "token"
        assert token.read_text() == address.token and len(address.token) == 37
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_a_taken_port_is_said_in_one_line(tmp_path, hub):
    port = int(hub.endpoint.rsplit(":", 1)[1])
    with pytest.raises(HubError, match=f"port {port} of 127.0.0.1 is taken"), running(tmp_path / "hub", port):
        pass


def test_ctrl_c_ends_serve_quietly(tmp_path):
    with served(tmp_path / "hub") as (process, endpoint):
        assert httpx.get(f"{endpoint}/").status_code == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")


def test_the_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    assert default_root() == tmp_path / "hub"
    monkeypatch.delenv("DSC_HUB_HOME")
    assert default_root() == Path.home() / ".cache" / "dsc_hub" / "hub"


def test_importing_the_package_loads_no_server():
    code = """if True:
        import sys
        import dsc_hub.local_hub.server
        print([m for m in ("starlette", "uvicorn", "huggingface_hub", "asyncio") if m in sys.modules])
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
