"""Two hundred times the embedded Hub is killed in the middle of commits: what it has answered is there, whole commits only."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi

from dsc_hub.local_hub.server import Address, running, token_of
from tests.local_hub.test_local_hub import added, http, raw_commit, served

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
KILLS = 200
LARGE = 200_000  # bytes of the file that goes through large file storage
REPO = "local/killed"


def data_of(number: int) -> bytes:
    return random.Random(number).randbytes(LARGE)


def commit(address: Address, number: int) -> bool:
    """Upload a large file, then commit it with a small one. Return whether the Hub said that it is done."""
    data = data_of(number)
    oid = hashlib.sha256(data).hexdigest()
    wish = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    batch = http(address, "POST", f"/{REPO}.git/info/lfs/objects/batch", address.token, json=wish).json()
    for one in batch["objects"]:
        if "actions" in one:
            httpx.put(one["actions"]["upload"]["href"], content=data, timeout=30).raise_for_status()
    pointer = "lfsFile", {"path": f"{number}.bin", "algo": "sha256", "oid": oid, "size": len(data)}
    return raw_commit(address, REPO, pointer, added(f"{number}.txt", str(number))).status_code == 200


def test_two_hundred_kills_during_commits(tmp_path: Path):
    root, rng = tmp_path / "hub", random.Random(0)
    answered: set[int] = set()
    number = broken_off = 0
    with running(root) as address:
        HfApi(endpoint=address.endpoint, token=address.token).create_repo("killed")
        started = time.monotonic()
        assert all(commit(address, -n) for n in range(1, 6))
        a_commit_s = (time.monotonic() - started) / 5
    for _ in range(KILLS):
        with served(root) as (process, endpoint):
            address = Address(endpoint, token_of(root), "local")
            there = set(HfApi(endpoint=endpoint, token=address.token).list_repo_files(REPO)) - {".gitattributes"}
            texts, weights = ({int(f[:-4]) for f in there if f.endswith(end)} for end in (".txt", ".bin"))
            assert texts == weights and answered <= texts  # whole commits, and all that were answered

            def kill(process=process) -> None:
                time.sleep(rng.uniform(0.0, 4 * a_commit_s))
                process.kill()

            killer = threading.Thread(target=kill)
            killer.start()
            try:
                while True:
                    number += 1
                    if commit(address, number):
                        answered.add(number)
            except (httpx.HTTPError, ValueError, KeyError):  # no answer, or half of one
                broken_off += 1
            killer.join()
    with running(root) as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        files = set(api.list_repo_files(REPO))
        for k in sorted(answered):
            assert http(address, "GET", f"/{REPO}/resolve/main/{k}.txt", address.token).content == str(k).encode()
            assert http(address, "GET", f"/{REPO}/resolve/main/{k}.bin", address.token).content == data_of(k)
        log = api.list_repo_commits(REPO)
        for entry in rng.sample(log, min(20, len(log))):
            api.list_repo_files(REPO, revision=entry.commit_id)
        assert commit(address, number + 1)
    print(
        f"{KILLS} kills, {broken_off} in the middle of a commit; {len(answered)} commits answered, {len(files)} files"
    )
    assert broken_off >= KILLS * 0.9 and len(answered) > KILLS / 2
