"""How often the claim's criteria err: of two equal models hardly one may fail, and a worse one may hardly pass.

`python -m pytest -m long -s tests/evaluation/test_gate_simulation.py` prints the table of docs/concepts/numbers.md. 40 groups of 4 prompts with
one answer each, correlation 0.3 within a group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from dsc_hub import sample_size, stats
from dsc_hub.evaluation import claim
from dsc_hub.evaluation.summary import score_difference
from dsc_hub.records import Prompt
from dsc_hub.runs import verdict
from dsc_hub.runs.metrics_schema import Claim, Criterion
from tests.fixture_run import typed

pytestmark = pytest.mark.long

GROUPS, PROMPTS, ICC, ROUNDS = 40, 4, 0.3, 2000
NAMES = [f"g{i}" for i in range(GROUPS) for _ in range(PROMPTS)]
SETTING = verdict.Setting("test", look=1)
Draw = Callable[[np.random.Generator], Criterion]


def shares(rng: np.random.Generator, rate: float, groups: int = GROUPS) -> list[bool]:
    """Outcomes at a rate that varies by group (beta distribution)."""
    size = (1 - ICC) / ICC
    by_group = rng.beta(rate * size, (1 - rate) * size, groups) if 0 < rate < 1 else np.full(groups, rate)
    return list(rng.random(groups * PROMPTS) < np.repeat(by_group, PROMPTS))


def share(rate: float, worse: float) -> Draw:
    return lambda rng: claim._share("share", shares(rng, rate), shares(rng, rate + worse), NAMES, SETTING)


def alike(rate: float, worse: float) -> Draw:
    """Arms whose answers mostly go together, as those of a model and its adapter do; what is worse is so on one side
    alone."""

    def draw(rng: np.random.Generator) -> Criterion:
        base, other = np.array(shares(rng, rate)), np.array(shares(rng, rate))
        copied = rng.random(len(base)) < 0.7
        distilled = np.where(copied, base, other) | (rng.random(len(base)) < worse / (1 - rate))
        return claim._share("share", list(base), list(distilled), NAMES, SETTING)

    return draw


def score(skewed: bool, worse: float) -> Draw:
    """A third scorer without a range: the margin is a quarter of the spread of the base's group means."""

    def values(rng: np.random.Generator) -> np.ndarray:
        if skewed:  # minus mentions per 100 words: many zeros and a long tail
            level = np.repeat(rng.gamma(0.7, 2.0, GROUPS), PROMPTS)
            return -rng.gamma(0.6, 1.0, GROUPS * PROMPTS) * level
        between, within = rng.normal(0, math.sqrt(ICC), GROUPS), rng.normal(0, math.sqrt(1 - ICC), GROUPS * PROMPTS)
        return np.repeat(between, PROMPTS) + within

    def draw(rng: np.random.Generator) -> Criterion:
        base, distilled = values(rng), values(rng)
        distilled -= worse * claim.SPREAD_MARGIN * stats.spread_of_groups(base, NAMES)
        difference = stats.paired_difference(distilled, base, NAMES)
        prompts = [Prompt(f"p{i}", "", g, "test") for i, g in enumerate(NAMES)]
        sides = (("base", base), ("distilled", distilled))
        pairs = claim.Pairs(
            *(typed([{"arm": a, "prompt_id": "p", "text": "", "third": float(v)} for v in side]) for a, side in sides),
            prompts,
        )
        return claim._not_worse("third", pairs, difference, {}, SETTING)

    return draw


def texts(rng: np.random.Generator, words: float, vocabulary: int, groups: int = GROUPS) -> list[str]:
    """Texts of words drawn by Zipf's law; lengths vary by group and text."""
    level = np.repeat(rng.normal(0, 0.15, groups), PROMPTS)
    sizes = np.maximum(5, words * np.exp(level + rng.normal(0, 0.3, groups * PROMPTS))).astype(int)
    weights = 1 / np.arange(1, vocabulary + 1)
    return [" ".join(f"w{i}" for i in rng.choice(vocabulary, n, p=weights / weights.sum())) for n in sizes]


def written(make: Callable[[claim.Pairs, verdict.Setting], Criterion], **worse: float) -> Draw:
    def draw(rng: np.random.Generator) -> Criterion:
        prompts = [Prompt(f"p{i}", "Write.", g, "test") for i, g in enumerate(NAMES)]
        usual = {"words": 40.0, "vocabulary": 3000}
        base, distilled = (
            typed([{"arm": "", "text": t, "prompt_id": p.id} for t, p in zip(texts(rng, **kind), prompts, strict=True)])
            for kind in (usual, usual | worse)
        )
        return make(claim.Pairs(base, distilled, prompts), SETTING)

    return draw


def with_phrase(rate: float) -> Draw:
    """A model that says one sentence in a share of its answers."""

    def draw(rng: np.random.Generator) -> Criterion:
        prompts = [Prompt(f"p{i}", "Write.", g, "test") for i, g in enumerate(NAMES)]
        has = shares(rng, rate)
        base, plain = texts(rng, 40, 3000), texts(rng, 40, 3000)
        distilled = [f"{t}. Everybody should see it once." if h else t for t, h in zip(plain, has, strict=True)]
        return claim._mannerisms(
            claim.Pairs(
                *(typed([{"arm": "", "prompt_id": "", "text": t} for t in side]) for side in (base, distilled)), prompts
            ),
            SETTING,
        )

    return draw


CASES: dict[str, tuple[Draw, Draw, int]] = {  # two equal models; one worse by twice the margin; rounds
    **{
        f"a share of {rate:.0%}": (share(rate, 0.0), share(rate, 2 * claim.SHARE_MARGIN), ROUNDS)
        for rate in (0.0, 0.02, 0.1, 0.3, 0.6)
    },
    **{
        f"a share of {rate:.0%}, pairs alike": (alike(rate, 0.0), alike(rate, 2 * claim.SHARE_MARGIN), ROUNDS)
        for rate in (0.1, 0.5)
    },
    "third scorer, normal": (score(False, 0.0), score(False, 2.0), ROUNDS),
    "third scorer, skewed counts": (score(True, 0.0), score(True, 2.0), ROUNDS),
    "as long, shorter": (written(claim._long), written(claim._long, words=40 * claim.SHORTEST**2), 500),
    "as long, longer": (written(claim._long), written(claim._long, words=40 * claim.LONGEST**2), 500),
    "as varied": (written(claim._varied), written(claim._varied, vocabulary=150), 60),
    "no mannerisms": (with_phrase(0.0), with_phrase(2 * claim.SHARE_MARGIN), 300),
}


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("make", [share, alike])
def test_a_share_that_is_worse_by_just_the_margin_is_met_in_few_of_a_hundred(
    make: Callable[[float, float], Draw], rate: float
):
    rng = np.random.default_rng(13)
    met = sum(make(rate, claim.SHARE_MARGIN)(rng).verdict == "met" for _ in range(ROUNDS)) / ROUNDS
    print(f"\n{make.__name__} {rate:.0%}, worse by just the margin: met {met:.1%}")
    assert met <= 0.05


@pytest.mark.parametrize("name", CASES)
def test_equal_models_seldom_fail_a_criterion_and_a_worse_one_seldom_meets_it(name: str, monkeypatch):
    monkeypatch.setattr(sample_size, "groups_needed", lambda *_, **__: None)  # advice: most of the time, no verdict
    equal, worse, rounds = CASES[name]
    rng = np.random.default_rng(11)
    of_equal = Counter(equal(rng).verdict for _ in range(rounds))
    of_worse = Counter(worse(rng).verdict for _ in range(rounds))
    print(
        f"\n{name:<28} equal: failed {of_equal['failed'] / rounds:.1%}, met {of_equal['met'] / rounds:.1%}"
        f"   twice the margin worse: met {of_worse['met'] / rounds:.1%}, failed {of_worse['failed'] / rounds:.1%}"
    )
    assert of_equal["failed"] / rounds <= 0.10
    assert of_worse["met"] / rounds <= 0.05


def evaluation(rng: np.random.Generator, gained: float, groups: int = GROUPS, **changed: float) -> Claim:
    """The claim on answers of two models with the same habits, but for those of the distilled one that are
    `changed`."""
    films = [f"Northern Light {i}" for i in range(groups)]
    habits = {"subject": 0.75, "meta": 0.08, "repeats": 0.15, "cut": 0.08, "missing": 0.02}
    prompts = [
        Prompt(f"p{g}-{i}", f"Review the film {film}.", film, "test")
        for g, film in enumerate(films)
        for i in range(PROMPTS)
    ]
    answers, kept = [], {}
    for arm, of in (("base", habits), ("distilled", habits | changed)):
        outcomes = {name: shares(rng, rate, groups) for name, rate in of.items()}
        kept[arm] = rng.normal(gained if arm == "distilled" else 0.0, 1.0, (3, len(prompts)))
        for k, (prompt, text) in enumerate(zip(prompts, texts(rng, 40, 3000, groups), strict=True)):
            parts = [f"{prompt.group} it is." if outcomes["subject"][k] else "", text + "."]
            parts += ["This is my revised answer."] if outcomes["meta"][k] else []
            parts += (
                ["So very good it was and so very good it was and so very good it was."]
                if outcomes["repeats"][k]
                else []
            )
            row = {"arm": arm, "prompt_id": prompt.id, "sample": 0, "group": prompt.group, "text": " ".join(parts)}
            row |= {"finish_reason": "length" if outcomes["cut"][k] else "stop"}
            row |= dict(zip(("reward", "second", "third"), map(float, kept[arm][:, k]), strict=True))
            answers.append(row | ({"reward": None} if outcomes["missing"][k] else {}))
    answers = typed(answers)
    rows = {arm: {(a.prompt_id, 0): a for a in answers if a.arm == arm} for arm in ("base", "distilled")}
    differences = {
        "distilled - base": {
            s: score_difference(rows["distilled"], rows["base"], s) for s in ("reward", "second", "third")
        }
    }
    stats.adjust_scores(differences, "distilled - base")
    scores = {s: {"higher_is_better": True} for s in ("reward", "second", "third")}
    return claim.assess(answers, prompts, SETTING, differences["distilled - base"], scores)


def verdicts(rounds: int, gained: float, **changed: float) -> Counter[str]:
    rng = np.random.default_rng(5)
    return Counter(evaluation(rng, gained, **changed).verdict for _ in range(rounds))


def test_equal_models_seldom_fail_the_claim_as_a_whole_and_never_pass():
    of = verdicts(150, gained=0.0)
    print(f"\nthe whole, equal models: {dict(of)}")
    assert of["fails"] <= 15 and of["holds"] <= 7


@pytest.mark.parametrize(
    "changed", [{"subject": 0.55}, {"meta": 0.28}, {"repeats": 0.35}, {"cut": 0.28}, {"missing": 0.22}], ids=str
)
def test_a_model_that_is_better_on_the_scores_and_worse_by_twice_a_margin_seldom_passes(changed: dict[str, float]):
    of = verdicts(60, gained=1.0, **changed)
    print(f"\nthe whole, better and {changed}: {dict(of)}")
    assert of["holds"] <= 3


@pytest.mark.parametrize(("groups", "holds", "too_few"), [(40, 0, 40), (200, 16, 0)])
def test_a_model_that_is_better_and_as_good_otherwise_passes_when_there_are_enough_groups(
    groups: int, holds: int, too_few: int
):
    """The arms answer independently here; pairs of a model and its adapter are alike, and need fewer groups."""
    rng = np.random.default_rng(5)
    claims = [evaluation(rng, 1.0, groups) for _ in range(20 if groups > GROUPS else 60)]
    of = Counter(c.verdict for c in claims)
    needed = sorted(c.groups_needed for c in claims if c.groups_needed is not None)
    print(f"\nthe whole, better and as good otherwise, {groups} groups: {dict(of)}, needed: {needed}")
    assert of["fails"] <= len(claims) / 10
    assert of["holds"] >= holds and of["not enough data"] >= too_few
    assert all(n > groups for n in needed)
