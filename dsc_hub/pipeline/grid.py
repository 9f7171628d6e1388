"""`dsc grid`: run one recipe with every combination of some settings, each as a regular run, and tabulate the results.

Work shared by two combinations is done once: a stage with equal inputs is reused from the run that did it, and a turn
that another run generated with the same request and seed is reused (chains of three steps begin like those of two).
Users select among the cells, so the cells are evaluated on the validation split unless the grid says otherwise:
evaluating twelve cells on the test set means looking at it twelve times.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from dsc_hub.config import messages, origin
from dsc_hub.config.section import Section
from dsc_hub.config.stages import up_to
from dsc_hub.errors import ConfigError, DscError
from dsc_hub.pipeline import resolve
from dsc_hub.pipeline.context import RunContext
from dsc_hub.pipeline.preflight import nothing_held_out
from dsc_hub.pipeline.run import run_all
from dsc_hub.runs.metrics_schema import Difference, Estimate, Scored, ScoreName
from dsc_hub.runs.results import metrics_of
from dsc_hub.stats import PRIMARY_SCORES
from dsc_hub.system import plain_yaml
from dsc_hub.system.progress import say

MOST = 256  # combinations; more is probably a mistake


def _varied_keys(varied: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Check that each key has values (else there is no combination) and that they differ (else runs would repeat)."""
    for key, values in varied.items():
        if len({yaml.safe_dump(v) for v in values}) != len(values) or not values:
            raise ValueError(f"{key}: expected one or more different values, got {values}")
    return varied


class Grid(Section):
    """A grid file. `vary` maps keys of the recipe to the values that each takes; every combination is run."""

    recipe: str = Field(
        min_length=1, description="packaged name, hub:USER/REPO, or a path (beside the grid file, or from here)"
    )
    vary: Annotated[dict[str, list[Any]], Field(min_length=1), AfterValidator(_varied_keys)]
    fixed: dict[str, Any] = Field({}, description="keys that are set alike in all of them")
    last: Literal["sampling", "dataset", "distill", "evaluation"] = Field(
        "evaluation", description="stage to stop after; nothing is published"
    )


class SampledCell(BaseModel):
    """The chains of a combination; `reward` is of the states after the last step."""

    proposals: int
    accepted: int
    reward: Estimate
    usable: int
    reused_turns: int
    new_tokens: int | None


class GridRow(BaseModel):
    """A combination and its results. None: its stage is not done, or the number does not exist.

    `rows` counts training rows; `difference` is distilled - base by score; `claim` is the verdict on the claim.
    """

    set: dict[str, Any]
    run: Path
    error: str
    sampling: SampledCell | None
    rows: int | None
    arms: dict[str, dict[ScoreName, Scored]] | None
    difference: dict[ScoreName, Difference] | None
    claim: str | None


def read_grid(path: Path) -> Grid:
    """Read and check a grid file. ConfigError with every problem, or if it was downloaded: it may set any key."""
    if where := origin.of_another(path):
        raise ConfigError(
            f"{path}, downloaded from {where}, is refused: a grid file may set servers, keys and folders",
            f"Read it; then `dsc recipes adopt {shlex.quote(str(path.parent))}`.",
        )
    try:
        data = plain_yaml.load_own_yaml(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"grid file {path} can't be read: {e.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected a mapping, got {type(data).__name__}",
            "A grid has `recipe: NAME` and `vary: {chain.steps: [1, 2], ...}`.",
        )
    if "vary" not in data and {"model", "prompts", "chain"} & set(data):
        raise ConfigError(
            f"{path} is a recipe, expected a grid file",
            f"A grid has `recipe: {path.name}` and `vary: {{chain.steps: [1, 2], ...}}`; `dsc run` takes a recipe.",
        )
    try:
        grid = Grid.model_validate(data)
    except ValidationError as e:
        problems = messages.recipe_problems(e, Grid)
        raise ConfigError(f"{path} has {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems) from None
    n = len(combinations(grid))
    if n > MOST:
        raise ConfigError(f"{path}: {n:,} combinations, at most {MOST} are run", "Vary fewer settings at once.")
    return grid


def combinations(grid: Grid) -> list[dict[str, Any]]:
    """Return the settings of each combination, in file order: the last key varies fastest."""
    return [dict(zip(grid.vary, values, strict=True)) for values in itertools.product(*grid.vary.values())]


def run_grid(path: Path, runs: Path, allowed_code: Sequence[str] = ()) -> list[GridRow]:
    """Run every combination up to the stage `last`; return one row each. All recipes are checked
    first.

    A combination that fails (for instance without training rows) has the reason in `error`, and the others continue.
    Running the same command again completes missing work.
    """
    grid = read_grid(path)
    cells = combinations(grid)
    reference = str(path.parent / grid.recipe) if (path.parent / grid.recipe).exists() else grid.recipe
    described = [_describe_cell(reference, grid, cell, runs, allowed_code) for cell in cells]
    rows = []
    for i, (cell, context) in enumerate(zip(cells, described, strict=True), 1):
        say(f"grid  {i}/{len(cells)}  {shown(cell)}")
        error = ""
        try:
            run_all(context, last=grid.last)
        except DscError as e:
            # Message and hint are two lines of a sentence each.
            error = "; ".join(part.strip().rstrip(".") for part in str(e).splitlines() if part.strip())
            say(f"grid  {i}/{len(cells)}  can't be finished: {error}")
        rows.append(_table_row(cell, context, grid.last, error))
    return rows


def shown(cell: Mapping[str, Any]) -> str:
    """Format a combination as one line."""
    return "  ".join(_overrides(cell))


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """Format settings as command-line overrides; values are JSON, which is valid one-line YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def _describe_cell(
    reference: str, grid: Grid, cell: Mapping[str, Any], runs: Path, allowed: Sequence[str]
) -> RunContext:
    by_default = "evaluation.split" not in {**grid.fixed, **cell}
    settings = {"evaluation.split": "validation", **grid.fixed, **cell, "publish.to": "none"}
    try:
        context = resolve.resolve_recipe(reference, _overrides(settings), runs, allowed)
        if "evaluation" in up_to(grid.last) and (problems := nothing_held_out(context.recipe)):
            raise ConfigError(problems[0])
        return context
    except ConfigError as e:
        hint = "A grid compares on validation prompts; `fixed: {evaluation.split: test}` changes that."
        raise ConfigError(f"{shown(cell)}: {e.message}", e.hint or (hint if by_default else ""), e.problems) from None


def _table_row(cell: Mapping[str, Any], context: RunContext, last: str, error: str) -> GridRow:
    """Return the result row of a combination; None for stages that are not done."""
    run = context.run
    done = {s for s in up_to(last) if run.is_done(s, context.fingerprints[s])}
    metrics = metrics_of(run)
    sampling = metrics.sampling if "sampling" in done else None
    dataset = metrics.dataset if "dataset" in done else None
    evaluation = metrics.evaluation if "evaluation" in done else None
    return GridRow(
        set=dict(cell),
        run=run.folder,
        error=error,
        sampling=sampling
        and SampledCell(
            proposals=sum(s.proposals for s in sampling.steps),
            accepted=sum(s.accepted for s in sampling.steps),
            reward=sampling.steps[-1].reward_state,
            usable=sampling.usable,
            reused_turns=sampling.reused_turns,
            new_tokens=sampling.new_tokens,
        ),
        rows=dataset and dataset.sft["train"],
        arms=evaluation
        and {
            arm: {s: numbers.score(s) for s in evaluation.score_names if s in PRIMARY_SCORES}
            for arm, numbers in evaluation.arms.items()
        },
        difference=evaluation and evaluation.differences.get("distilled - base"),
        claim=evaluation and evaluation.claim and evaluation.claim.verdict,
    )
