"""A table of wrong inputs over all commands: each ends with exit code 2 and a few lines that say what was got, what was
expected or what to do; never a traceback, and nothing half-written.

The commands run in this process, through the entry point that turns errors into messages.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from dsc_hub.cli import main
from tests.conftest import FILMS, RECIPE

MOST_LINES = 12  # of a message, the list of problems included
FILES = {
    "recipe.yaml": RECIPE,
    "films.txt": FILMS,
    "list.yaml": "- a\n- b\n",
    "broken.yaml": "name: [",
    "empty.yaml": "",
    "twice.yaml": RECIPE + "name: other\n",
    "tabs.yaml": "name: x\n\tmodel: y\n",
    "unsafe.yaml": RECIPE + "description: !!python/object/apply:os.system [echo]\n",
    "nofile.yaml": RECIPE.replace("films.txt", "nosuch.txt"),
    "folder.yaml": RECIPE.replace("films.txt", "folder"),
    "few.yaml": RECIPE.replace("films.txt", "one.txt"),
    "one.txt": "Only one\n",
    "nothing.txt": "\n \n",
    "column.yaml": RECIPE.replace("values: films.txt", "path: meals.csv\n  group_column: restaurant")
    .replace('  templates: ["Say something about {value}.", "Describe {value} in a line."]\n', "")
    .replace("What is wrong with it?", "What is good about {restaurant}?"),
    "meals.csv": "prompt,restaurant\n" + "".join(f"Praise meal {n},place {n}\n" for n in range(12)),
    "empty.csv": "",
    "quote.csv": 'text\n"never closed\n',
    "twice.csv": "text,text\na,b\n",
    "ragged.csv": "text\na,b\n",
    "bad.jsonl": '{"text": "a"}\nnot json\n',
    "number.jsonl": '{"text": 1}\n[2]\n',
    "table.xlsx": "PK\3\4",
    "weights.pkl": "x",
    "latin.txt": b"caf\xe9\n",
    "zeros.txt": b"a\0b\n",
    "wide.txt": "a\n".encode("utf-16-le"),
    "fake.parquet": b"PAR1 not really",
    "grid.yaml": "{recipe: recipe.yaml, vary: {chain.nosuch: [1, 2]}}",
    "metric.py": "raise RuntimeError('at import')\n",
    "nometric.py": "x = 1\n",
    "rows.json": '[{"other": 1}]',
    "norows.json": "{}",
    "folder/x.txt": "x",
    "notarun/run.json": "{}",
    "damaged/run.json": "{",
}
RECIPES = [
    # what is given, what the message says
    ("plan nosuch", "'nosuch' not found"),
    ("plan quickstrat", "quickstart"),
    ("plan ./recipe.yml", "recipe.yaml"),
    ("plan folder", "folder"),
    ("plan list.yaml", "expected a mapping"),
    ("plan broken.yaml", "not valid YAML"),
    ("plan empty.yaml", "expected a mapping"),
    ("plan twice.yaml", "name"),
    ("plan tabs.yaml", "indent with spaces"),
    ("plan column.yaml", "{restaurant} is a column and no placeholder; that column is {group}"),
    ("plan unsafe.yaml", "not valid YAML"),
    ("plan grid.yaml", "is a grid file"),
    ("plan films.txt", "mapping"),
    ("plan table.xlsx", "YAML"),
    ("plan nofile.yaml", "nosuch.txt not found"),
    ("plan folder.yaml", "is a folder"),
    ("plan hub:nobody", "USER/REPO"),
    ("plan recipe.yaml chain.steps", "expected key.sub=value"),
    ("plan recipe.yaml chain.steps=", "chain.steps"),
    ("plan ./recipe.yaml chain.steps = 3", "without spaces around '='"),
    ("plan ./recipe.yaml chain.steps= 3", "without spaces around '='"),
    ("plan recipe.yaml chain.steps=two", "chain.steps"),
    ("plan recipe.yaml chain.steps=0", "greater than or equal to 1"),
    ("plan recipe.yaml chain.steps=1.5", "chain.steps"),
    ("plan recipe.yaml chain.steps=true", "chain.steps"),
    ("plan recipe.yaml chain.stepz=1", "did you mean 'steps'"),
    ("plan recipe.yaml chian.steps=1", "did you mean 'chain'"),
    ("plan recipe.yaml chain.acceptance=improved", "did you mean 'improve'"),
    ("plan recipe.yaml chain=1", "expected a section"),
    ("plan recipe.yaml --chain.steps 1", "chain.steps=VALUE"),
    ("plan recipe.yaml name=../../etc", "name"),
    ("plan recipe.yaml seed=-1", "seed"),
    ("plan recipe.yaml prompts.split={train: 0.5, validation: 0.4, test: 0.3}", "must be 1, got 1.2"),
    ("plan recipe.yaml prompts.templates=[No placeholder]", "has no {value}"),
    ("plan recipe.yaml chain.critique=Look at {anwser}", "did you mean {answer}"),
    ("plan recipe.yaml reward.metric=sentimant", "did you mean 'sentiment'"),
    ("plan recipe.yaml reward.metric=/etc/passwd", "metric"),
    ("plan recipe.yaml reward.metric=metric.py", "defines no class derived from evaluate.Measurement"),
    ("plan recipe.yaml reward.metric=nometric.py", "nometric.py"),
    ("plan recipe.yaml reward.metric=gone.py", "gone.py"),
    ("plan recipe.yaml reward.scorer=vadre", "did you mean 'vader'"),
    ("plan recipe.yaml reward.options={x: 1}", "no option 'x'"),
    ("plan recipe.yaml evaluation.arms=[]", "at least one"),
    ("plan recipe.yaml evaluation.arms=[base, distiled]", "did you mean 'distilled'"),
    ("plan recipe.yaml evaluation.arms=[base, base]", "only once"),
    ("plan recipe.yaml generation.temperature=hot", "generation.temperature"),
    ("plan recipe.yaml generation.max_new_tokens=0", "generation.max_new_tokens"),
    ("plan recipe.yaml serving.endpoints=[localhost:8000]", "endpoints"),
    ("plan recipe.yaml serving.endpoints=[http://127.0.0.1:{port}/v1]", "127.0.0.1"),
    ("plan recipe.yaml distill.sft.push_to_hub=true", "set by dsc itself"),
    ("plan recipe.yaml distill.objective=ppo", "distill.objective"),
    ("plan recipe.yaml distill.method=lorra", "distill.method"),
    ("plan recipe.yaml distill.report_to=wandbb", "report_to"),
    ("plan recipe.yaml publish.to=hubb", "did you mean 'hub'"),
    ("plan recipe.yaml publish.owner=a/b", "publish"),
    ("plan recipe.yaml model.source=./nowhere", "not found"),
    ("plan recipe.yaml model.source=package:nosuch", "is not installed"),
    ("plan recipe.yaml model.source=folder", "folder"),
    ("plan recipe.yaml budget_s.sampeling=8", "did you mean 'sampling'"),
]
COMMANDS = [
    ("rum recipe.yaml", "Did you mean 'run'"),
    ("run", "Missing argument"),
    ("run recipe.yaml --nosuch", "No such option"),
    ("sample recipe.yaml --shard 3/2", "shard"),
    ("sample recipe.yaml --shard x", "shard"),
    ("dataset recipe.yaml", "Run `dsc sample` first"),
    ("distill recipe.yaml", "Run `dsc sample` first"),
    ("evaluate recipe.yaml --adapter folder", "adapter"),
    ("publish recipe.yaml publish.to=local", "Run `dsc sample` first"),
    ("try recipe.yaml -n 0", "-n"),
    ("fetch nosuch", "'nosuch' not found"),
    ("grid nosuch.yaml", "can't be read"),
    ("grid recipe.yaml", "is a recipe, expected a grid file"),
    ("grid grid.yaml", "chain.nosuch"),
    ("merge recipe.yaml", "there are no shards in"),
    ("show nosuch", "nosuch"),
    ("show folder", "folder"),
    ("show notarun", "notarun"),
    ("show damaged", "damaged"),
    ("report nosuch", "nosuch"),
    ("check nosuch", "nosuch"),
    ("check recipe.yaml", "there is no run of the recipe 'little' in /"),
    ("compare folder", "neither a run folder"),
    ("compare folder nosuch", "folder"),
    ("watch nosuch", "nosuch"),
    ("blind nosuch", "nosuch"),
    ("chat nosuch", "nosuch"),
    ("runs remove folder --yes", "no run.json"),
    ("runs remove nosuch --yes", "no run.json"),
    ("cache remove nosuch", "nosuch"),
    ("verify nosuch", "nosuch"),
    ("pull nosuch", "USER/REPO"),
    ("pull a/b/c", "a/b/c"),
    ("publish-metric nosuch --to local", "nosuch"),
    ("publish-metric nometric.py --to local", "nometric"),
    ("publish-report nosuch", "nosuch"),
    ("recipes copy nosuch", "no packaged recipe"),
    ("recipes copy quickstart folder", "exists"),
    ("recipes adopt nosuch", "nosuch"),
    ("schema recipes", "recipe"),
    ("completion powershell", "bash"),
    ("import-reference nosuch.json quickstart", "nosuch.json"),
    ("import-reference norows.json quickstart", "list"),
    ("import-reference rows.json quickstart", "row"),
    ("score nosuch films.txt", "no metric 'nosuch'"),
    ("score sentimant films.txt", "did you mean 'sentiment'"),
    ("score sentiment/vader films.txt", "`dsc score sentiment FILE --scorer vader`"),
    ("score sentiment nosuch.txt", "not found"),
    ("score sentiment folder", "is a folder"),
    ("score sentiment nothing.txt", "no texts"),
    ("score sentiment empty.csv", "empty.csv"),
    ("score sentiment quote.csv", "quote"),
    ("score sentiment twice.csv", "text"),
    ("score sentiment ragged.csv", "more cells"),
    ("score sentiment bad.jsonl", "line 2"),
    ("score sentiment number.jsonl", "number.jsonl"),
    ("score sentiment table.xlsx", "table.xlsx"),
    ("score sentiment weights.pkl", "weights.pkl"),
    ("score sentiment latin.txt", "UTF-8"),
    ("score sentiment zeros.txt", "zero bytes"),
    ("score sentiment wide.txt", "zero bytes"),
    ("score sentiment fake.parquet", "fake.parquet"),
    ("score sentiment films.txt --scorer vadre", "did you mean 'vader'"),
    ("score sentiment films.txt nosuch=1", "nosuch"),
    ("score metric.py films.txt", "defines no class"),
    ("score judge films.txt", "endpoint"),
]


def words_of(line: str) -> list[str]:
    """The words of a command line; of an override all to its end."""
    head, *overrides = line.split(" ", 2) if line.startswith("plan recipe.yaml ") else (line,)
    if overrides:
        rest = overrides[-1]
        return [head, overrides[0], *(rest.split() if rest.startswith("--") else [rest])]
    return line.split()


@pytest.fixture
def work(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    for name, value in {"DSC_HUB_HOME": home, "HF_HOME": tmp_path / "hf", "HOME": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def written(folder: Path) -> set[str]:
    caches = {"hf", "__pycache__", ".cache", ".config"}
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not caches & set(p.parts)}


@pytest.mark.parametrize(("line", "told"), [*RECIPES, *COMMANDS], ids=lambda x: x[:60])
def test_it_is_said_what_is_wrong_and_nothing_is_written(
    work: Path, line: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        line = line.replace("{port}", str(unused.getsockname()[1]))
    monkeypatch.setattr(sys, "argv", ["dsc", *words_of(line)])
    before = written(work)
    code = main._run_command()
    captured = capsys.readouterr()
    message = captured.err
    assert code == 2, captured
    assert told in message and "Traceback" not in message, message
    assert len(message.strip().splitlines()) <= MOST_LINES, message
    assert written(work) == before
    assert captured.out == "", captured.out


def test_the_table_is_of_sixty_at_least_and_of_every_command():
    lines = [line for line, _ in (*RECIPES, *COMMANDS)]
    assert len(set(lines)) == len(lines) >= 60
    without_input = {"env", "hub"}
    assert set(main.cli.commands) - {line.split()[0] for line in lines} == without_input
