"""Implementation of the stages: one function each, which works on the run folder and returns the marker's numbers.

Those that ask models have modules of their own: sampling_stage.py and evaluation_stage.py. Modules that do the work are
imported inside the functions, so that a finished stage releases its memory and `dsc --help` is instant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsc_hub.data.prompts import load_prompts
from dsc_hub.errors import RunError
from dsc_hub.inference.adapters import WEIGHTS
from dsc_hub.pipeline import evaluation_stage, sampling_stage
from dsc_hub.pipeline.context import RunContext
from dsc_hub.records import SPLITS
from dsc_hub.runs.results import current_metrics
from dsc_hub.runs.row_index import StoredPrompts
from dsc_hub.runs.run import Run
from dsc_hub.system import hashing
from dsc_hub.system.progress import say

StageResult = dict[str, Any]


def _run_prompts(context: RunContext) -> StageResult:
    prompts, dropped = load_prompts(
        context.recipe.prompts, context.path.parent, context.recipe.seed, context.identity["prompts"]
    )
    context.run["prompts.jsonl"].unlink(missing_ok=True)
    rows = context.run.rows("prompts.jsonl")
    for prompt in prompts:
        rows.append(prompt.as_row())
    rows.close()
    counts = {s: sum(p.split == s for p in prompts) for s in SPLITS}
    groups = {s: len({p.group for p in prompts if p.split == s}) for s in SPLITS}
    shown = ", ".join(f"{counts[s]} {s}" for s in counts)
    say(
        f"prompts  {len(prompts)} of {dropped.read} ({shown})  in {sum(groups.values())} groups  dropped: "
        f"{dropped.duplicates} duplicate, {dropped.overlaps} overlapping"
        + (f"  without a group: {dropped.ungrouped}" if dropped.ungrouped else "")
    )
    return counts | {"groups": groups} | dropped.as_metrics()


def _run_dataset(context: RunContext) -> StageResult:
    from dsc_hub.data import dataset
    from dsc_hub.sampling import convergence, sample

    prompts = StoredPrompts(context.run.rows("prompts.jsonl"), *SPLITS)
    chains = sample.read_chains(context.run)
    if len(chains) != (finished := context.run.result("sampling")["finished"]):
        raise RunError(
            f"{context.run['chains.jsonl']} holds {len(chains)} chains, and {finished} were finished",
            f"Remove {context.run['sampling.done.json']} and run again: only what is missing is sampled.",
        )
    if "mixing" not in (sampled := context.run.metrics.get("sampling", {})):  # reused chains of an earlier version
        diagnosed = convergence.diagnostics(chains, lambda i: prompts[i].group, context.recipe.chain)
        context.run.add_metrics("sampling", sampled | diagnosed)
    counts = dataset.build_dataset(context.run, context.recipe, prompts, chains)
    dropped = ", ".join(f"{n} {why}" for why, n in counts["dropped"].items()) or "none"
    if (wanted := context.recipe.dataset.rows) and (made := counts["sft"]["train"]) < wanted:
        say(f"dataset  {made} of the {wanted} training rows that are wanted (dataset.rows); why not more is below")
    say(
        f"dataset  sft {counts['sft'].get('train', 0)} train, {counts['sft'].get('validation', 0)} validation  "
        f"preference {counts['preference'].get('train', 0)}, {counts['preference'].get('validation', 0)}  "
        f"dropped: {dropped} -> {context.run['dataset']}"
    )
    return counts


def _run_distill(context: RunContext) -> StageResult:
    from dsc_hub.distill import launcher, ranks
    from dsc_hub.pipeline import rounds

    if context.recipe.rounds > 1:
        return rounds.copy_adapter(context.run)
    training = ranks.train_together(context.run) if ranks.leads() else launcher.launch(context.run)
    return training.model_dump() | {"adapter_sha256": hashing.file_hash(context.run["adapter"] / WEIGHTS)}


def write_report(run: Run) -> StageResult:
    """Write the report page of an evaluated run."""
    from dsc_hub.report import page

    if (test_set := current_metrics(run).test_set) is not None:  # other adapters may have been scored on it since
        run.add_metrics("test_set", test_set.model_dump())
    result = page.build_page(run)
    say(f"report  {result['plots']} plots -> {run['report.html']}")
    return result


def write_cards(run: Run) -> StageResult:
    """Write the cards of an evaluated run."""
    from dsc_hub.report import cards

    return {"files": cards.build_cards(run)}


def publish_stage(context: RunContext, account: Any) -> StageResult:
    from dsc_hub.publish import upload
    from dsc_hub.report import cards

    trained = context.run.result("distill")["adapter_sha256"]
    if hashing.file_hash(context.run["adapter"] / WEIGHTS) != trained:
        raise RunError(
            f"{context.run['adapter'] / WEIGHTS} is not what was trained and evaluated: its hash has changed",
            f"Remove {context.run['distill.done.json']} and run again.",
        )
    context.run.add_facts(repos=context.run.raw_facts["repos"] | {"endpoint": account.endpoint})
    return upload.publish_run(
        context.run,
        account,
        context.run.facts.base.weights if context.recipe.publish.base else None,
        context.path.parent,
        context.recipe.publish,
        lambda: cards.build_cards(context.run),
        context.names_by,
    )


STAGE: dict[str, Callable[[RunContext], StageResult]] = {
    "prompts": _run_prompts,
    "sampling": sampling_stage.run_sampling,
    "dataset": _run_dataset,
    "distill": _run_distill,
    "evaluation": evaluation_stage.run_evaluation,
    "report": lambda context: write_report(context.run),
    "cards": lambda context: write_cards(context.run),
}
