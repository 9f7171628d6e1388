"""The report: one page that says what the numbers allow, shows absence as absence, and lets no foreign text act."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dsc_hub.errors import RunError
from dsc_hub.report import formatting, tables, texts, verdicts
from dsc_hub.report.page import build_page, step_rows
from dsc_hub.runs.facts import RunFacts
from dsc_hub.runs.metrics_schema import Difference, Evaluation, Metrics, Sampling, ScoreDescription
from tests import fixture_run

HOSTILE = (
    "<script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(1)></div></section><a href='javascript:1'>x</a>"
    '" onload="x $\\frac$ _ {{ 777*777 }} ]]></svg><style>*{display:none}</style>'
)


class Page(HTMLParser):
    """The page's tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run) -> Page:
    build_page(run)
    return Page(run["report.html"].read_text(encoding="utf-8"))


def difference(mean, low, high, p=0.02, n=40, groups=10, **more):
    values = {"mean": mean, "low": low, "high": high, "p": p, "p_holm": p, "detectable": 0.2, "n": n, "groups": groups}
    return Difference(**values, wins=0, ties=0, losses=0, **more)


def evaluation_in(metrics) -> Evaluation:
    return Metrics.model_validate(metrics).evaluation


SCORE = ScoreDescription(name="sentiment (vader)", unit="polarity", higher_is_better=True)


def test_an_interval_without_zero_is_no_difference_if_the_adjusted_p_says_otherwise():
    """Distilled "beat" base with p 0.530 after Holm."""
    verdict = verdicts.judge_difference("distilled - base", difference(0.3, 0.01, 0.6, p=0.53), SCORE, 0.95)
    assert (
        verdict.kind == "unclear"
        and verdict.sentence.startswith("No difference shown")
        and "p 0.530" in verdict.sentence
    )
    assert (
        verdicts.judge_difference("distilled - base", difference(0.3, 0.01, 0.6, p=0.049), SCORE, 0.95).kind == "better"
    )
    assert (
        verdicts.judge_difference("distilled - base", difference(0.3, 0.01, 0.6, p=None), SCORE, 0.95).kind == "unclear"
    )


def test_where_arms_differ_in_what_is_unscored_the_verdict_gives_the_bounds():
    d = difference(0.3, 0.2, 0.4, p=0.001, if_missing_worst=-0.05, if_missing_best=0.41)
    said = verdicts.judge_difference("distilled - base", d, SCORE, 0.95).sentence
    assert "with what is unscored counted as worst \N{MINUS SIGN}0.05, as best 0.41" in said
    assert (
        "unscored" not in verdicts.judge_difference("distilled - base", difference(0.3, 0.2, 0.4), SCORE, 0.95).sentence
    )


def test_the_page_says_the_verdict_and_returns_its_size(tmp_path):
    run = fixture_run.write(tmp_path)
    result = build_page(run)
    assert result == {"bytes": run["report.html"].stat().st_size, "plots": 7}
    assert (
        "Distilled beats base on sentiment (vader) by 0.31 (95 % interval 0.21 to 0.42, p 0.003 after Holm; 39 pairs of answers in 10 groups)."
        in page_of(run).text
    )


def test_the_plots_for_the_cards_are_written_and_small(tmp_path):
    run = fixture_run.write(tmp_path)
    build_page(run)
    sizes = {p.name: p.stat().st_size for p in run["cards"].glob("*.png")}
    assert sorted(sizes) == ["arms.png", "loss.png", "steps.png"]
    assert all(1_000 < size < 100_000 for size in sizes.values())


def test_the_same_run_gives_the_same_bytes(tmp_path):
    one, two = fixture_run.write(tmp_path / "one"), fixture_run.write(tmp_path / "two")
    build_page(one), build_page(two)
    assert one["report.html"].read_bytes() == two["report.html"].read_bytes()
    assert one["cards/arms.png"].read_bytes() == two["cards/arms.png"].read_bytes()


@pytest.mark.parametrize(
    ("d", "higher_is_better", "kind", "words"),
    [
        (
            difference(0.31, 0.20, 0.42, 0.001),
            True,
            "better",
            "Distilled beats base on sentiment (vader) by 0.31 (95 % interval 0.20 to 0.42, p 0.001 after Holm; 40 pairs of answers in 10 groups).",
        ),
        (
            difference(-0.31, -0.42, -0.20),
            True,
            "worse",
            "Distilled is worse than base on sentiment (vader) by 0.31 (95 % interval 0.20 to 0.42, p 0.020 after Holm; 40 pairs of answers in 10 groups).",
        ),
        (
            difference(-0.31, -0.42, -0.20),
            False,
            "better",
            "Distilled beats base on sentiment (vader) by 0.31 (95 % interval 0.20 to 0.42, p 0.020 after Holm; 40 pairs of answers in 10 groups).",
        ),
        (
            difference(0.31, 0.20, 0.42),
            False,
            "worse",
            "Distilled is worse than base on sentiment (vader) by 0.31 (95 % interval 0.20 to 0.42, p 0.020 after Holm; 40 pairs of answers in 10 groups).",
        ),
        (
            difference(0.05, -0.10, 0.20, 0.4),
            True,
            "unclear",
            "No difference shown between distilled and base on sentiment (vader): 0.05 (95 % interval −0.10 to 0.20, p 0.400 after Holm; 40 pairs of answers in 10 groups).",
        ),
        (
            difference(0.05, 0.0, 0.10, 0.05),
            True,
            "unclear",
            "No difference shown between distilled and base on sentiment (vader): 0.05 (95 % interval 0.00 to 0.10, p 0.050 after Holm; 40 pairs of answers in 10 groups).",
        ),
        (
            difference(0.05, None, None, None),
            True,
            "unmeasured",
            "Distilled minus base on sentiment (vader) is 0.05, without an interval: no difference can be claimed.",
        ),
        (
            difference(None, None, None, None, reason="no answers"),
            True,
            "unmeasured",
            "Not measured: distilled against base on sentiment (vader) (no answers).",
        ),
    ],
)
def test_only_an_interval_without_zero_is_called_a_difference(d, higher_is_better, kind, words):
    assert verdicts.judge_difference(
        "distilled - base", d, SCORE.model_copy(update={"higher_is_better": higher_is_better}), 0.95
    ) == verdicts.ComparisonVerdict(kind, words)


@pytest.mark.parametrize(
    ("here", "update", "is_said"),
    [
        ((1, 20), {}, True),
        ((14, 20), {}, False),  # as often as 300 of 512
        ((3, 5), {}, False),
        ((0, 3), {}, False),  # too few to say
        ((1, 20), {"evaluation": {"weights": "original"}}, False),
        ((1, 20), {"distill": {"method": "lora"}}, False),
        ((1, 20), {"chain": {"acceptance": "always"}}, False),  # counts another thing
        (
            (1, 20),
            {"serving": {"endpoints": ["http://127.0.0.1:1/v1"]}},
            True,
        ),  # where the adapter is, the base is, too
        ((1, 20), {"arms": ["base", "self_critique"]}, False),  # no adapter, no rounding
        ((1, 20), {"rounds": 2}, False),  # the chains may be of another model
        ((1, 20), {"chain": {"good_enough": 0.9}}, True),  # in the evaluation, too
        (
            (1, 20),
            {"dataset": {"rows": 72}, "chain": {"critique": ["a", "b"], "revision": ["c", "d"]}},
            False,
        ),  # the better pair of texts was drawn more often
    ],
)
def test_a_base_that_rounding_made_weaker_is_told_first(here, update, is_said):
    """Of 512 sampled chains 300 accepted their first revision; `here` changed an answer in the evaluation."""
    data, facts = fixture_run.metrics(), fixture_run.facts()
    data["sampling"] |= {"chains": 512, "finished": 512}
    data["sampling"]["steps"][0] |= {"proposals": 450, "accepted": 300, "rejected": {"not accepted by the rule": 150}}
    wins, n = here
    chains = difference(0.1, -0.1, 0.3, 0.5).model_dump() | {"wins": wins, "ties": n - wins, "losses": 0, "n": n}
    data["evaluation"]["differences"]["self_critique - base"] = {"reward": chains, "second": chains, "third": chains}
    for section, values in update.items():
        if section != "arms":
            facts["recipe"][section] = facts["recipe"][section] | values if isinstance(values, dict) else values
    metrics = Metrics.model_validate(data)
    arms = {arm: metrics.evaluation.arms["base"] for arm in update.get("arms", metrics.evaluation.arms)}
    metrics = metrics.model_copy(update={"evaluation": metrics.evaluation.model_copy(update={"arms": arms})})
    said = verdicts.caveats(RunFacts.model_validate(facts), metrics, metrics.evaluation)
    assert [s.startswith("The base is weaker here than where the chains were sampled: 300 of 512") for s in said] == [
        is_said,
        *[False] * (len(said) - 1),
    ]


def test_the_headline_tells_when_the_second_scorer_does_not_follow():
    metrics = fixture_run.metrics()
    metrics["evaluation"]["differences"]["distilled - base"]["second"] = difference(0.01, -0.04, 0.06, 0.7).model_dump()
    assert "The second scorer shows none: No difference shown" in verdicts.headline(evaluation_in(metrics))
    worse = difference(-0.1, -0.2, -0.05, 0.001).model_dump()
    metrics["evaluation"]["differences"]["distilled - base"]["second"] = worse
    assert "The second scorer says otherwise: Distilled is worse" in verdicts.headline(evaluation_in(metrics))
    unmeasured = difference(None, None, None, None, reason="nothing scored").model_dump()
    metrics["evaluation"]["differences"]["distilled - base"]["second"] = unmeasured
    assert "The second scorer says nothing: Not measured" in verdicts.headline(evaluation_in(metrics))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0.00"),
        (-0.05, "−0.05"),
        (0.0004, "0.0004"),
        (-0.0004, "−0.0004"),
        (3.94, "3.94"),
    ],
)
def test_an_absent_number_is_never_written_as_zero_nor_a_small_one(value, text):
    assert formatting.number(value) == text


def test_what_was_not_measured_is_a_dash_with_its_reason(tmp_path):
    metrics = fixture_run.metrics()
    absent = {
        "mean": None,
        "low": None,
        "high": None,
        "n": 0,
        "groups": 0,
        "reason": "the scorer's package is missing",
    }
    metrics["evaluation"]["arms"]["distilled"]["second"] = absent | {"unscored": 40, "failed": 0}
    metrics["evaluation"]["differences"]["distilled - base"]["second"] = absent | {
        "p": None,
        "p_holm": None,
        "detectable": None,
        "wins": 0,
        "ties": 0,
        "losses": 0,
    }
    metrics["distill"]["validation_loss"] = None
    text = page_of(fixture_run.write(tmp_path, run_metrics=metrics)).text
    assert "– (the scorer's package is missing)" in text
    assert "validation – (not measured)" in text
    assert "Not measured: distilled against base on sentiment (textblob)" in text


def test_an_unscored_answer_is_shown_as_unscored(tmp_path):
    rows = [
        {
            "arm": arm,
            "prompt_id": "a",
            "sample": 0,
            "group": "g",
            "prompt": "P",
            "text": "T",
            "reward": None,
            "second": None,
            **fixture_run.REST_OF_AN_ANSWER,
        }
        for arm in ("base", "distilled")
    ]
    rows[1]["unscored_reason"] = "empty text"
    text = page_of(fixture_run.write(tmp_path, answers=rows)).text
    assert text.count("reward – (unscored)") == 1 and text.count("reward – (unscored: empty text)") == 1


def test_proposals_that_nothing_accounts_for_are_shown(tmp_path):
    metrics = fixture_run.metrics()
    assert "not accounted for" not in page_of(fixture_run.write(tmp_path / "whole", run_metrics=metrics)).text
    metrics["sampling"]["steps"][0]["accepted"] -= 17
    page = page_of(fixture_run.write(tmp_path / "short", run_metrics=metrics))
    assert "+ not accounted for" in page.text
    rows = step_rows(Metrics.model_validate(metrics).sampling.steps)
    assert [r["unexplained"] for r in rows] == [17, 0]
    assert all(r["proposals"] == r["accepted"] + sum(r["rejected"]) + r["unexplained"] for r in rows)


def hostile_run(folder):
    facts, metrics = fixture_run.facts(), fixture_run.metrics()
    facts["recipe"]["description"] = facts["recipe"]["chain"]["critique"] = facts["recipe"]["chain"][
        "revision"
    ] = facts["model"]["note"] = HOSTILE
    facts["hardware"] |= {"cpu": HOSTILE, "gpus": [HOSTILE]}
    facts["versions"][HOSTILE] = HOSTILE
    metrics["evaluation"]["served_on"] = HOSTILE
    metrics["evaluation"]["scores"]["reward"] |= {"name": HOSTILE, "unit": HOSTILE}
    metrics["sampling"]["steps"][0]["rejected"] = {HOSTILE: 30, "_hidden": 28}
    metrics["dataset"]["dropped"] = {HOSTILE: 3}
    rows = [
        {
            "arm": arm,
            "prompt_id": "a",
            "sample": 0,
            "group": HOSTILE,
            "prompt": HOSTILE,
            "text": HOSTILE,
            "reward": 0.1,
            "second": 0.1,
            **fixture_run.REST_OF_AN_ANSWER,
        }
        for arm in ("base", "distilled")
    ]
    return fixture_run.write(folder, run_facts=facts, run_metrics=metrics, answers=rows)


def test_foreign_text_stays_text(tmp_path):
    plain, hostile = page_of(fixture_run.write(tmp_path / "plain")), page_of(hostile_run(tmp_path / "hostile"))
    assert set(hostile.tags) <= set(plain.tags)
    assert {k for k, _ in hostile.attributes} <= {k for k, _ in plain.attributes}
    assert hostile.text.count("<script>alert(1)</script>") >= 12
    assert "{{ 777*777 }}" in hostile.text and "603729" not in hostile.text


def test_the_page_runs_its_own_script_alone_and_asks_for_nothing(tmp_path):
    for run in (fixture_run.write(tmp_path / "plain"), hostile_run(tmp_path / "hostile")):
        page = page_of(run)
        assert not {"img", "link", "iframe", "object", "embed", "a", "form", "base"} & set(page.tags)
        assert not [k for k, _ in page.attributes if k.startswith("on") or k in ("src", "href")]
        assert all(v.startswith("#") for k, v in page.attributes if k == "xlink:href")
        source = run["report.html"].read_text(encoding="utf-8")
        scripts = re.findall(r"<script([^>]*)>(.*?)</script>", source, flags=re.S)
        assert [kind for kind, _ in scripts] == [' type="application/octet-stream" id="data"', ""]
        allowed = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
            f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
        )
        assert ("content", policy) in page.attributes
        assert page.tags.count("svg") == 7 + 2  # two of them for phones, too


def test_every_id_on_the_page_is_there_once(tmp_path):
    ids = [v for k, v in page_of(fixture_run.write(tmp_path)).attributes if k == "id"]
    assert len(ids) > 20 and len(ids) == len(set(ids))


def test_a_missing_fact_is_an_error_with_its_stage(tmp_path):
    metrics = fixture_run.metrics()
    del metrics["distill"]["final_loss"]
    with pytest.raises(RunError, match=r"distill\.final_loss: Field required") as error:
        build_page(fixture_run.write(tmp_path, run_metrics=metrics))
    assert "distill.done.json" in error.value.hint


def test_a_run_that_stopped_after_sampling_still_has_a_report(tmp_path):
    metrics = fixture_run.metrics()
    for stage in ("dataset", "distill", "evaluation", "test_set", "stages"):
        del metrics[stage]
    text = page_of(fixture_run.write(tmp_path, run_metrics=metrics, answers=[])).text
    assert "Not evaluated" in text and "238 of 240 chains finished" in text


def test_a_run_without_a_second_scorer_says_so(tmp_path):
    facts, metrics = fixture_run.facts(), fixture_run.metrics()
    facts["recipe"]["second_scorer"] = None
    for part in (
        metrics["evaluation"]["scores"],
        *metrics["evaluation"]["arms"].values(),
        *metrics["evaluation"]["differences"].values(),
    ):
        del part["second"]
    text = page_of(fixture_run.write(tmp_path, run_facts=facts, run_metrics=metrics)).text
    assert "no second scorer was recorded" in text and "Second scorer" not in text


def test_the_folder_of_the_model_is_not_shown(tmp_path):
    facts = fixture_run.facts()
    facts["model"] |= {"source": fixture_run.MODEL_FOLDER, "id": fixture_run.MODEL_FOLDER}
    page = page_of(fixture_run.write(tmp_path, run_facts=facts))
    assert "a local folder" in page.text and "/home/" not in page.text


def printed(metrics, width=120):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.closing_table(evaluation_in(metrics), Metrics.model_validate(metrics).blind))
    return console.export_text()


def test_the_terminal_table_shows_every_arm_with_interval_and_counts():
    text = printed(fixture_run.metrics())
    assert re.search(r"base +−0.05 \(−0.13 to 0.03\) +0.02 \(−0.03 to 0.07\) +39 / 10 +1 +0", text)
    assert re.search(r"distilled − base +0.31 \(0.21 to 0.42\) +0.12 \(0.06 to 0.18\) +39 / 10", text)
    assert "p < 0.001" in text


def test_the_terminal_table_reads_no_markup_from_names():
    metrics = copy.deepcopy(fixture_run.metrics())
    metrics["evaluation"]["scores"]["reward"]["name"] = "[bold]x[/]"
    assert "[bold]x[/]" in printed(metrics, 160)


def test_what_got_worse_besides_the_scores_is_told():
    facts, metrics = RunFacts.model_validate(fixture_run.facts()), fixture_run.metrics()

    def caveats() -> str:
        return " ".join(verdicts.caveats(facts, Metrics.model_validate(metrics), evaluation_in(metrics)))

    told = caveats()
    assert "ends by itself less often than the base (25 % against 30 % of answers)" in told
    assert "not clean than of the base's (81 % against 77 %)" in told
    metrics["evaluation"]["arms"]["distilled"] |= {"stops_by_itself": 0.31, "defects": 0.5}
    told = caveats()
    assert "less often" not in told and "not clean than" not in told


def test_what_sampling_cost_is_told_as_far_as_it_is_known():
    from dsc_hub.report.formatting import sampling_cost

    sampled = Metrics.model_validate(fixture_run.metrics()).sampling.model_dump()
    sampled |= {"new_tokens": 49152, "prompt_tokens": 79745, "seconds": 118.2, "tokens_per_s": 415.8}
    sampled |= dict.fromkeys(("cache_rate", "processor_hours", "processors", "scoring_s", "retries"))
    assert sampling_cost(Sampling(**sampled)) == "49,152 tokens written, 79,745 read; 416 tokens/s; 1 min 58 s"
    more = {
        "cache_rate": 0.8125,
        "processor_hours": 0.0657,
        "processors": "core",
        "scoring_s": 3.2,
        "retries": {"503": 2},
    }
    assert sampling_cost(Sampling(**sampled | more)) == (
        "49,152 tokens written, 79,745 read (81 % from the prefix cache); 416 tokens/s; 1 min 58 s; 0.07 core hours; "
        "scorers worked 3 s beside it; sent again: 2 503"
    )
    killed = sampled | {"seconds": None, "processor_hours": None, "retries": {}}
    assert sampling_cost(Sampling(**killed)) == "49,152 tokens written, 79,745 read; 416 tokens/s; sent again: nothing"


def test_chains_above_those_of_a_page_go_into_pages_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_CHAINS", 4)
    run = fixture_run.write(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "chains-9.html").write_text("of an earlier, longer run")
    build_page(run)
    assert len(run["chains.jsonl"].read_text().splitlines()) == 10
    pages = {p.name: p.read_text() for p in (tmp_path / "report").iterdir()}
    assert sorted(pages) == ["chains-2.html", "chains-3.html"]
    first = run["report.html"].read_text()
    assert "the chains 1 to 4 of 10; the others are in report/chains-2.html, report/chains-3.html." in first
    assert "the chains 9 to 10 of 10; the others are in ../report.html, chains-2.html." in pages["chains-3.html"]
    assert "side by side" in first and "side by side" not in pages["chains-2.html"]


def test_a_dataset_that_is_being_written_is_no_traceback(tmp_path):
    run = fixture_run.write(tmp_path)
    for file in (run["dataset"] / "sft").glob("*.parquet"):
        file.write_bytes(b"PAR1 half")
    run.unfinish("dataset")
    assert build_page(run)["plots"] == 6  # without what became of the chains


def priced_run(folder):
    """A run with prices, at a server that did not take the temperature."""
    facts, metrics = fixture_run.facts(), fixture_run.metrics()
    metrics["sampling"]["cost_usd"], metrics["evaluation"]["cost_usd"] = 12.3, 0.0042
    for arm in metrics["evaluation"]["arms"].values():
        arm["cost_usd"] = 0.0037
    server = {"place": "serving.endpoints", "model": "m-1", "left_out": ["temperature", "seed"]}
    facts["servers"] = [server | {"changes": ["temperature"]}]
    return fixture_run.write(folder, run_facts=facts, run_metrics=metrics)


UNSET = "Not as the recipe says: m-1 (serving.endpoints) used its own temperature, which could not be set at its server"


def test_the_page_shows_money_where_there_is_a_price_and_what_a_server_did_not_take(tmp_path):
    text = page_of(priced_run(tmp_path / "priced")).text
    assert "12.30 USD" in text and "0.0042 USD for all arms" in text and "0.0037 USD" in text and UNSET in text
    text = page_of(fixture_run.write(tmp_path / "plain")).text
    assert "USD" not in text and "Not as the recipe says" not in text


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (1234.5, "1,234.50 USD"),
        (0.1, "0.10 USD"),
        (0.0042, "0.0042 USD"),
        (0.00000123, "0.0000012 USD"),
        (0, "0.00 USD"),
        (None, "–"),
    ],
)
def test_small_amounts_never_look_like_nothing(usd, text):
    assert formatting.money(usd) == text


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "trained on 6 rows: so few teach little"),
        ({"rows": 1, "validation_rows": 0}, "trained on 1 row, and no validation row shows what it learned"),
        ({"rows": 81}, ""),
        ({"rows": 81, "final_loss": 4.153}, "The loss rose in training, from 2.114 to 4.153"),
        ({"rows": 81, "first_loss": None, "final_loss": None}, ""),
    ],
)
def test_a_training_that_can_not_have_taught_much_is_a_caveat(tmp_path, changed, told: str):
    run = fixture_run.write(tmp_path)
    metrics = run.metrics | {"distill": run.metrics["distill"] | changed}
    sentences = verdicts.caveats(run.facts, Metrics.model_validate(metrics), evaluation_in(metrics))
    found = [s for s in sentences if "adapter was trained on" in s or "loss rose" in s]
    assert len(found) == bool(told) and all(told in s for s in found)
