"""The chain and its acceptance rules, worked out by hand and against the theory."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from typing import Any

import pytest
from scipy import stats as sps

from dsc_hub.acceptance import make_rule
from dsc_hub.chain.chain import NOT_BETTER, NOT_COMPARABLE, UNSCORED, Texts, dice_of, run_chain, seed_of
from dsc_hub.chain.hygiene import Finding, inspect
from dsc_hub.config.sampling import HygieneConfig
from dsc_hub.records import Chain, Prompt, Score, Turn, from_row

PROMPT = Prompt("p1", "Review the film {answer}.", "film", "train")
TEXTS = Texts("Criticise: {answer}", "Revise: {prompt} / {answer}")


class Script:
    """Gives its answers in order and remembers what it was asked."""

    def __init__(self, *answers: str | tuple[str, str]) -> None:
        self.answers, self.asked = deque(answers), []

    async def __call__(self, messages, prompt, chain, step, role) -> Turn:
        self.asked.append((step, role, messages))
        answer = self.answers.popleft()
        text, why = answer if isinstance(answer, tuple) else (answer, "stop")
        return Turn(prompt.id, chain, step, role, text, why, 1, 1, seed_of(0, prompt.id, chain, step, role))


def go(
    script: Script,
    rewards: dict[str, float | None],
    steps: int = 1,
    rule: str = "improve",
    u: float = 0.5,
    temperature: float = 1.0,
    meta_talk: str = "reject",
    texts: Texts = TEXTS,
    **more: Any,
) -> Chain:
    rules = HygieneConfig(meta_talk=meta_talk)

    async def score(text: str, prompt: Prompt) -> Score:
        value = rewards[text]
        return Score(value, "" if value is not None else "can't tell")

    return asyncio.run(
        run_chain(
            PROMPT,
            0,
            texts=texts,
            steps=steps,
            generate=script,
            score=score,
            rule=make_rule(rule, temperature),
            dice=lambda *_: u,
            inspect=lambda turn, prompt, critique: inspect(turn.text, turn.finish_reason, prompt, critique, rules),
            **more,
        )
    )


def test_a_better_revision_is_kept_and_the_next_step_starts_from_it():
    script = Script("bad", "c1", "good", "c2", "best")
    chain = go(script, {"bad": -1, "good": 0.5, "best": 0.9}, steps=2)
    assert chain.final == "best" and chain.state_step == 2 and chain.final_score.value == 0.9
    step, role, messages = script.asked[3]
    assert (step, role) == (2, "critique")
    assert [m["content"] for m in messages] == [PROMPT.text, "good", "Criticise: good"]


def test_a_worse_revision_is_not_kept_and_the_chain_stays():
    chain = go(Script("good", "c", "worse", "c", "worst"), {"good": 0.5, "worse": 0.1, "worst": 0.0}, steps=2)
    assert chain.final == "good" and chain.state_step == 0
    assert [s.rejected for s in chain.steps] == [NOT_BETTER, NOT_BETTER]


def test_the_revision_request_follows_the_critique_in_one_conversation():
    script = Script("a", "my critique", "b")
    go(script, {"a": 0, "b": 1})
    assert [(m["role"], m["content"]) for m in script.asked[2][2]] == [
        ("user", PROMPT.text),
        ("assistant", "a"),
        ("user", "Criticise: a"),
        ("assistant", "my critique"),
        ("user", f"Revise: {PROMPT.text} / a"),
    ]


def test_braces_in_prompts_and_answers_are_not_placeholders():
    braces = Prompt("p", "{answer}", "{prompt}", "train")
    assert Texts.fill("{prompt} then {answer} on {group}", braces, "{group}") == "{answer} then {group} on {prompt}"


def test_equal_reward_is_no_improvement_but_metropolis_takes_it():
    assert go(Script("a", "c", "b"), {"a": 0.5, "b": 0.5}).state_step == 0
    assert go(Script("a", "c", "b"), {"a": 0.5, "b": 0.5}, rule="metropolis").state_step == 1


def test_always_keeps_even_a_worse_revision_but_never_a_dirty_or_unscored_one():
    assert go(Script("a", "c", "b"), {"a": 0.5, "b": 0.1}, rule="always").state_step == 1
    cut = go(Script("a", "c", ("b", "length")), {"a": 0.5, "b": 0.9}, rule="always")
    assert (
        cut.state_step == 0 and cut.steps[0].rejected == "cut at the length limit" and cut.steps[0].score.value == 0.9
    )
    unscored = go(Script("a", "c", "b"), {"a": 0.5, "b": None}, rule="always")
    assert unscored.state_step == 0 and unscored.steps[0].rejected == UNSCORED


def test_a_dirty_first_answer_counts_as_minus_infinity():
    chain = go(
        Script(("fine but cut", "length"), "c", "clean"),
        {"fine but cut": 0.99, "clean": -0.9},
        rule="metropolis",
        u=0.999,
        temperature=1e-3,
    )
    assert chain.answer_defect and chain.final == "clean" and chain.final_defect == ""


@pytest.mark.parametrize("rule", ["improve", "metropolis"])
def test_beside_an_unscored_answer_no_revision_counts_as_better(rule: str):
    chain = go(Script("x", "c", "y", "c", "z"), {"x": None, "y": 0.9, "z": 0.99}, steps=2, rule=rule, u=0.0)
    assert chain.final == "x" and [s.rejected for s in chain.steps] == [NOT_COMPARABLE] * 2
    assert chain.final_defect == UNSCORED and [chain.reward_after(i) for i in range(3)] == [None] * 3


def test_an_answer_that_is_dirty_and_unscored_is_left_for_a_clean_one_and_always_compares_nothing():
    assert go(Script(("x", "length"), "c", "y"), {"x": None, "y": -1}).final == "y"
    assert go(Script("x", "c", "y"), {"x": None, "y": -1}, rule="always").final == "y"


def test_a_chain_without_a_clean_state_says_so():
    assert go(Script(("x", "length"), "c", ("y", "length")), {"x": 1, "y": 1}).final_defect == "cut at the length limit"
    assert go(Script("x", "c", "y"), {"x": None, "y": None}).final_defect == UNSCORED


def test_a_chain_survives_its_row_unchanged():
    chain = go(Script("a", "c", "b", "c", "d"), {"a": 0, "b": None, "d": 1}, steps=2)
    assert from_row(Chain, chain.as_row()) == chain


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_the_chain_samples_p_times_exp_reward_over_t_where_proposals_come_from_p(temperature: float):
    """Five states, proposals drawn from p whatever the state: there the rule is exact (up to the p ratio, which an
    independence sampler's acceptance p'/p * q/q' cancels). Frequencies against p exp(r/T), chi-square."""
    p = dict(zip("abcde", (0.35, 0.30, 0.20, 0.10, 0.05), strict=True))
    reward = dict(zip("abcde", (-0.6, 0.0, 0.4, 0.1, 0.9), strict=True))
    dice = random.Random(7)

    class FromP:
        async def __call__(self, messages, prompt, chain, step, role) -> Turn:
            text = "critique" if role == "critique" else dice.choices(list(p), list(p.values()))[0]
            return Turn(prompt.id, chain, step, role, text, "stop", 1, 1, 0)

    async def score(text: str, prompt: Prompt) -> Score:
        return Score(reward[text])

    async def chains() -> Counter[str]:
        counts: Counter[str] = Counter()
        for n in range(4000):  # the last states of independent chains are independent, as chi-square wants them
            chain = await run_chain(
                PROMPT,
                n,
                texts=TEXTS,
                steps=25,
                generate=FromP(),
                score=score,
                rule=make_rule("metropolis", temperature),
                dice=lambda *_: dice.random(),
                inspect=lambda turn, prompt, critique: Finding(turn.text, ""),
            )
            counts[chain.final] += 1
        return counts

    counts = asyncio.run(chains())
    weights = {s: p[s] * math.exp(reward[s] / temperature) for s in p}
    expected = [4000 * w / sum(weights.values()) for w in weights.values()]
    assert sps.chisquare([counts[s] for s in p], expected).pvalue > 0.001
    # and the test can tell: p alone is not what comes out
    if temperature <= 1:
        assert sps.chisquare([counts[s] for s in p], [4000 * v for v in p.values()]).pvalue < 1e-6


def test_seeds_depend_on_what_is_asked_alone_and_fit_every_server():
    a = seed_of(1, "p", 2, 3, "answer")
    assert a == seed_of(1, "p", 2, 3, "answer") and 0 <= a < 2**31
    others = {
        seed_of(*key)
        for key in [
            (2, "p", 2, 3, "answer"),
            (1, "q", 2, 3, "answer"),
            (1, "p", 3, 3, "answer"),
            (1, "p", 2, 4, "answer"),
            (1, "p", 2, 3, "critique"),
        ]
    }
    assert a not in others and len(others) == 5


def test_dice_are_uniform_and_repeatable():
    draws = [dice_of(0)(f"p{i}", 0, 1) for i in range(5000)]
    assert draws[:3] == [dice_of(0)(f"p{i}", 0, 1) for i in range(3)]
    assert all(0 <= d < 1 for d in draws) and sps.kstest(draws, "uniform").pvalue > 0.001


def test_a_stripped_revision_is_scored_and_kept_without_its_opening_and_the_whole_stands_beside_it():
    raw = "Here's a warmer version of the review:\n\nThe film is a quiet joy."
    rewards = {"It was dull.": -1, "The film is a quiet joy.": 0.7}  # the raw text has no score: asking for it fails
    chain = go(Script("It was dull.", "c", raw), rewards, meta_talk="strip")
    assert chain.final == "The film is a quiet joy." and chain.steps[0].raw == raw and chain.answer_raw == ""
    assert from_row(Chain, chain.as_row()) == chain
    kept = go(Script("It was dull.", "c", raw), {"It was dull.": -1, raw: 0.9})
    assert kept.final == "It was dull." and kept.steps[0].rejected == "talks about the conversation"


def test_the_group_is_put_into_the_requests():
    texts = Texts("What is good about {group}?", "Praise {group}, not {answer}.")
    assert texts.fill(texts.revision, PROMPT, "{group}") == "Praise film, not {group}."


def test_a_veto_blocks_what_the_rule_would_take_and_is_asked_about_clean_scored_texts_only():
    asked = []

    async def veto(revision: str, first: str) -> str:
        asked.append((revision, first))
        return "lost" if revision == "no" else ""

    script = Script("first", "c1", "no", "c2", ("cut", "length"), "c3", "unknown", "c4", "yes")
    rewards = {"first": 0, "no": 9, "cut": 9, "unknown": None, "yes": 1}
    chain = go(script, rewards, steps=4, veto=veto)
    assert [s.rejected for s in chain.steps][0] == "lost" and chain.steps[2].rejected == UNSCORED
    assert chain.final == "yes" and asked == [("no", "first"), ("yes", "first")]


def test_principles_are_drawn_for_each_step_and_stand_in_both_texts():
    texts = Texts("Against {principle}?", "Mind {principle}, {answer}", principles=("truth", "kindness", "{answer}"))
    dice = dice_of(7, "principle")
    drawn = [texts.principle(dice("p", n, i)) for n in range(300) for i in (1, 2)]
    assert all(150 < drawn.count(p) < 250 for p in texts.principles)
    assert drawn == [texts.principle(dice("p", n, i)) for n in range(300) for i in (1, 2)]
    script = Script("first", "c1", "second")
    chain = go(script, {"first": 0, "second": 1}, texts=texts, principle_dice=lambda *_: 0.99)
    assert script.asked[1][2][-1]["content"] == "Against {answer}?"
    assert script.asked[2][2][-1]["content"] == "Mind {answer}, first" and chain.final == "second"
    assert Texts("a", "b").principle(0.5) == ""
