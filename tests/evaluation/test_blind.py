"""A blind comparison: who wins does not depend on what is shown first, nothing is asked twice, and the numbers are those
that one gets by hand."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dsc_hub import stats
from dsc_hub.cli import terminal
from dsc_hub.cli.blind import judge_pairs
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.evaluation import blind
from dsc_hub.records import prompt_id
from dsc_hub.report import cards, tables
from dsc_hub.report.page import build_page
from dsc_hub.report.verdicts import blind_lines
from dsc_hub.runs.results import metrics_of
from dsc_hub.runs.reuse import reuse
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_json
from tests import fixture_run
from tests.conftest import ROOT

FILMS = ("Ash", "Kestrel", "Low Tide", "Saltwater", "Two Winters")


def answers(per_film: int = 4, films=FILMS, distilled: str = "A warm one.", base: str = "A cold one."):
    """Rows of answers.jsonl: two arms and `per_film` prompts about each film."""
    prompts = [(f"Prompt {i} about {film}.", film) for film in films for i in range(per_film)]
    return [
        {
            "arm": arm,
            "prompt_id": prompt_id(p),
            "sample": 0,
            "group": film,
            "prompt": p,
            "text": text,
            "reward": 0.1,
            "second": 0.1,
        }
        | fixture_run.REST_OF_AN_ANSWER
        for arm, text in (("base", base), ("distilled", distilled))
        for p, film in prompts
    ]


def run_of(folder: Path, rows=None, stages=("evaluation", "report", "cards", "publish")) -> Run:
    run = fixture_run.write(folder, answers=rows or answers())
    run.unfinish("evaluation")
    for stage in stages:
        run.finish(stage, f"fingerprint of {stage}", 1.0, {})
    return run


def verdicts(run: Run) -> list[dict]:
    return list(run.rows(blind.JUDGEMENTS))


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    """What is printed, on a terminal too narrow for two columns: A stands above B."""
    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=text, width=80, highlight=False))
    return text


def typed(monkeypatch, *lines: str) -> list[str]:
    """The user's lines, then the end of input; returns the prompts that were asked."""
    left, asked = list(lines), []

    def ask(prompt: str) -> str | None:
        asked.append(prompt)
        return left.pop(0) if left else None

    monkeypatch.setattr(terminal, "ask_key", ask)
    return asked


# -- which prompts, in which order


def test_groups_take_turns_and_a_larger_sample_begins_with_the_smaller():
    pairs = blind.answer_pairs(fixture_run.typed(answers()))
    five, twelve, all_of_them = (blind.pick(pairs, 7, n) for n in (5, 12, 1000))
    assert {p.group for p in five} == set(FILMS)
    assert (
        twelve[:5] == five and all_of_them[:12] == twelve and len(all_of_them) == len(set(map(id, all_of_them))) == 20
    )
    assert all(a.group != b.group for a, b in zip(all_of_them, all_of_them[1:], strict=False))
    assert blind.pick(pairs[::-1], 7, 12) == twelve and blind.pick(pairs, 8, 12) != twelve


def test_a_prompt_that_one_arm_did_not_answer_is_not_shown():
    rows = answers()
    gone = rows.pop()
    assert len(blind.answer_pairs(fixture_run.typed(rows))) == 19 and gone["prompt_id"] not in {
        p.prompt_id for p in blind.answer_pairs(fixture_run.typed(rows))
    }


def test_which_arm_is_shown_first_is_a_fair_coin():
    seeds = [blind.seed_of(3, f"prompt {i}", 0, 0, "blind order x") for i in range(1000)]
    first = [blind.order_of(s)[0] for s in seeds]
    assert 440 < first.count("base") < 560 and {len(set(blind.order_of(s))) for s in seeds} == {2}


def test_the_winner_does_not_depend_on_which_arm_is_shown_first(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)

    def prefers_warmth(prompt: str) -> str:
        last = screen.getvalue()[screen.getvalue().rindex("of 20 ─") :]
        return "a" if last.index("A warm one.") < last.index("A cold one.") else "B"

    monkeypatch.setattr(terminal, "ask_key", prefers_warmth)
    judge_pairs(run, 1000, "ann")
    rows = verdicts(run)
    assert len(rows) == 20 and {r["won"] for r in rows} == {"distilled"}
    assert {(r["choice"], tuple(r["shown"])) for r in rows} == {
        ("A", ("distilled", "base")),
        ("B", ("base", "distilled")),
    }
    assert all(tuple(r["shown"]) == blind.order_of(r["seed"]) for r in rows)


# -- asking


def test_nothing_is_asked_twice_and_another_judge_is_asked_everything(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    asked = typed(monkeypatch, "a", "t", "b", "q")
    judge_pairs(run, 8, "ann")
    assert len(asked) == 4 and len(verdicts(run)) == 3
    asked = typed(monkeypatch, *"ttttttttt")
    judge_pairs(run, 8, "ann")
    assert len(asked) == 5
    seen = [r["prompt_id"] for r in verdicts(run)]
    assert seen == [p.prompt_id for p in blind.pick(blind.read_pairs(run), 7, 8)]
    asked = typed(monkeypatch, "t")
    judge_pairs(run, 8, "ann")
    assert asked == [] and "All 8 pairs are judged under this name already." in screen.getvalue()
    asked = typed(monkeypatch, *"aaaaaaaaa")
    judge_pairs(run, 8, "bob")
    assert len(asked) == 8 and run.metrics["blind"]["judges"] == 2 and run.metrics["blind"]["prompts"] == 8


def test_going_on_shows_the_same_order_of_the_same_pair(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    typed(monkeypatch, "q")
    judge_pairs(run, 5, "ann")
    first = screen.getvalue()
    first = first[first.index("─ 1 of 5") : first.index("Nothing was judged")]
    screen.truncate(0), screen.seek(0)
    typed(monkeypatch, "q")
    judge_pairs(run, 5, "ann")
    assert first in screen.getvalue() and "A warm one." in first
    other = run_of(tmp_path / "elsewhere")
    for same in (run, other):
        typed(monkeypatch, *"t" * 20)
        judge_pairs(same, 20, "ann")
    assert verdicts(run) == verdicts(other) and len({tuple(r["shown"]) for r in verdicts(run)}) == 2


def test_what_is_no_answer_is_asked_again_in_one_line(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    asked = typed(monkeypatch, "", "c", "ab", " A ", "TIE", "Q")
    judge_pairs(run, 30, "ann")
    assert len(asked) == 6 and [r["choice"] for r in verdicts(run)] == ["A", "t"]
    assert screen.getvalue().count("That is none of A, B, t, q.\n") == 3


def test_the_end_of_input_and_ctrl_c_keep_what_was_judged(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    typed(monkeypatch, "a", "b")
    judge_pairs(run, 30, "ann")
    assert len(verdicts(run)) == 2 and run.metrics["blind"]["verdicts"] == 2
    left = iter(["t"])

    def interrupted(prompt: str) -> str:
        for word in left:
            return word
        os.kill(os.getpid(), signal.SIGINT)
        return "never"

    monkeypatch.setattr(terminal, "ask_key", interrupted)
    judge_pairs(run, 30, "ann")
    assert len(verdicts(run)) == 3 and run.metrics["blind"]["verdicts"] == 3


def test_which_one_is_which_is_not_told_before_the_end(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    seen = []

    def ask(prompt: str) -> str | None:
        seen.append(screen.getvalue() + prompt)
        return "a" if len(seen) < 6 else None

    monkeypatch.setattr(terminal, "ask_key", ask)
    judge_pairs(run, 30, "ann")
    assert len(seen) == 6 and not any(word in seen[-1].lower() for word in ("base", "distilled", "ann"))
    assert "the distilled answer was preferred" in " ".join(screen.getvalue().split())


@pytest.mark.parametrize("width", [80, 140])
def test_control_characters_do_not_reach_the_terminal_and_markup_is_not_read(tmp_path, monkeypatch, width):
    evil = "\x1b]0;owned\x07\x1b[2J\r\x08\x9b31m\u202e[bold]as it is[/bold]"
    rows = answers(1, films=("Ash",), distilled=f"warm {evil}", base=f"cold {evil}")
    for row in rows:
        row["prompt"] += evil
    run = fixture_run.write(tmp_path, answers=rows)
    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=text, width=width, force_terminal=True, color_system=None))
    typed(monkeypatch, "a")
    judge_pairs(run, 5, "ann")
    shown = text.getvalue()
    assert shown.count("[bold]as it is[/bold]") == 3 and "\N{REPLACEMENT CHARACTER}" in shown
    assert not any(c in shown for c in "\x1b\x07\r\x08\x9b\u202e")
    assert len(verdicts(run)) == 1


# -- counting


def judged(group_values: dict[str, list[float]], judge: str = "ann"):
    """Pairs and a judge's verdicts with these values (1, 0.5, 0) by group."""
    rows = [r for g, v in group_values.items() for r in answers(len(v), (g,))]
    pairs = blind.answer_pairs(fixture_run.typed(rows))
    won = {1.0: "distilled", 0.5: "tie", 0.0: "base"}
    ids = {g: [prompt_id(f"Prompt {i} about {g}.") for i in range(len(v))] for g, v in group_values.items()}
    by_id = {i: won[v] for g in group_values for i, v in zip(ids[g], group_values[g], strict=True)}
    return pairs, [blind.Judgement(p.prompt_id, judge, 1, blind.ARMS, "A", by_id[p.prompt_id], p.hashes) for p in pairs]


def test_the_tally_is_the_one_worked_out_by_hand():
    few = {"Ash": [1, 0.5], "Kestrel": [0, 0.5], "Saltwater": [1, 1]}
    pairs, given = judged(few | {"Low Tide": [1], "Harbour": [0], "Rain": [1]})
    t = blind.tally(pairs, given, 0.95)
    # Group means 0.75, 0.25, 1, 1, 0, 1: mean 2/3, standard deviation 0.437798, t = 2.570582 at 5 degrees of freedom.
    assert t.win_rate.mean == pytest.approx(2 / 3)
    assert 0 <= t.win_rate.low <= 2 / 3 - 2.570582 * 0.437798 / 6**0.5
    assert t.win_rate.high == 1.0  # the interval reaches beyond: a rate doesn't
    assert (t.distilled, t.base, t.tie, t.prompts, t.groups, t.judges) == (5, 2, 2, 9, 6, 1)
    assert t.share_decided == 5 / 7
    assert t.p == pytest.approx(2 * (1 + 7 + 21) / 128)  # 5 or more of 7 by a fair coin, and as far to the other side
    line = " ".join(blind_lines(t))
    assert "67 % (95 % interval over groups" in line and "to 100 %)" in line and "Of the 7 decided: 71 %" in line
    assert "by 1 person: of 9 prompts in 6 groups" in line and "not necessarily independent" in line


def test_several_judges_of_one_prompt_count_once_with_their_mean():
    pairs, ann = judged({"Ash": [1], "Kestrel": [0]}, "ann")
    _, bob = judged({"Ash": [1], "Kestrel": [1]}, "bob")
    _, eve = judged({"Ash": [0], "Kestrel": [0.5]}, "eve")
    t = blind.tally(pairs, [*ann, *bob, *eve])
    assert (t.prompts, t.verdicts, t.judges) == (2, 6, 3)
    assert (t.distilled, t.base, t.tie) == (1, 0, 1)  # means 2/3 and 1/2
    assert t.win_rate.mean == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert "by 3 people" in blind_lines(t)[0]
    again = blind.tally(pairs, [*ann, *bob, *eve, *ann])
    assert again == t  # a judge's last verdict counts, not both


def test_there_is_no_interval_where_none_can_be_had():
    one_group = blind.tally(*judged({"Ash": [1, 0, 1]}))
    assert one_group.win_rate.low is None and "no interval: 1 group; an interval needs 6" in blind_lines(one_group)[1]
    alike = blind.tally(*judged({film: [1] for film in "abcdef"}))
    assert alike.win_rate.low is None and alike.p == 2 / 2**6
    assert "100 % (no interval: all groups are alike)" in blind_lines(alike)[1]
    ties = blind.tally(*judged({"Ash": [0.5], "Kestrel": [0.5]}))
    assert ties.p is None and ties.share_decided is None and stats.sign_test(0, 0) is None
    assert "Of the 0 decided: –, exact sign test p –" in blind_lines(ties)[1]
    assert blind.tally(blind.answer_pairs(fixture_run.typed(answers())), []) is None


# -- answers that have changed since


def test_verdicts_on_answers_that_have_changed_do_not_count_and_are_asked_again(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    typed(monkeypatch, *"aaa")
    judge_pairs(run, 3, "ann")
    changed = verdicts(run)[1]["prompt_id"]
    rows = list(run.rows("evaluation/answers.jsonl"))
    for row in rows:
        if row["prompt_id"] == changed and row["arm"] == "distilled":
            row["text"] = "Another adapter's."
    fixture_run._jsonl(run["evaluation/answers.jsonl"], rows)
    assert blind.record_tally(run).model_dump() == run.metrics["blind"]
    assert (run.metrics["blind"]["prompts"], run.metrics["blind"]["outdated"]) == (2, 1)
    assert "Not counted: 1 verdict on answers that have changed since." in blind_lines(metrics_of(run).blind)
    asked = typed(monkeypatch, *"bbb")
    judge_pairs(run, 3, "ann")
    assert len(asked) == 1 and "Another adapter's." in screen.getvalue() and run.metrics["blind"]["prompts"] == 3


def test_a_tally_of_answers_that_are_all_gone_is_taken_out_of_the_numbers(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    typed(monkeypatch, *"aa")
    judge_pairs(run, 2, "ann")
    fixture_run._jsonl(run["evaluation/answers.jsonl"], answers(distilled="All of them new."))
    assert blind.record_tally(run) is None and "blind" not in run.metrics and "evaluation" in run.metrics


# -- where it is told


def test_the_tally_reaches_report_card_and_terminal(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    cards.build_cards(run), build_page(run)
    card, page = run["cards/adapter/README.md"], run["report.html"]
    assert "Judged blind" not in card.read_text() + page.read_text()
    typed(monkeypatch, *"ababtaaaaa")
    judge_pairs(run, 10, "Ann Smith")
    told = " ".join(screen.getvalue().split())
    assert "no longer counted as done: report, cards, publish." in told and "`dsc publish RECIPE`" in told
    assert [run.marker(s) is None for s in ("evaluation", "report", "cards", "publish")] == [False, True, True, True]
    cards.build_cards(run), build_page(run)
    for line in blind_lines(metrics_of(run).blind):
        assert line in card.read_text() and line in page.read_text().replace("&#39;", "'")
    assert "Judged blind" not in run["cards/dataset/README.md"].read_text()
    assert "Ann" not in run["metrics.json"].read_text() + card.read_text() + page.read_text()
    text = io.StringIO()
    Console(file=text, width=120).print(tables.closing_table(metrics_of(run).evaluation, metrics_of(run).blind))
    assert "Blind comparison by 1 person: of 10 prompts" in " ".join(text.getvalue().split())


def test_the_same_tally_again_makes_nothing_undone(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    typed(monkeypatch, "a")
    judge_pairs(run, 5, "ann")
    run.finish("report", "x", 1.0, {})
    typed(monkeypatch, "q")
    judge_pairs(run, 5, "ann")
    assert run.marker("report")


def test_nothing_judged_records_nothing(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    typed(monkeypatch, "q")
    judge_pairs(run, 5, "ann")
    assert "blind" not in run.metrics and run.marker("publish") and "Nothing was judged" in screen.getvalue()


def test_a_report_without_the_tally_is_not_taken_over_from_another_run(tmp_path, screen, monkeypatch):
    mine, other = run_of(tmp_path / "a"), run_of(tmp_path / "b")
    other["report.html"].write_text("a report")
    write_json(other["evaluation.done.json"], mine.marker("evaluation"))
    typed(monkeypatch, "a")
    assert mine.marker("report")
    judge_pairs(mine, 5, "ann")
    assert reuse(mine, "report", "fingerprint of report", ["evaluation"], [other]) is None
    other.add_metrics("blind", mine.metrics["blind"])
    assert reuse(mine, "report", "fingerprint of report", ["evaluation"], [other]) == other.folder


def test_an_evaluation_is_taken_over_with_its_tally_but_never_over_verdicts(tmp_path, screen, monkeypatch):
    donor = run_of(tmp_path / "a")
    typed(monkeypatch, *"ab")
    judge_pairs(donor, 5, "ann")
    taker = run_of(tmp_path / "b", stages=())
    taker.add_metrics("blind", {"stale": True})
    assert reuse(taker, "evaluation", "fingerprint of evaluation", [], [donor]) == donor.folder
    assert taker.metrics["blind"] == donor.metrics["blind"] and verdicts(taker) == verdicts(donor)
    taker.unfinish("evaluation")
    assert reuse(taker, "evaluation", "fingerprint of evaluation", [], [donor]) is None


# -- what is missing


def test_no_evaluation_a_missing_arm_and_an_empty_name_are_told(tmp_path, screen):
    run = run_of(tmp_path / "a", stages=())
    with pytest.raises(RunError, match="no finished evaluation") as e:
        judge_pairs(run, 5, "ann")
    assert "dsc evaluate" in str(e.value)
    run = run_of(tmp_path / "b", rows=[r for r in answers() if r["arm"] == "base"])
    with pytest.raises(RunError, match="no answers of: distilled"):
        judge_pairs(run, 5, "ann")
    with pytest.raises(ConfigError, match="--judge is empty"):
        judge_pairs(run_of(tmp_path / "c"), 5, " ")


def test_verdicts_are_kept_when_another_process_holds_the_run(tmp_path, screen, monkeypatch):
    run = run_of(tmp_path)
    typed(monkeypatch, *"ab")
    with Run(tmp_path).lock(), pytest.raises(RunError, match="in use by another process") as e:
        judge_pairs(run, 5, "ann")
    assert "verdicts are kept" in str(e.value) and len(verdicts(run)) == 2 and "blind" not in run.metrics


def dsc(*words: str, cwd: Path, lines: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsc_hub", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_verb_reads_lines_from_a_pipe_and_finds_the_run_by_its_recipe(tmp_path):
    run = run_of(tmp_path / "runs" / "quickstart" / "abc")
    done = dsc("blind", "quickstart", "-n", "5", cwd=tmp_path, lines="a\nx\nt\n")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "of 2 prompts in 2 groups" in " ".join(done.stdout.split()) and "none of A, B, t, q" in done.stdout
    assert [r["judge"] for r in verdicts(run)] == ["anonymous"] * 2
    done = dsc("blind", str(run.folder), "-n", "2", cwd=tmp_path)
    assert done.returncode == 0 and "All 2 pairs are judged" in done.stdout


def test_the_verb_says_in_one_message_what_is_missing(tmp_path):
    run = run_of(tmp_path / "runs" / "quickstart" / "abc", stages=())
    for words, told in ((("nosuch",), "neither a run folder"), ((str(run.folder),), "no finished evaluation")):
        done = dsc("blind", *words, cwd=tmp_path)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_the_count_so_far_is_printed_as_json_without_asking(tmp_path):
    run = run_of(tmp_path / "runs" / "quickstart" / "abc")
    none_yet = dsc("blind", str(run.folder), "--json", cwd=tmp_path)
    assert none_yet.returncode == 0 and json.loads(none_yet.stdout)["verdicts"] == 0
    assert dsc("blind", str(run.folder), "-n", "3", cwd=tmp_path, lines="a\nb\nt\n").returncode == 0
    found = json.loads(dsc("blind", str(run.folder), "--json", cwd=tmp_path).stdout)
    assert (found["prompts"], found["verdicts"], found["tie"]) == (3, 3, 1)
