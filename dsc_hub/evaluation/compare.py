"""Comparison of two or more evaluated runs: the same arm on the same prompts, paired where both runs have an answer.

Run folders in, numbers out; the first run is the baseline. Scores are matched by their scorer (package and version, or
model and commit), not by their role: the reward of one run may be the second scorer of another. Numbers of different
prompts are never subtracted; a note reports if the arms ran on different weights or at different temperatures.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dsc_hub import stats
from dsc_hub.config.arms import ADAPTER, ARMS
from dsc_hub.config.recipe import generation_at_evaluation, reward_terms, scorers, training_seed
from dsc_hub.errors import ConfigError
from dsc_hub.evaluation.summary import score_difference
from dsc_hub.records import Answer, AnswerKey
from dsc_hub.runs.facts import RunFacts
from dsc_hub.runs.metrics_schema import Difference, Evaluation, Scored, ScoreName
from dsc_hub.runs.overview import flat_settings, shown_setting
from dsc_hub.runs.results import answers, evaluation_of
from dsc_hub.runs.run import Run

LONGEST, MOST_SHOWN = 100, 8  # characters of a setting that is shown, and settings


class ComparedRun(BaseModel):
    """One run of a comparison: its setting, and its arms' scores.

    `scores` has their titles; `differs` has KEY=VALUE of the settings that the compared runs do not share.
    """

    name: str
    folder: Path
    served_on: str
    split: str
    temperature: float
    differs: tuple[str, ...]
    scores: dict[ScoreName, str]
    arms: dict[str, dict[ScoreName, Scored]]


class ArmDifference(BaseModel):
    """A run's arm minus the same arm of the baseline `against`, by scorer.

    `prompts` counts answers (prompt and sample) that both runs have, `unshared` those that only one has.
    """

    run: str
    against: str
    arm: str
    prompts: int
    unshared: int
    by_score: dict[str, Difference]


class TrainingSpread(BaseModel):
    """How the mean score of an arm varies between trainings that differ in their seed only.

    `mean`, `sd` (sample standard deviation), `low` and `high` (smallest and largest) are over the `runs` trainings.
    """

    arm: str
    score: str
    runs: int
    mean: float
    sd: float
    low: float
    high: float


class Comparison(BaseModel):
    """Several runs and their differences from the first one. `notes` are sentences on settings that differ.

    `spread` is empty unless the runs differ in `distill.seed` only.
    """

    confidence: float
    runs: list[ComparedRun]
    differences: list[ArmDifference]
    spread: list[TrainingSpread]
    notes: list[str]


def compare_runs(runs: Sequence[Run], confidence: float = 0.95) -> Comparison:
    """Compare each further run with the first one.

    p is adjusted (Holm) over all differences together. Arms or scorers that only one run has are left out. ConfigError
    for fewer than two different runs; RunError for a run that is not evaluated.
    """
    if len({run.folder.resolve() for run in runs}) < max(2, len(runs)):
        raise ConfigError(
            "compare needs two or more different runs", "Name run folders, as runs/quickstart/0123456789ab."
        )
    read = [_read_run(run) for run in runs]
    names = _run_names(runs)
    differ = _settings_that_differ(runs)
    shown = [_compared_run(*each) for each in zip(names, runs, read, differ, strict=True)]
    differences = [
        (name, other, arm)
        for name, other in zip(names[1:], read[1:], strict=True)
        for arm in read[0].rows
        if arm in other.rows
    ]
    by_score = {str(i): _by_score(read[0], other, arm, confidence) for i, (_, other, arm) in enumerate(differences)}
    stats.adjust(by_score)
    return Comparison(
        confidence=confidence,
        runs=shown,
        differences=[
            ArmDifference(
                run=name,
                against=names[0],
                arm=arm,
                prompts=len(other.rows[arm].keys() & read[0].rows[arm].keys()),
                unshared=len(other.rows[arm].keys() ^ read[0].rows[arm].keys()),
                by_score={title: Difference(**_without_noise(d)) for title, d in by_score[str(i)].items()},
            )
            for i, (name, other, arm) in enumerate(differences)
        ],
        spread=_spread_of_trainings(runs, shown),
        notes=_notes(shown),
    )


def _spread_of_trainings(runs: Sequence[Run], shown: Sequence[ComparedRun]) -> list[TrainingSpread]:
    """Return the spread between trainings by arm of the adapter and score."""
    if not _differ_in_training_seed_only(runs):
        return []
    out = []
    for arm in [name for name in shown[0].arms if ARMS[name].model == ADAPTER]:
        for score, title in shown[0].scores.items():
            means = [r.arms[arm][score].mean for r in shown if arm in r.arms and score in r.arms[arm]]
            measured = [m for m in means if m is not None]
            if len(measured) == len(runs):
                out.append(
                    TrainingSpread(
                        arm=arm,
                        score=title,
                        runs=len(measured),
                        mean=statistics.fmean(measured),
                        sd=statistics.stdev(measured),
                        low=min(measured),
                        high=max(measured),
                    )
                )
    return out


def _differ_in_training_seed_only(runs: Sequence[Run]) -> bool:
    facts = [run.facts for run in runs]
    without = [
        (f.recipe.model_copy(update={"distill": f.recipe.distill.model_copy(update={"seed": None})}), f.identity)
        for f in facts
    ]
    seeds = {training_seed(f.recipe) for f in facts}
    if any(f.recipe.rounds > 1 for f in facts):  # later chains depend on the seed, too
        return False
    return len(seeds) == len(runs) and all(one == without[0] for one in without)


def _by_score(first: _Evaluated, other: _Evaluated, arm: str, confidence: float) -> dict[str, dict[str, Any]]:
    """Return `other` minus `first` on an arm, for each scorer that both have, by the scorer's title in `first`."""
    out = {}
    for score, identity in other.identity.items():
        if (of_first := first.score_with(identity)) is not None:
            about = other.evaluation.scores[score]
            bounds = (about.low, about.high)
            rows = (other.rows[arm], first.rows[arm])
            out[first.scores[of_first]] = score_difference(*rows, score, of_first, confidence, bounds)
    return out


def _without_noise(difference: dict[str, Any]) -> dict[str, Any]:
    """Return a difference without the rounding errors of scorers, which give equal texts of two batches 1e-7 apart."""
    ends = {key: difference[key] for key in ("mean", "low", "high")}
    return difference | {key: None if value is None else round(value, 6) + 0.0 for key, value in ends.items()}


def _settings_that_differ(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return KEY=VALUE of the settings that are not the same in all runs, for each run; none about servers."""
    settings = [flat_settings(run.facts.recipe.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each if not key.startswith("serving."))
    differ = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
    more = (f"and {len(differ) - MOST_SHOWN} more",) if len(differ) > MOST_SHOWN else ()
    return [
        (*(textwrap.shorten(shown_setting(key, each.get(key)), LONGEST) for key in differ[:MOST_SHOWN]), *more)
        for each in settings
    ]


def _compared_run(name: str, run: Run, r: _Evaluated, differs: tuple[str, ...]) -> ComparedRun:
    arms = {arm: {s: numbers.score(s) for s in r.scores} for arm, numbers in r.evaluation.arms.items()}
    return ComparedRun(
        name=name,
        folder=run.folder,
        served_on=r.evaluation.served_on,
        split=r.evaluation.split,
        temperature=r.temperature,
        differs=differs,
        scores=r.scores,
        arms=arms,
    )


def _notes(shown: Sequence[ComparedRun]) -> list[str]:
    first, out = shown[0], []
    for r in shown[1:]:
        settings = {
            "ran on": (r.served_on, first.served_on),
            "were asked (split)": (r.split, first.split),
            "were drawn at (temperature)": (r.temperature, first.temperature),
        }
        out += [
            f"{r.name} and {first.name} differ in what the arms {words}: {here} against {there}."
            for words, (here, there) in settings.items()
            if here != there
        ]
    return out


def _run_names(runs: Sequence[Run]) -> list[str]:
    """Return recipe/fingerprint of each run, or the full paths if these names are not unique."""
    short = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder.resolve()) for run in runs]


@dataclass(frozen=True)
class _Evaluated:
    """A run's answers by arm, prompt and sample; the identity of each score; the evaluation's settings."""

    rows: dict[str, dict[AnswerKey, Answer]]
    identity: dict[ScoreName, str]
    temperature: float
    evaluation: Evaluation

    @property
    def scores(self) -> dict[ScoreName, str]:
        return {name: score.name for name, score in self.evaluation.scores.items()}

    def score_with(self, identity: str) -> ScoreName | None:
        return next((name for name, own_identity in self.identity.items() if own_identity == identity), None)


def _read_run(run: Run) -> _Evaluated:
    evaluation, facts = evaluation_of(run), run.facts
    rows: dict[str, dict[AnswerKey, Answer]] = {arm: {} for arm in evaluation.arms}
    for row in answers(run):
        rows[row.arm][row.prompt_id, row.sample] = row
    identity = {name: _identity(facts, name, score.name) for name, score in evaluation.scores.items()}
    return _Evaluated(rows, identity, generation_at_evaluation(facts.recipe).temperature, evaluation)


def _identity(facts: RunFacts, score: ScoreName, title: str) -> str:
    """Return the exact identity of a score: every scorer term with its weight. Equal identities are comparable."""
    if score not in scorers(facts.recipe):  # chains and scores of somebody else's
        return title
    terms = reward_terms(facts.recipe, score)
    weighted = [(term.weight, facts.identity.get(place) or title) for place, term in terms.items()]
    return " + ".join(identity if weight == 1 else f"{weight:g} x {identity}" for weight, identity in weighted)
