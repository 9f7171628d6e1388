"""What happens before the first request of a sampling, and in which order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsc_hub.errors import ServingError
from dsc_hub.metrics import loading
from dsc_hub.pipeline import resolve, run, session
from tests.metrics.test_own_metrics import OWN
from tests.scripted_server import TRIAL, answer_to, is_trial, make_server


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order: "loaded" the reward, "asked" the server, "imported" vLLM."""
    done: list[str] = []
    load = loading.load_named

    def loads(*args):
        done.append("loaded")
        return load(*args)

    @contextlib.contextmanager
    def imports(context, stage: str) -> Iterator[None]:
        done.append(f"imported for {stage}")
        yield
        done.append("block left")

    check = run.check_run

    def checks(*args):
        done.append("checked")
        return check(*args)

    monkeypatch.setattr(run, "check_run", checks)
    monkeypatch.setattr(loading, "load_named", loads)
    monkeypatch.setattr(session, "vllm_imported_early", imports)
    return done


@pytest.fixture
def sample(recipe_file: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, events: list[str]):
    """Sample a recipe at a server that runs already."""
    monkeypatch.setenv("DSC_HUB_HOME", str(home))

    def answer(body: dict) -> str:
        if body["messages"][-1]["content"] != TRIAL:
            events.append("asked")
        return answer_to(body)

    server = make_server(answer=answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def sample(*overrides: str):
        words = [f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]", *overrides]
        context = resolve.resolve_recipe(str(recipe_file), words, tmp_path / "runs")
        run.run_all(context, "sampling")
        return context

    yield sample
    server.shutdown()


def test_a_server_that_runs_is_asked_before_a_packaged_reward_is_loaded(sample, events: list[str]):
    context = sample()
    asked = [event for event in events if event in ("loaded", "asked")]
    assert asked[0] == "asked" and "loaded" in asked and asked.count("asked") > 20
    assert context.run.result("sampling")["unscored"] == 0


def test_a_reward_of_the_users_own_is_loaded_before_anything_is_asked(sample, recipe_file: Path, events: list[str]):
    (recipe_file.parent / "own.py").write_text(OWN)
    sample("reward={metric: own.py, scorer: default}")
    assert [event for event in events if event in ("loaded", "asked")][:2] == ["loaded", "asked"]


def test_vllm_is_imported_while_a_run_is_checked_whose_first_work_is_sampling(
    recipe_file: Path, tmp_path: Path, home: Path, server: str, events: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DSC_HUB_HOME", str(home))

    class Stopped(Exception):
        pass

    def stops(context, stage, *_):
        raise Stopped(stage)

    def events_of(last: str, *overrides: str, done: tuple[str, ...] = ()) -> list[str]:
        del events[:]
        monkeypatch.setattr(run, "run_stage", stops)
        monkeypatch.setattr(run, "reusable_stages", lambda *_: dict.fromkeys(done))
        with pytest.raises(Stopped):
            run.run_all(resolve.resolve_recipe(str(recipe_file), overrides, tmp_path / "runs"), last)
        return events

    assert events_of("sampling")[:2] == ["imported for sampling", "checked"]
    assert events_of("sampling", done=("prompts",))[0] == "imported for sampling"
    assert events_of("dataset", done=("prompts", "sampling")) == ["checked"]
    assert events_of("prompts") == ["checked"]
    assert events_of("sampling", "rounds=2") == ["checked"]
    assert events_of("sampling", f"serving.endpoints=[{server}]") == ["checked"]


def test_if_no_chain_could_be_finished_the_reason_is_said_and_no_advice_about_rows(
    recipe_file: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DSC_HUB_HOME", str(home))

    def refuse(body: dict):
        return None if is_trial(body) else (400, {"error": {"message": "no such weather"}})

    server = make_server(refuse=refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]", "dataset.rows=2"]
    context = resolve.resolve_recipe(str(recipe_file), words, tmp_path / "runs")
    with pytest.raises(ServingError, match=r"not one of \d+ chains could be finished; \d+ times: .*no such weather"):
        run.run_all(context, "sampling")
    server.shutdown()
    said = capsys.readouterr()
    assert "that are wanted" not in said.out + said.err and "Step 1" not in said.out + said.err
