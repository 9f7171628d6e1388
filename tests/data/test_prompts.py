"""Prompts: loaded, cleaned, split by group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsc_hub.config import recipe_files
from dsc_hub.config.sampling import PromptsConfig, SplitShares
from dsc_hub.data import prompts
from dsc_hub.errors import DataError
from dsc_hub.pipeline import preflight


def section(**keys: object) -> PromptsConfig:
    return PromptsConfig.model_validate(keys)


def test_all_phrasings_of_a_film_lie_in_one_split(tmp_path: Path):
    (tmp_path / "films.txt").write_text("\n".join(f"Film {i}" for i in range(40)))
    found, _ = prompts.load_prompts(
        section(templates=["Praise {value}.", "Tell of {value}."], values="films.txt"), tmp_path, 0
    )
    by_group: dict[str, set[str]] = {}
    for p in found:
        by_group.setdefault(p.group, set()).add(p.split)
    assert len(found) == 80 and all(len(s) == 1 for s in by_group.values())
    assert [sum(s == {name} for s in by_group.values()) for name in ("train", "validation", "test")] == [28, 6, 6]


def test_order_of_the_file_does_not_move_a_film_to_another_split():
    groups = [f"g{i}" for i in range(30)]
    assert prompts.split_groups(groups, SplitShares(), 3) == prompts.split_groups(
        list(reversed(groups)), SplitShares(), 3
    )
    assert prompts.split_groups(groups, SplitShares(), 3) != prompts.split_groups(groups, SplitShares(), 4)


def test_duplicates_by_normalised_text_are_dropped_and_counted(tmp_path: Path):
    (tmp_path / "p.txt").write_text(
        "Write a review.\nwrite  a review.\nWRITE A REVIEW.\nWrite a poem.\nWrite a song.\n\n"
    )
    found, dropped = prompts.load_prompts(section(path="p.txt"), tmp_path, 0)
    assert len(found) == 3
    assert dropped.as_metrics() == {"read": 5, "duplicates_dropped": 2, "overlapping_dropped": 0}
    assert dropped.first_duplicates[0] == prompts.Drop("write  a review.", "Write a review.")


@pytest.mark.parametrize(
    "texts",
    [
        ["What is 3 + 2?", "What is 3 \N{MINUS SIGN} 2?", "What is 3 * 2?"],
        ["Explain C.", "Explain C++.", "Explain C#."],
        ["\N{GRINNING FACE}", "\N{CRYING FACE}", "\N{SNOWMAN}"],
        ["\u0915\u093f", "\u0915\u0940", "\u0915\u0941"],  # ki, kii, ku: one letter with three vowel signs
        ["\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19", "\u0e01\u0e38\u0e19"],  # Thai: kin, kan, kun
    ],
    ids=["arithmetic", "C", "emoji", "Hindi", "Thai"],
)
def test_texts_that_differ_in_a_sign_are_no_duplicates(tmp_path: Path, texts: list[str]):
    (tmp_path / "p.txt").write_text("\n".join([*texts, texts[0]]), encoding="utf-8")
    found, dropped = prompts.load_prompts(section(path="p.txt"), tmp_path, 0)
    assert {p.text for p in found} == set(texts) and dropped.duplicates == 1


def test_a_row_without_a_group_is_its_own_and_counted(tmp_path: Path):
    rows = [{"prompt": f"Ask about thing {i}.", "topic": None if i % 2 else f"t{i}", "kind": None} for i in range(12)]
    rows[3]["topic"] = "  "
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, dropped = prompts.load_prompts(
        section(path="p.jsonl", group_column="topic", kind_column="kind"), tmp_path, 0
    )
    assert len({p.group for p in found}) == 12 and dropped.ungrouped == 6 and {p.kind for p in found} == {""}
    assert {p.group for p in found if "thing 3" in p.text} == {"Ask about thing 3."}


@pytest.mark.parametrize("named", ["column", "group_column", "kind_column"])
def test_columns_of_what_has_none_are_refused(named: str):
    with pytest.raises(ValueError, match=f"{named}: p.txt is read a prompt a line"):
        section(path="p.txt", **{named: "topic"})
    with pytest.raises(ValueError, match=f"{named}: templates have no columns"):
        section(templates=["Praise {value}."], values="films.txt", **{named: "topic"})


def test_phrasings_of_a_topic_are_kept_where_groups_keep_topics_apart(tmp_path: Path):
    """Five topics in four wordings each: with few training topics the wording stands in two of them only, and looks
    like a copy."""
    topics = ("the water cycle", "photosynthesis", "gravity", "magnets", "volcanoes")
    wordings = (
        "In simple words that a child of ten would understand, explain {}.",
        "Write a short and friendly text for a school book about {}.",
        "What are the three most important things to know about {}?",
        "Tell a story in which somebody learns for the first time about {}.",
    )
    rows = [{"prompt": w.format(t), "topic": t} for t in topics for w in wordings]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shares = {"train": 0.4, "validation": 0.2, "test": 0.4}
    found, dropped = prompts.load_prompts(section(path="p.jsonl", group_column="topic", split=shares), tmp_path, 0)
    assert len(found) == 20 and dropped.overlaps == 0
    # asked for, the check says which and why
    asked = section(path="p.jsonl", group_column="topic", split=shares, drop_overlaps=True)
    with pytest.raises(DataError, match=r"no prompt is left for the split(?s:.*)drop_overlaps=false"):
        prompts.load_prompts(asked, tmp_path, 0)
    off = section(path="p.jsonl", split=shares, drop_overlaps=False)
    assert prompts.load_prompts(off, tmp_path, 0)[1].overlaps == 0


def test_a_held_out_near_copy_of_a_training_prompt_is_dropped_but_common_wording_is_not(tmp_path: Path):
    wording = "Please write a short and honest review of the following film for our readers"
    lines = [f"{wording}: film number {i}" for i in range(20)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    found, dropped = prompts.load_prompts(section(path="p.txt"), tmp_path, 0)
    assert len(found) == 20 and dropped.overlaps == 0
    story = "the old man rowed out alone before dawn and said nothing to the boy"
    held_out = next(p.text for p in found if p.split == "test")
    trained = next(p.text for p in found if p.split == "train")
    rows = [{"prompt": text + (f" {story}" if text in (held_out, trained) else ""), "group": text} for text in lines]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, dropped = prompts.load_prompts(
        section(path="p.jsonl", group_column="group", drop_overlaps=True), tmp_path, 0
    )
    assert dropped.overlaps == 1 and held_out not in {p.group for p in found}
    (drop,) = dropped.first_overlaps
    assert drop.text.startswith(held_out) and drop.kept.startswith(trained) and len(drop.shared.split()) == 8


def test_a_held_out_prompt_of_the_same_words_is_dropped_also_where_groups_are_named(tmp_path: Path):
    rows = [{"prompt": f"Say no to thing {i}.", "topic": f"t{i}"} for i in range(20)]
    shares = {"train": 0.5, "validation": 0.1, "test": 0.4}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, _ = prompts.load_prompts(section(path="p.jsonl", group_column="topic", split=shares), tmp_path, 0)
    split = {p.text: p.split for p in found}
    held_out = next(t for t, s in split.items() if s == "test")
    trained = next(r for r in rows if split[r["prompt"]] == "train")
    rows[[r["prompt"] for r in rows].index(held_out)]["prompt"] = f"{trained['prompt'][:-1].upper()}!"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, dropped = prompts.load_prompts(section(path="p.jsonl", group_column="topic", split=shares), tmp_path, 0)
    assert dropped.overlaps == 1 and dropped.first_overlaps[0].kept == trained["prompt"]
    kept, _ = prompts.load_prompts(
        section(path="p.jsonl", group_column="topic", split=shares, drop_overlaps=False), tmp_path, 0
    )
    assert len(kept) == 20


def test_a_group_that_the_chain_asks_for_and_prompts_do_not_have_is_a_problem(recipe_file: Path):
    r = recipe_files.load_recipe_file(recipe_file, ["chain.revision='Praise {group}.'"])
    assert "2 prompts have none" in preflight.without_group(r, 2)[0] and preflight.without_group(r, 0) == []
    assert preflight.without_group(recipe_files.load_recipe_file(recipe_file), 2) == []


def test_a_split_that_overlaps_away_is_an_error_not_an_empty_test_set(tmp_path: Path):
    story = "the old man rowed out alone before dawn and said nothing to the boy"
    (tmp_path / "p.txt").write_text("\n".join(f"{story} {i}" for i in range(3)))
    with pytest.raises(DataError, match="no prompt is left for the split"):
        prompts.load_prompts(section(path="p.txt"), tmp_path, 0)


@pytest.mark.parametrize("n", [3, 4, 5, 7, 20])
@pytest.mark.parametrize("shares", [(0.02, 0.94, 0.04), (0.2, 0.7, 0.1), (0.94, 0.03, 0.03), (0.1, 0.1, 0.8)])
def test_every_split_that_is_asked_for_gets_a_group(n: int, shares: tuple[float, float, float]):
    names = ("train", "validation", "test")
    splits = prompts.split_groups([f"g{i}" for i in range(n)], SplitShares(**dict(zip(names, shares, strict=True))), 0)
    assert set(splits.values()) == set(names) and len(splits) == n


def test_a_csv_that_loses_text_is_refused(tmp_path: Path):
    (tmp_path / "p.csv").write_text("prompt\nWrite a review, please\n")
    with pytest.raises(DataError, match="more cells than the header"):
        prompts.load_prompts(section(path="p.csv"), tmp_path, 0)
    (tmp_path / "p.csv").write_bytes("prompt\nécrire\n".encode("cp1252"))
    with pytest.raises(DataError, match="not UTF-8"):
        prompts.load_prompts(section(path="p.csv"), tmp_path, 0)
    (tmp_path / "p.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="p.parquet can.t be read as Parquet"):
        prompts.load_prompts(section(path="p.parquet"), tmp_path, 0)


def test_a_line_separator_inside_a_prompt_does_not_cut_it(tmp_path: Path):
    rows = [json.dumps({"prompt": f"one\u2028two {i}"}, ensure_ascii=False) for i in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found, _ = prompts.load_prompts(section(path="p.jsonl"), tmp_path, 0)
    assert len(found) == 5 and all("\u2028" in p.text for p in found)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables_are_read_by_column(tmp_path: Path, suffix: str):
    rows = [{"goal": f"do {i}", "topic": f"t{i % 5}"} for i in range(10)]
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows))
    elif suffix == "csv":
        path.write_text("goal,topic\n" + "\n".join(f"{r['goal']},{r['topic']}" for r in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    found, _ = prompts.load_prompts(section(path=path.name, column="goal", group_column="topic"), tmp_path, 0)
    assert sorted(p.text for p in found) == [f"do {i}" for i in range(10)] and {p.group for p in found} == {
        f"t{i}" for i in range(5)
    }


def test_a_missing_column_shows_the_columns_there_are(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"goal": "a", "target": "b"}\n')
    with pytest.raises(DataError, match=r"no column 'prompt'; it has \['goal', 'target'\]"):
        prompts.load_prompts(section(path="p.jsonl"), tmp_path, 0)


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no prompts"), ("\n \n", "holds no prompts"), ("only one\n", "can't be split")]
)
def test_too_few_prompts_are_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        prompts.load_prompts(section(path="p.txt"), tmp_path, 0)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="not found"):
        prompts.load_prompts(section(path="p.txt"), tmp_path, 0)
    (tmp_path / "p.txt").write_bytes(b"bad \xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        prompts.load_prompts(section(path="p.txt"), tmp_path, 0)


def test_a_column_says_of_what_kind_a_prompt_is(tmp_path: Path):
    rows = [{"prompt": f"Ask {i} about a thing.", "sort": "harmful" if i % 2 else "harmless"} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, _ = prompts.load_prompts(section(path="p.jsonl", kind_column="sort"), tmp_path, 0)
    assert {p.text: p.kind for p in found} == {r["prompt"]: r["sort"] for r in rows}
    assert {p.kind for p in prompts.load_prompts(section(path="p.jsonl"), tmp_path, 0)[0]} == {""}
    with pytest.raises(DataError, match=r"no column 'kind'(?s:.*)prompts\.kind_column"):
        prompts.load_prompts(section(path="p.jsonl", kind_column="kind"), tmp_path, 0)
