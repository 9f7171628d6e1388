"""Nothing that others wrote is obeyed by the terminal: escapes, cursor moves and turned lines are shown as replacement characters."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dsc_hub.cli import terminal
from dsc_hub.system import progress
from tests.conftest import RECIPE

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[1;31mred \x9b31m\u202eabc\u2066 back\rspace\x08\x7f"
OBEYED = [c for c in HOSTILE if not c.isprintable()]


def inert(text: str) -> bool:
    return not any(c in text for c in OBEYED)


def test_what_a_terminal_obeys_is_replaced_and_all_else_is_kept():
    assert progress.clean("a\tb\nc é 漢 🙂‍🙂 שלום\u200f") == "a\tb\nc é 漢 🙂‍🙂 שלום\u200f"
    cleaned = progress.clean(HOSTILE)
    assert inert(cleaned) and len(cleaned) == len(HOSTILE) and "red" in cleaned


def test_json_keeps_its_value():
    text = progress.clean_json(json.dumps({"a": HOSTILE}, ensure_ascii=False))
    assert inert(text) and json.loads(text) == {"a": HOSTILE}


@pytest.mark.parametrize("colour", [False, True])
def test_whatever_a_text_was_put_into_the_console_cleans_it(colour: bool):
    table = Table(HOSTILE, title=Text(HOSTILE))
    table.add_row(HOSTILE, end_section=True)
    file = io.StringIO()
    console = progress.CleanConsole(file=file, force_terminal=colour, color_system="standard" if colour else None)
    linked = Text("x", f"link {HOSTILE.replace(' ', '')}")
    for shown in (HOSTILE, "[/x] [link=\x1bc]a[/link]", linked, Text(HOSTILE, "bold red"), table, Panel(Text(HOSTILE))):
        console.print(shown)
    text = file.getvalue()
    assert "\x1b]" not in text and "\x1b[2J" not in text and inert(text.replace("\x1b", "") if colour else text)
    assert ("\x1b[1;31m" in text) is colour  # the console's own colours stay


def test_lines_and_the_log_are_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    progress.log_to(tmp_path / "log.txt")
    progress.say(HOSTILE)
    assert inert((tmp_path / "log.txt").read_text()) and inert(capsys.readouterr().err)


def test_both_consoles_are_of_the_kind():
    assert type(progress.console) is type(terminal.out) is progress.CleanConsole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": HOSTILE}, ()),
        ({HOSTILE: 1}, ()),
        ({"model": {"source": f"/{HOSTILE}"}}, ()),
        ({"reward": {"metric": "sentiment", "scorer": HOSTILE}}, ()),
        ({}, (f"{HOSTILE}=1",)),
        ({}, (f"chain.steps={HOSTILE}",)),
    ],
)
def test_errors_are_clean(dsc, recipe_file: Path, change: dict, words: tuple[str, ...]):
    recipe_file.write_text(yaml.safe_dump(yaml.safe_load(RECIPE) | change))
    done = dsc("plan", str(recipe_file), *words, code=2)
    assert done.stderr and inert(done.stdout + done.stderr), repr(done.stderr)


def test_an_error_of_yaml_itself_is_clean(dsc, recipe_file: Path):
    recipe_file.write_bytes(b"name: \x1b]0;owned\x07\n" + RECIPE.encode())
    done = dsc("plan", str(recipe_file), code=2)
    assert inert(done.stdout + done.stderr)
