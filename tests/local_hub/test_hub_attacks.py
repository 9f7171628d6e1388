"""What one client of the embedded Hub sends can't break it for others: damaged files, YAML bombs, large bodies, foreign hosts."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from dsc_hub.local_hub.limits import OF_A_STRANGER
from dsc_hub.local_hub.server import Address, running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacked") / "hub"


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[Address]:
    with running(place) as address:
        yield address


@pytest.fixture(scope="module")
def api(hub: Address) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("local/good")
    return api


def commit(hub: Address, repo: str, name: str, content: bytes) -> None:
    """As a client does that checks no card."""
    lines = [
        {"key": "header", "value": {"summary": "x", "description": ""}},
        {"key": "file", "value": {"path": name, "encoding": "base64", "content": base64.b64encode(content).decode()}},
    ]
    answer = httpx.post(
        f"{hub.endpoint}/api/models/{repo}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {hub.token}", "Content-Type": "application/x-ndjson"},
    )
    assert answer.status_code == 200, answer.text


BOMB = "---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
) + "---\n"  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[" * 2000),
        ("config.json", b"\xff\xfe"),
        ("README.md", b"---\ndate: 2024-13-45\n---\n"),
        ("README.md", b"---\nn: 1:99:99999999999999999999\n---\n"),
        ("README.md", b"---\n" + b"[" * 5000 + b"\n---\n"),
        ("README.md", BOMB.encode()),
        ("README.md", b"---\n" + b"- a\n" * 100_000 + b"---\n"),
        ("README.md", b"---\n? [a, b]\n: 1\n---\n"),
        ("README.md", b"---\nlicense: !!bool maybe\n---\n"),
        ("README.md", b"---\nlicense: !!int ''\n---\n"),
        ("README.md", b"---\nlicense: 0x" + b"f" * 5000 + b"\n---\n"),
        ("README.md", b"---\nlicense: " + b"9" * 5000 + b"\n---\n"),
        ("README.md", b'---\npretty_name: "\\ud800"\n---\n'),
        ("config.json", b'{"architectures": NaN}'),
        ("config.json", b'{"architectures": "\\ud800"}'),
        ("config.json", b'{"architectures": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("adapter_config.json", b"{" * 3000),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_hostile_file_leaves_every_listing_as_it_was(api: HfApi, hub: Address, name: str, content: bytes):
    repo = f"local/bad-{abs(hash(content)) % 10**9}"
    api.create_repo(repo)
    commit(hub, repo, name, content)
    started = time.monotonic()
    assert {"local/good", repo} <= {m.id for m in api.list_models(full=True, cardData=True)}
    assert api.model_info(repo).id == repo and api.model_info("local/good").id == "local/good"
    key = {"Authorization": f"Bearer {hub.token}"}
    for page in ("", f"/{repo}", "/local/good"):
        answer = httpx.get(hub.endpoint + page, headers=key, follow_redirects=True)
        assert answer.status_code == 200 and len(answer.content) < 10**6
    assert time.monotonic() - started < 5
    api.delete_repo(repo)


@pytest.mark.parametrize("text", ["", "[" * 3000, "null", "{}", '{"id": 3}'])
@pytest.mark.parametrize("name", ["meta.json", "refs.json"])
def test_a_damaged_repo_is_shown_as_that_and_others_are_untouched(api: HfApi, place: Path, name: str, text: str):
    api.create_repo("local/damaged", exist_ok=True)
    (file,) = (p for p in place.rglob(name) if "damaged" in str(p))
    before = file.read_text()
    file.write_text(text)
    try:
        assert "local/good" in {m.id for m in api.list_models()}
        with pytest.raises(HfHubHTTPError, match=f"{name} is damaged"):
            api.model_info("local/damaged")
    finally:
        file.write_text(before)
    assert api.model_info("local/damaged").id == "local/damaged"


def test_a_commit_or_a_file_that_is_gone_is_shown_as_that(api: HfApi, hub: Address, place: Path):
    api.create_repo("local/broken")
    api.upload_file(path_or_fileobj=b"unlike any other", path_in_repo="README.md", repo_id="local/broken")
    (commit_file,) = place.rglob(f"{api.model_info('local/broken').sha}.json")
    blob = next(p for p in place.rglob("*") if p.is_file() and p.read_bytes() == b"unlike any other")
    for file, told in ((commit_file, "is damaged"), (blob, "is missing")):
        before = file.read_bytes()
        file.unlink()
        if file == commit_file:
            file.write_text("{}")
        assert "local/good" in {m.id for m in api.list_models(full=True)}
        with pytest.raises(HfHubHTTPError, match=told):
            api.model_info("local/broken")
        page = httpx.get(hub.endpoint, headers={"Authorization": f"Bearer {hub.token}"})
        assert page.status_code == 200 and "local/good" in page.text and told in page.text
        file.write_bytes(before)
    api.delete_repo("local/broken")


@pytest.mark.parametrize("text", ["", "[" * 3000, "null", "{}", "[]", '{"title": "x", "private": true, "owner": "x"}'])
def test_a_damaged_collection_hides_no_other(api: HfApi, place: Path, text: str):
    title = f"Good {abs(hash(text)) % 10**6}"
    slug = api.create_collection(title).slug
    folder = next(p.parent for p in place.rglob("*.json") if p.stem in slug)
    bad = folder / "bad-0123.json"
    bad.write_text(text)
    assert slug in {c.slug for c in api.list_collections(owner="local")}
    assert api.create_collection(title, exists_ok=True).slug == slug
    bad.unlink()


def test_a_body_is_not_read_for_who_has_no_token(hub: Address, api: HfApi):
    large = b"x" * (OF_A_STRANGER + 1)
    for path in ("/api/repos/create", "/api/validate-yaml", "/api/models/local/good/commit/main"):
        assert httpx.post(hub.endpoint + path, content=large).status_code == 413
        wrong = {"Authorization": "Bearer hf_" + "x" * 34}
        assert httpx.post(hub.endpoint + path, content=large, headers=wrong).status_code == 413
    small = httpx.post(f"{hub.endpoint}/api/validate-yaml", json={"content": "---\nlicense: mit\n---\n"})
    assert small.status_code == 200
    api.upload_file(path_or_fileobj=large, path_in_repo="large.txt", repo_id="local/good")  # with one it is


@pytest.mark.parametrize("content", [BOMB, "---\n" + "[" * 50_000 + "\n---\n", "---\n" + "- a\n" * 200_000 + "---\n"])
def test_a_card_that_is_a_bomb_is_refused_at_once(hub: Address, content: str):
    started = time.monotonic()
    answer = httpx.post(f"{hub.endpoint}/api/validate-yaml", json={"content": content}, timeout=60)
    assert answer.status_code == 400 and "YAML parse error" in answer.text and len(answer.content) < 10_000
    assert time.monotonic() - started < 2


def test_a_slow_question_stops_nobody_else(hub: Address, api: HfApi):
    api.create_repo("local/long")
    for n in range(60):
        api.upload_file(path_or_fileobj=str(n).encode(), path_in_repo=f"{n}.txt", repo_id="local/long")
    paths = [f"{n}.txt" for n in range(60)]
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(api.get_paths_info, "local/long", paths, expand=True) for _ in range(4)]
        waits = []
        while not all(s.done() for s in slow):
            started = time.monotonic()
            httpx.get(f"{hub.endpoint}/api/whoami-v2", headers={"Authorization": f"Bearer {hub.token}"})
            waits.append(time.monotonic() - started)
    assert [len(s.result()) for s in slow] == [60] * 4 and waits and max(waits) < 2


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1"])
def test_a_foreign_host_is_refused(hub: Address, host: str):
    key = {"Authorization": f"Bearer {hub.token}", "Host": host}
    for path in ("/", "/api/whoami-v2", "/api/models"):
        assert httpx.get(hub.endpoint + path, headers=key).status_code == 400
    assert httpx.get(hub.endpoint + "/api/whoami-v2", headers=key | {"Host": "localhost"}).status_code == 200


@pytest.mark.parametrize("value", [{"": ""}, ["x"], 7, True])
@pytest.mark.parametrize(
    ("path", "method", "body", "key"),
    [
        ("/api/repos/create", "POST", {"name": "typed"}, "type"),
        ("/api/repos/create", "POST", {"name": "typed"}, "organization"),
        ("/api/repos/create", "POST", {"name": "typed", "type": "space"}, "sdk"),
        ("/api/repos/delete", "DELETE", {"name": "typed"}, "type"),
        ("/api/validate-yaml", "POST", {"content": "x"}, "repoType"),
        ("/api/collections", "POST", {"title": "t"}, "namespace"),
        ("/api/collections", "POST", {"title": "t"}, "description"),
    ],
)
def test_a_field_of_another_type_is_said(hub: Address, path: str, method: str, body: dict, key: str, value: object):
    head = {"Authorization": f"Bearer {hub.token}"}
    answer = httpx.request(method, hub.endpoint + path, json=body | {key: value}, headers=head)
    assert answer.status_code == 400 and f'\\"{key}\\" must be a string' in answer.text
