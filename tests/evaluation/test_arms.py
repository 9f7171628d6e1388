"""Every arm answers the same prompts with the same seeds, asks nothing twice, and costs what it cost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.chain.chain import no_veto, seed_of
from dsc_hub.config import models, recipe_files
from dsc_hub.config.arms import ADAPTER, ARMS, TEACHER, Arm
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.stages import BY_NAME
from dsc_hub.errors import ServingError
from dsc_hub.evaluation import answers, arms, reuse, summary
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.pipeline import estimate, evaluation_stage
from dsc_hub.pipeline.context import RunContext
from dsc_hub.records import Prompt, Score
from dsc_hub.runs.metrics_schema import SCHEMA, Metrics
from dsc_hub.runs.run import Run
from dsc_hub.runs.test_sets import with_current_looks
from dsc_hub.system.files import write_json
from dsc_hub.system.hashing import file_hash
from tests import fixture_run
from tests.conftest import ScriptedModel, length_score

PROMPTS = [Prompt(f"p{i}", f"Tell of film {i}.", f"film {i}", "test") for i in range(4)]
ALL = [name for name, arm in ARMS.items() if arm.model != TEACHER]  # of a recipe without a student


class Model(ScriptedModel):
    """Remembers who was asked what with which seed; the adapter says other things than the base."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str | None, str, int]] = []

    async def as_model(self, messages: list[dict[str, str]], seed: int, model: str | None) -> Any:
        self.asked.append((model, json.dumps(messages), seed))
        return await self([*messages, {"role": "system", "content": str(model)}], seed)


def recipe_with(recipe_file: Path, *overrides: str) -> Recipe:
    return recipe_files.load_recipe_file(recipe_file, [f"evaluation.arms=[{', '.join(ALL)}]", *overrides])


def score_all(texts: Any, prompts: Any = None) -> list[Score]:
    return [asyncio.run(length_score(t)) for t in texts]


def run_arms(tmp_path: Path, r: Recipe, model: Model) -> tuple[Run, dict[str, float | None]]:
    run = Run(tmp_path)
    asyncio.run(arms.answer_prompts(run, r, PROMPTS, model.as_model, length_score))
    return run, {arm: arms.seconds(run, arm) for arm in r.evaluation.arms}


def test_no_request_is_made_twice_and_base_and_adapter_get_the_same_seeds(tmp_path: Path, recipe_file: Path):
    model = Model()
    run, seconds = run_arms(tmp_path, recipe_with(recipe_file, "evaluation.samples=3"), model)
    assert len(set(model.asked)) == len(model.asked)
    opening = {
        m: {(t, s) for who, t, s in model.asked if who == m and "assistant" not in t} for m in (None, "distilled")
    }
    assert opening["distilled"] < opening[None] and len(opening["distilled"]) == 12  # best of n asks the base for more
    assert {s for _, s in opening["distilled"]} == {seed_of(0, p.id, k, 0, "answer") for p in PROMPTS for k in range(3)}
    # base first, adapter last: on a CPU they must not share a batch
    who = [m for m, _, _ in model.asked]
    assert who == sorted(who, key=lambda m: m is not None)
    again = Model()
    _, seconds_again = run_arms(tmp_path, recipe_with(recipe_file, "evaluation.samples=3"), again)
    assert again.asked == [] and set(seconds) == set(ALL)
    assert all(s is not None for s in seconds_again.values())


@pytest.mark.parametrize(
    "names", [ALL, ["base"], ["base", "distilled"], ["self_critique", "best_of_n"], ["base", "distilled_self_critique"]]
)
def test_the_plan_counts_the_requests_that_are_made(tmp_path: Path, recipe_file: Path, names: list[str]):
    r = recipe_with(recipe_file, "evaluation.samples=2", f"evaluation.arms=[{', '.join(names)}]")
    model = Model()
    run_arms(tmp_path, r, model)
    assert estimate.estimate_run(r, PROMPTS, "m", tmp_path).requests["evaluation"] == len(model.asked)


def test_the_tokens_of_an_arm_are_all_that_it_took(tmp_path: Path, recipe_file: Path):
    r = recipe_with(recipe_file)  # two steps: five turns a chain, each of 11 tokens
    run, _ = run_arms(tmp_path, r, Model())
    by_id = {p.id: p for p in PROMPTS}
    tokens = {a: {x.new_tokens for x in arms.answers_of(run, r, a, by_id, score_all)} for a in ALL}
    assert tokens == {
        "base": {11},
        "self_critique": {55},
        "best_of_n": {55},  # n = 5: the chain's tokens, in answers
        "distilled": {11},
        "distilled_self_critique": {55},
    }
    assert arms.answers_for_the_same_tokens(run, r) == 5


def test_best_of_n_is_the_best_by_reward_of_what_is_clean(tmp_path: Path, recipe_file: Path):
    r = recipe_with(recipe_file)
    run, _ = run_arms(tmp_path, r, Model())
    by_id = {p.id: p for p in PROMPTS}
    rows = [*run.rows("evaluation/turns.jsonl"), *run.rows(f"evaluation/{arms.MORE_ANSWERS}")]
    for answer in arms.answers_of(run, r, "best_of_n", by_id, score_all):
        mine = [x["text"] for x in rows if x["prompt_id"] == answer.prompt_id and x["role"] == "answer"]
        assert len(mine) == 5 and answer.text == max(mine, key=lambda t: score_all([t])[0].value)
    # none clean: the first answer stands, as a chain would stay at it
    cut = [json.dumps(x | {"finish_reason": "length"}) for x in rows if x["role"] == "answer"]
    run["evaluation/turns.jsonl"].write_text("\n".join(c for c in cut if json.loads(c)["step"] == 0) + "\n")
    run[f"evaluation/{arms.MORE_ANSWERS}"].write_text("\n".join(c for c in cut if json.loads(c)["step"]) + "\n")
    first = {x["prompt_id"]: x["text"] for x in map(json.loads, cut) if x["step"] == 0}
    assert {a.prompt_id: a.text for a in arms.answers_of(run, r, "best_of_n", by_id, score_all)} == first


def test_each_way_of_answering_can_be_had_of_each_model(
    tmp_path: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """A new entry of the table is all that a known way needs for another model."""
    monkeypatch.setitem(ARMS, "distilled_best_of_n", Arm(ADAPTER, "best", "distilled + best of n"))
    names = [*ALL, "distilled_best_of_n"]
    plain = recipe_with(recipe_file)
    r = plain.model_copy(update={"evaluation": plain.evaluation.model_copy(update={"arms": tuple(names)})})
    model = Model()
    run, seconds = run_arms(tmp_path, r, model)
    assert estimate.estimate_run(r, PROMPTS, "m", tmp_path).requests["evaluation"] == len(model.asked)
    by_id = {p.id: p for p in PROMPTS}
    files = [f"evaluation/{ADAPTER}.turns.jsonl", f"evaluation/{ADAPTER}.{arms.MORE_ANSWERS}"]
    drawn = [x for file in files for x in run.rows(file) if x["role"] == "answer"]
    best = arms.answers_of(run, r, "distilled_best_of_n", by_id, score_all)
    assert len(best) == len(PROMPTS) and seconds["distilled"] is not None
    for answer in best:
        mine = [x["text"] for x in drawn if x["prompt_id"] == answer.prompt_id]
        assert len(mine) == 5 and answer.text == max(mine, key=lambda t: score_all([t])[0].value)
    assert ("distilled_best_of_n", "distilled") in summary.arm_pairs(names)
    # what an adapter wrote does not outlive it
    written = {f"evaluation/{p.name}" for p in run["evaluation"].glob(f"{ADAPTER}.*")}
    assert files[1] in written and written <= set(BY_NAME["distill"].stale_files)


def test_what_failed_is_counted_and_is_no_answer(tmp_path: Path, recipe_file: Path):
    class Refusing(Model):
        async def as_model(self, messages: Any, seed: int, model: str | None) -> Any:
            if "film 2" in messages[0]["content"] and model:
                raise RequestFailed("too long")
            return await super().as_model(messages, seed, model)

    r = recipe_files.load_recipe_file(recipe_file, ["evaluation.arms=[base, distilled]"])
    run, _ = run_arms(tmp_path, r, Refusing())
    rows = answers.collect_answers(run, r, PROMPTS, {"reward": score_all})
    numbers = summary.summarise_evaluation(r, PROMPTS, rows, {"reward": {}})
    assert [numbers["arms"][a]["reward"]["failed"] for a in ("base", "distilled")] == [0, 1]
    assert numbers["differences"]["distilled - base"]["reward"]["n"] == 3
    assert any(c["name"] == "as many answers" and c["distilled"] > c["base"] == 0 for c in numbers["claim"]["criteria"])


def test_openings_are_stripped_off_all_arms_alike(tmp_path: Path, recipe_file: Path):
    class Talking(Model):
        async def as_model(self, messages: Any, seed: int, model: str | None) -> Any:
            c = await super().as_model(messages, seed, model)
            return dataclasses.replace(c, text=f"Here's a warmer version of the review:\n\n{c.text}")

    opening = "Here's a warmer version"
    (tmp_path / "strip").mkdir()
    (tmp_path / "whole").mkdir()
    run, _ = run_arms(tmp_path / "strip", recipe_with(recipe_file, "hygiene.meta_talk=strip"), Talking())
    r = recipe_with(recipe_file, "hygiene.meta_talk=strip")
    rows = answers.collect_answers(run, r, PROMPTS, {"reward": score_all})
    assert {row.arm for row in rows} == set(ALL) and not any(opening in row.text for row in rows)
    assert all(row.raw.startswith(opening) for row in rows)
    numbers = summary.summarise_evaluation(r, PROMPTS, rows, {"reward": {}})
    assert {arm: a["stripped"] for arm, a in numbers["arms"].items()} == dict.fromkeys(ALL, len(PROMPTS))
    # without stripping all are looked at as they are
    whole, _ = run_arms(tmp_path / "whole", recipe_with(recipe_file), Talking())
    rows = answers.collect_answers(whole, recipe_with(recipe_file), PROMPTS, {"reward": score_all})
    assert all(opening in row.text and not row.raw and row.defect for row in rows)


def test_missing_scores_bound_a_difference_where_the_arms_differ_in_them(recipe_file: Path):
    """Of "unsafe" verdicts half are lost in one arm: its mean over scored answers is too good."""
    r = recipe_files.load_recipe_file(recipe_file, ["evaluation.arms=[base, distilled]"])

    def row(arm: str, i: int, value: float | None) -> dict[str, Any]:
        p = PROMPTS[i]
        return {"arm": arm, "prompt_id": p.id, "sample": 0, "group": p.group, "prompt": p.text, "text": "word", "reward": value,
                "finish_reason": "stop", "new_tokens": 3, "prompt_tokens": 9, "defect": ""}  # fmt: skip

    base = [row("base", i, value) for i, value in enumerate((1.0, 0.0, 0.0, 1.0))]
    lost = [row("distilled", i, value) for i, value in enumerate((1.0, None, None, 1.0))]
    bounded = {"reward": {"low": 0.0, "high": 1.0}}
    d = summary.summarise_evaluation(r, PROMPTS, fixture_run.typed([*base, *lost]), bounded)["differences"][
        "distilled - base"
    ]["reward"]
    assert (d["mean"], d["n"], d["if_missing_worst"], d["if_missing_best"]) == (0.0, 2, 0.0, 0.5)
    for scores, rows in (
        ({"reward": {}}, [*base, *lost]),
        (bounded, [*base, *[x | {"arm": "distilled"} for x in base]]),
    ):
        d = summary.summarise_evaluation(r, PROMPTS, fixture_run.typed(rows), scores)["differences"][
            "distilled - base"
        ]["reward"]
        assert "if_missing_worst" not in d


def test_a_broken_off_session_leaves_the_time_unknown(tmp_path: Path, recipe_file: Path):
    class Dying(Model):
        async def as_model(self, messages: Any, seed: int, model: str | None) -> Any:
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return await super().as_model(messages, seed, model)

    r = recipe_files.load_recipe_file(recipe_file, ["evaluation.arms=[base, distilled]"])
    with pytest.raises(KeyboardInterrupt):
        run_arms(tmp_path, r, Dying())
    run, seconds = run_arms(tmp_path, r, Model())
    assert seconds["base"] is None and seconds["distilled"] is not None
    run["evaluation/distilled.seconds.jsonl"].unlink()  # as before a new adapter is evaluated
    assert arms.seconds(run, "distilled") == 0 and arms.seconds(run, "base") is None


def test_pairs_are_each_arm_with_the_first_and_what_distilling_spares():
    assert summary.arm_pairs(["base", "self_critique", "distilled"]) == [
        ("self_critique", "base"),
        ("distilled", "base"),
        ("distilled", "self_critique"),
    ]
    assert summary.arm_pairs(["self_critique", "distilled"]) == [("distilled", "self_critique")]
    assert summary.arm_pairs(["distilled", "base", "self_critique"]) == [
        ("base", "distilled"),
        ("self_critique", "distilled"),
    ]  # and not the mirror of it too


def test_gain_for_a_thousand_tokens_and_hours_by_hand(recipe_file: Path):
    r = recipe_files.load_recipe_file(recipe_file, ["evaluation.arms=[base, distilled]"])
    rows = [
        {
            "arm": arm,
            "prompt_id": p.id,
            "sample": 0,
            "group": p.group,
            "prompt": p.text,
            "text": f"{arm} {p.id} says so.",
        }
        | {"finish_reason": "stop", "new_tokens": tokens, "prompt_tokens": 9, "defect": "", "reward": reward}
        for arm, tokens, reward in (("base", 40, 0.1), ("distilled", 50, 0.4))
        for p in PROMPTS
    ]
    numbers = summary.summarise_evaluation(
        r,
        PROMPTS,
        fixture_run.typed(rows),
        {"reward": {}},
        {"base": 90.0, "distilled": None},
        None,
        {"base": 4, "distilled": 4},
    )
    base, distilled = numbers["arms"]["base"], numbers["arms"]["distilled"]
    assert distilled["gain_per_1000_tokens"] == pytest.approx(1000 * 0.3 / 50) and base["gain_per_1000_tokens"] is None
    assert base["processor_hours"] == pytest.approx(4 * 90 / 3600) and distilled["processor_hours"] is None
    assert (base["new_tokens"], distilled["prompt_tokens"]) == (160, 36)


def test_neutral_texts_are_asked_of_each_model_and_absent_where_the_server_tells_none(
    tmp_path: Path, recipe_file: Path
):
    class Telling(Model):
        def __init__(self, tells: bool) -> None:
            super().__init__()
            self.tells, self.texts = tells, 0

        async def complete(self, *request: Any) -> Any:
            return await self.as_model(*request)

        criticise = complete

        def level(self) -> int:
            return 8

        async def surprise(self, text: str, model: str | None) -> float | None:
            self.texts += 1
            if self.texts == 2:
                raise RequestFailed("answered 500")
            return (3.0 if model else 2.0) if self.tells else None

    def nats(tells: bool, folder: str) -> dict[str, dict[str, float]]:
        run, r = (
            Run(tmp_path / folder),
            recipe_files.load_recipe_file(recipe_file, ["evaluation.arms=[base, distilled]"]),
        )
        run.folder.mkdir()
        return asyncio.run(arms.answer_all(run, r, PROMPTS, Telling(tells), length_score, no_veto, (None, ADAPTER)))

    found = nats(True, "one")
    assert found["base"] == {} and len(found["distilled"]) == 20  # one request failed: unmeasured, not a mean of some
    assert set(found["distilled"].values()) == {3.0}
    assert nats(False, "two") == {"base": {}, "distilled": {}}


@pytest.mark.parametrize(
    ("adapted", "is_refused"),
    [([1.0, 2.0, 3.0, 4.0, 5.0], True), ([1.0, 2.0, 3.0, 4.0, 5.001], False), ([None] * 5, False)],
)
def test_an_adapter_that_the_server_does_not_apply_is_refused(adapted: list[float | None], is_refused: bool):
    """One difference among the texts is enough; a server without log-probabilities can't be checked."""

    class Serving:
        async def surprise(self, text: str, model: str | None) -> float | None:
            values = adapted if model == ADAPTER else [1.0, 2.0, 3.0, 4.0, 5.0]
            return values[int(text)]

    class Failing:
        async def surprise(self, text: str, model: str | None) -> float | None:
            raise RequestFailed("no")

    asyncio.run(arms.check_adapter_acts(Failing(), arms.neutral_texts()))  # not known: no reason to end an evaluation
    check = arms.check_adapter_acts(Serving(), list("01234567"))
    if not is_refused:
        return asyncio.run(check)
    with pytest.raises(ServingError, match="as the base does"):
        asyncio.run(check)


def test_answers_that_cannot_be_had_never_keep_an_evaluation_from_its_end(tmp_path: Path, recipe_file: Path):
    r = recipe_with(recipe_file, "evaluation.arms=[base]", "evaluation.samples=16", "serving.concurrency=4")
    model = Model()

    async def picky(messages: list[dict[str, str]], seed: int, name: str | None) -> Any:
        if messages[0]["content"] in {PROMPTS[0].text, PROMPTS[2].text}:
            raise RequestFailed("no answer in 600 s, 3 times")
        return await model.as_model(messages, seed, name)

    mixed = [PROMPTS[i] for i in (1, 0, 3, 2)]
    for _ in range(3):  # from the second time on only these are left
        asyncio.run(arms.answer_prompts(Run(tmp_path), r, mixed, picky, length_score))
    assert len(list(Run(tmp_path).rows("evaluation/turns.jsonl"))) == 32
    (tmp_path / "new").mkdir()
    with pytest.raises(ServingError, match="20 requests failed one after the other"):
        asyncio.run(arms.answer_prompts(Run(tmp_path / "new"), r, [PROMPTS[0], PROMPTS[2]], picky, length_score))


# -- the base's arms, taken from another run


def evaluated_run(folder: Path, r: Recipe, model: Model, base: str, others: list[Run]) -> tuple[Run, str]:
    """A run folder whose arms are asked as the stage does it, and from which run the base's came."""
    run = Run(folder)
    folder.mkdir(parents=True)
    donor = reuse.adopt_arms(run, None, base, others)
    models = (ADAPTER,) if reuse.finished_arms(run, None, base) is not None else (None, ADAPTER)
    asyncio.run(arms.answer_prompts(run, r, PROMPTS, model.as_model, length_score, models=models))
    rows = answers.collect_answers(run, r, PROMPTS, {"reward": score_all})
    reuse.finish_arms(run, r, None, base, rows, len(PROMPTS), {"base": {"text": 2.0}})
    return run, donor


def test_another_adapter_is_compared_with_the_very_same_answers_of_the_base(tmp_path: Path, recipe_file: Path):
    one, two = recipe_with(recipe_file), recipe_with(recipe_file, "distill.sft.max_steps=7")
    base = reuse.arms_digest(one, None, "s")
    assert base == reuse.arms_digest(two, None, "s")
    first, _ = evaluated_run(tmp_path / "one", one, Model(), base, [])
    model = Model()
    second, donor = evaluated_run(tmp_path / "two", two, model, base, [Run(tmp_path / "two"), first])
    assert donor == "one" and {who for who, *_ in model.asked} == {ADAPTER}
    for name in ("turns", "chains", "best_of_n.turns", "seconds"):
        assert second[f"evaluation/{name}.jsonl"].read_bytes() == first[f"evaluation/{name}.jsonl"].read_bytes()
    assert reuse.finished_arms(second, None, base) == {"base": {"text": 2.0}}
    assert all(arms.seconds(second, name) is not None for name in ALL)


@pytest.mark.parametrize(
    "override",
    ["evaluation.samples=2", "evaluation.temperature=0.3", "evaluation.split=validation", "distill.method=lora",
     "distill.quantization={bnb_4bit_quant_type: fp4}", "evaluation.arms=[base, distilled]"],
)  # fmt: skip
def test_what_the_base_s_answers_depend_on_makes_them_others(tmp_path: Path, recipe_file: Path, override: str):
    changed = recipe_files.load_recipe_file(recipe_file, [f"evaluation.arms=[{', '.join(ALL)}]", override])
    assert reuse.arms_digest(changed, None, "s") != reuse.arms_digest(recipe_with(recipe_file), None, "s")
    assert reuse.arms_digest(recipe_with(recipe_file), None, "other sampling") != reuse.arms_digest(
        recipe_with(recipe_file), None, "s"
    )


@pytest.mark.parametrize("override", ["rounds=2", "chain.seed=5", "rounds=3"])
def test_rounds_and_the_chains_seed_do_not_change_the_base_s_answers(tmp_path: Path, recipe_file: Path, override: str):
    def sampling(*overrides: str) -> str:
        recipe = recipe_with(recipe_file, *overrides)
        identity = dict.fromkeys(("prompts", "model", "reward", "second_scorer", "third_scorer", "chain.veto"), "x")
        context = RunContext(recipe, recipe_file, Run(tmp_path), tmp_path, None, identity, {}, "dsc run")
        return evaluation_stage.sampling_of_base(context)

    assert sampling() == sampling(override) != sampling("seed=5")


def test_arms_that_are_not_whole_are_not_taken_and_nothing_of_one_s_own_is_replaced(tmp_path: Path, recipe_file: Path):
    class Refusing(Model):
        async def as_model(self, messages: Any, seed: int, model: str | None) -> Any:
            if "film 2" in messages[0]["content"] and not model:
                raise RequestFailed("too long")
            return await super().as_model(messages, seed, model)

    r = recipe_with(recipe_file)
    base = reuse.arms_digest(r, None, "s")
    torn, _ = evaluated_run(tmp_path / "torn", r, Refusing(), base, [])
    assert reuse.finished_arms(torn, None, base) is None
    model = Model()
    whole, donor = evaluated_run(tmp_path / "whole", r, model, base, [torn])
    assert donor == "" and None in {who for who, *_ in model.asked}
    assert reuse.finished_arms(whole, None, "another digest") is None
    (tmp_path / "begun/evaluation").mkdir(parents=True)
    begun = Run(tmp_path / "begun")
    begun["evaluation/turns.jsonl"].write_text("")
    assert reuse.adopt_arms(begun, None, base, [whole]) == "" and begun["evaluation/turns.jsonl"].read_text() == ""


# -- a student, and its teacher


OF_A_STUDENT = ("student.source=org/small", f"evaluation.arms=[{', '.join(ARMS)}]")


def test_the_teacher_answers_as_its_server_s_own_model_and_the_base_stays_the_baseline(
    tmp_path: Path, recipe_file: Path
):
    r, model = recipe_files.load_recipe_file(recipe_file, OF_A_STUDENT), Model()
    run = Run(tmp_path)
    asyncio.run(arms.answer_prompts(run, r, PROMPTS, model.as_model, length_score, models=[TEACHER]))
    assert {who for who, *_ in model.asked} == {None}  # an endpoint knows no model of the name "teacher"
    assert models.models_by_server(r) == [(None, ADAPTER), (TEACHER,)]  # two starts of vLLM
    asyncio.run(arms.answer_prompts(run, r, PROMPTS, model.as_model, length_score, models=[None, ADAPTER]))
    assert estimate.estimate_run(r, PROMPTS, "m", tmp_path).requests["evaluation"] == len(model.asked)
    rows = answers.collect_answers(run, r, PROMPTS, {"reward": score_all})
    numbers = summary.summarise_evaluation(r, PROMPTS, rows, {"reward": {}})
    assert set(numbers["arms"]) == set(ARMS) and numbers["primary"]["difference"] == "distilled - base"
    assert {"teacher - base", "distilled - teacher", "distilled - teacher_self_critique"} <= numbers[
        "differences"
    ].keys()
    assert numbers["claim"]["answers"] == len(PROMPTS)
    read = {row.text for row in rows if row.arm == "base"}
    assert read == {row["text"] for row in run.rows("evaluation/turns.jsonl") if row["role"] == "answer"}


def test_the_teacher_s_answers_outlive_the_student_and_the_base_s_don_t(tmp_path: Path, recipe_file: Path):
    r = recipe_files.load_recipe_file(recipe_file, OF_A_STUDENT)
    assert reuse.reusable_models(r) == [None, TEACHER]
    one, other = ({m: reuse.arms_digest(r, m, "s", student) for m in (None, TEACHER)} for student in ("a@1", "b@2"))
    assert one[TEACHER] == other[TEACHER] and one[None] != other[None] and one[None] != one[TEACHER]
    first, second = (Run(tmp_path / name) for name in ("one", "two"))
    for run in (first, second):
        run.folder.mkdir()
    asyncio.run(arms.answer_prompts(first, r, PROMPTS, Model().as_model, length_score))
    rows = answers.collect_answers(first, r, PROMPTS, {"reward": score_all})
    for m, inputs in one.items():
        reuse.finish_arms(first, r, m, inputs, rows, len(PROMPTS), {"base": {"t": 1.0}, "teacher": {}})
    assert [reuse.adopt_arms(second, m, inputs, [first]) for m, inputs in other.items()] == ["", "one"]
    assert reuse.finished_arms(second, TEACHER, other[TEACHER]) == {"teacher": {}}
    assert not second["evaluation/turns.jsonl"].exists() and second["evaluation/teacher.chains.jsonl"].is_file()


def test_answers_of_the_recipe_s_servers_are_not_taken_for_those_of_a_server_of_ours(recipe_file: Path):
    endpoints, lora = "serving.endpoints=[http://127.0.0.1:9/v1]", "distill.method=lora"
    theirs, ours = (
        recipe_files.load_recipe_file(
            recipe_file, [f"evaluation.arms=[{names}]", endpoints, lora, "evaluation.samples=2"]
        )
        for names in ("base", "base, distilled")
    )
    assert reuse.arms_digest(theirs, None, "s") != reuse.arms_digest(ours, None, "s")


def test_the_ledger_keeps_the_order_in_which_adapters_were_scored(tmp_path: Path):
    runs = tmp_path / "runs"
    (runs / "r" / "f").mkdir(parents=True)
    adapters = [tmp_path / f"{name}.safetensors" for name in ("z", "a", "m")]
    for path in adapters:
        path.write_bytes(path.name.encode())
    looks = [answers.count_adapters(runs, PROMPTS, path) for path in (*adapters, adapters[0])]
    assert [(look["position"], look["adapters_scored"]) for look in looks] == [(1, 1), (2, 2), (3, 3), (1, 3)]
    assert answers.count_adapters(runs, PROMPTS, None)["position"] is None
    assert answers.count_adapters(runs, PROMPTS[:2], adapters[2])["position"] == 1  # another test set
    # of what an older dsc wrote, sorted, the order is not known
    write_json(runs / "test_sets.json", {looks[0]["id"]: ["a", "b"]})
    old = answers.count_adapters(runs, PROMPTS, adapters[0])
    assert (old["position"], old["adapters_scored"]) == (3, 3)
    write_json(runs / "test_sets.json", {looks[0]["id"]: sorted([file_hash(adapters[0]), "b"])})
    assert answers.count_adapters(runs, PROMPTS, adapters[0])["position"] is None
    write_json(runs / "test_sets.json", {looks[0]["id"]: [file_hash(adapters[0])]})
    assert answers.count_adapters(runs, PROMPTS, adapters[0])["position"] == 1
    for path in adapters:
        answers.count_adapters(runs, PROMPTS, path)
    # whoever shows the first run's numbers shows today's count
    recorded = Metrics.model_validate({"schema": SCHEMA, "test_set": looks[0]})
    shown = with_current_looks(Run(runs / "r" / "f"), recorded)
    assert shown.test_set.model_dump() == looks[0] | {"adapters_scored": 3}
    elsewhere = Run(tmp_path / "pulled" / "r" / "f")
    assert with_current_looks(elsewhere, recorded) == recorded
    without = Metrics.model_validate({"schema": SCHEMA})
    assert with_current_looks(elsewhere, without) == without
