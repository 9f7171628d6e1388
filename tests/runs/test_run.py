"""The run folder: rows survive a kill, markers are whole, one process at a time, finished work is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from dsc_hub.errors import RunError, disk_error
from dsc_hub.runs.cost import add_session, cost_of
from dsc_hub.runs.reuse import adopt_rows, reusable_stages, reuse
from dsc_hub.runs.run import Run, siblings
from dsc_hub.system.files import write_json


def a_run(tmp_path: Path, name: str = "a") -> Run:
    run = Run(tmp_path / "runs" / "r" / name)
    run.folder.mkdir(parents=True)
    run.add_facts(x=1)
    return run


def test_a_torn_last_line_is_not_read_and_is_cut_off_before_the_next_row(tmp_path: Path):
    run = a_run(tmp_path)
    path = run["turns.jsonl"]
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n": 3, "text": "torn \xc3')
    assert [r["n"] for r in run.rows("turns.jsonl")] == [1, 2]
    rows = run.rows("turns.jsonl")
    rows.append({"n": 4})
    rows.close()
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n":4}\n'


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path):
    run = a_run(tmp_path)
    run["turns.jsonl"].write_bytes(b'{"n": ' + b"1" * 200_000)
    rows = run.rows("turns.jsonl")
    rows.append({"n": 1})
    rows.close()
    assert run["turns.jsonl"].read_bytes() == b'{"n":1}\n'


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path):
    run = a_run(tmp_path)
    run["turns.jsonl"].write_text('{"n": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        list(run.rows("turns.jsonl"))


def test_rows_keep_any_text_in_one_line(tmp_path: Path):
    run = a_run(tmp_path)
    text = 'line\nbreak \u2028 "quotes" \x00 emoji 🎬 \ud800'.encode("utf-8", "replace").decode()
    rows = run.rows("x.jsonl")
    rows.append({"t": text})
    assert [r["t"] for r in run.rows("x.jsonl")] == [text]
    rows.close()


def test_a_marker_counts_only_with_its_fingerprint(tmp_path: Path):
    run = a_run(tmp_path)
    assert not run.is_done("sampling", "f1")
    run["chains.jsonl"].write_text("")
    run.finish("sampling", "f1", 1.5, {"result": {"chains": 3}})
    assert run.is_done("sampling", "f1") and not run.is_done("sampling", "f2")
    run["chains.jsonl"].unlink()
    assert not run.is_done("sampling", "f1")  # what it speaks of is gone
    assert run.marker("sampling")["result"] == {"chains": 3} and not list(run.folder.glob("*.part"))


def _hold(folder: str, ready: object, go: object) -> None:
    with Run(Path(folder)).lock():
        ready.set()
        go.wait(30)


def test_two_processes_on_one_run_folder_the_second_says_so_and_stops(tmp_path: Path):
    run = a_run(tmp_path)
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(run.folder), ready, go))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(RunError, match="in use by another process"), run.lock():
        pass
    go.set()
    holder.join()
    with run.lock():
        pass


def test_a_stage_with_the_same_inputs_is_taken_over_as_a_copy(tmp_path: Path):
    old, new = a_run(tmp_path, "old"), a_run(tmp_path, "new")
    for n in range(3):
        rows = old.rows("chains.jsonl")
        rows.append({"n": n})
        rows.close()
    old.add_metrics("sampling", {"chains": 3})
    old.finish("sampling", "f", 1, {})
    assert reuse(new, "sampling", "g", [], siblings(tmp_path / "runs", "r")) is None
    assert reuse(new, "sampling", "f", [], siblings(tmp_path / "runs", "r")) == old.folder
    assert (
        new.is_done("sampling", "f")
        and len(list(new.rows("chains.jsonl"))) == 3
        and new.metrics["sampling"] == {"chains": 3}
    )
    rows = new.rows("chains.jsonl")
    rows.append({"n": 9})
    rows.close()
    assert len(list(old.rows("chains.jsonl"))) == 3


def test_a_stage_whose_numbers_can_not_be_read_is_not_taken_over(tmp_path: Path):
    old, new = (Run(tmp_path / "runs" / "r" / name) for name in ("old", "new"))
    for run in (old, new):
        run.folder.mkdir(parents=True)
    old["chains.jsonl"].write_text("{}\n")
    write_json(old["run.json"], {})
    old.finish("sampling", "f", 1.0, {})
    for damaged in ('{"schema": 99}', "{"):
        old["metrics.json"].write_text(damaged)
        assert reuse(new, "sampling", "f", [], [old]) is None
    old["metrics.json"].unlink()
    assert reuse(new, "sampling", "f", [], [old]) == old.folder


def test_what_would_be_taken_over_is_known_before_anything_is_copied(tmp_path: Path):
    old, new = a_run(tmp_path, "old"), a_run(tmp_path, "new")
    for stage, file in (("prompts", "prompts.jsonl"), ("sampling", "chains.jsonl"), ("distill", "adapter")):
        old[file].write_text("")
        old.finish(stage, stage, 1.0, {})
    stages = ("prompts", "sampling", "dataset", "distill")

    def outlook(run: Run, **fingerprints: str) -> dict[str, Path]:
        found = reusable_stages(run, stages, {s: s for s in stages} | fingerprints, siblings(tmp_path / "runs", "r"))
        return {stage: of.folder for stage, of in found.items()}

    assert outlook(new) == {"prompts": old.folder, "sampling": old.folder}  # not what follows a gap
    assert outlook(old) == {"prompts": old.folder, "sampling": old.folder}
    assert outlook(new, prompts="x") == {}
    assert not new["prompts.jsonl"].exists()
    new["prompts.jsonl"].write_text("")
    new.finish("prompts", "prompts", 2.0, {})  # read anew here: another marker
    assert outlook(new) == {"prompts": new.folder}
    new["chains.jsonl"].write_text("")
    new.finish("sampling", "sampling", 2.0, {})
    assert outlook(new) == {"prompts": new.folder, "sampling": new.folder}
    new.unfinish("prompts")  # with another's prompts come another's chains: those made here are forgotten
    assert outlook(new) == {"prompts": old.folder, "sampling": old.folder}


def test_what_people_judged_goes_with_the_evaluation_that_would_be_taken_over(tmp_path: Path):
    old, new = a_run(tmp_path, "old"), a_run(tmp_path, "new")
    stages = {"evaluation": "evaluation", "report": "report.html"}
    for stage, file in stages.items():
        old[file].write_text("")
        old.finish(stage, stage, 1.0, {})
    old.add_metrics("blind", {"judged": 3})
    found = reusable_stages(new, list(stages), {s: s for s in stages}, siblings(tmp_path / "runs", "r"))
    assert {s: of.folder for s, of in found.items()} == dict.fromkeys(stages, old.folder)
    for stage in stages:  # and so it is when it is done
        taken = reuse(new, stage, stage, list(found)[: list(stages).index(stage)], [old])
        assert taken == old.folder


def test_the_evaluation_of_another_adapter_is_not_taken_over(tmp_path: Path):
    """Same recipe, same fingerprints, but trained twice: the numbers belong to the other adapter."""
    old, new = a_run(tmp_path, "old"), a_run(tmp_path, "new")
    for run in (old, new):
        (run["adapter"]).mkdir()
        run.finish("distill", "d", 10.0 if run is old else 11.0, {})
    old["evaluation"].mkdir()
    old["evaluation"].joinpath("answers.jsonl").write_text("{}\n")
    old.finish("evaluation", "e", 1, {})
    assert reuse(new, "evaluation", "e", ["distill"], siblings(tmp_path / "runs", "r")) is None
    assert reuse(old, "evaluation", "e", [], [new]) is None


def test_a_stage_that_another_run_began_is_gone_on_with(tmp_path: Path):
    old, new, other = (a_run(tmp_path, n) for n in ("old", "new", "other"))
    old.add_facts(fingerprints={"sampling": "f"})
    other.add_facts(fingerprints={"sampling": "g"})
    for run in (old, other):
        run["turns.jsonl"].write_text('{"n": 1}\n{"n": 2')
    assert adopt_rows(new, "sampling", "f", siblings(tmp_path / "runs", "r")) == old.folder
    rows = new.rows("turns.jsonl")
    rows.append({"n": 3})
    rows.close()
    assert [r["n"] for r in new.rows("turns.jsonl")] == [1, 3] and old["turns.jsonl"].read_text().endswith('{"n": 2')
    assert adopt_rows(new, "sampling", "f", siblings(tmp_path / "runs", "r")) is None  # it has rows of its own


def test_what_it_cost_is_summed_over_sessions_and_unknown_after_a_kill(tmp_path: Path):
    run = a_run(tmp_path)
    run["turns.jsonl"].write_text('{"prompt_tokens": 5, "new_tokens": 10}\n' * 4)
    session = {"seconds": 2.0, "new_tokens": 30, "cached_tokens": 60, "looked_up_tokens": 80, "retries": {"503": 2}}
    add_session(run, "sampling", session | {"processors": 2, "kind": "core", "scoring_s": 0.5})
    cost = cost_of(run, "sampling", "turns.jsonl")
    assert (cost["prompt_tokens"], cost["new_tokens"], cost["tokens_per_s"]) == (20, 40, 15.0)
    assert cost["seconds"] is cost["processor_hours"] is None
    assert (cost["cache_rate"], cost["retries"], cost["scoring_s"]) == (0.75, {"503": 2}, 0.5)
    add_session(run, "sampling", {"seconds": 1.0, "new_tokens": 10, "retries": {"503": 1}, "processors": 2})
    cost = cost_of(run, "sampling", "turns.jsonl")
    assert (cost["seconds"], cost["tokens_per_s"], cost["retries"]) == (3.0, 13.3, {"503": 3})
    assert (cost["processor_hours"], cost["processors"]) == (round(3 * 2 / 3600, 4), "core")


def test_tokens_that_another_run_generated_cost_nothing_here(tmp_path: Path):
    run = a_run(tmp_path)
    run["turns.jsonl"].write_text('{"prompt_tokens": 5, "new_tokens": 10}\n' * 4)
    add_session(run, "sampling", {"seconds": 2.0, "new_tokens": 10, "reused_tokens": 30, "processors": 2})
    cost = cost_of(run, "sampling", "turns.jsonl")
    assert (cost["seconds"], cost["new_tokens"], cost["tokens_per_s"]) == (2.0, 40, 5.0)
    assert cost["processor_hours"] == round(2 * 2 / 3600, 4)


def test_rows_that_are_adopted_in_part_are_not_chains_without_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old, new = a_run(tmp_path, "old"), a_run(tmp_path, "new")
    old.add_facts(fingerprints={"sampling": "f"})
    for name in ("turns.jsonl", "chains.jsonl"):
        old[name].write_text('{"n": 1}\n')
    real, done = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target.name)
        real(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            adopt_rows(new, "sampling", "f", [old])
    assert new["turns.jsonl"].exists() and not new["chains.jsonl"].exists()


def test_what_no_session_knows_is_absent(tmp_path: Path):
    run = a_run(tmp_path)
    run["turns.jsonl"].write_text('{"prompt_tokens": 5, "new_tokens": 10}\n')
    run["sessions.jsonl"].write_text('{"stage": "sampling", "seconds": 2.0, "new_tokens": 10}\n')  # of an older dsc
    cost = cost_of(run, "sampling", "turns.jsonl")
    assert cost["seconds"] == 2.0 and cost["cache_rate"] is cost["processor_hours"] is cost["processors"] is None


def test_a_full_disk_is_the_users_error_and_a_bug_is_not(tmp_path: Path):
    run = a_run(tmp_path)
    os.symlink("/dev/full", run["turns.jsonl"])  # the kernel answers every write there with ENOSPC
    with pytest.raises(OSError) as e:
        run.rows("turns.jsonl").append({"n": 1})
    error = disk_error(e.value)
    assert error is not None and "no space left on the disk" in str(error) and "turns.jsonl" in str(error)
    assert disk_error(OSError(5, "io")) is None


def test_metrics_sections_stand_side_by_side(tmp_path: Path):
    run = a_run(tmp_path)
    run.add_metrics("a", {"n": 1})
    run.add_metrics("b", {"n": 2})
    assert json.loads(run["metrics.json"].read_text()) == {"schema": 4, "a": {"n": 1}, "b": {"n": 2}}


@pytest.mark.parametrize("content", ["[]", "3", "", "{broken"])
def test_a_damaged_marker_or_run_json_is_one_line_and_names_the_file(tmp_path: Path, content: str):
    run = a_run(tmp_path)
    run["sampling.done.json"].write_text(content)
    with pytest.raises(RunError, match="sampling.done.json is damaged"):
        run.is_done("sampling", "f")
    run["run.json"].write_text(content)
    with pytest.raises(RunError, match="run.json is damaged"):
        run.add_facts(x=2)


def test_a_row_of_another_kind_is_an_error_that_names_its_line(tmp_path: Path):
    from dsc_hub.sampling.sample import read_chains

    run = a_run(tmp_path)
    for row in ('{"a": 1}', "3"):
        run["chains.jsonl"].write_text(row + "\n")
        with pytest.raises(RunError, match="line 1 is damaged"):
            read_chains(run)
