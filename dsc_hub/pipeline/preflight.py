"""Checks before a long run: report every problem of a recipe on this machine at once, and estimate the run's cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsc_hub.chain import hygiene
from dsc_hub.chain.language import foreign_prompts
from dsc_hub.config.arms import judges_claim
from dsc_hub.config.models import (
    Place,
    base_place,
    is_at_endpoints,
    runs_chains,
    ways_by_model,
    weights_loaded,
)
from dsc_hub.config.recipe import Recipe, all_scorers, generation_at_evaluation, metric_files, model_server
from dsc_hub.config.stages import NAMES, up_to
from dsc_hub.data.prompts import Counts, load_prompts
from dsc_hub.distill import launcher
from dsc_hub.errors import ConfigError, MetricError, ServingError
from dsc_hub.inference import base_model, chat_template
from dsc_hub.inference.base_model import TURN_OVERHEAD
from dsc_hub.metrics import registry
from dsc_hub.pipeline import fetch, rounds
from dsc_hub.pipeline.context import RunContext, announce_servers
from dsc_hub.pipeline.disk import DiskNeed, disk_needs, disk_problems
from dsc_hub.pipeline.estimate import (
    RunEstimate,
    TrainingNeed,
    chain_count,
    estimate_run,
    priced,
    training_need,
)
from dsc_hub.pipeline.repos import check_publishing
from dsc_hub.pipeline.thresholds import missing_rows, threshold_problems
from dsc_hub.pipeline.work import opening_tokens
from dsc_hub.records import Prompt
from dsc_hub.runs import test_sets
from dsc_hub.runs.reuse import reusable_stages
from dsc_hub.runs.run import Run, siblings
from dsc_hub.system import machine, progress
from dsc_hub.system.launch import world_size


class RunPlan(RunEstimate):
    """What a run will do: its estimate, and what is there already.

    `dropped` counts prompts that are left out; `done` are finished stages; `taken_over` maps stages to the folders of
    the runs whose results will be reused; `repos` says what is published, None: nothing is. `training` is None if there
    is nothing to train, or where it could not be worked out. `looks` counts the adapters that were scored on the same
    test prompts before; 0 if the evaluation is done, or not on test prompts.
    """

    training: TrainingNeed | None

    disk: list[DiskNeed]
    dropped: Counts
    done: list[str]
    taken_over: dict[str, str]
    repos: list[str] | None
    run: Path
    looks: int


def too_long(recipe: Recipe, prompts: Sequence[Prompt], model_folder: Path, place: Place = "model") -> list[str]:
    """Return length problems: conversations that exceed the context, or a context beyond the model's positions.

    `place` is the recipe's section of that model.
    """
    problems = []
    config = base_model.config_of(model_folder)
    if (most := config.get("max_position_embeddings")) and recipe.serving.context > most:
        problems.append(f"serving.context: {recipe.serving.context} is more than the {place}'s {most} positions")
    count = base_model.token_counter(model_folder)
    if count is None:  # a slow tokenizer: the server will report overflows; no guess is made here
        return problems
    c, new = recipe.chain, recipe.generation.max_new_tokens
    fixed, texts, system = new + 2 * TURN_OVERHEAD, "", count(c.system or "")
    fixed += recipe.generation.max_thinking_tokens or 0  # of this turn; those of earlier ones are not shown
    if runs_chains(recipe, place):
        # The last request has prompt, answer, critique request, critique and revision request; the revision must fit.
        critique, revision = max(c.pairs, key=lambda pair: count(pair[0]) + count(pair[1]))
        texts = critique + revision
        fixed += 2 * new + count(critique) + count(revision) + 4 * TURN_OVERHEAD + new * texts.count("{answer}")
    times = texts.count("{prompt}") + texts.count("{group}")  # a group's name is rarely longer than its prompt
    worst = [(fixed + opening_tokens(p, system, count) + times * count(p.text), p) for p in prompts]
    over = [(n, p) for n, p in worst if n > recipe.serving.context]
    if over:
        n, p = max(over, key=lambda x: x[0])
        problems.append(
            f"prompts: {len(over)} of {len(prompts)} don't fit a context of {recipe.serving.context} tokens"
            f"{' of the student' if place == 'student' else ''}; the longest needs {n} "
            f"with its turns: '{p.text[:50]}...'. Raise serving.context, lower generation.max_new_tokens, or shorten "
            "them"
        )
    return problems


def without_group(recipe: Recipe, ungrouped: int) -> list[str]:
    """Return a problem if the chain's texts use {group} and some prompts have no group.

    Without this check the whole prompt would be substituted for the group.
    """
    if not (ungrouped and recipe.chain.asks_for_group()):
        return []
    return [
        f"chain: {{group}} stands in the chain's texts, and {ungrouped} prompts have none; fill "
        f"'{recipe.prompts.group_column}' in all "
        "rows, or leave these out"
    ]


def nothing_held_out(recipe: Recipe) -> list[str]:
    """Return a problem if the split that is evaluated has no share of the prompts, as one who only samples may set."""
    split = recipe.evaluation.split
    if getattr(recipe.prompts.split, split):
        return []
    return [
        f"evaluation.split: there is no prompt in the split '{split}'; set prompts.split.{split} above 0, or name"
        " another one; to sample alone (`dsc sample`, then `dsc dataset`), leave it so"
    ]


def check_run(context: RunContext, account: Any, last: str = "publish", problems_before: Sequence[str] = ()) -> RunPlan:
    """Check the stages up to `last` before a long run and return its plan.

    ConfigError lists all problems, with `problems_before`, which were met earlier. Model weights are not downloaded for
    the check.
    """
    recipe = context.recipe
    fetch.check_fetched(context)
    announce_servers(recipe)
    _say_which_metrics_stay(recipe)
    prompts, dropped = load_prompts(recipe.prompts, context.path.parent, recipe.seed, context.identity["prompts"])
    loaded = {place: model for place, model in context.models.items() if not model.is_behind_api}
    folders = {place: base_model.materialize(model, weights=False) for place, model in loaded.items()}
    _say_who_teaches(context)
    base = folders.get(base_place(recipe))
    reusable = reusable_stages(context.run, NAMES, context.fingerprints, siblings(context.runs, recipe.name))
    planned = chain_count(recipe, prompts)
    left = rounds.chains_left(context, planned)
    share_left = sum(left) / (planned * recipe.rounds) if planned else 0.0
    identities, stages = (context.identity["prompts"], context.base.identity), up_to(last)
    estimate = estimate_run(recipe, prompts, context.model.identity, base, reusable, left, *identities, stages)
    stages_left = [stage for stage in stages if stage not in reusable]
    needs = disk_needs(context, estimate.disk_bytes, base, stages_left)
    problems = [
        *problems_before,
        *(
            problem
            for place, folder in folders.items()
            for problem in template_problems(recipe, folder, place, prompts)
        ),
        *(problem for place, folder in folders.items() for problem in too_long(recipe, prompts, folder, place)),
        *without_group(recipe, dropped.ungrouped),
        *missing_rows(recipe, prompts),
        *(nothing_held_out(recipe) if "evaluation" in stages else ()),
        *disk_problems(needs),
        *_scorer_problems(context, prompts),
        *hygiene_problems(recipe, prompts),
        *(threshold_problems(recipe) if "dataset" not in reusable else ()),
        *_server_problems(recipe, stages_left),
        *_process_problems(recipe),
    ]
    training = None
    if "distill" not in reusable:
        training_problems, training = _check_training(context, base, prompts, last)
        problems += training_problems
    repos = None
    if account:
        repos, hub_problems = check_publishing(context, account, base, estimate.disk_bytes)
        problems += hub_problems
    if n := len(problems):
        raise ConfigError(f"{context.path} can't run here: {n} problem{'s' * (n > 1)}", problems=problems)
    return RunPlan(
        **dict(estimate) | priced(recipe, prompts, folders.get("model"), reusable, share_left),
        training=training,
        disk=needs,
        dropped=dropped,
        done=[stage for stage, source in reusable.items() if source is context.run],
        taken_over={stage: str(source.folder) for stage, source in reusable.items() if source is not context.run},
        repos=repos,
        run=context.run.folder,
        looks=_looks(context, prompts, reusable.get("distill")) if "evaluation" in stages_left else 0,
    )


def _looks(context: RunContext, prompts: Sequence[Prompt], trained: Run | None) -> int:
    """Return how many other adapters were scored on the test prompts before; 0 if no claim is judged on them.

    `trained` is the run that has the adapter; None: it is still to be trained.
    """
    e = context.recipe.evaluation
    if e.split != "test" or not judges_claim(e.arms):
        return 0
    adapter_sha256 = (trained.marker("distill") or {}).get("result", {}).get("adapter_sha256") if trained else None
    return test_sets.looks_before(context.runs, (p.id for p in prompts if p.split == e.split), adapter_sha256)


def _check_training(
    context: RunContext, base: Path | None, prompts: Sequence[Prompt], last: str
) -> tuple[list[str], TrainingNeed | None]:
    """Return problems of the training that is to come, and what it needs, None: not known.

    `base` has the base's files without the weights; None: it is behind an API.
    """
    recipe, place = context.recipe, base_place(context.recipe)
    if base is None:
        problem = (
            f"{place}.source: {context.base.source} has no weights to train; name a student (student.source=ORG/NAME), "
            "or end with the dataset (`dsc sample`, then `dsc dataset`)"
        )
        return [problem] if "distill" in up_to(last) else [], None
    if quantised := _quantised_by(base):
        problem = (
            f"{place}.source: the weights of {context.base.id} are quantised already ({quantised}), and an adapter is"
            " trained on weights that are not; name the model that they were made from"
        )
        return [problem], None
    has_validation = any(p.split == "validation" for p in prompts)
    checked = launcher.rehearse_in_child(recipe, base, has_validation)
    need = training_need(recipe, prompts, base, checked.size) if checked.size else None
    return [*launcher.tracker_problems(recipe.distill), *checked.problems], need


def _say_who_teaches(context: RunContext) -> None:
    """Say what is not known of a model behind an API, and whose licence or terms a student's training depends on."""
    if context.model.is_behind_api:
        progress.say(
            f"model  {context.model.id} is known by its name alone: which weights answer is not recorded, and whether "
            f"the conversations fit its context is not checked (serving.context: {context.recipe.serving.context})"
        )
    if context.student:
        progress.say(
            f"model  {context.model.id} writes the rows that {context.student.id} is trained on: see that its licence "
            f"({context.model.license or 'not known here'}) or its provider's terms allow that"
        )


def _say_which_metrics_stay(recipe: Recipe) -> None:
    """Say which metric files will not be published with the recipe that names them."""
    if recipe.publish.to == "none" or recipe.publish.metrics:
        return
    for place, file in metric_files(recipe).items():
        progress.say(
            f"{place}  {file} stays on this machine: others can look at what is published, but not score with its "
            "recipe; publish.metrics=true publishes the file as a Space, too"
        )


def template_problems(
    recipe: Recipe, model_folder: Path, place: Place = "model", prompts: Iterable[Prompt] = ()
) -> tuple[str, ...]:
    """Return what in the model's chat template stops the recipe's chains or training; say what else to know of it.

    `place` is the recipe's section of that model; `prompts` may be conversations that it does not take.
    """
    template, system = chat_template.load_template(model_folder), recipe.chain.system
    settings = recipe.generation.template_settings
    findings = chat_template.check_template(
        template,
        system,
        settings,
        base_model.token_counter(model_folder),
        runs_chains=runs_chains(recipe, place),
        is_trained=place == base_place(recipe),
    )
    for note in findings.notes:
        progress.say(f"{place}  its chat template: {note}")
    problems = (*findings.problems, *chat_template.conversation_problems(template, prompts, system, settings))
    return tuple(problem.replace("model.source:", f"{place}.source:", 1) for problem in problems)


def _scorer_problems(context: RunContext, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield problems of scorers with these prompts, and of judges that do not answer."""
    from dsc_hub.metrics import loading

    for place, section in all_scorers(context.recipe).items():
        wrong = registry.of_no_kind(section, prompts)
        if not wrong and context.recipe.hygiene.language != "any":
            wrong = registry.of_no_language(section, prompts)
        if wrong:
            yield f"{place}: {wrong}"
        if section.metric == "judge":  # the first request may be hours away
            try:
                loading.load_scorer(section, context.identity[place], context.path.parent)
            except MetricError as e:
                yield f"{place}: {e.one_line}"


def hygiene_problems(recipe: Recipe, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield the problem that hygiene looks for phrases of another language than the prompts'."""
    if recipe.hygiene.meta_talk == "keep" or recipe.hygiene.language == "any":
        return
    if reason := foreign_prompts([p.text for p in prompts], hygiene.META_TALK_LANGUAGES):
        yield (
            f"hygiene.meta_talk: {recipe.hygiene.meta_talk} knows talk about the conversation in English, and the "
            f"prompts are {reason}; hygiene.meta_talk=keep does not look for it, and the claim does not judge it"
        )


def _server_problems(recipe: Recipe, stages: Collection[str]) -> Iterator[str]:
    """Yield problems of the servers that these stages ask; each of others gets a request of the run's form."""
    from dsc_hub.inference import external, servers

    ways = ways_by_model(recipe) if "evaluation" in stages else {}
    at_endpoints = "sampling" in stages or any(is_at_endpoints(recipe, model) for model in ways)
    asks_critic = "sampling" in stages or any("chain" in used for used in ways.values())
    used = [recipe.generation] if "sampling" in stages else []
    if ways and generation_at_evaluation(recipe) not in used:
        used.append(generation_at_evaluation(recipe))
    for settings in used if asks_critic else ():
        try:
            external.critic_endpoint(recipe, settings)
        except (ConfigError, ServingError) as e:
            yield e.one_line
            break
    if weights_loaded(recipe, [stage for stage in stages if stage in ("sampling", "evaluation")]):
        try:
            servers.replica_places(recipe.serving)
        except ConfigError as e:
            yield e.one_line
    if not recipe.serving.endpoints:
        if at_endpoints and (name := recipe.model.api_name):
            yield (
                f"model.source: no server is known at which {name} can be asked; give "
                "serving.endpoints=[https://HOST/v1]"
            )
        return
    for settings in used if at_endpoints else ():
        try:
            external.connect_base(external.external(model_server(recipe)), recipe, settings)
        except ServingError as e:
            yield e.one_line
            break


def _quantised_by(model_folder: Path) -> str:
    """Return the method by which a model's weights are quantised (awq, gptq, fp8, ...); "" if they are not."""
    config = base_model.config_of(model_folder)
    section = config.get("quantization_config") or config.get("compression_config") or {}
    return str(section.get("quant_method") or "unknown method") if section else ""


def _process_problems(recipe: Recipe) -> Iterator[str]:
    """Yield a problem if training would start more processes than this machine has cores or GPUs."""
    if world_size() > 1:  # a launcher has started them
        return
    most = max(machine.cores(), len(machine.gpus()))
    if recipe.distill.processes > most:
        yield f"distill.processes: {recipe.distill.processes} is more than this machine can run: {most}"
