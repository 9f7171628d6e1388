"""`dsc run`: run the stages in order; skip each stage whose marker matches.

    prompts -> sampling -> dataset -> distill -> evaluation -> report -> cards -> publish

stages.py, sampling_stage.py and evaluation_stage.py implement the stages.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsc_hub.config.models import weights_loaded
from dsc_hub.config.recipe import repo_names
from dsc_hub.config.stages import BY_NAME, NAMES, after, before, up_to
from dsc_hub.distill import launcher, ranks
from dsc_hub.errors import ConfigError, DscError, RunError
from dsc_hub.inference import adapters
from dsc_hub.pipeline import rounds, sampling_stage, session, stages
from dsc_hub.pipeline.context import RunContext, hub_account, record, record_servers, set_owner
from dsc_hub.pipeline.preflight import check_run
from dsc_hub.runs import seals, shards
from dsc_hub.runs.reuse import adopt_rows, reusable_stages, reuse
from dsc_hub.runs.run import Run
from dsc_hub.system.hashing import digest
from dsc_hub.system.launch import world_size
from dsc_hub.system.progress import say

BOOKKEEPING = {"run.json", "lock", "log.txt"}  # files of a run folder that hold no work


@contextmanager
def _working_in(run: Run) -> Iterator[None]:
    """Hold the run folder during the block. Of a new one nothing is left if an error comes before any work was done."""
    run_folder = run.folder.absolute()
    new = [folder for folder in (run_folder, *run_folder.parents) if not folder.exists()]
    with run.lock():
        try:
            yield
        except DscError:
            if run_folder in new and run_folder.is_dir() and {p.name for p in run_folder.iterdir()} <= BOOKKEEPING:
                shutil.rmtree(run_folder, ignore_errors=True)
            raise
        finally:
            for folder in new:
                with contextlib.suppress(OSError):  # not empty, or gone
                    folder.rmdir()


def run_all(context: RunContext, last: str = "publish", retry_failed: bool = False) -> None:
    """Run the stages up to `last`, skipping those that are done. The run folder stays locked throughout."""
    _check_processes()
    if retry_failed and context.recipe.rounds > 1:
        raise ConfigError(
            "--retry-failed: later rounds depend on what an earlier one has", "Leave it out, or set rounds=1."
        )
    with _working_in(context.run), contextlib.ExitStack() as stack:
        record(context)
        account = stack.enter_context(hub_account(context.recipe)) if last == "publish" else None
        if _samples_first(context, last):
            stack.enter_context(session.vllm_imported_early(context, "sampling"))
        check_run(context, account, last)
        record_servers(context)
        set_owner(context, account, up_to(last))
        for stage in up_to(last):
            run_stage(context, stage, account, retry_failed)


def _samples_first(context: RunContext, last: str) -> bool:
    """Return whether the first stage with work for a model, of those up to `last`, is a sampling in a single round."""
    if "sampling" not in up_to(last) or context.recipe.rounds > 1 or not weights_loaded(context.recipe, ["sampling"]):
        return False
    return "sampling" not in reusable_stages(context.run, NAMES, context.fingerprints, rounds.all_siblings(context))


def run_one(context: RunContext, stage: str) -> None:
    """Run one stage; skip it if it is done. RunError if an earlier stage is neither done nor reusable."""
    _check_processes()
    is_new = not context.run["run.json"].exists()
    with _working_in(context.run), contextlib.ExitStack() as stack:
        record(context)
        for earlier in before(stage):
            if not context.run.is_done(earlier, context.fingerprints[earlier]) and not _take_over(context, earlier):
                if is_new:  # the folder holds only reused stages: leaving it would look like a run
                    shutil.rmtree(context.run.folder)
                raise context.run.not_done(earlier)
        seals.check(context.run, before(stage))
        account = None
        if stage == "publish":
            account = stack.enter_context(hub_account(context.recipe))
            check_run(context, account, stage)
        recorded = context.run.raw_facts
        if account or any(not recorded[p].get("folder") for p in weights_loaded(context.recipe, [stage])):
            set_owner(context, account, [stage])
        run_stage(context, stage, account)


def evaluate_adapter(context: RunContext, reference: str) -> RunContext:
    """Score an adapter from the Hub on a recipe's test prompts, together with its base: the recipe's student or model.

    Return the run context; its run folder is `runs/<recipe>+<adapter>/<fingerprint>`. ConfigError if `reference` is not
    of the form hub:USER/REPO, or if the adapter was trained on another base.
    """
    from dsc_hub.hub import client

    _check_processes()
    if not reference.startswith("hub:"):
        raise ConfigError(f"--adapter {reference}: expected hub:USER/REPO[@REVISION]")
    if "distilled" not in context.recipe.evaluation.arms:
        raise ConfigError(f"evaluation.arms: {', '.join(context.recipe.evaluation.arms)} has no 'distilled' to score")
    repo = reference.removeprefix("hub:")
    folder, commit = client.pull_adapter(repo)
    name = repo.partition("@")[0]
    adapters.check_adapter(reference, folder, context.base, repo_names(context.recipe)["base"])
    distill = adapters.trained_how(reference, folder)
    if problems := launcher.check_in_child(distill):
        raise ConfigError(f"{reference} has a recipe.yaml with settings that can't be used", problems=problems)
    place = (
        context.runs
        / f"{context.recipe.name}+{name.replace('/', '--')}"
        / digest(context.fingerprints["evaluation"], commit)
    )
    context = replace(context, recipe=context.recipe.model_copy(update={"distill": distill}), run=Run(place))
    with _working_in(context.run):
        record(context)
        set_owner(context, None, ["evaluation"])
        context.run.add_facts(adapter={"repo": name, "commit": commit})
        run_stage(context, "prompts")
        shutil.rmtree(context.run["adapter"], ignore_errors=True)
        context.run["adapter"].mkdir()
        for file in adapters.FILES:  # the cache may hold more files of that repo
            shutil.copy2(folder / file, context.run["adapter"] / file)
        run_stage(context, "evaluation")
    return context


def report_run(run: Run) -> dict[str, Any]:
    """Write the report page of a run folder, of what there is; return what the stage records.

    The recipe is not needed. If all stages before it are done and report or cards are not, both become done.
    """
    from dsc_hub.report import page

    fingerprints = run.facts.fingerprints

    def is_done(stage: str) -> bool:
        return run.is_done(stage, fingerprints.get(stage, ""))

    if not all(map(is_done, before("report"))) or (is_done("report") and is_done("cards")):
        return page.build_page(run)
    with run.lock():
        for later in after("evaluation"):
            run.unfinish(later)
        for stage, write in (("report", stages.write_report), ("cards", stages.write_cards)):
            started = time.monotonic()
            result = write(run)
            _note_time(run, stage, time.monotonic() - started)
            run.finish(stage, fingerprints[stage], time.monotonic() - started, {"result": result})
    return run.result("report")


def merge_shards(context: RunContext, folders: Sequence[Path]) -> None:
    """Merge finished shards (`dsc sample --shard`) into the run: those in `folders`, else those in the run folder."""
    with _working_in(context.run):
        again = context.command.replace("dsc run", "dsc sample", 1)
        shard_runs = shards.find_shards(context.run, folders, context.fingerprints["sampling"], again)
        record(context)
        set_owner(context, None, [])
        run_stage(context, "prompts")
        started = time.monotonic()
        _forget_after(context, "prompts")
        _note_start(context.run, "sampling", None)
        shards.join(context.run, shard_runs)
        reused = sum(shard.result("sampling")["reused_turns"] for shard in shard_runs)
        result = sampling_stage.sampled(context, sampling_stage.prompts_to_sample(context), reused)
        if (present := result["finished"] + sum(1 for _ in context.run.rows("failed.jsonl"))) != result["chains"]:
            raise RunError(
                f"of {result['chains']} chains {present} are in the shards",
                "Remove the shards' sampling.done.json and sample them again.",
            )
        context.run.add_metrics("sampling", result)
        seconds = result["seconds"] or time.monotonic() - started
        _note_time(context.run, "sampling", seconds)
        context.run.finish("sampling", context.fingerprints["sampling"], seconds, {"result": result})
        say(f"merged {len(shard_runs)} shards -> {context.run.folder}")


def _check_processes() -> None:
    if world_size() > 1 and not ranks.leads():
        raise ConfigError(
            f"started in {world_size()} processes, but this is work for one",
            "`accelerate launch -m dsc_hub run RECIPE` may have several, which share the training. From Python, start"
            " one, and set distill.launch or distill.processes: training starts its own.",
        )


def _take_over(context: RunContext, stage: str) -> bool:
    """Reuse a finished stage of another run with the same inputs; return whether there was one."""
    if _has_rounds(context, stage):  # its rounds take over what others have of them
        return False
    source = reuse(context.run, stage, context.fingerprints[stage], before(stage), rounds.all_siblings(context))
    if source is None:
        return False
    _forget_after(context, stage)
    marker = context.run.marker(stage)
    assert marker, "a stage that was reused has its marker"
    _note_time(context.run, stage, marker["seconds"])
    _note_start(context.run, stage, marker.get("server_start_s"))
    say(f"{stage}: taken over from {_name(context, source)}, whose inputs were the same")
    return True


def _name(context: RunContext, folder: Path) -> str:
    """Return the name of another run of the recipe: its fingerprint, in a round with the number of it."""
    return str(folder.relative_to(context.runs / context.recipe.name))


def _forget_after(context: RunContext, stage: str) -> None:
    """Remove the markers and stale files of the later stages: their inputs have changed or are about to."""
    for later in after(stage):
        context.run.unfinish(later)
    for name in BY_NAME[stage].stale_files:
        context.run[name].unlink(missing_ok=True)


def _note_time(run: Run, stage: str, seconds: float) -> None:
    if BY_NAME[stage].is_timed:
        run.add_metrics("stages", run.metrics.get("stages", {}) | {stage: round(seconds, 1)})


def _note_start(run: Run, stage: str, seconds: float | None) -> None:
    """Record how long a stage waited for vLLM's start; None: not at all."""
    before = run.metrics.get("server_starts", {})
    starts = {k: v for k, v in before.items() if k != stage} | ({} if seconds is None else {stage: seconds})
    if starts != before:
        run.add_metrics("server_starts", starts)


def run_stage(context: RunContext, stage: str, account: Any = None, retry_failed: bool = False) -> None:
    """Run one stage: skip it if its marker matches, reuse it from another run with the same inputs, or execute it."""
    if stage == "publish":
        if account is None:
            say("publish: skipped, publish.to is none")
            return
    elif context.run.is_done(stage, context.fingerprints[stage]) and not (
        retry_failed and _has_failures(context, stage)
    ):
        seals.check(context.run, [stage])
        say(f"{stage}: done before")
        return
    elif not retry_failed and _take_over(context, stage):
        return
    context.run.unfinish(stage)
    _forget_after(context, stage)
    _note_start(context.run, stage, None)  # of an earlier session
    if (
        stage == "sampling"
        and not _has_rounds(context, stage)
        and (source := adopt_rows(context.run, stage, context.fingerprints[stage], rounds.all_siblings(context)))
    ):
        say(f"{stage}: going on from what {_name(context, source)} had done of it")
    started = time.monotonic()
    before_s = 0.0
    if _has_rounds(context, stage):
        # A round's own stages are taken over where another run has them, or an earlier session.
        done = rounds.run_rounds(context, run_stage)
        before_s, started = sum(r.seconds for r in done.rounds), time.monotonic()
        _note_start(context.run, stage, rounds.seconds_of_starts(context.run, done))
    result = stages.publish_stage(context, account) if stage == "publish" else stages.STAGE[stage](context)
    record_servers(context)  # a stage that was run alone had no check before it
    seconds = before_s + time.monotonic() - started
    if BY_NAME[stage].sections:
        context.run.add_metrics(stage, result)
    _note_time(context.run, stage, seconds)
    start_s = context.run.metrics.get("server_starts", {}).get(stage)
    more = {} if start_s is None else {"server_start_s": start_s}
    context.run.finish(stage, context.fingerprints[stage], seconds, {"result": result, **more})


def _has_rounds(context: RunContext, stage: str) -> bool:
    return stage == "sampling" and context.recipe.rounds > 1


def _has_failures(context: RunContext, stage: str) -> bool:
    """Return whether the finished stage has failures that `--retry-failed` can retry."""
    result = context.run.result(stage)
    if stage == "evaluation":
        return any(arm["reward"]["failed"] for arm in result["arms"].values())
    return stage == "sampling" and result["failed"] > 0
