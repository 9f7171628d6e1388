"""Runs that an older dsc made go on and can be shown, published and verified.

`tests/data/older_run.tar.gz` is the small run of `tests/small_run.py` as dsc made it before its modules lay in packages;
`fingerprints.json` are the fingerprints that it gave to the packaged recipes; `older_quickstart.yaml` is the recipe
`quickstart` of that time, with one pair of texts.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_hub.api import Results
from dsc_hub.cli.main import cli
from dsc_hub.config import recipe_files
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.recipe import all_scorers
from dsc_hub.hub.account import login
from dsc_hub.local_hub.server import running
from dsc_hub.publish import upload
from dsc_hub.publish.verify import verify_repo
from dsc_hub.report import cards, sentences
from dsc_hub.runs.run import Run
from tests.conftest import ROOT
from tests.hub import at_hub

DATA = ROOT / "tests" / "data"
FINGERPRINTS = json.loads((DATA / "fingerprints.json").read_text())


@pytest.fixture
def older(tmp_path: Path) -> Run:
    with tarfile.open(DATA / "older_run.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    return Run(tmp_path / "run")


@pytest.mark.parametrize("file", FINGERPRINTS)
def test_packaged_recipes_have_the_fingerprints_that_an_older_dsc_gave_them(file: str):
    """A difference means that runs which were begun are begun anew. If a stage's work has changed, its version in
    config/stages.py goes up, and these numbers with it."""
    recipe = recipe_files.load_recipe_file(next(f for f in (DATA / file, ROOT / "recipes" / file) if f.is_file()))
    identity = {"prompts": "a", "model": "b", "second_scorer": "", "third_scorer": ""}
    assert stage_fingerprints(recipe, identity | {place: place for place in all_scorers(recipe)}) == FINGERPRINTS[file]


def test_its_numbers_are_shown_and_typed(older: Run):
    for command in ("show", "check"):
        done = CliRunner().invoke(cli, [command, str(older.folder)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.output
        assert "distilled" in done.output
    results = Results(older.folder)
    assert results.claim.verdict in ("holds", "fails", "not enough data")
    assert len(list(results.answers())) == sum(
        arm.reward.n + arm.reward.unscored for arm in results.metrics.evaluation.arms.values()
    )
    assert len(list(results.chains())) == results.metrics.sampling.finished


REWORDED = {
    "| final loss |": "| mean of the last tenth of the logged losses |",
    ": distilled \N{MINUS SIGN} base on reward and second scorer, named beforehand, for itself, and all other differences of "
    "scores for each other": " in two families: distilled \N{MINUS SIGN} base on reward and second scorer, the question asked "
    "beforehand; and all other differences of scores",
    " training rows were never compared": " rows (for training and validation) were never compared",
}


def test_its_cards_are_rendered_to_the_same_bytes_but_for_words_and_new_caveats(older: Run, monkeypatch):
    monkeypatch.setattr(cards, "CHAINS_ON_CARD", 2)  # three by now
    monkeypatch.setattr(sentences, "MOST_NAMED", 99)  # all criteria were named
    names = ("cards/dataset/README.md", "cards/adapter/README.md")
    before = {name: older[name].read_text() for name in names}
    for name in names:
        for old, new in REWORDED.items():
            before[name] = before[name].replace(old, new)
    cards.build_cards(older)
    for name in names:
        lines = older[name].read_text().splitlines(keepends=True)
        added = ("- Intervals hold this one adapter fixed", "- The adapter was trained on")
        new = [line for line in lines if line.startswith(added)]
        assert len(new) == 2 and "".join(line for line in lines if line not in new) == before[name]


def test_it_is_published_and_verified(older: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running(tmp_path / "hub") as address:
        at_hub.point(monkeypatch, address, tmp_path / "cache")
        account, recipe = login(None, address.endpoint, address.token), Results(older.folder).recipe
        folder = older.folder.parent / "recipe"
        upload.publish_run(older, account, tmp_path, folder, recipe.publish, lambda: cards.build_cards(older))
        checks = [check for repo in ("little-dsc", "little-dsc-lora") for check in verify_repo(f"local/{repo}")[1]]
    assert checks and not [check for check in checks if check.agrees is False], checks
