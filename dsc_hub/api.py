"""What the command `dsc` does, as functions of Python with typed results. `from dsc_hub import ...` gives these names.

    from dsc_hub import plan, resolve, run

    context = resolve("quickstart", ["chain.steps=1", "publish.to=none"])
    print(plan(context).run)
    results = run(context)
    print(results.metrics.evaluation.arms["distilled"].reward.mean, results.claim.verdict)

All of it works in a notebook, where an event loop runs already. What a user can mend is raised as a `DscError`, whose
text says what was got, what was expected, and what to do next. Progress goes to standard error, as on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_hub.errors import HubError, RunError
from dsc_hub.runs.run import Run

if TYPE_CHECKING:
    from dsc_hub.config.recipe import Recipe
    from dsc_hub.hub.pull import Pulled
    from dsc_hub.pipeline.context import RunContext
    from dsc_hub.pipeline.fetch import Fetched
    from dsc_hub.pipeline.preflight import RunPlan
    from dsc_hub.publish.verify import Check
    from dsc_hub.records import Answer, Chain, Prompt
    from dsc_hub.runs.metrics_schema import Claim, Metrics

RUNS = Path("runs")  # where the command line puts run folders, too


@dataclass(frozen=True)
class Results:
    """What a run has recorded so far. Read from its folder each time, so that it is never older than that."""

    folder: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe as the run resolved it. RunError if run.json is missing, damaged, or of a version that can't be
        read."""
        return Run(self.folder).facts.recipe

    @property
    def metrics(self) -> Metrics:
        """All numbers (metrics.json), checked and typed; a section whose stage has not run is None. `dsc schema
        metrics` describes each. RunError if the file is damaged or of a schema that this version does not read."""
        from dsc_hub.runs.results import current_metrics

        return current_metrics(Run(self.folder))

    @property
    def claim(self) -> Claim:
        """Whether "distilled is better than its base" holds, with its criteria. RunError where it was not judged."""
        evaluation = self.metrics.evaluation
        if evaluation is None or evaluation.claim is None:
            raise RunError(
                f"{self.folder} has no claim that was judged",
                "It takes an evaluation with `base` as the first arm, and `distilled`.",
            )
        return evaluation.claim

    def prompts(self) -> Iterator[Prompt]:
        """All prompts, with split and group."""
        from dsc_hub.records import Prompt

        return Run(self.folder).rows("prompts.jsonl").as_type(Prompt)

    def chains(self) -> Iterator[Chain]:
        """All finished chains, in the order of prompt id and chain index: the answer, each critique and revision, the
        decisions."""
        from dsc_hub.sampling.sample import read_chains

        return iter(read_chains(Run(self.folder)))

    def answers(self) -> Iterator[Answer]:
        """The answers of all arms with their scores. RunError if the run is not evaluated, or its rows do not fit its
        numbers."""
        from dsc_hub.runs.results import answers

        return iter(answers(Run(self.folder)))

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, as `peft` and vLLM load it. RunError if none was trained."""
        folder = self.folder / "adapter"
        if not (folder / "adapter_config.json").is_file():
            raise RunError(f"{self.folder} has no adapter", "Run the stage `distill` first.")
        return folder


def resolve(
    recipe: str | Path, overrides: Sequence[str] = (), runs: Path = RUNS, allow_code: Sequence[str] = ()
) -> RunContext:
    """Find a recipe, check it, and resolve what it names into fingerprints and a run folder. Writes nothing.

    Args:
        recipe: a packaged recipe's name, a YAML file, a folder with recipe.yaml, or hub:USER/REPO[@REVISION].
        overrides: KEY.SUB=VALUE each, as on the command line.
        runs: the folder that holds the run folders.
        allow_code: Spaces, USER/NAME@COMMIT with all 40 digits, whose metric code may run here.

    Raises:
        ConfigError: with all problems of the recipe at once.
        DscError: a model, prompt file or scorer that it names can't be had.
    """
    from dsc_hub.pipeline import resolve

    return resolve.resolve_recipe(str(recipe), overrides, runs, allow_code)


def plan(context: RunContext) -> RunPlan:
    """What a run would do, take and write, as `dsc plan` prints it. Fetches no weights.

    Raises:
        ConfigError: with everything that stands in the way of the run on this machine.
    """
    from dsc_hub.pipeline.context import hub_account
    from dsc_hub.pipeline.preflight import check_run

    with ExitStack() as stack:
        account, problems = None, []
        try:
            account = stack.enter_context(hub_account(context.recipe))
        except HubError as e:  # said with everything else that stands in the way
            problems = [f"publish: {e.message}. {e.hint}"]
        return check_run(context, account, problems_before=problems)


def fetch(context: RunContext, adapter: str | None = None) -> Fetched:
    """Fetch all that a run of the recipe loads into the caches of this machine, as `dsc fetch` does.

    With HF_HUB_OFFLINE=1 the recipe then resolves to the same commits and the same run folder, without a network.
    `adapter`, hub:USER/REPO[@REVISION], is fetched too.

    Raises:
        ConfigError: no network is allowed, or the disk of the Hub's cache is too small.
        DscError: something can't be had.
    """
    from dsc_hub.pipeline import fetch

    return fetch.fetch_all(context, adapter)


def try_out(context: RunContext, count: int = 8) -> list[tuple[Prompt, Chain]]:
    """Sample the chains of the first `count` training prompts, to look at them before hours are spent. Keeps
    nothing."""
    from dsc_hub.pipeline import session

    tried = session.sample_a_few(context, count).chains
    return tried


def run(context: RunContext, until: str = "publish", retry_failed: bool = False) -> Results:
    """Run the stages up to `until` (prompts, sampling, dataset, distill, evaluation, report, cards, publish).

    Finished stages are skipped and a broken-off one goes on from where it was. With `until="publish"`, what goes where
    is said by the recipe's `publish:` section; `publish.to=none` publishes nothing. `retry_failed` takes up chains that
    failed.

    Raises:
        ConfigError: before anything starts, with everything that stands in the way.
        DscError: a stage can't go on; what is finished is kept.
    """
    from dsc_hub.pipeline.run import run_all

    run_all(context, until, retry_failed)
    return Results(context.run.folder)


def load_run(reference: str | Path, runs: Path = RUNS) -> Results:
    """The results of a run: its folder or the name of it, or a recipe's name or file for its newest evaluated run.

    ConfigError if there is none.
    """
    from dsc_hub.runs.lookup import find_run

    return Results(find_run(str(reference), runs).folder)


def pull(reference: str, folder: Path | None = None) -> Pulled:
    """Fetch a published dataset, adapter or recipe, hub:USER/REPO[@REVISION], into a new folder (default: the repo's
    name).

    Its files are checked against its manifest; only data, configuration and safetensors are taken, no code.
    """
    from dsc_hub.hub import pull

    return pull.pull_repo(reference, folder)


def verify(reference: str, rescore: bool = False) -> list[Check]:
    """Check a published dataset or adapter: its files against its manifest, its numbers and card against its rows.

    With `rescore`, the packaged scorers score the answers again. A check whose `agrees` is None could not be made.
    """
    from dsc_hub.publish import verify

    return verify.verify_repo(reference, rescore)[1]
