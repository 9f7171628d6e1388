"""The documentation says what the code does: the reference is generated, commands parse, links lead somewhere, examples work.

How each kind of example is tested:
- YAML of "Your own task": written to files, sampled with a scripted server, turned into rows; its grid is read.
- Python of docs/python.md: run on a real run (tests/e2e). The own metric and the judge: tests/metrics.
- Commands: each is parsed by the command line itself, overrides by the recipe's schema; test_commands_run.py says which test
  runs it, and runs what needs no model. What is no command of dsc is left alone.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from dsc_hub.cli.main import cli
from dsc_hub.config.recipe import Recipe
from dsc_hub.pipeline import grid
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts),
]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]


def blocks(path: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages."""
    for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```", path.read_text(encoding="utf-8"), flags=re.S | re.M):
        if language in languages:
            yield body


def commands() -> list[tuple[str, str]]:
    """Every line of the documentation that is a command of dsc, with its page."""
    found = []
    for name, path in zip(NAMES, PAGES, strict=True):
        if name == "docs/reference/commands.md":  # usage lines, generated
            continue
        for block in blocks(path, "console", "text", "sh", ""):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if re.match(r"dsc\s", line):
                    found.append((name, line))
    return found


def test_the_reference_is_what_the_code_says():
    done = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "howto" / "own-task.html").is_file()


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path: Path):
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), target


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_commands_parse(page: str, line: str):
    words = shlex.split(re.split(r"\s#\s|\s{2,}#", line)[0].split(" && ")[0])[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="dsc")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"no command '{name}'"
        command = command.commands[name]
        context = click.Context(command, info_name=name, parent=context)
    # What is in brackets may be left out; placeholders stand for values.
    words = [re.sub(r"\[@REV(ISION)?\]", "", w).replace("COMMIT", "0" * 40) for w in words]
    try:
        values = command.make_context(context.info_name, list(words), parent=context.parent).params
    except click.MissingParameter:
        raise
    except click.BadParameter as e:
        assert "does not exist" in e.message, e.message  # a folder that the reader has
        return
    for word in values.get("overrides", ()):
        key, equals, value = word.partition("=")
        assert equals and key_exists(key), f"{key} is no key of a recipe"
        yaml.safe_load(value)


def key_exists(path: str) -> bool:
    schema = Recipe.model_json_schema()
    part = schema
    for key in path.split("."):
        if key not in part.get("properties", {}):
            return part.get("type") == "object" and bool(part.get("additionalProperties"))
        part = part["properties"][key]
        options = [part, *part.get("anyOf", [])]
        part = next((schema["$defs"][o["$ref"].rpartition("/")[2]] for o in options if "$ref" in o), part)
    return True


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert all(p.stat().st_size < 300_000 for p in (DOCS / "pictures").iterdir())


def test_your_own_task_works_as_it_stands(dsc, server: str):
    page = DOCS / "howto" / "own-task.md"
    recipe, grid_file = blocks(page, "yaml")
    (prompts,) = (b for b in blocks(page, "text") if b.startswith("prompt,product"))
    folder = dsc.work / "mine"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    more = [f"Write a short review of the product number {n}.,product {n}" for n in range(40)]
    (folder / "prompts.csv").write_text(prompts + "\n".join(more) + "\n")
    served = [f"serving.endpoints=[{server}]", "evaluation.arms=[base]", "hygiene.language=any"]
    dsc("sample", "mine/recipe.yaml", *served, code=0)
    (run,) = (dsc.work / "runs" / "kind-reviews").iterdir()
    rows = (run / "chains.jsonl").read_text().splitlines()
    assert len(rows) == len((run / "prompts.jsonl").read_text().splitlines()) - sum(
        '"split": "test"' in line or '"split":"test"' in line
        for line in (run / "prompts.jsonl").read_text().splitlines()
    )
    (dsc.work / "grid.yaml").write_text(grid_file.replace("mine/recipe.yaml", str(folder / "recipe.yaml")))
    assert len(grid.combinations(grid.read_grid(dsc.work / "grid.yaml"))) == 6
