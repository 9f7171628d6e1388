"""Publish a run's report as a static Space: a page that anybody with access opens in the browser."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from dsc_hub.config.publishing import publishes_rejected
from dsc_hub.errors import ConfigError
from dsc_hub.hub import push, repos
from dsc_hub.hub.account import Account, web_address
from dsc_hub.publish.bundle import check_no_paths, model_folders
from dsc_hub.report.page import build_page
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_whole


def publish_report(run: Run, account: Account, name: str | None, private: bool) -> dict[str, Any]:
    """Push the report of a run in one commit; return {repo, commit, address, files, bytes, texts}. Idempotent.

    `name` is that of the Space; None: <recipe>-report. Where the recipe keeps what was not kept to itself (a content
    warning), the page has no chains and no answers, and `texts` is false. ConfigError for a repo that can't be written
    to, and for a public page of a Space that is private.
    """
    recipe = run.facts.recipe
    name = name or f"{recipe.name}-report"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII):
        raise ConfigError(
            f"'{name}' can't be the name of a Space", "Use letters, digits, '-', '_' and '.', at most 96."
        )
    target = repos.RepoTarget("space", f"{account.owner}/{name}", private)
    if problems := repos.check_targets(account, [target]):
        raise ConfigError(f"the report of {run.folder} can't be published", problems=problems)
    has_texts = publishes_rejected(recipe.publish)
    with tempfile.TemporaryDirectory(prefix="dsc-") as work:
        files = _files(run, recipe.name, recipe.description, has_texts, Path(work))
        check_no_paths(files, [str(run.folder.resolve()), *model_folders(run.facts), f"{Path.home()}/"])
        commit = push.push(account, target, files, f"{recipe.name}: report by dsc", Path(work))
        size = sum(p.stat().st_size for p in files.values())
    about = {"repo": target.repo, "commit": commit, "address": web_address(account, "space", target.repo)}
    return about | {"files": len(files), "bytes": size, "texts": has_texts}


def _files(run: Run, name: str, description: str, has_texts: bool, work: Path) -> dict[str, Path]:
    """Write the Space's files below `work`; return {path in the repo: file}."""
    site = work / "site"
    build_page(run, site, has_texts=has_texts)
    (site / "report.html").rename(site / "index.html")
    metadata = {"title": f"{name}: report", "sdk": "static", "app_file": "index.html", "tags": ["dsc", "self-critique"]}
    about = description or "The report of a run of distilled self-critique."
    write_whole(site / "README.md", f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{about}\n")
    pages = (p for p in site.rglob("*") if p.suffix in (".html", ".md"))
    return {p.relative_to(site).as_posix(): p for p in pages}
