"""What a run writes where, by file system, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsc_hub.config.arms import ADAPTER, models_of
from dsc_hub.config.models import base_place
from dsc_hub.inference import weights
from dsc_hub.pipeline import fetch
from dsc_hub.pipeline.context import RunContext
from dsc_hub.report.formatting import megabytes
from dsc_hub.system.cache import cache_home
from dsc_hub.system.files import existing


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run writes into a folder, which need not exist yet."""

    what: str
    folder: Path
    bytes: int

    def __str__(self) -> str:
        return f"{self.what}: {megabytes(self.bytes)} in {self.folder}"


def disk_needs(context: RunContext, run_bytes: int, base_folder: Path | None, left: Collection[str]) -> list[DiskNeed]:
    """Return what the stages that are `left` write: run folder, downloads, rounded weights.

    `run_bytes` are those of the run folder; `base_folder` has the files of the model that is trained.
    """
    out = [DiskNeed("run folder", context.runs, run_bytes)]
    downloads = fetch.downloads(context) if left else {}
    if to_fetch := sum(downloads.values()):
        out.append(DiskNeed("downloads", fetch.hub_cache(), to_fetch))
    evaluation = context.recipe.evaluation
    asks_rounded = ADAPTER in models_of(evaluation.arms) and evaluation.weights == "rounded" and "evaluation" in left
    if base_folder and asks_rounded and not weights.is_rounded(context.base.identity, context.recipe.distill):
        size = sum(file.stat().st_size for file in base_folder.glob("*.safetensors"))
        size = max(size, downloads.get(base_place(context.recipe), 0))
        out.append(DiskNeed("rounded weights", cache_home(), size))
    return out


def disk_problems(needs: Sequence[DiskNeed]) -> list[str]:
    """Return a problem for each file system that has less free than is written there."""
    by_device: dict[int, list[DiskNeed]] = defaultdict(list)
    for need in needs:
        by_device[existing(need.folder).stat().st_dev].append(need)
    problems = []
    for group in by_device.values():
        free, needed = shutil.disk_usage(existing(group[0].folder)).free, sum(need.bytes for need in group)
        if free < needed:
            problems.append(
                f"disk: {megabytes(free)} free at {existing(group[0].folder)}, about {megabytes(needed)} needed "
                f"({'; '.join(map(str, group))}); free some, or choose another place: --runs for run folders, HF_HOME "
                "for downloads, DSC_HUB_HOME for converted models"
            )
    return problems
