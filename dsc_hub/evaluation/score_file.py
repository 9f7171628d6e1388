"""`dsc score`: score the texts of a file with a metric, in the metric's own unit and direction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dsc_hub import stats
from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.data import table_files
from dsc_hub.data.conversations import parse_conversation
from dsc_hub.errors import DataError
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.registry import SHIPPED, Code
from dsc_hub.records import Prompt
from dsc_hub.runs.metrics_schema import Estimate


class ScoredText(BaseModel):
    text: str
    score: float | None
    reason: str  # why there is no score


class ScoredFile(BaseModel):
    """The texts of a file with their scores; `estimate` is of the mean over texts."""

    metric: str
    identity: str
    unit: str
    higher_is_better: bool
    estimate: Estimate
    unscored: int
    rows: list[ScoredText]


def score_file(
    metric: str, file: Path, scorer: str | None, column: str, options: Mapping[str, Any], code: Code
) -> ScoredFile:
    """Score every text of a file: one text per line, or `column` of JSON, CSV or Parquet.

    The metric also gets `prompt` (a text, or a conversation) and `kind` of the rows. DataError for a file that cannot
    be read, MetricError for a scorer that is not available.
    """
    rows = list(table_files.read_rows(file, column))
    if not rows:
        raise DataError(f"{file} holds no texts")
    shipped = SHIPPED.get(metric)
    first = next(iter(shipped.scorers), "default") if shipped else "default"
    section = ScorerConfig(metric=metric, scorer=scorer or first, options=dict(options))
    identity = registry.identify_scorer(section, code)
    loaded = loading.load_scorer(section, identity, code.folder, as_measured=True)
    prompts = [_prompt(row, f"{file} row {number}") for number, row in enumerate(rows, 1)]
    texts = [str(row[column] if row[column] is not None else "") for row in rows]
    scores = loaded.score(texts, prompts)
    values = [s.value for s in scores if s.value is not None]
    return ScoredFile(
        metric=loaded.name,
        identity=identity,
        unit=loaded.unit,
        higher_is_better=loaded.higher_is_better,
        estimate=Estimate(**stats.estimate(values, [str(i) for i in range(len(values))])),
        unscored=len(scores) - len(values),
        rows=[ScoredText(text=t, score=s.value, reason=s.reason) for t, s in zip(texts, scores, strict=True)],
    )


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    prompt, kind = row.get("prompt") or "", str(row.get("kind") or "")
    if not isinstance(prompt, list):
        return Prompt("", str(prompt), "", "test", kind)
    try:
        messages = parse_conversation(prompt)
    except DataError as e:
        raise DataError(f"{where}, prompt: {e.message}", e.hint) from None
    return Prompt("", messages[-1]["content"], "", "test", kind, messages)
