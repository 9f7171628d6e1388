"""What is wanted: `evaluate` measurements, one folder each, and the functions that load them for our stages.

A metric says in `unit` what it counts and in `higher_is_better` which way is good; a stage gets a `ScorerConfig`, whose scores
always point the way that is wanted: of a metric where lower is better they are negated.
"""

from __future__ import annotations

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
from dsc_hub.errors import DscError, MetricError
from dsc_hub.metrics.own_code import EXAMPLE, described
from dsc_hub.metrics.registry import (
    SHIPPED,
    commit_of,
    file_of,
    is_shipped,
    languages_of,
)
from dsc_hub.records import Prompt, Score


@dataclass(frozen=True)
class LoadedScorer:
    """A loaded scorer. `score` takes texts and the prompts that they answer, and gives one `Score` a text, in order, higher being
    better (unless it was loaded as the metric measures); `name` and `unit` are for people."""

    score: Callable[[Sequence[str], Sequence[Prompt]], list[Score]]
    name: str
    unit: str
    higher_is_better: bool = True
    bounds: tuple[float | None, float | None] = (None, None)  # lowest and highest score; None: no limit, or not known


def load_all(recipe: Recipe, identity: Mapping[str, str], folder: Path) -> dict[str, LoadedScorer]:
    """The scorers of a recipe, by the name that their numbers have. `folder` is the recipe's.

    Slow (seconds): imports `evaluate`, and torch for a model. MetricError if one can't be loaded.
    """
    return {name: load_named(name, recipe, identity, folder) for name in recipes.scorers(recipe)}


def load_named(name: str, recipe: Recipe, identity: Mapping[str, str], folder: Path) -> LoadedScorer:
    """One of a recipe's scorers whole, as `load_all` does: a reward with all its terms."""
    terms = recipes.reward_terms(recipe, name)
    return _sum([load(section, identity[place], folder) for place, section in terms.items()])


def load(
    section: recipes.ScorerConfig, identity: str, folder: Path | None = None, as_measured: bool = False
) -> LoadedScorer:
    """One scorer, with its weight and its sign (`as_measured`: without). `identity` (of `identify`) says at which commit."""
    measurement = _measurement(section, identity, folder or Path())
    name = f"{Path(section.metric).name.removesuffix('.py')} ({Path(section.scorer).name})"
    try:
        unit, higher = str(measurement.unit), bool(measurement.higher_is_better)
    except AttributeError as e:
        raise MetricError(
            f"metric {section.metric} has no attribute '{e.name}'",
            "A metric says in `unit` (a text) what it counts, and in `higher_is_better` (True or False) which way is good.",
        ) from None
    factor = 1.0 if as_measured else section.weight if higher else -section.weight
    sign = "" if factor > 0 else "minus "
    times = "" if abs(factor) == 1 else f"{section.weight:g} x "

    def score(texts: Sequence[str], prompts: Sequence[Prompt]) -> list[Score]:
        return [
            s if s.value is None else Score(factor * s.value) for s in _scores(measurement, section, texts, prompts)
        ]

    bounds = _scaled(getattr(measurement, "bounds", (None, None)), factor)
    return LoadedScorer(score, name, f"{sign}{times}{unit}", higher if as_measured else True, bounds)


def _scaled(bounds: tuple[float | None, float | None], factor: float) -> tuple[float | None, float | None]:
    """The range of a metric times a factor, which turns it round where it is negative."""
    low, high = (None if end is None else factor * float(end) for end in bounds)
    return (low, high) if factor > 0 else (high, low)


def _sum(terms: Sequence[LoadedScorer]) -> LoadedScorer:
    """Several scores added; a text that one of them can't score is unscored."""
    if len(terms) == 1:
        return terms[0]

    def score(texts: Sequence[str], prompts: Sequence[Prompt]) -> list[Score]:
        return [_added(of) for of in zip(*(t.score(texts, prompts) for t in terms), strict=True)]

    low, high = (None if None in ends else math.fsum(ends) for ends in zip(*(t.bounds for t in terms), strict=True))
    name, unit = " + ".join(t.name for t in terms), "sum of " + " and ".join(t.unit for t in terms)
    return LoadedScorer(score, name, unit, bounds=(low, high))


def _added(scores: Sequence[Score]) -> Score:
    missing = [s for s in scores if s.value is None]
    return missing[0] if missing else Score(math.fsum(s.value for s in scores if s.value is not None))


def load_veto(recipe: Recipe, identity: Mapping[str, str]) -> Callable[[Sequence[str], Sequence[str]], list[str]]:
    """What blocks acceptance: (revisions, first answers) -> why each must not be kept, "" if it may."""
    rules = recipes.effective_veto(recipe)
    if rules is None:
        return lambda revisions, firsts: [""] * len(revisions)
    section = recipes.all_scorers(recipe).get("chain.veto")
    alike = None if section is None else _measurement(section, identity["chain.veto"], Path())

    def veto(revisions: Sequence[str], firsts: Sequence[str]) -> list[str]:
        found = (
            alike.compute(data=list(revisions), references=list(firsts))["scores"]
            if alike is not None
            else [1.0] * len(firsts)
        )
        return [
            TOO_SHORT
            if len(words(new)) < rules.length * len(words(old))
            else LOST_MEANING
            if likeness is None or likeness < rules.similarity
            else ""
            for new, old, likeness in zip(revisions, firsts, found, strict=True)
        ]

    return veto


def _measurement(section: recipes.ScorerConfig, identity: str, folder: Path) -> Any:
    """The `evaluate` measurement behind a section."""
    import evaluate

    commit = commit_of(identity)
    options: dict[str, Any] = dict(section.options)
    if is_shipped(section):
        path = file_of(section.metric)
        if commit:
            options["model_revision"] = commit
        if section.positive_label is not None:
            options["positive_label"] = section.positive_label
    elif section.metric.endswith(".py"):
        path = folder / section.metric
    else:
        from dsc_hub.hub import client

        path = client.space_module(section.metric, str(commit))
    try:
        measurement = evaluate.load(
            str(path.absolute()),  # a cached Space is links, which have the names that `evaluate` asks for
            config_name=section.scorer,
            experiment_id=uuid.uuid4().hex,
            keep_in_memory=True,
            **options,
        )
    except (ValueError, OSError, ImportError) as e:
        raise _cannot_load(section, e) from None
    except (Exception, SystemExit) as e:
        if is_shipped(section):
            raise  # a bug of ours
        raise _cannot_load(section, e) from None
    # `evaluate` takes any keyword without a word.
    known = inspect.signature(type(measurement).__init__).parameters
    if unknown := [name for name in options if name not in known]:
        raise MetricError(
            f"metric {section.metric} has no option '{unknown[0]}'",
            f"Its options are the keywords of its __init__: {', '.join(_own_keywords(known)) or 'none'}.",
        )
    return measurement


def _own_keywords(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [n for n, p in parameters.items() if n != "self" and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _cannot_load(section: recipes.ScorerConfig, e: BaseException) -> MetricError:
    shipped = SHIPPED.get(section.metric)
    if shipped is None:
        hint = EXAMPLE
    elif shipped.models:
        hint = f"Name {', '.join(shipped.scorers)}, or {shipped.models} with safetensors."
    else:
        hint = "README, Metrics, says what its options are."
    return MetricError(
        f"scorer '{section.scorer}' of metric '{section.metric}' can't be loaded: {_told(section, e)}", hint
    )


def _told(section: recipes.ScorerConfig, e: BaseException) -> str:
    """The error in a line; of somebody's own code with its place."""
    if is_shipped(section):
        return " ".join(str(e).split())[:400] or type(e).__name__
    name = Path(section.metric).name
    return described(e, name if name.endswith(".py") else f"{name}.py")


def _scores(
    measurement: Any, section: recipes.ScorerConfig, texts: Sequence[str], prompts: Sequence[Prompt]
) -> list[Score]:
    """As `_compute`, of the texts that may be in a language that the scorer reads; others are unscored."""
    languages = languages_of(section)
    why = [foreign(text, languages) for text in texts] if languages else []
    if not any(why):
        return _compute(measurement, section, texts, prompts)
    kept = [i for i, reason in enumerate(why) if not reason]
    scored = iter(_compute(measurement, section, [texts[i] for i in kept], [prompts[i] for i in kept]))
    read = " or ".join(map(language_name, languages))
    return [Score(None, f"not {read}: it is {reason}") if reason else next(scored) for reason in why]


def _compute(
    measurement: Any, section: recipes.ScorerConfig, texts: Sequence[str], prompts: Sequence[Prompt]
) -> list[Score]:
    """Scores as the metric gives them, checked: one a text, each a finite number or None."""
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
            "Answers are given as data (or predictions), beside them prompts and kinds.",
        )
    given: dict[str, Any] = {name: columns[name] for name in features}
    if "batch_size" in inspect.signature(measurement._compute).parameters:
        given["batch_size"] = section.batch_size
    try:
        result = measurement.compute(**given)
    except DscError:
        raise
    except ConnectionError as e:  # a judge's server went away
        raise MetricError(
            f"metric {section.metric} failed: {e}", "The same command goes on from what is done."
        ) from None
    except (Exception, SystemExit) as e:
        if is_shipped(section):
            raise
        raise MetricError(
            f"metric {section.metric} failed on {len(texts)} texts: {_told(section, e)}",
            "Mend the metric; the same command goes on from what is done.",
        ) from None
    return _checked(result, len(texts), section)


def _checked(result: Any, n: int, section: recipes.ScorerConfig) -> list[Score]:
    scores = result.get("scores") if isinstance(result, Mapping) else None
    if not isinstance(scores, (list, tuple)) or len(scores) != n:
        got = f"{len(scores)} of them" if isinstance(scores, (list, tuple)) else f"{result!r:.80}"
        raise MetricError(
            f"metric {section.metric} should return {{'scores': [...]}} with one score a text ({n}), got {got}"
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
                f"metric {section.metric} gave {value!r:.40} as a score, expected a finite number, or None for a text that "
                "it can't score"
            )
    return out
