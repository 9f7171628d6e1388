"""Random damage to what users bring and models say: tables of texts, texts themselves, and files of a run folder.

Targets of tests/fuzz.py.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.chain import hygiene, language, text, thinking
from dsc_hub.config.sampling import HygieneConfig
from dsc_hub.data import table_files
from dsc_hub.evaluation.claim import claim_of
from dsc_hub.metrics.judge.judge import GUARDS, guard_of, rating_of
from dsc_hub.publish.verify_run import verify_run
from dsc_hub.records import Prompt
from dsc_hub.report import cards, page
from dsc_hub.runs import overview
from dsc_hub.runs.run import Run
from tests import small_run
from tests.conftest import FILMS, RECIPE
from tests.fuzz import HOSTILE, Finding, changed, damaged, only_errors_for_users

ROWS: list[Any] = [{"text": f"It is film {i}, and I liked it.", "kind": "a", "n": i} for i in range(9)]


def _table(rows: list[Any], suffix: str) -> bytes:
    if suffix == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ROWS), out)
        return out.getvalue()
    if suffix in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        return "\n".join(
            mark.join(map(str, r.values())) for r in [dict(zip(ROWS[0], ROWS[0], strict=True)), *ROWS]
        ).encode()
    if suffix == "txt":
        return "\n".join(r["text"] for r in ROWS).encode()
    lines = [json.dumps(r) for r in rows]
    return ("[" + ",".join(lines) + "]" if suffix == "json" else "\n".join(lines)).encode("utf-8", "replace")


def tables(rng: random.Random, place: Path) -> str:
    """A table that is read for `dsc score` is rows that have the column, or an error for users."""
    suffix = rng.choice(("jsonl", "ndjson", "json", "csv", "tsv", "txt", "parquet"))
    rows = changed(ROWS, rng)
    data = _table(rows if isinstance(rows, list) else [rows], suffix)
    if rng.random() < 0.7:
        data = damaged(data, rng)
    if is_packed := suffix != "parquet" and rng.random() < 0.3:
        data = gzip.compress(data)
        if rng.random() < 0.5:
            data = damaged(data, rng)
    path = place / f"table.{suffix}{'.gz' * is_packed}"
    path.write_bytes(data)

    def read() -> None:
        for row in table_files.read_rows(path, "text"):
            if "text" not in row:
                raise Finding(f"a row without the column: {row!r:.300}")

    only_errors_for_users(read)
    return f"{path.name} {data[:300]!r}"


WORDS = (
    *(
        "<think>",
        "</think>",
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        "<|end|>",
        "[[",
        "]]",
        "[[5]]",
    ),
    *(
        "safe",
        "unsafe",
        "Safety: ",
        "\n",
        " ",
        "...",
        "Here's a revised version:",
        "I apologize",
        "\u3002",
        "\u202e",
        "\0",
    ),
    *(
        "{prompt}",
        "{answer}",
        "**",
        "```",
        "<script>",
        "film",
        "the",
        "is",
        "good",
        "ist",
        "gut",
        "\N{LLAMA}",
        "\ud800",
        "\u0301",
    ),
)


def texts(rng: random.Random, place: Path) -> str:
    """Whatever a model writes is judged without an error; a vote is none or lies on its scale."""
    said = "".join(
        str(rng.choice(WORDS)) * rng.choice((1, 1, 1, 2, 50, 2000))
        if rng.random() < 0.8
        else str(rng.choice(HOSTILE))[:9000]
        for _ in range(rng.randint(0, 30))
    )
    prompt = Prompt("p", rng.choice(("Say something about film 1.", said[:300], "")), "film 1", "test")
    reason = rng.choice(("stop", "length", "content_filter", ""))
    split = thinking.split_thought(said, rng.choice((None, "", said[:50])))
    hygiene.inspect(split.text, reason, prompt, said[::-1][:500], HygieneConfig())
    if len(hygiene.strip_opening(split.text)) > len(split.text):
        raise Finding(f"stripping made a text longer: {said!r:.300}")
    language.in_another_language(said, prompt.text)
    text.words(said)
    for vote in (rating_of(said, (1, 10), rng.random() < 0.5), *(guard_of(said, kind) for kind in GUARDS)):
        if vote.value is not None and not 0 <= vote.value <= 1:
            raise Finding(f"a vote of {vote.value}: {said!r:.300}")
    return repr(said[:500])


class SmallRun:
    """A finished run, of which each case gets a copy with one damaged file."""

    def __init__(self, place: Path) -> None:
        (place / "recipe").mkdir()
        (place / "recipe" / "films.txt").write_text(FILMS)
        (place / "recipe" / "recipe.yaml").write_text(RECIPE)
        self.whole = place / "whole"
        small_run.make(self.whole, place / "recipe" / "recipe.yaml")
        self.files = sorted(p.relative_to(self.whole) for p in self.whole.rglob("*.json*") if p.stat().st_size)

    def __call__(self, rng: random.Random, place: Path) -> str:
        folder = place / "runs" / "little" / "0"
        shutil.copytree(self.whole, folder)
        file = rng.choice(self.files)
        data = (folder / file).read_bytes()
        if rng.random() < 0.7 and file.suffix == ".json":
            data = json.dumps(changed(json.loads(data), rng)).encode("utf-8", "replace")
        else:
            data = damaged(data, rng)
        (folder / file).write_bytes(data)
        run = Run(folder)
        for look in (
            lambda: overview.summaries(place / "runs"),
            lambda: claim_of(run),
            lambda: verify_run(run),
            lambda: page.build_page(run),
            lambda: cards.build_cards(run),
        ):
            only_errors_for_users(look)
        return f"{file} {data[:300]!r}"
