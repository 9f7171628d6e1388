"""Loading of metrics: `evaluate` measurements, one folder each, as scorers for the stages.

A metric states what it measures in `unit`, and the direction in `higher_is_better`. A stage gets a `LoadedScorer`, and
in its scores higher is always better: the scores of a metric where lower is better are negated.
"""

from __future__ import annotations

import importlib
import inspect
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_hub.chain.chain import LOST_MEANING, TOO_SHORT
from dsc_hub.chain.language import foreign, language_name
from dsc_hub.chain.text import words
from dsc_hub.config import recipe as recipes
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.errors import DscError, MetricError, ServingError
from dsc_hub.inference import external
from dsc_hub.inference.base_model import WANTED
from dsc_hub.metrics.evaluate_import import import_evaluate
from dsc_hub.metrics.own_code import EXAMPLE, described
from dsc_hub.metrics.registry import (
    SHIPPED,
    commit_of,
    file_of,
    is_hub_model,
    is_shipped,
    languages_of,
)
from dsc_hub.records import Prompt, Score
from dsc_hub.system import cache
from dsc_hub.system.hashing import digest

BOUNDS = "reward_bounds.json"  # in dsc's cache
# Prompt, its conversation, and the answer, of the request that tests a judge's server.
TRIAL_EXCHANGE = ("Say yes.", [{"role": "user", "content": "Say yes."}], "Yes.")


@dataclass(frozen=True)
class LoadedScorer:
    """A loaded scorer.

    `score` takes texts and the prompts that they answer, and returns one `Score` per text, in order; higher is better
    (unless loaded with `as_measured`). `name` and `unit` are for display.
    """

    score: Callable[[Sequence[str], Sequence[Prompt]], list[Score]]
    name: str
    unit: str
    higher_is_better: bool = True
    bounds: tuple[float | None, float | None] = (None, None)  # lowest and highest score; None: no limit, or unknown


def load_all(recipe: Recipe, identity: Mapping[str, str], folder: Path) -> dict[str, LoadedScorer]:
    """Return the scorers of a recipe by the name of their scores. `folder` is the recipe's folder.

    Slow (seconds): imports `evaluate`, and torch for a model. MetricError if one can't be loaded.
    """
    return {name: load_named(name, recipe, identity, folder) for name in recipes.scorers(recipe)}


def load_named(name: str, recipe: Recipe, identity: Mapping[str, str], folder: Path) -> LoadedScorer:
    """Return one of a recipe's scorers, loaded as by `load_all`: a reward with all its terms."""
    terms = recipes.reward_terms(recipe, name)
    return _sum([load_scorer(section, identity[place], folder) for place, section in terms.items()])


def load_scorer(
    section: ScorerConfig, identity: str, folder: Path | None = None, as_measured: bool = False
) -> LoadedScorer:
    """Return one scorer with its weight and sign (`as_measured`: without).

    The commit is part of `identity`, the result of `identify`.
    """
    measurement = _measurement(section, identity, folder or Path())
    name = f"{Path(section.metric).name.removesuffix('.py')} ({Path(section.scorer).name})"
    try:
        unit, higher = str(measurement.unit), bool(measurement.higher_is_better)
    except AttributeError as e:
        raise MetricError(
            f"metric {section.metric} has no attribute '{e.name}'",
            "A metric says in `unit` (a text) what it counts, and in `higher_is_better` (True or False) which way is "
            "good.",
        ) from None
    factor = 1.0 if as_measured else section.weight if higher else -section.weight
    sign = "" if factor > 0 else "minus "
    times = "" if abs(factor) == 1 else f"{section.weight:g} x "

    def score(texts: Sequence[str], prompts: Sequence[Prompt]) -> list[Score]:
        return [
            s if s.value is None else Score(factor * s.value)
            for s in _score_texts(measurement, section, texts, prompts)
        ]

    bounds = _scaled(getattr(measurement, "bounds", (None, None)), factor)
    return LoadedScorer(score, name, f"{sign}{times}{unit}", higher if as_measured else True, bounds)


def _scaled(bounds: tuple[float | None, float | None], factor: float) -> tuple[float | None, float | None]:
    """Return the range of a metric times a factor; a negative factor swaps its ends."""
    low, high = (None if end is None else factor * float(end) for end in bounds)
    return (low, high) if factor > 0 else (high, low)


def reward_bounds(recipe: Recipe) -> tuple[float | None, float | None]:
    """Return the lowest and highest reward by what the metrics declare, without loading a scorer.

    None: no limit, or unknown, as of a metric that is not shipped: its code is not run for this.
    """
    terms = list(recipes.reward_terms(recipe, "reward").values())
    # Metrics are classes of `evaluate`, whose import takes ten seconds and more; so what they declare is remembered.
    files = [file_of(section.metric).read_bytes().hex() for section in terms if is_shipped(section)]
    key = digest([section.model_dump(mode="json") for section in terms], files)
    if (known := cache.recall_value(BOUNDS, key)) is None:
        known = _added_bounds([_declared_bounds(section) for section in terms])
        cache.remember_value(BOUNDS, key, known)
    low, high = known
    return low, high


def _declared_bounds(section: ScorerConfig) -> tuple[float | None, float | None]:
    if not is_shipped(section):
        return None, None
    evaluate = import_evaluate()  # before the module, which imports it too
    module = importlib.import_module(f"dsc_hub.metrics.{section.metric}.{section.metric}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, evaluate.Measurement)]
    # Made, but not prepared: nothing is downloaded or loaded.
    try:
        measurement = classes[0](
            config_name=section.scorer, experiment_id=uuid.uuid4().hex, keep_in_memory=True, **section.options
        )
    except ValueError as e:
        raise _cannot_load(section, e) from None
    factor = section.weight if measurement.higher_is_better else -section.weight
    return _scaled(measurement.bounds, factor)


def _added_bounds(bounds: Sequence[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    low, high = (
        None if None in ends else math.fsum(e for e in ends if e is not None) for ends in zip(*bounds, strict=True)
    )
    return low, high


def _sum(terms: Sequence[LoadedScorer]) -> LoadedScorer:
    """Return the sum of several scorers; a text that one of them can't score is unscored."""
    if len(terms) == 1:
        return terms[0]

    def score(texts: Sequence[str], prompts: Sequence[Prompt]) -> list[Score]:
        return [_added(text_scores) for text_scores in zip(*(t.score(texts, prompts) for t in terms), strict=True)]

    name, unit = " + ".join(t.name for t in terms), "sum of " + " and ".join(t.unit for t in terms)
    return LoadedScorer(score, name, unit, bounds=_added_bounds([t.bounds for t in terms]))


def _added(scores: Sequence[Score]) -> Score:
    missing = [s for s in scores if s.value is None]
    return missing[0] if missing else Score(math.fsum(s.value for s in scores if s.value is not None))


def load_veto_scorer(
    recipe: Recipe, identity: Mapping[str, str]
) -> Callable[[Sequence[str], Sequence[str]], list[str]]:
    """Return the veto: (revisions, first answers) -> the reason not to accept each revision, "" if there is none."""
    rules = recipes.effective_veto(recipe)
    if rules is None:
        return lambda revisions, firsts: [""] * len(revisions)
    section = recipes.all_scorers(recipe).get("chain.veto")
    measurement = None if section is None else _measurement(section, identity["chain.veto"], Path())

    def veto(revisions: Sequence[str], firsts: Sequence[str]) -> list[str]:
        similarities = (
            measurement.compute(data=list(revisions), references=list(firsts))["scores"]
            if measurement is not None
            else [1.0] * len(firsts)
        )
        return [
            TOO_SHORT
            if len(words(new)) < rules.length * len(words(old))
            else LOST_MEANING
            if similarity is None or similarity < rules.similarity
            else ""
            for new, old, similarity in zip(revisions, firsts, similarities, strict=True)
        ]

    return veto


def _measurement(section: ScorerConfig, identity: str, folder: Path) -> Any:
    """Return the `evaluate` measurement of a section."""
    evaluate = import_evaluate()
    options: dict[str, Any] = dict(section.options)
    downloaded = download_scorer(section, identity)
    if is_shipped(section):
        path = file_of(section.metric)
        if downloaded is not None:
            options["model_revision"] = commit_of(identity)
        if section.positive_label is not None:
            options["positive_label"] = section.positive_label
    elif section.metric.endswith(".py"):
        path = folder / section.metric
    else:
        assert downloaded is not None, "a metric that is neither shipped nor a file is a Space, at a commit"
        path = downloaded
    try:
        measurement = evaluate.load(
            str(path.absolute()),  # a cached Space consists of links, whose names are those that `evaluate` expects
            config_name=section.scorer,
            experiment_id=uuid.uuid4().hex,
            keep_in_memory=True,
            **options,
        )
    except (ValueError, OSError, ImportError) as e:
        raise _cannot_load(section, e) from None
    except (Exception, SystemExit) as e:
        if is_shipped(section):
            raise  # a bug in dsc_hub
        raise _cannot_load(section, e) from None
    # `evaluate` silently accepts any keyword.
    parameters = inspect.signature(type(measurement).__init__).parameters
    if unknown := [name for name in options if name not in parameters]:
        raise MetricError(
            f"metric {section.metric} has no option '{unknown[0]}'",
            f"Its options are the keywords of its __init__: {', '.join(_own_keywords(parameters)) or 'none'}.",
        )
    if section.metric == "judge":
        measurement.sent_as = _form_of_judge(measurement, section)
    return measurement


def download_scorer(section: ScorerConfig, identity: str) -> Path | None:
    """Download what a scorer loads from the Hub, a model or a Space's file, and return where; None if it loads nothing.

    Offline it must be in the cache. HubError if it can't be had.
    """
    commit = commit_of(identity)
    is_code = not is_shipped(section) and not section.metric.endswith(".py")
    if commit is None or not (is_code or is_hub_model(section)):
        return None
    from dsc_hub.hub import client

    if is_code:
        return client.space_module(section.metric, commit)
    return client.download_model(section.scorer, commit, WANTED)


def _form_of_judge(measurement: Any, section: ScorerConfig) -> Mapping[str, str | None]:
    """Return the form of requests that a judge's server takes, after one real request. MetricError without an answer.

    A server that was asked before in this process is not asked again.
    """
    server = recipes.server_of_judge("judge", section)
    messages = measurement.messages(*TRIAL_EXCHANGE)
    try:
        endpoint = external.endpoint_of(server)
        return external.connect(endpoint, server, measurement.parameters(), messages, {}, measurement.timeout_s).form
    except ServingError as e:
        raise MetricError(e.message, e.hint) from None


def _own_keywords(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [n for n, p in parameters.items() if n != "self" and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _cannot_load(section: ScorerConfig, e: BaseException) -> MetricError:
    shipped = SHIPPED.get(section.metric)
    if shipped is None:
        hint = EXAMPLE
    elif shipped.models and not section.options:
        hint = f"Name {', '.join(shipped.scorers)}, or {shipped.models} with safetensors."
    else:
        hint = "docs/reference/metrics.md says what its options are."
    return MetricError(
        f"scorer '{section.scorer}' of metric '{section.metric}' can't be loaded: {_error_text(section, e)}", hint
    )


def _error_text(section: ScorerConfig, e: BaseException) -> str:
    """Return the error in one line; for the user's own code with its location."""
    if is_shipped(section):
        return " ".join(str(e).split())[:400] or type(e).__name__
    name = Path(section.metric).name
    return described(e, name if name.endswith(".py") else f"{name}.py")


def _score_texts(
    measurement: Any, section: ScorerConfig, texts: Sequence[str], prompts: Sequence[Prompt]
) -> list[Score]:
    """Return the scores of texts that may be in a language the scorer reads (see `_compute`); others are unscored."""
    languages = languages_of(section)
    reasons = [foreign(text, languages) for text in texts] if languages else []
    if not any(reasons):
        return _compute(measurement, section, texts, prompts)
    indices = [i for i, reason in enumerate(reasons) if not reason]
    scored = iter(_compute(measurement, section, [texts[i] for i in indices], [prompts[i] for i in indices]))
    readable = " or ".join(map(language_name, languages))
    return [Score(None, f"not {readable}: it is {reason}") if reason else next(scored) for reason in reasons]


def _compute(measurement: Any, section: ScorerConfig, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[Score]:
    """Return the metric's scores, validated: one per text, each a finite number or None."""
    if not texts:
        return []
    columns = {
        "data": list(texts),
        "predictions": list(texts),
        "prompts": [p.text for p in prompts],
        "kinds": [p.kind for p in prompts],
    }
    features = measurement.features if not isinstance(measurement.features, list) else measurement.features[0]
    if unknown := [name for name in features if name not in columns]:
        raise MetricError(
            f"metric {section.metric} asks for {', '.join(unknown)}",
            "Answers are given as data (or predictions), beside them prompts and kinds; conversations is a keyword of "
            "_compute.",
        )
    inputs: dict[str, Any] = {name: columns[name] for name in features}
    keywords = inspect.signature(measurement._compute).parameters
    if "batch_size" in keywords:
        inputs["batch_size"] = section.batch_size
    if "conversations" in keywords:
        inputs["conversations"] = [p.conversation for p in prompts]
    try:
        result = measurement.compute(**inputs)
    except DscError:
        raise
    except ConnectionError as e:  # a judge's server is unreachable
        raise MetricError(
            f"metric {section.metric} failed: {e}", "The same command goes on from what is done."
        ) from None
    except (Exception, SystemExit) as e:
        if is_shipped(section):
            raise
        raise MetricError(
            f"metric {section.metric} failed on {len(texts)} texts: {_error_text(section, e)}",
            "Mend the metric; the same command goes on from what is done.",
        ) from None
    return _checked_scores(result, len(texts), section)


def _checked_scores(result: Any, n: int, section: ScorerConfig) -> list[Score]:
    scores = result.get("scores") if isinstance(result, Mapping) else None
    if not isinstance(scores, (list, tuple)) or len(scores) != n:
        actual = f"{len(scores)} of them" if isinstance(scores, (list, tuple)) else f"{result!r:.80}"
        raise MetricError(
            f"metric {section.metric} should return {{'scores': [...]}} with one score a text ({n}), got {actual}"
        )
    reasons = result.get("reasons") or [""] * n
    out = []
    for value, reason in zip(scores, reasons, strict=True):
        if value is None:
            out.append(Score(None, reason or "unscored"))
        elif isinstance(value, (int, float)) and math.isfinite(value):
            out.append(Score(float(value)))
        else:
            raise MetricError(
                f"metric {section.metric} gave {value!r:.40} as a score, expected a finite number, or None for a text "
                "that it can't score"
            )
    return out
