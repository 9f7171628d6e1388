"""The example cards of the shipped recipes are what the templates make of real runs, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import golden

NAMES = sorted(p.name for p in golden.KEPT.glob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_the_example_cards_are_what_the_templates_make_of_the_kept_run(tmp_path: Path, name: str):
    made = golden.render(name, tmp_path / "run")
    shown = {p.stem: p.read_text(encoding="utf-8") for p in (golden.SHOWN / name).glob("*.md")}
    assert set(made) == set(shown)
    for kind, text in made.items():
        assert text == shown[kind], f"{kind} card of {name}: `python -m tests.golden RUN` writes the examples anew"


def test_there_is_one_for_each_recipe_that_was_run_and_it_is_small():
    assert {"quickstart", "privacy", "safety", "sentiment"} == set(NAMES)
    for folder in golden.KEPT.iterdir():
        assert sum(p.stat().st_size for p in folder.iterdir()) < 200_000, folder
