"""A blind comparison by people: base and distilled on the same held-out prompts, shown as A and B, verdicts as numbers.

`pairs_of`, `pick`, `order_of` and `tally` are pure; `compare` asks on the terminal. A verdict is a row of
evaluation/blind.jsonl, written as it is given, and holds the hashes of both answers: one on texts that have changed since
does not count. Says nothing about who judged: the number of names in the rows is what is recorded.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dsc_hub import stats
from dsc_hub.chain.chain import seed_of
from dsc_hub.errors import RunError
from dsc_hub.records import Answer
from dsc_hub.runs.results import answers
from dsc_hub.runs.run import Run

ARMS = ("base", "distilled")
FILE = "evaluation/blind.jsonl"
TIE = "tie"
VALUE = {"distilled": 1.0, TIE: 0.5, "base": 0.0}  # of a verdict


@dataclass(frozen=True)
class Pair:
    """The two answers to one prompt, by arm."""

    prompt_id: str
    group: str
    prompt: str
    texts: Mapping[str, str]

    @property
    def hashes(self) -> dict[str, str]:
        """{arm: the first 16 hex digits of the SHA-256 of its answer}"""
        return {a: hashlib.sha256(self.texts[a].encode("utf-8", "surrogatepass")).hexdigest()[:16] for a in ARMS}


@dataclass(frozen=True)
class Verdict:
    """A line of blind.jsonl: who preferred what, and all that is needed to check it."""

    prompt_id: str
    judge: str
    seed: int  # of the order, 0 <= seed < 2**31
    shown: Sequence[str]  # arms as A and B
    choice: Literal["A", "B", "t"]
    won: Literal["base", "distilled", "tie"]
    answers: Mapping[str, str]  # hashes of what was shown, by arm


# -- which, in what order, with what result


def pairs_of(answers: Iterable[Mapping[str, Any]]) -> list[Pair]:
    """Rows of evaluation/answers.jsonl -> a pair for every prompt that both arms answered, in the order of prompt ids; of
    several answers to a prompt the first."""
    by_prompt: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in answers:
        if row["sample"] == 0:
            by_prompt[row["prompt_id"]][row["arm"]] = row
    return [
        Pair(i, arms["base"]["group"], arms["base"]["prompt"], {a: arms[a]["text"] for a in ARMS})
        for i, arms in sorted(by_prompt.items())
        if all(a in arms for a in ARMS)
    ]


def pick(pairs: Sequence[Pair], seed: int, n: int) -> list[Pair]:
    """At most n pairs in random order, the groups taking turns: no group twice before every other with pairs left came once.

    The same seed gives the same order, and a larger n the same beginning, so that one can go on later.
    """
    by_group: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda p: seed_of(seed, p.prompt_id, 0, 0, "blind prompt")):
        by_group[pair.group].append(pair)
    groups = sorted(by_group, key=lambda g: seed_of(seed, g, 0, 0, "blind group"))
    rounds = max(map(len, by_group.values()), default=0)
    return [by_group[g][i] for i in range(rounds) for g in groups if i < len(by_group[g])][:n]


def order_of(seed: int) -> tuple[str, str]:
    """The arms as A and B: a fair coin that a pair's own seed decides."""
    return ARMS if seed % 2 else (ARMS[1], ARMS[0])


def counted(pairs: Sequence[Pair], verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The last verdict of every judge on every prompt whose two answers are still those that were shown."""
    now = {p.prompt_id: p.hashes for p in pairs}
    last = {(v.judge, v.prompt_id): v for v in verdicts if now.get(v.prompt_id) == dict(v.answers)}
    return list(last.values())


def tally(pairs: Sequence[Pair], verdicts: Iterable[Verdict], confidence: float = 0.95) -> dict[str, Any] | None:
    """Counts, win rate and p over the prompts that were judged; None if none was.

    A prompt's value is 1 (distilled), 0.5 (tie) or 0 (base), the mean over its judges where there are several; above
    0.5 it counts as a win of the distilled model. `win_rate` is `stats.estimate` of the values, so its interval is over
    groups and within 0..1. `p` is the exact sign test over decided prompts, and takes prompts as independent.
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
    return {
        "prompts": len(judged),
        "groups": len({p.group for p in judged}),
        "judges": len({v.judge for v in valid}),
        "verdicts": len(valid),
        "outdated": sum(now.get(v.prompt_id) != dict(v.answers) for v in verdicts),
        "distilled": wins,
        "base": losses,
        "tie": len(means) - wins - losses,
        "share_decided": wins / (wins + losses) if wins + losses else None,
        "win_rate": rate,
        "p": stats.sign_test(wins, losses),
        "confidence": confidence,
    }


# -- the run folder


def read_pairs(run: Run) -> list[Pair]:
    """The pairs of a finished evaluation. RunError if there is none, or if it lacks one of the two arms."""
    if run.marker("evaluation") is None or not run["evaluation/answers.jsonl"].is_file():
        raise RunError(f"{run.folder} has no finished evaluation, so there are no answers to compare", _first(run))
    rows = answers(run)
    there = {a["arm"] for a in rows}
    if missing := [arm for arm in ARMS if arm not in there]:
        raise RunError(
            f"the evaluation of {run.folder} has no answers of: {', '.join(missing)}; expected base and distilled",
            f"Have both in evaluation.arms of the recipe. {_first(run)}",
        )
    return pairs_of(rows)


def _first(run: Run) -> str:
    return f"Run `dsc evaluate RECIPE` first (this run was started as `{run.facts.get('command', 'dsc run RECIPE')}`)."


def read_verdicts(run: Run) -> list[Verdict]:
    return list(run.rows(FILE).as_type(Verdict))


def record_tally(run: Run) -> dict[str, Any] | None:
    """Write the tally of what is in the run folder now to metrics.json, or take an outdated one out of it; the tally.

    Called after judging, and by the evaluation: answers that are made anew may have left verdicts behind.
    """
    verdicts = read_verdicts(run)
    found = None
    if verdicts:
        pairs = pairs_of(map(asdict, run.rows("evaluation/answers.jsonl").as_type(Answer)))
        found = tally(pairs, verdicts, run.facts["recipe"]["evaluation"]["confidence"])
    if found is not None:
        run.add_metrics("blind", found)
    else:
        run.drop_metrics("blind")
    return found


def counts(run: Run) -> dict[str, Any]:
    """The tally of what was judged so far (`tally`), from the verdicts themselves. RunError if nothing was."""
    found = tally(read_pairs(run), read_verdicts(run), run.facts["recipe"]["evaluation"]["confidence"])
    if found is None:
        raise RunError(f"nothing in {run.folder} was judged yet", "`dsc blind RUN` asks.")
    return found


# -- the judge
