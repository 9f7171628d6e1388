"""A model that thinks, through the whole of `dsc run`: its thoughts are kept beside the texts, and nowhere else."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.distill.conftest import base, one_thread  # noqa: F401  (fixtures: a tiny model)
from tests.inference import chat_templates
from tests.scripted_server import answer_to

THOUGHT = "zqthought"
OVERRIDES = (
    "chain.steps=1",
    "evaluation.arms=[base]",
    "distill.sft={max_steps: 2, per_device_train_batch_size: 1, gradient_accumulation_steps: 1}",
    "publish={to: local}",
)


def thinking(form: str):
    """Return how a server answers that thinks first, in one of the forms; "off": it doesn't think."""

    def answer(body: dict) -> str | dict:
        text, thought = answer_to(body), f"{THOUGHT} {body['seed']} <b>why</b>"
        if form == "tags":
            return f"<think>\n{thought}\n</think>\n\n{text}"
        if form == "field":
            return {"message": {"role": "assistant", "content": text, "reasoning_content": thought}}
        return text

    return answer


@pytest.fixture
def thinker(base: Path, tmp_path: Path) -> Path:  # noqa: F811
    folder = tmp_path / "thinker"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(chat_templates.QWEN3)
    return folder


def run_with(dsc, start, recipe_file: Path, thinker: Path, form: str) -> tuple[Path, str, list[dict]]:
    """Run all of a recipe; return the run folder, what was said, and the requests."""
    bodies: list[dict] = []
    server = start(answer=thinking(form), bodies=bodies)
    settings = "{chat_template_kwargs: {enable_thinking: " + str(form != "off").lower() + "}}"
    done = dsc(
        "run",
        str(recipe_file),
        f"model={{source: {thinker}, license: mit}}",
        f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]",
        f"generation.extra={settings}",
        *OVERRIDES,
        code=0,
    )
    (run,) = sorted((dsc.work / "runs" / "little").iterdir(), key=lambda p: p.stat().st_mtime)[-1:]
    return run, done.stdout + done.stderr, bodies


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_thought_is_in_any_row_score_card_or_training_row(dsc, start, recipe_file: Path, thinker: Path):
    seen = {}
    for form in ("off", "field"):
        run, said, bodies = run_with(dsc, start, recipe_file, thinker, form)
        assert THOUGHT not in json.dumps(bodies) and THOUGHT not in said
        holding = {p.name for p in run.rglob("*") if p.is_file() and THOUGHT.encode() in p.read_bytes()}
        assert holding <= ({"turns.jsonl"} if form != "off" else set()), holding
        files = sorted((run / "dataset").rglob("*.parquet"))
        tables = {p.relative_to(run): [without_tokens(r) for r in pq.read_table(p).to_pylist()] for p in files}
        assert tables and THOUGHT not in repr(tables)
        turns = sorted(rows(run / "turns.jsonl"), key=lambda t: (t["prompt_id"], t["chain"], t["step"], t["role"]))
        assert all(THOUGHT in t["thought"] for t in turns) is (form != "off")
        chains = sorted(rows(run / "chains.jsonl"), key=lambda c: (c["prompt_id"], c["number"]))
        card = (run / "cards" / "adapter" / "README.md").read_text()
        assert f"enable_thinking={form != 'off'}" in card
        seen[form] = (chains, tables, [without_tokens(t) | {"thought": ""} for t in turns], page_data(run))
    # What the model thought changes the thoughts and their tokens, and nothing else.
    assert seen["off"][:3] == seen["field"][:3]
    (chain, *_), (plain, *_) = seen["field"][3]["chains"], seen["off"][3]["chains"]
    assert THOUGHT in chain["answer"]["thought"] and THOUGHT in chain["steps"][0]["critique_thought"]
    assert "thought" not in plain["answer"] and chain["answer"]["text"] == plain["answer"]["text"]
    assert THOUGHT in seen["field"][3]["answers"][0]["arms"]["base"]["thought"]


def without_tokens(row: dict) -> dict:
    """The row without the number of tokens, which counts those of the thought."""
    return {key: value for key, value in row.items() if key != "new_tokens"}


def page_data(run: Path) -> dict:
    data = re.search(r'id="data"[^>]*>([^<]+)<', (run / "report.html").read_text())
    assert data
    return json.loads(gzip.decompress(base64.b64decode(data[1])))


def test_try_shows_thoughts_on_demand(dsc, start, recipe_file: Path, thinker: Path):
    url = f"http://127.0.0.1:{start(answer=thinking('tags')).server_port}/v1"
    asked = ("try", str(recipe_file), "-n", "2", f"model.source={thinker}", f"serving.endpoints=[{url}]")
    plain = dsc(*asked, code=0).stdout
    assert THOUGHT not in plain and "The model thought before 10 turns; --thoughts shows what." in plain
    assert dsc(*asked, "--thoughts", code=0).stdout.count(THOUGHT) == 10
    listed = json.loads(dsc(*asked, "--thoughts", "--json", code=0).stdout)["thoughts"]
    assert len(listed) == 10 and {t["role"] for t in listed} == {"answer", "critique", "revision"}
