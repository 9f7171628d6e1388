"""Runs over servers that somebody else operates, each refusing something else: what is sent, said and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import error, sample, the_run
from tests.scripted_server import REFUSING

NAMES = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "random_seed"}
SENT = {
    "reasoning_model": {"max_completion_tokens", "top_p", "seed"},
    "one_of_two": {"max_tokens", "temperature", "seed"},
    "strict_fields": {"max_tokens", "temperature", "top_p", "random_seed"},
    "without_seed": {"max_tokens", "temperature", "top_p"},
    "wordless": {"max_tokens", "temperature", "top_p"},
}


@pytest.fixture
def serve(start: Callable[..., Any]) -> Callable[..., str]:
    """Start a server of a kind of REFUSING ("": it refuses nothing); its address."""

    def go(kind: str = "", **keys: Any) -> str:
        return f"http://127.0.0.1:{start(refuse=REFUSING.get(kind), **keys).server_port}/v1"

    return go


def facts_of(dsc) -> dict:
    return json.loads((the_run(dsc) / "run.json").read_text())


def sent_names(bodies: list[dict]) -> set[str]:
    (names,) = {frozenset(body) & NAMES for body in bodies}
    return set(names)


@pytest.mark.parametrize("kind", SENT)
def test_a_run_over_a_server_that_refuses_something(dsc, recipe_file: Path, serve: Callable[..., str], kind: str):
    bodies: list[dict] = []
    trials: list[dict] = []
    done = sample(dsc, recipe_file, serve(kind, bodies=bodies, trials=trials))
    assert done.returncode == 0, done.stderr
    assert "sampling  14/14 chains  failed 0" in done.stderr
    assert len(bodies) == 14 * 5 and sent_names(bodies) == SENT[kind]
    assert len(trials) == 1 and sent_names(trials) == SENT[kind]  # of the very form
    (recorded,) = facts_of(dsc)["servers"]
    assert recorded["place"] == "serving.endpoints" and recorded["model"] == "scripted"
    assert set(recorded["renamed"].values()) | {"temperature", "top_p"} >= SENT[kind] - {"max_tokens", "seed"}
    assert recorded["changes"] == (["temperature"] if kind == "reasoning_model" else [])
    assert ("NOT with 0.8" in done.stderr) == (kind == "reasoning_model")


def test_critic_and_judge_of_other_kinds_get_what_they_take_and_nothing_of_the_bases(
    dsc, recipe_file: Path, serve: Callable[..., str]
):
    base: list[dict] = []
    critic: list[dict] = []
    judge: list[dict] = []
    judge_url = serve("strict_fields", bodies=judge, models=("judge",), answer=lambda body: "Well. [[4]]")
    options = f"{{endpoint: '{judge_url}', model: judge, instruction: 'Rate {{answer}}'}}"
    done = sample(
        dsc,
        recipe_file,
        serve("without_seed", bodies=base, listing=lambda: (404, {})),
        "serving.served_model=base",
        f"chain.critic={{model: critic, endpoint: '{serve('reasoning_model', bodies=critic)}'}}",
        "chain.critic.extra={reasoning_effort: low}",
        f"reward={{metric: judge, scorer: rating, options: {options}}}",
    )
    assert "unknown" not in done.stderr.lower() or done.returncode == 0, done.stderr
    assert done.returncode == 0, done.stderr
    assert sent_names(base) == SENT["without_seed"] and not any("reasoning_effort" in body for body in base)
    assert sent_names(critic) == SENT["reasoning_model"] and len(critic) == 28
    assert {body["reasoning_effort"] for body in critic} == {"low"}
    assert sent_names(judge) == {"max_tokens", "temperature", "random_seed"}
    recorded = {s["place"]: s for s in facts_of(dsc)["servers"]}
    assert list(recorded) == ["serving.endpoints", "chain.critic", "reward"]
    assert recorded["serving.endpoints"]["left_out"] == ["seed"]
    assert recorded["chain.critic"]["renamed"] == {"max_tokens": "max_completion_tokens"}
    assert recorded["chain.critic"]["changes"] == ["temperature"]
    assert recorded["reward"]["renamed"] == {"seed": "random_seed"}


def test_generation_extra_is_the_bases_alone(dsc, recipe_file: Path, serve: Callable[..., str]):
    base: list[dict] = []
    critic: list[dict] = []
    done = sample(
        dsc,
        recipe_file,
        serve(bodies=base),
        f"chain.critic={{model: critic, endpoint: '{serve(bodies=critic)}'}}",
        "generation.extra={top_k: 20}",
    )
    assert done.returncode == 0, done.stderr
    assert {body.get("top_k") for body in base} == {20} and {body.get("top_k") for body in critic} == {None}


def test_all_unusable_servers_are_named_together_before_anything_runs(
    dsc, recipe_file: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    told = error(
        sample(
            dsc,
            recipe_file,
            serve(key="right"),
            "serving.served_model=base",
            "chain.critic={model: critic, endpoint: 'http://127.0.0.1:1/v1'}",
        )
    )
    assert "2 problems" in told
    assert "serving.endpoints: base at http://127.0.0.1:" in told and "OPENAI_API_KEY is not set" in told
    assert "wrong key" in told and "chain.critic: critic at http://127.0.0.1:1/v1 can't be used" in told
    assert not (dsc.work / "runs").exists()


def test_a_server_without_a_list_of_models_needs_the_models_name(dsc, recipe_file: Path, serve: Callable[..., str]):
    url = serve(listing=lambda: (404, {"error": "no route"}))
    told = error(dsc("plan", str(recipe_file), f"serving.endpoints=[{url}]", "evaluation.arms=[base]"))
    assert "Name the model with serving.served_model" in told and "404" in told
    dsc(
        "plan",
        str(recipe_file),
        f"serving.endpoints=[{url}]",
        "serving.served_model=m",
        "evaluation.arms=[base]",
        code=0,
    )


def test_what_a_run_costs_is_said_before_and_recorded_after(dsc, recipe_file: Path, serve: Callable[..., str]):
    url = serve()
    price = ("serving.price={input: 2, output: 10}", "evaluation.arms=[base, best_of_n]")
    quota = ("serving.requests_per_minute=6000", "serving.tokens_per_minute=100000000")
    plan = json.loads(
        dsc("plan", str(recipe_file), f"serving.endpoints=[{url}]", *price, *quota, "--json", code=0).stdout
    )
    most, written, read = (plan[k] for k in ("cost_usd_at_most", "new_tokens_at_most", "prompt_tokens_at_most"))
    for stage in ("sampling", "evaluation"):
        assert most[stage] == pytest.approx((read[stage] * 2 + written[stage] * 10) / 1e6) and read[stage] > 0
    assert plan["quota_seconds"]["sampling"]["requests_s"] == pytest.approx(plan["requests"]["sampling"] / 100)
    shown = " ".join(dsc("plan", str(recipe_file), f"serving.endpoints=[{url}]", *price, *quota, code=0).stdout.split())
    assert "price at most" in shown and "quota sampling: its requests in" in shown
    done = sample(dsc, recipe_file, url, *price)
    numbers = json.loads((the_run(dsc) / "metrics.json").read_text())["sampling"]
    spent = (numbers["prompt_tokens"] * 2 + numbers["new_tokens"] * 10) / 1e6
    assert numbers["cost_usd"] == pytest.approx(spent) and 0 < spent < most["sampling"]
    assert " USD" in done.stderr
    dsc("dataset", str(recipe_file), f"serving.endpoints=[{url}]", *price, code=0)


def test_without_a_price_no_money_is_shown(dsc, recipe_file: Path, serve: Callable[..., str]):
    url = serve()
    plan = dsc("plan", str(recipe_file), f"serving.endpoints=[{url}]", "evaluation.arms=[base]", code=0)
    rows = {line.split()[0] for line in plan.stdout.splitlines() if line.split()}
    assert "USD" not in plan.stdout and not rows & {"price", "quota"}
    assert "USD" not in sample(dsc, recipe_file, url).stderr
