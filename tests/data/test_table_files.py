"""Files of prompts and texts as people have them: each is read, or refused with what to do."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config.sampling import PromptsConfig
from dsc_hub.data import prompts
from dsc_hub.data.table_files import read_rows, read_table
from dsc_hub.errors import DataError

ROWS = [{"prompt": f"Say {n}; then {n + 1}, please.", "topic": f"t{n}"} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
QUOTED = "".join(f'"{row["prompt"]}",{row["topic"]}\n' for row in ROWS)


def with_delimiter(delimiter: str) -> str:
    return f"prompt{delimiter}topic\n" + QUOTED.replace('",', f'"{delimiter}')


READ = {
    "lines.jsonl": LINES,
    "LINES.JSONL": LINES,
    "lines.ndjson": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "comma.csv": with_delimiter(","),
    "semicolon.csv": with_delimiter(";"),
    "tab.csv": with_delimiter("\t"),
    "bar.CSV": with_delimiter("|"),
    "tab.tsv": with_delimiter("\t"),
    "carriage.csv": with_delimiter(",").replace("\n", "\r\n"),
    "blank lines.csv": "\n\n" + with_delimiter(",").replace("\n", "\n\n"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_is_read_by_its_kind(tmp_path: Path, name: str, packed: bool):
    path = tmp_path / (f"{name}.gz" if packed else name)
    content = READ[name].encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert list(read_table(path, ["prompt", "topic"])) == ROWS
    section = PromptsConfig.model_validate({"path": path.name, "group_column": "topic"})
    loaded, _ = prompts.load_prompts(section, tmp_path, 0)
    assert sorted(p.text for p in loaded) == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("bom", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_a_byte_order_mark_says_how_a_text_is_encoded(tmp_path: Path, bom: bytes):
    encoding = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}[bom]
    path = tmp_path / "p.tsv"
    path.write_bytes(bom + with_delimiter("\t").replace("Say", "Säg").encode(encoding))
    assert next(iter(read_table(path)))["prompt"] == "Säg 0; then 1, please."


def test_a_cell_may_be_long_hold_lines_and_lack(tmp_path: Path):
    path = tmp_path / "p.csv"
    path.write_text(f'prompt,topic\n"{"word " * 100_000}\nend",a\nshort\n')
    first, second = read_table(path)
    assert len(first["prompt"]) > 500_000 and first["prompt"].endswith("\nend")
    assert second == {"prompt": "short", "topic": None}


def test_what_separates_the_cells_is_said_unless_it_is_a_comma(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, delimiter in (("a.csv", ","), ("b.csv", ";")):
        (tmp_path / name).write_text(with_delimiter(delimiter))
        list(read_table(tmp_path / name, ["prompt"]))
    said = capsys.readouterr().err
    assert "b.csv: the cells are separated by ';'" in said and "a.csv" not in said


def test_lines_that_hold_brackets_commas_or_numbers_are_texts(tmp_path: Path):
    lines = [
        "One; two.",
        "[Scene: a prompt, a stage] Go on.",
        "{name}, say hello",
        '{"a": 1}',
        "3",
        "prompt, please, the next one",
        "a carriage\rreturn, alone",
    ]
    (tmp_path / "p.txt").write_bytes("\n".join(lines).encode())
    assert [row["text"] for row in read_rows(tmp_path / "p.txt", "text")] == lines
    (tmp_path / "notes.prompts").write_text("A line.\n")
    assert list(read_rows(tmp_path / "notes.prompts", "text")) == [{"text": "A line."}]


REFUSED: dict[str, tuple[bytes, str]] = {
    "p.xlsx": (b"PK\3\4", "a spreadsheet: export it as CSV"),
    "p.XLS": (b"", "a spreadsheet"),
    "p.feather": (b"", "save it as Parquet"),
    "p.pkl": (b"", "can run code: save it as JSON lines"),
    "p.zip": (b"", "packed: unpack it"),
    "p.jsonl.zst": (b"", "packed: unpack it"),
    "p.sqlite": (b"", "a database"),
    "p.pdf": (b"", "a document"),
    "p.yaml": (b"", "YAML: save it as JSON lines"),
    "object.json": (json.dumps({"data": ROWS}, indent=1).encode(), r"one object with the keys \['data'\]"),
    "broken.json": (b'[{"prompt": "a"},', "broken.json is not JSON"),
    "texts.json": (b'["a", "b"]', "item 1: expected an object, got str"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
    "lines.txt": (LINES.encode(), "looks like JSON"),
    "array.txt": (json.dumps(ROWS, indent=2).encode(), "looks like JSON"),
    "comma.txt": (with_delimiter(",").encode(), "looks like CSV"),
    "tab": (with_delimiter("\t").encode(), "looks like CSV"),
    "semicolons.txt": (
        b"Text;Product\nA kettle; red;Aqua\n".replace(b"; red", b"") + b"A lamp;Lumen\n",
        "looks like CSV",
    ),
    "tabs.txt": (b"Text\tProduct\tNote\nA kettle\tAqua\t1,5\nA lamp\tLumen\t2\n", "looks like CSV"),
    "renamed.csv": (b"PK\x03\x04\x14", "is an archive, as a spreadsheet"),
    "other.csv": (b'Text;Product\n"A; kettle";Aqua\n', r"no column 'prompt'; it has \['Product', 'Text'\]"),
    "twice.csv": (b"prompt,prompt\na,b\n", "has the column 'prompt' 2 times"),
    "open.csv": (b'prompt,topic\n"a",1\n"b,2\nc,3\n', "a quote is never closed, in the row that begins at line 3"),
    "quote.csv": (b'prompt,topic\n"a" he said,1\n', "row that begins at line 2"),
    "wide.csv": (b"prompt\nWrite a review, please\n", "2 cells, more cells than the header, which has 1"),
    "column.csv": (b"question;topic\na;b\n", "no column 'prompt'"),
    "latin.csv": ("prompt\nécrire\n".encode("cp1252"), r"not UTF-8 text: .* in line 2, b'\\xe9'"),
    "utf16.txt": ("Say a.\nSay b.\n".encode("utf-16-le"), "as UTF-16 without a byte order mark does"),
    "cut16.txt": (codecs.BOM_UTF16_LE + b"a", "not UTF-16 text"),
    "zeros.txt": (b"Say a.\nSay \0b.\n", "1 zero bytes, as a damaged or binary file does"),
    "p.jsonl.gz": (LINES.encode(), "can't be unpacked as gzip"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-12], "can't be unpacked as gzip"),
    "p.parquet.gz": (gzip.compress(b"PAR1"), "Unpack it: Parquet is packed inside"),
    "p.parquet": (b"nonsense", "can't be read as Parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("reads", ["prompts", "score"])
def test_a_file_that_can_not_be_read_is_refused_with_what_to_do(tmp_path: Path, name: str, reads: str):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)

    def read() -> Any:
        if reads == "score":
            return list(read_rows(tmp_path / name, "prompt"))
        try:
            section = PromptsConfig.model_validate({"path": name})
        except ValueError as e:  # by its name alone
            raise DataError(str(e).split("[type=")[0]) from None
        return prompts.load_prompts(section, tmp_path, 0)

    with pytest.raises(DataError, match=message) as error:
        read()
    assert name in str(error.value) and len(str(error.value)) < 400


def test_values_of_templates_are_no_table(tmp_path: Path):
    (tmp_path / "films.csv").write_text("prompt,year\nAlien,1979\n")
    section = PromptsConfig.model_validate({"templates": ["Praise {value}."], "values": "films.csv"})
    with pytest.raises(DataError, match=r"films.csv is a table, expected a text file"):
        prompts.load_prompts(section, tmp_path, 0)


def test_who_only_samples_needs_no_test_prompts(tmp_path: Path):
    (tmp_path / "p.txt").write_text("".join(f"Say {n}.\n" for n in range(5)))
    shares = {"train": 0.8, "validation": 0.2, "test": 0}
    loaded, _ = prompts.load_prompts(PromptsConfig.model_validate({"path": "p.txt", "split": shares}), tmp_path, 0)
    assert sorted(p.split for p in loaded) == ["train"] * 4 + ["validation"]
    shares = {"train": 1, "validation": 0, "test": 0}
    loaded, _ = prompts.load_prompts(PromptsConfig.model_validate({"path": "p.txt", "split": shares}), tmp_path, 0)
    assert {p.split for p in loaded} == {"train"}
