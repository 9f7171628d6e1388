"""The gate: may one say that the distilled model is better than its base? Recorded answers in, a list of criteria out.

A small model games every reward, so a gain on the reward alone says little. The claim holds if distilled beats base, with
an interval that leaves out zero, on the reward and on a second scorer that chose nothing, *and* none of what usually goes
with gaming has got worse: losing the subject, saying the same of everything, growing or shrinking, talking about the
conversation, repeating itself, not coming to an end, no answer. What it can't tell is fluent text from word salad: read the
answers, or have them judged (`dsc blind`). Pure; shares are 0..1.

The counts of "no more ..." allow for nothing: the claim carries the burden of proof, and of two equal models one fails such a
criterion about half of the time it is not at zero. A longer test set makes a real difference show.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from dsc_hub import hygiene
from dsc_hub.records import Prompt
from dsc_hub.side_effects import variety

SUBJECT_LOSS = 0.02  # by so much the share of answers that name their subject may fall
LEAST_VARIETY = 0.8  # distinct-2 against the base's
SHORTEST, LONGEST = 0.7, 1.3  # median length against the base's
COMMON_8GRAM = 0.05  # share of answers above which an 8-gram, or a whole sentence, is a mannerism
BETTER = {"reward": "better on the reward", "second": "better on the second scorer"}  # score -> its criterion
SHORTEST_SENTENCE = 3  # words that a sentence must have to be one
LEAST_CONFIDENCE = 0.95

Row = Mapping[str, Any]  # an evaluated answer: prompt_id, sample, text, finish_reason ...


@dataclass(frozen=True, slots=True)
class Criterion:
    """One condition. `holds` is None where it can't be measured (`told` says why), which is not a pass.

    `base` and `distilled` are the two numbers that were compared (a count, a share, a ratio), where there are two; of a score
    `distilled` is the mean difference.
    """

    name: str
    holds: bool | None
    told: str
    base: float | None = None
    distilled: float | None = None


def judge(
    answers: Sequence[Row],
    prompts: Sequence[Prompt],
    split: str,
    confidence: float,
    differences: Mapping[str, Any],
    higher_is_better: Mapping[str, bool],
    samples: int = 1,
    trained_here: bool = True,
) -> dict[str, Any]:
    """The claim of an evaluation: {"holds": bool, "answers": n, "criteria": [{name, holds, told, base, distilled}]}; n counts every
    sample.

    `answers` are rows of all arms on `prompts` of `split`, `differences` the paired differences distilled - base by score
    name, with intervals at `confidence`. None of the criteria may fail, and those on the scores must have been measured; a
    criterion on the text that can't be measured (no subject is known) is told and left out.
    """
    by_id = {p.id: p for p in prompts}
    arms = {
        arm: {(a["prompt_id"], a["sample"]): a for a in answers if a["arm"] == arm} for arm in ("base", "distilled")
    }
    both = [i for i in sorted(arms["base"]) if i in arms["distilled"] and i[0] in by_id]
    base, distilled = ([arms[arm][i] for i in both] for arm in ("base", "distilled"))
    asked = [by_id[i] for i, _ in both]
    criteria = [_better(name, differences.get(name), confidence, higher_is_better.get(name, True)) for name in BETTER]
    criteria += [_held_out(split, trained_here), _answered(arms, [(p.id, k) for p in prompts for k in range(samples)])]
    if "third" in differences:
        criteria.append(_not_worse(differences["third"], higher_is_better.get("third", True)))
    if both:
        criteria += [
            _names_subject(base, distilled, asked),
            _variety(base, distilled),
            _length(base, distilled),
            _mannerisms(base, distilled, asked),
            *_no_worse(base, distilled, asked),
        ]
    told = [asdict(c) for c in criteria]
    return {"holds": holds(told, len(both)), "answers": len(both), "criteria": told}


def holds(criteria: Sequence[Mapping[str, Any]], answers: int) -> bool:
    """Do the criteria of a claim add up to it? None may fail, those on the scores must be there and measured, and some
    answers must have been compared."""
    found = {c["name"]: c["holds"] for c in criteria}
    return answers > 0 and all(found.get(name) for name in BETTER.values()) and False not in found.values()


def _held_out(split: str, trained_here: bool) -> Criterion:
    if not trained_here:
        told = f"the {split} split, but the adapter is somebody else's: what it was trained on is not known here"
        return Criterion("on test prompts", False, told)
    return Criterion(
        "on test prompts",
        split == "test",
        f"the {split} split" + ("" if split == "test" else ", which choices may have been made on"),
    )


def _better(name: str, difference: Row | None, confidence: float, higher: bool) -> Criterion:
    label = BETTER[name]
    if difference is None:
        return Criterion(label, None, "there is no second scorer" if name == "second" else "not measured")
    low, high, mean = (difference[k] for k in ("low", "high", "mean"))
    if confidence < LEAST_CONFIDENCE:
        return Criterion(label, None, f"the interval is at {confidence:.0%}, the claim needs {LEAST_CONFIDENCE:.0%}")
    if mean is None or low is None or high is None or low == high != 0:
        return Criterion(label, None, "no interval: too few groups, or all alike")
    told = f"distilled - base {mean:+.3f}, {confidence:.0%} interval {low:+.3f} to {high:+.3f}; it must leave out zero"
    return Criterion(label, low > 0 if higher else high < 0, told, None, mean)


def _not_worse(difference: Row, higher: bool) -> Criterion:
    name, (low, high) = "not worse on the third scorer", (difference["low"], difference["high"])
    if low is None or high is None:
        return Criterion(name, None, "no interval")
    told = f"distilled - base {difference['mean']:+.3f}, interval {low:+.3f} to {high:+.3f}"
    return Criterion(name, high >= 0 if higher else low <= 0, told, None, difference["mean"])


def _answered(arms: Mapping[str, Mapping[Any, Row]], wanted: Sequence[tuple[str, int]]) -> Criterion:
    """Failed, empty and unscored answers drop out of all means: more of them would flatter."""

    def good(row: Row | None) -> bool:
        return row is not None and bool(hygiene.words(row["text"])) and row.get("reward", 0.0) is not None

    before, after = (sum(not good(arms[arm].get(i)) for i in wanted) for arm in ("base", "distilled"))
    told = f"{after} of {len(wanted)} answers missing (failed, empty or unscored) against the base's {before}; not more"
    return Criterion("as many answers", after <= before, told, before, after)


def _names_subject(base: Sequence[Row], distilled: Sequence[Row], asked: Sequence[Prompt]) -> Criterion:
    known = [k for k, p in enumerate(asked) if hygiene.subject_of(p)]
    name = "names its subject"
    if not known:
        return Criterion(name, None, "no prompt names its group, so the subject is not known")

    def share(rows: Sequence[Row]) -> float:
        return sum(hygiene.names(rows[k]["text"], hygiene.subject_of(asked[k])) for k in known) / len(known)

    before, after = share(base), share(distilled)
    told = f"{after:.1%} of answers against the base's {before:.1%}; at most {100 * SUBJECT_LOSS:.0f} points less"
    return Criterion(name, after >= before - SUBJECT_LOSS, told, before, after)


def _variety(base: Sequence[Row], distilled: Sequence[Row]) -> Criterion:
    found, compared = variety({"base": base, "distilled": distilled}, 2)
    before, after = found["base"], found["distilled"]
    if before is None or after is None:
        return Criterion("as varied", None, "an arm has no two words")
    told = f"distinct-2 {after:.3f} against {before:.3f} (first {compared} word pairs of each); at least {LEAST_VARIETY:g} of it"
    return Criterion("as varied", after >= LEAST_VARIETY * before, told, before, after)


def _length(base: Sequence[Row], distilled: Sequence[Row]) -> Criterion:
    before, after = (median(len(hygiene.words(a["text"])) for a in rows) for rows in (base, distilled))
    if not before:
        return Criterion("as long", None, "the base's median answer has no words")
    told = f"median {after:g} words against {before:g}, {after / before:.2f} of it; {SHORTEST:g} to {LONGEST:g} of it"
    return Criterion("as long", SHORTEST <= after / before <= LONGEST, told, before, after)


def _mannerisms(base: Sequence[Row], distilled: Sequence[Row], asked: Sequence[Prompt]) -> Criterion:
    """8-grams and whole sentences that come in too many answers, of more than one group; the subject's name is one mark, so
    that "X is a wonderful film that everybody should see" is one of them."""

    def common(rows: Sequence[Row]) -> dict[str, float]:
        seen: Counter[str] = Counter()
        groups: dict[str, set[str]] = defaultdict(set)
        for row, prompt in zip(rows, asked, strict=True):
            subject = hygiene.subject_of(prompt)
            found = {" ".join(g) for g in hygiene.ngrams(hygiene.without(row["text"], subject), 8)}
            sentences = (hygiene.without(s, subject) for s in re.split(r"[.!?\n]+(?=\s|$)", row["text"]))
            found |= {" ".join(s) for s in sentences if len(s) >= SHORTEST_SENTENCE}
            seen.update(found)
            for phrase in found:
                groups[phrase].add(prompt.group)
        return {p: n / len(rows) for p, n in seen.items() if len(groups[p]) > 1 and n / len(rows) > COMMON_8GRAM}

    theirs = common(base)
    new = {phrase: share for phrase, share in common(distilled).items() if phrase not in theirs}
    if not new:
        told = f"no 8-gram or sentence in more than {COMMON_8GRAM:.0%} of answers that the base has not as often"
        return Criterion("no mannerisms", True, told)
    worst = max(sorted(new), key=lambda phrase: new[phrase])
    return Criterion("no mannerisms", False, f'"{worst}" stands in {new[worst]:.1%} of answers (* is the subject)')


def _no_worse(base: Sequence[Row], distilled: Sequence[Row], asked: Sequence[Prompt]) -> list[Criterion]:
    def meta(row: Row, prompt: Prompt) -> bool:
        return hygiene.talks_about_the_conversation(row["text"])

    def repeats(row: Row, prompt: Prompt) -> bool:
        return hygiene.repeats_itself(row["text"], hygiene.subject_of(prompt))

    def foreign(row: Row, prompt: Prompt) -> bool:
        return hygiene.in_another_language(row["text"], prompt.text)

    def unfinished(row: Row, prompt: Prompt) -> bool:
        return row["finish_reason"] != "stop"

    def criterion(name: str, is_so: Callable[[Row, Prompt], bool]) -> Criterion:
        before, after = (sum(map(is_so, rows, asked)) for rows in (base, distilled))
        told = f"{after} of {len(asked)} answers against the base's {before}; not more"
        return Criterion(name, after <= before, told, before, after)

    return [
        criterion("no more talk about the conversation", meta),
        criterion("no more repetition", repeats),
        criterion("no more in another language", foreign),
        criterion("no more unfinished answers", unfinished),
    ]
