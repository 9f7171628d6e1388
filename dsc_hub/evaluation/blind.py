"""Blind comparison by human judges: base and distilled answer the same held-out prompts and are shown as A and B.

`answer_pairs`, `pick`, `order_of` and `tally` are pure; cli/blind.py runs the dialogue on the terminal. A verdict is a
row of evaluation/blind.jsonl, appended when it is given. It holds the hashes of both answers: a verdict on texts that
have changed since does not count. The identity of the judges is not verified: only the number of names is reported.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dsc_hub import stats
from dsc_hub.chain.chain import seed_of
from dsc_hub.errors import RunError
from dsc_hub.records import Answer
from dsc_hub.runs.metrics_schema import Blind, Estimate
from dsc_hub.runs.results import answers
from dsc_hub.runs.run import Run

ArmName = Literal["base", "distilled"]
Choice = Literal["A", "B", "t"]
Winner = Literal["base", "distilled", "tie"]

ARMS: tuple[ArmName, ArmName] = ("base", "distilled")
JUDGEMENTS = "evaluation/blind.jsonl"
TIE: Literal["tie"] = "tie"
VALUE = {"distilled": 1.0, TIE: 0.5, "base": 0.0}  # value of a verdict


@dataclass(frozen=True)
class Pair:
    """The two answers to one prompt, by arm."""

    prompt_id: str
    group: str
    prompt: str
    texts: Mapping[str, str]

    @property
    def hashes(self) -> dict[str, str]:
        """First 16 hex digits of the SHA-256 of each arm's answer, by arm."""
        return {a: hashlib.sha256(self.texts[a].encode("utf-8", "surrogatepass")).hexdigest()[:16] for a in ARMS}


@dataclass(frozen=True)
class Judgement:
    """A row of blind.jsonl: the judge, the choice, and the data needed to verify it."""

    prompt_id: str
    judge: str
    seed: int  # seed of the order, 0 <= seed < 2**31
    shown: Sequence[str]  # the arms shown as A and B
    choice: Choice
    won: Winner
    answers: Mapping[str, str]  # hashes of the shown answers, by arm


# -- selection, order, result


def answer_pairs(answers: Iterable[Answer]) -> list[Pair]:
    """Return one pair per prompt that both arms answered, sorted by prompt id.

    Of several answers to a prompt the first one is used.
    """
    by_prompt: dict[str, dict[str, Answer]] = defaultdict(dict)
    for row in answers:
        if row.sample == 0:
            by_prompt[row.prompt_id][row.arm] = row
    return [
        Pair(i, arms["base"].group, arms["base"].prompt, {a: arms[a].text for a in ARMS})
        for i, arms in sorted(by_prompt.items())
        if all(a in arms for a in ARMS)
    ]


def pick(pairs: Sequence[Pair], seed: int, n: int) -> list[Pair]:
    """Return at most n pairs in random order, round-robin over the groups.

    The same seed gives the same order, and a larger n the same beginning, so that judging can continue later.
    """
    by_group: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda p: seed_of(seed, p.prompt_id, 0, 0, "blind prompt")):
        by_group[pair.group].append(pair)
    groups = sorted(by_group, key=lambda g: seed_of(seed, g, 0, 0, "blind group"))
    rounds = max(map(len, by_group.values()), default=0)
    return [by_group[g][i] for i in range(rounds) for g in groups if i < len(by_group[g])][:n]


def order_of(seed: int) -> tuple[ArmName, ArmName]:
    """Return the arms in the order A, B: a fair coin decided by the pair's seed."""
    return ARMS if seed % 2 else (ARMS[1], ARMS[0])


def winner(choice: Choice, shown: tuple[ArmName, ArmName]) -> Winner:
    """Return the arm that a choice between A and B means, or a tie."""
    return TIE if choice == "t" else shown["AB".index(choice)]


def counted(pairs: Sequence[Pair], verdicts: Iterable[Judgement]) -> list[Judgement]:
    """Return the last verdict of each judge on each prompt whose two answers have not changed since."""
    now = {p.prompt_id: p.hashes for p in pairs}
    last = {(v.judge, v.prompt_id): v for v in verdicts if now.get(v.prompt_id) == dict(v.answers)}
    return list(last.values())


def tally(pairs: Sequence[Pair], verdicts: Iterable[Judgement], confidence: float = 0.95) -> Blind | None:
    """Return counts, win rate and p over the judged prompts; None if no prompt was judged.

    A prompt's value is 1 (distilled), 0.5 (tie) or 0 (base), averaged over its judges; a value above 0.5 counts as a
    win of the distilled model. `win_rate` is `stats.estimate` of the values, so its interval is over groups and within
    0..1. `p` is the exact sign test over decided prompts; it treats prompts as independent.
    """
    verdicts = list(verdicts)
    valid = counted(pairs, verdicts)
    if not valid:
        return None
    values: dict[str, list[float]] = defaultdict(list)
    for v in valid:
        values[v.prompt_id].append(VALUE[v.won])
    judged = [p for p in pairs if p.prompt_id in values]
    means = [sum(values[p.prompt_id]) / len(values[p.prompt_id]) for p in judged]
    wins, losses = sum(m > 0.5 for m in means), sum(m < 0.5 for m in means)
    rate = stats.estimate(means, [p.group for p in judged], confidence, (0.0, 1.0))
    now = {p.prompt_id: p.hashes for p in pairs}
    return Blind(
        prompts=len(judged),
        groups=len({p.group for p in judged}),
        judges=len({v.judge for v in valid}),
        verdicts=len(valid),
        outdated=sum(now.get(v.prompt_id) != dict(v.answers) for v in verdicts),
        distilled=wins,
        base=losses,
        tie=len(means) - wins - losses,
        share_decided=wins / (wins + losses) if wins + losses else None,
        win_rate=Estimate(**rate),
        p=stats.sign_test(wins, losses),
        confidence=confidence,
    )


# -- the run folder


def read_pairs(run: Run) -> list[Pair]:
    """Return the pairs of a finished evaluation; RunError if there is none, or if one of the two arms is missing."""
    if run.marker("evaluation") is None or not run["evaluation/answers.jsonl"].is_file():
        raise RunError(
            f"{run.folder} has no finished evaluation, so there are no answers to compare", _how_to_begin(run)
        )
    rows = answers(run)
    arms = {a.arm for a in rows}
    if missing := [arm for arm in ARMS if arm not in arms]:
        raise RunError(
            f"the evaluation of {run.folder} has no answers of: {', '.join(missing)}; expected base and distilled",
            f"Have both in evaluation.arms of the recipe. {_how_to_begin(run)}",
        )
    return answer_pairs(rows)


def _how_to_begin(run: Run) -> str:
    return f"Run `dsc evaluate RECIPE` first (this run was started as `{run.facts.command}`)."


def read_verdicts(run: Run) -> list[Judgement]:
    return list(run.rows(JUDGEMENTS).as_type(Judgement))


def record_tally(run: Run) -> Blind | None:
    """Recompute the tally from the run folder, write it to metrics.json or remove an outdated one; return the tally.

    Called after judging, and by the evaluation: recomputed answers can make stored verdicts outdated.
    """
    verdicts = read_verdicts(run)
    result = None
    if verdicts:
        pairs = answer_pairs(run.rows("evaluation/answers.jsonl").as_type(Answer))
        result = tally(pairs, verdicts, run.facts.recipe.evaluation.confidence)
    if result is not None:
        run.add_metrics("blind", result.model_dump())
    else:
        run.drop_metrics("blind")
    return result


def counts(run: Run) -> Blind | None:
    """Return the tally (`tally`) of the stored verdicts; None if nothing was judged yet."""
    return tally(read_pairs(run), read_verdicts(run), run.facts.recipe.evaluation.confidence)


# -- the judge
