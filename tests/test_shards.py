"""Sampling on several machines: the shards together are, byte for byte, what one machine would have made."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsc_hub import prompts, recipe_files
from dsc_hub.errors import ConfigError
from dsc_hub.shards import Shard, parse
from tests.scripted_server import make_server
from tests.test_sampling import sorted_rows


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = make_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture
def sample(dsc, recipe_file: Path, url: str) -> Callable[..., object]:
    def run(verb: str, *words: str, code: int = 0):
        return dsc(verb, str(recipe_file), f"serving.endpoints=[{url}]", "chain.chains_per_prompt=2", *words, code=code)

    return run


def the_run(dsc) -> Path:
    (folder,) = (dsc.work / "runs" / "little").iterdir()
    return folder


def test_each_prompt_is_in_one_shard_and_they_are_alike():
    ids = [prompts.prompt_id(f"prompt {i}") for i in range(4000)]
    for n in (1, 3, 8):
        sizes = [sum(Shard(i, n).has(x) for x in ids) for i in range(1, n + 1)]
        assert sum(sizes) == 4000 and min(sizes) > 0.8 * 4000 / n


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", "1/0", "1/99999", "1 / 2", "١/٢"])
def test_what_is_no_shard_is_told(text: str):
    with pytest.raises(ConfigError, match="expected i/n"):
        parse(text)
    assert parse("2/8") == Shard(2, 8)


def test_shards_in_any_order_merge_into_what_one_machine_would_have_made(dsc, sample, tmp_path: Path):
    order = [1, 2, 3]
    random.Random(2).shuffle(order)
    for i in order:
        sample("sample", "--shard", f"{i}/3")
    split = the_run(dsc)
    done = sample("merge")
    assert "merged 3 shards" in done.stderr
    merged = tmp_path / "merged"
    shutil.move(split, merged)
    sample("sample")
    for name in ("turns.jsonl", "chains.jsonl"):
        whole = sorted_rows(the_run(dsc) / name)
        assert sorted_rows(merged / name) == whole and len(whole) == {"turns.jsonl": 140, "chains.jsonl": 28}[name]
    a, b = (json.loads((f / "sampling.done.json").read_text()) for f in (merged, the_run(dsc)))
    assert a["fingerprint"] == b["fingerprint"]
    untold = {"seconds", "tokens_per_s", "scoring_s"}
    assert {k: v for k, v in a["result"].items() if k not in untold} == {
        k: v for k, v in b["result"].items() if k not in untold
    }
    # The dataset that is made of them is the same, byte for byte.
    sample("dataset")
    files = {f.relative_to(the_run(dsc)): f.read_bytes() for f in (the_run(dsc) / "dataset").rglob("*.parquet")}
    place = the_run(dsc)
    shutil.move(place, tmp_path / "whole")
    shutil.move(merged, place)
    sample("dataset")
    assert files and all((place / name).read_bytes() == data for name, data in files.items())


def test_shards_from_other_machines_are_named_by_their_folders(dsc, sample, tmp_path: Path):
    for i in (1, 2):
        sample("sample", "--shard", f"{i}/2")
    shutil.move(the_run(dsc) / "shards", tmp_path / "brought")
    shutil.rmtree(the_run(dsc))
    sample("merge", str(tmp_path / "brought" / "1-of-2"), str(tmp_path / "brought" / "2-of-2"))
    assert len(sorted_rows(the_run(dsc) / "chains.jsonl")) == 28
    sample("dataset")  # later stages take it as they take any sampling


def test_all_that_is_wrong_with_shards_is_told_at_once(dsc, sample, tmp_path: Path):
    assert "there are no shards in" in sample("merge", code=2).stderr
    sample("sample", "--shard", "1/3")
    sample("sample", "--shard", "2/3")
    shards = the_run(dsc) / "shards"
    (shards / "2-of-3" / "sampling.done.json").unlink()
    (tmp_path / "empty").mkdir()
    told = sample("merge", str(shards / "1-of-3"), str(shards / "2-of-3"), str(tmp_path / "empty"), code=2).stderr
    assert "empty is no shard" in told and "shard 2/3" in told and "is not finished" in told and "1 missing: 3" in told
    other = sample("merge", "seed=5", str(shards / "1-of-3"), code=2).stderr
    assert "is shard 1/3 of something else" in other
    assert not list((dsc.work / "runs").rglob("little/*/chains.jsonl"))


def test_a_run_does_not_sample_again_what_lies_in_shards(dsc, sample):
    sample("sample", "--shard", "1/2")
    told = sample("sample", code=2).stderr
    assert "shards of this sampling are in" in told and "dsc merge" in told


def test_a_shard_that_failed_in_part_is_merged_with_its_failures(dsc, recipe_file: Path):
    server = make_server(fault=lambda body, before: "400" if "number 3" in body["messages"][0]["content"] else "")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [
        str(recipe_file),
        f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]",
        "prompts.split={train: 0.9, validation: 0.05, test: 0.05}",
    ]
    r = recipe_files.load(recipe_file, words[2:])
    found, _ = prompts.load(r.prompts, recipe_file.parent, r.seed)
    hurt = {p.id for p in found if "number 3" in p.text and p.split != "test"}
    for i in (1, 2):
        dsc("sample", *words, "--shard", f"{i}/2", code=0)
    dsc("merge", *words, code=0)
    result = json.loads((the_run(dsc) / "sampling.done.json").read_text())["result"]
    failed = [json.loads(line) for line in (the_run(dsc) / "failed.jsonl").read_text().splitlines()]
    assert hurt and {row["prompt_id"] for row in failed} == hurt
    assert result["failed"] == len(hurt) and result["finished"] + result["failed"] == result["chains"]
    server.shutdown()
