"""Sampling on several machines: the shards together are, byte for byte, what one machine would have made."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from dsc_hub.errors import ConfigError, RunError
from dsc_hub.pipeline import resolve, run
from dsc_hub.records import prompt_id
from dsc_hub.runs.cost import cost_of
from dsc_hub.runs.shards import Shard, parse
from tests.sampling.test_sample import sorted_rows
from tests.scripted_server import make_server


@pytest.fixture
def place(recipe_file: Path, tmp_path: Path, home: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    """Describe the job in a folder of runs; `--shard` and `merge` as the command line does them."""
    monkeypatch.setenv("DSC_HUB_HOME", str(home))

    class Place:
        def __init__(self, name: str = "runs", *overrides: str, at: str = server) -> None:
            self.runs = tmp_path / name
            words = [f"serving.endpoints=[{at}]", "chain.chains_per_prompt=2", *overrides]
            self.context = resolve.resolve_recipe(str(recipe_file), words, self.runs)
            self.run = self.context.run

        def sample(self, shard: str = "") -> Path:
            context = resolve.of_shard(self.context, parse(shard)) if shard else self.context
            run.run_all(context, "sampling")
            return context.run.folder

        def merge(self, *folders: Path) -> None:
            run.merge_shards(self.context, folders)

    return Place


def test_each_prompt_is_in_one_shard_and_they_are_alike():
    ids = [prompt_id(f"prompt {i}") for i in range(4000)]
    for n in (1, 3, 8):
        sizes = [sum(Shard(i, n).has(x) for x in ids) for i in range(1, n + 1)]
        assert sum(sizes) == 4000 and min(sizes) > 0.8 * 4000 / n


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", "1/0", "1/99999", "1 / 2", "١/٢"])
def test_what_is_no_shard_is_told(text: str):
    with pytest.raises(ConfigError, match="expected i/n"):
        parse(text)
    assert parse("2/8") == Shard(2, 8)


def test_shards_in_any_order_merge_into_what_one_machine_would_have_made(place):
    split, whole = place("split"), place("whole")
    for i in random.Random(2).sample([1, 2, 3], 3):
        split.sample(f"{i}/3")
    split.merge()
    whole.sample()
    for name, n in (("turns.jsonl", 140), ("chains.jsonl", 28)):
        assert sorted_rows(split.run[name]) == sorted_rows(whole.run[name]) and len(sorted_rows(whole.run[name])) == n
    a, b = split.run.marker("sampling"), whole.run.marker("sampling")
    assert a["fingerprint"] == b["fingerprint"]
    untold = {"seconds", "tokens_per_s", "scoring_s"}
    assert {k: v for k, v in a["result"].items() if k not in untold} == {
        k: v for k, v in b["result"].items() if k not in untold
    }
    # The dataset that is made of them is the same, byte for byte.
    made = []
    for of in (split, whole):
        run.run_one(of.context, "dataset")
        made.append({f.name: f.read_bytes() for f in sorted(of.run["dataset"].rglob("*.parquet"))})
    assert made[0] == made[1] and made[0]


def test_shards_from_other_machines_are_named_by_their_folders(place, tmp_path: Path):
    folders = [place("one").sample("1/2"), place("two").sample("2/2")]
    here = place("here")
    here.merge(*folders)
    assert len(sorted_rows(here.run["chains.jsonl"])) == 28
    here.merge(*reversed(folders))  # again, and in another order: the same
    assert len(sorted_rows(here.run["chains.jsonl"])) == 28


def test_a_merge_that_is_broken_off_leaves_nothing_that_passes_for_done(place, monkeypatch: pytest.MonkeyPatch):
    here = place()
    for i in (1, 2):
        here.sample(f"{i}/2")
    here.merge()
    with monkeypatch.context() as broken:
        broken.setattr("dsc_hub.pipeline.sampling_stage.sampled", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            here.merge()
    assert not here.run.is_done("sampling", here.context.fingerprints["sampling"])
    here.merge()
    assert here.run.is_done("sampling", here.context.fingerprints["sampling"])


def test_what_was_sampled_before_it_was_divided_is_kept(place):
    here = place()
    whole = here.sample()
    spent = list(here.run.rows("sessions.jsonl"))
    rows = {name: (whole / name).read_bytes().splitlines(True) for name in ("turns.jsonl", "chains.jsonl")}
    here.run.unfinish("sampling")
    (whole / "chains.jsonl").write_bytes(b"".join(rows["chains.jsonl"][:5]))
    for i in (1, 2):
        here.sample(f"{i}/2")
    here.merge()
    here.merge()
    for name, before in rows.items():
        assert sorted_rows(whole / name) == sorted(line.rstrip(b"\n") for line in before)
    sessions = list(here.run.rows("sessions.jsonl"))  # what it cost before counts too, and no merge counts twice
    assert sessions[0] == spent[0] and [row.get("shard") for row in sessions] == [None, "1/2", "2/2"]
    assert cost_of(here.run, "sampling", "turns.jsonl")["seconds"] is not None


def test_all_that_is_wrong_with_shards_is_told_at_once(place, tmp_path: Path):
    here = place()
    with pytest.raises(RunError, match=r"there are no shards in .*\n.*--shard 1/N"):
        here.merge()
    one, two = here.sample("1/3"), here.sample("2/3")
    (two / "sampling.done.json").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError) as e:
        here.merge(one, two, tmp_path / "empty", one)
    for told in (
        "empty is no shard",
        "shard 2/3 in",
        "is not finished",
        "of 3 shards 1 missing: 3",
        "shard 1/3 is there twice",
    ):
        assert told in str(e.value)
    with pytest.raises(RunError, match="is shard 1/3 of something else"):
        place("runs", "seed=5").merge(one)
    assert not list(tmp_path.rglob("runs/little/*/chains.jsonl"))


def test_a_run_does_not_sample_again_what_lies_in_shards(place):
    here = place()
    here.sample("1/2")
    with pytest.raises(RunError, match=r"shards of this sampling are in .*\n.*dsc merge"):
        here.sample()


def test_a_shard_that_failed_in_part_is_merged_with_its_failures(place):
    server = make_server(fault=lambda body, before: "400" if "number 3" in body["messages"][0]["content"] else "")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    split = "prompts.split={train: 0.9, validation: 0.05, test: 0.05}"
    here = place("runs", split, at=f"http://127.0.0.1:{server.server_port}/v1")
    for i in (1, 2):
        here.sample(f"{i}/2")
    here.merge()
    hurt = {p.id for p in here.context.prompts("train", "validation") if "number 3" in p.text}
    result, failed = here.run.marker("sampling")["result"], list(here.run.rows("failed.jsonl"))
    assert hurt and {row["prompt_id"] for row in failed} == hurt and len(failed) == 2 * len(hurt)
    assert result["failed"] == len(failed) and result["finished"] + result["failed"] == result["chains"]
    server.shutdown()


def test_the_command_line_samples_a_shard_and_merges(dsc, recipe_file: Path, server: str):
    words = [str(recipe_file), f"serving.endpoints=[{server}]"]
    dsc("sample", *words, "--shard", "1/1", code=0)
    (shard,) = dsc.work.glob("runs/little/*/shards/1-of-1")
    done = dsc("merge", *words, str(shard), "--json", code=0)
    assert json.loads(done.stdout)["result"]["finished"] == 14 and "merged 1 shards" in done.stderr
    assert "expected i/n" in dsc("sample", *words, "--shard", "3/2", code=2).stderr
