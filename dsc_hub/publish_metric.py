"""A shipped metric as a Space of the Hub that `evaluate.load("user/name")` loads where dsc_hub is not installed."""

from __future__ import annotations

import json
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dsc_hub import __version__, hub, push, targets
from dsc_hub.errors import ConfigError
from dsc_hub.metrics import HEAD, PACKAGED
from dsc_hub.recipe import packaged_folder
from dsc_hub.runs import write_whole

FOLDER = Path(__file__).parent / "metrics"
ALONE = '_HEAD = ""'  # in the module: where what it else reads from beside itself goes


def names() -> list[str]:
    """The metrics that are shipped."""
    return sorted(p.parent.name for p in FOLDER.glob("*/*.py") if p.stem == p.parent.name)


def files(metric: str, name: str, work: Path) -> dict[str, Path]:
    """The Space's files, path in repo -> file under `work`: the module under the Space's own name (`evaluate` asks for that), its
    requirements and its card."""
    source = (FOLDER / metric / f"{metric}.py").read_text(encoding="utf-8")
    if source.count(ALONE) != 1:
        raise AssertionError(f"{metric}.py has no line {ALONE}")
    head = json.dumps(json.loads(HEAD.read_text(encoding="utf-8")))
    module = source.replace(ALONE, f"_HEAD = {head!r}  # noqa: E501")
    description = re.search(r'_DESCRIPTION = """\\\n(.*?)"""', source, re.S)
    usage = re.search(r'_KWARGS = """\n(.*?)"""', source, re.S)
    packages = ["evaluate", "datasets", *(PACKAGED[s] for s in ("vader", "textblob"))]
    env = Environment(
        loader=FileSystemLoader(packaged_folder("model_cards")), undefined=StrictUndefined, trim_blocks=True
    )
    card = env.get_template("metric_card.md.jinja").render(
        name=name,
        metric=metric,
        description=description.group(1) if description else "",
        usage=usage.group(1) if usage else "",
        version=__version__,
    )
    texts = {
        f"{name}.py": module,
        "requirements.txt": "".join(f"{p}=={metadata.version(p)}\n" for p in packages),
        "README.md": card,
    }
    for path, text in texts.items():
        write_whole(work / path, text)
    return {path: work / path for path in texts}


def publish(metric: str, account: hub.Account, name: str, private: bool) -> dict[str, Any]:
    """Put it up in one commit, read back: {repo, commit, address, load}. Publishing the same again changes nothing."""
    if metric not in names():
        raise ConfigError(f"there is no metric '{metric}'", f"Shipped: {', '.join(names())}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise ConfigError(
            f"'{name}' can't be the name of a metric's Space",
            "It becomes a Python file: small letters, digits and '_'.",
        )
    repo = f"{account.owner}/{name}"
    target = targets.Target("space", repo, private)
    if problems := targets.preflight(account, [target]):
        raise ConfigError(f"{metric} can't be published", problems=problems)
    with tempfile.TemporaryDirectory() as work:
        made = files(metric, name, Path(work))
        commit = push.push(account, target, made, f"{metric} by dsc", Path(work))
    load = f'evaluate.load("{repo}", config_name="vader")'
    return {"repo": repo, "commit": commit, "address": hub.web_address(account, "space", repo), "load": load}
