"""Checks before a long run: report every problem of a recipe on this machine at once, and estimate the run's cost."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dsc_hub.config.arms import ADAPTER, ARMS, models_of
from dsc_hub.config.recipe import Recipe, all_scorers, generation_at_evaluation, metric_files
from dsc_hub.config.stages import NAMES, up_to
from dsc_hub.data.prompts import Counts, load_prompts
from dsc_hub.distill import launcher
from dsc_hub.distill.memory import GIB, TrainingSize, peak_bytes
from dsc_hub.errors import ConfigError, DscError, MetricError, ServingError
from dsc_hub.inference import base_model, chat_template
from dsc_hub.inference.base_model import TURN_OVERHEAD
from dsc_hub.inference.weights import merges_adapters
from dsc_hub.metrics import registry
from dsc_hub.pipeline import pace, work
from dsc_hub.pipeline.context import RunContext, announce_servers, repos_of
from dsc_hub.records import SPLITS, Prompt
from dsc_hub.runs.reuse import reusable_stages
from dsc_hub.runs.run import siblings
from dsc_hub.system import machine, progress
from dsc_hub.system.launch import world_size

ROWS_A_STEP = 4  # of training on a device, unless the recipe says otherwise
DISK_BYTES_PER_TOKEN = 8  # on disk: the text, its JSON, and its copy in the dataset
WEIGHTS_SHARE = (
    0.1  # size of an adapter with trainer state, as a fraction of the base's files, where it can't be worked out
)


class RunEstimate(BaseModel):
    """The work of a run: prompts and split groups by split, chains; by stage requests, new tokens and time.

    `seconds` is None for a stage if nothing was measured or no request is left. With a price or a quota in the recipe
    (else None): tokens read by stage, and USD at most by stage (None if the price of a server that it asks is not
    given), and the time that quotas allow. `work` has the rule.
    """

    prompts: dict[str, int]
    groups: dict[str, int]
    chains: int
    requests: dict[str, int]
    new_tokens_at_most: dict[str, int]
    seconds: dict[str, pace.ExpectedTime | None]
    disk_bytes: int
    prompt_tokens_at_most: dict[str, int] | None = None
    cost_usd_at_most: dict[str, float | None] | None = None
    quota_seconds: dict[str, work.QuotaTime | None] | None = None


class TrainingNeed(BaseModel):
    """What training needs: parameters of the base and of the adapter, the share that is quantised, and about how much
    memory in GiB each process takes at its peak, with rows of the length that generation allows."""

    parameters: int
    trained: int
    quantised_share: float
    has_experts: bool
    memory_gib: float
    memory_there_gib: float


class RunPlan(RunEstimate):
    """What a run will do: its estimate, and what is there already.

    `dropped` counts prompts that are left out; `done` are finished stages; `taken_over` maps stages to the folders of
    the runs whose results will be reused; `repos` says what is published, None: nothing is. `training` is None if there
    is nothing to train, or where it could not be worked out.
    """

    training: TrainingNeed | None

    dropped: Counts
    done: list[str]
    taken_over: dict[str, str]
    repos: list[str] | None
    run: Path


def too_long(recipe: Recipe, prompts: Sequence[Prompt], model_folder: Path) -> list[str]:
    """Return length problems: conversations that exceed the context, or a context beyond the model's positions."""
    from tokenizers import Tokenizer

    problems = []
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    if (most := config.get("max_position_embeddings")) and recipe.serving.context > most:
        problems.append(f"serving.context: {recipe.serving.context} is more than the model's {most} positions")
    file = model_folder / "tokenizer.json"
    if not file.is_file():  # a slow tokenizer: the server will report overflows; no guess is made here
        return problems
    tokenizer = Tokenizer.from_file(str(file))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    c, new = recipe.chain, recipe.generation.max_new_tokens
    # The last request has prompt, answer, critique request, critique and revision request; the revision must fit too.
    fixed = 3 * new + count(c.critique) + count(c.revision) + (count(c.system) if c.system else 0) + 6 * TURN_OVERHEAD
    fixed += recipe.generation.max_thinking_tokens or 0  # of this turn; those of earlier ones are not shown
    fixed += new * (c.critique.count("{answer}") + c.revision.count("{answer}"))
    texts = c.critique + c.revision
    times = 1 + texts.count("{prompt}") + texts.count("{group}")  # a group's name is rarely longer than its prompt
    worst = [(fixed + times * count(p.text), p) for p in prompts]
    over = [(n, p) for n, p in worst if n > recipe.serving.context]
    if over:
        n, p = max(over, key=lambda x: x[0])
        problems.append(
            f"prompts: {len(over)} of {len(prompts)} don't fit a context of {recipe.serving.context} tokens; the "
            f"longest needs {n} "
            f"with its turns: '{p.text[:50]}...'. Raise serving.context, lower generation.max_new_tokens, or shorten "
            "them"
        )
    return problems


def training_need(recipe: Recipe, prompts: Sequence[Prompt], model_folder: Path, size: TrainingSize) -> TrainingNeed:
    """Return what training needs, if each row is as long as the longest prompt and a whole answer."""
    count = chat_template.token_counter(model_folder) or len
    system = count(recipe.chain.system) if recipe.chain.system else 0
    longest = max((count(p.text) for p in prompts), default=0) + system + recipe.generation.max_new_tokens
    settings = getattr(recipe.distill, recipe.distill.objective)
    rows = settings.get("per_device_train_batch_size", ROWS_A_STEP) * (2 if recipe.distill.objective == "dpo" else 1)
    length = min(longest + 2 * TURN_OVERHEAD, settings.get("max_length") or recipe.serving.context)
    on_cpu = not machine.gpus()
    wide = 4 if on_cpu and machine.cpu_dtype() == "float32" else 2
    there = machine.memory_gib() if on_cpu else machine.gpu_memory_gib()
    peak = peak_bytes(size, rows, length, wide) * (recipe.distill.processes if on_cpu else 1)
    return TrainingNeed(
        parameters=size.parameters,
        trained=size.trained,
        quantised_share=size.quantised_share,
        has_experts=size.has_experts,
        memory_gib=round(peak / GIB, 1),
        memory_there_gib=there,
    )


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


def estimate_run(
    recipe: Recipe, prompts: Sequence[Prompt], model_identity: str, model_folder: Path, done: Collection[str] = ()
) -> RunEstimate:
    """Return the planned work. Stages in `done` make no requests."""
    splits = Counter(p.split for p in prompts)
    sampled = (splits["train"] + splits["validation"]) * recipe.chain.chains_per_prompt
    turns = 1 + 2 * recipe.chain.steps
    evaluated = splits[recipe.evaluation.split] * recipe.evaluation.samples
    ways: dict[str | None, set[str]] = {}  # model -> the ways in which it answers one prompt and sample
    for arm in (ARMS[name] for name in recipe.evaluation.arms):
        ways.setdefault(arm.model, set()).add(arm.way)
    # A chain and best-of-n begin with their model's plain answer, which is generated once.
    per_sample = sum((turns if "chain" in w else 1) + (turns - 1 if "best" in w else 0) for w in ways.values())
    requests = {"sampling": sampled * turns * recipe.rounds, "evaluation": evaluated * per_sample}
    requests = {stage: 0 if stage in done else n for stage, n in requests.items()}
    tokens = {k: v * recipe.generation.most_tokens for k, v in requests.items()}
    stored = [] if recipe.serving.endpoints else pace.known_paces(model_identity)
    at_once = {"sampling": sampled, "evaluation": evaluated}
    starts = {
        "sampling": recipe.rounds,
        "evaluation": len(models_by_server(recipe.evaluation.arms, recipe.serving.endpoints)),
    }
    seconds = {
        k: pace.expect(stored, k, n, at_once[k], recipe.generation.most_tokens, starts[k]) for k, n in requests.items()
    }
    weights = sum(p.stat().st_size for p in model_folder.iterdir() if p.is_file())
    return RunEstimate(
        **_priced(recipe, prompts, model_folder, done),
        prompts={s: splits[s] for s in SPLITS},
        groups={s: len({p.group for p in prompts if p.split == s}) for s in SPLITS},
        chains=sampled,
        requests=requests,
        new_tokens_at_most=tokens,
        seconds=seconds,
        disk_bytes=int(
            sum(tokens.values()) * DISK_BYTES_PER_TOKEN
            + (
                adapter_bytes(model_folder, recipe.distill.lora.get("r", launcher.DEFAULT_RANK))
                or weights * WEIGHTS_SHARE
            )
            + (weights if recipe.publish.base else 0)
            # float32 from bfloat16, while the adapter is scored
            + (2 * weights if ADAPTER in models_of(recipe.evaluation.arms) and merges_adapters() else 0)
        ),
    )


def _priced(recipe: Recipe, prompts: Sequence[Prompt], folder: Path, done: Collection[str]) -> dict[str, Any]:
    """Return the estimates that need the tokens read; {} if the recipe has neither price nor quota."""
    s = recipe.serving
    if s.price is None and not (s.endpoints and (s.requests_per_minute or s.tokens_per_minute)):
        return {}
    stages = work.work_of(recipe, prompts, work.counter(folder))
    stages = {stage: work.NOTHING if stage in done else w for stage, w in stages.items()}
    return {
        "prompt_tokens_at_most": {k: w.base.prompt_tokens + w.critic.prompt_tokens for k, w in stages.items()},
        "cost_usd_at_most": None if s.price is None else {k: work.cost_at_most(recipe, w) for k, w in stages.items()},
        "quota_seconds": {k: work.quota_time(recipe, w) for k, w in stages.items()},
    }


def adapter_bytes(model_folder: Path, rank: Any) -> float | None:
    """Return the bytes of a LoRA of all linear layers with its checkpoints; None if config.json does not say enough.

    Sizes are those of a Llama-like block: attention with key and value heads, and a gated MLP.
    """
    file = model_folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = [n for n in (*map(config.get, names), rank) if isinstance(n, int) and n > 0]
    if len(sizes) < 5:
        return None
    hidden, inner, layers, heads, r = sizes
    keys = hidden // heads * (config.get("num_key_value_heads") or heads)
    per_layer = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return float(r * layers * per_layer * launcher.CHECKPOINT_BYTES)


def models_by_server(arms: Sequence[str], endpoints: Sequence[str]) -> list[tuple[str | None, ...]]:
    """Return the models per server start: base and adapter together, or first the base on a server without adapter.

    On a CPU, serving an adapter makes requests to the base take half as long again, which costs more than another
    start; or the adapter is merged into a model of its own (`weights.merges_adapters`).
    """
    models = models_of(arms)
    if len(models) < 2 or endpoints or not machine.vllm_on_cpu():
        return [models]
    return [(model,) for model in models]


def disk(runs: Path, needed: int) -> list[str]:
    """Return a problem if the disk of the runs folder has less than `needed` bytes free."""
    folder = next(p for p in (runs, *runs.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        return [
            f"disk: {free / 1e9:.2f} GB free at {folder}, about {needed / 1e9:.2f} GB needed; free some, or choose "
            "another place with --runs"
        ]
    return []


def check_run(context: RunContext, account: Any, last: str = "publish") -> RunPlan:
    """Check the stages up to `last` before a long run and return its plan.

    ConfigError lists all problems. Model weights are not downloaded for the check.
    """
    recipe = context.recipe
    announce_servers(recipe)
    _say_which_metrics_stay(recipe)
    prompts, dropped = load_prompts(recipe.prompts, context.path.parent, recipe.seed, context.identity["prompts"])
    folder = base_model.materialize(context.model, weights=False)
    reusable = reusable_stages(context.run, NAMES, context.fingerprints, siblings(context.runs, recipe.name))
    estimate = estimate_run(recipe, prompts, context.model.identity, folder, reusable)
    problems = [
        *template_problems(recipe, folder),
        *too_long(recipe, prompts, folder),
        *without_group(recipe, dropped.ungrouped),
        *disk(context.runs, estimate.disk_bytes),
        *_scorer_problems(context, prompts),
        *_server_problems(recipe, evaluates="evaluation" in up_to(last)),
        *_process_problems(recipe),
    ]
    training = None
    if "distill" not in reusable and (quantised := _quantised_by(folder)):
        problems.append(
            f"model.source: the weights of {context.model.id} are quantised already ({quantised}), and an adapter is"
            " trained on weights that are not; name the model that they were made from"
        )
    elif "distill" not in reusable:
        has_validation = any(p.split == "validation" for p in prompts)
        problems += launcher.tracker_problems(recipe.distill)
        checked = launcher.rehearse_in_child(recipe, folder, has_validation)
        problems += checked.problems
        training = checked.size and training_need(recipe, prompts, folder, checked.size)
    repos = None
    if account:
        repos, hub_problems = _check_publishing(context, account, folder, estimate.disk_bytes)
        problems += hub_problems
    if problems:
        n = len(problems)
        raise ConfigError(f"{context.path} can't run here: {n} problem{'s' * (n > 1)}", problems=problems)
    return RunPlan(
        **dict(estimate),
        training=training,
        dropped=dropped,
        done=[stage for stage, source in reusable.items() if source is context.run],
        taken_over={stage: str(source.folder) for stage, source in reusable.items() if source is not context.run},
        repos=repos,
        run=context.run.folder,
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


def template_problems(recipe: Recipe, model_folder: Path) -> tuple[str, ...]:
    """Return what in the model's chat template stops the recipe's chains or training; say what else to know of it."""
    template = chat_template.load_template(model_folder)
    count = chat_template.token_counter(model_folder)
    findings = chat_template.check_template(template, recipe.chain.system, recipe.generation.template_settings, count)
    for note in findings.notes:
        progress.say(f"model  its chat template: {note}")
    return findings.problems


def _scorer_problems(context: RunContext, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield problems of scorers with these prompts, and of judges that do not answer."""
    from dsc_hub.metrics import loading

    for place, section in all_scorers(context.recipe).items():
        if wrong := registry.of_no_kind(section, prompts):
            yield f"{place}: {wrong}"
        if section.metric == "judge":  # the first request may be hours away
            try:
                loading.load_scorer(section, context.identity[place], context.path.parent)
            except MetricError as e:
                yield f"{place}: {_in_a_line(e)}"


def _server_problems(recipe: Recipe, evaluates: bool) -> Iterator[str]:
    """Yield problems of the servers of base and critic; each that already runs gets a request of the run's form."""
    from dsc_hub.inference import external, servers

    used = [recipe.generation]
    if evaluates and generation_at_evaluation(recipe) != recipe.generation:
        used.append(generation_at_evaluation(recipe))
    for settings in used:
        try:
            external.critic_endpoint(recipe, settings)
        except (ConfigError, ServingError) as e:
            yield _in_a_line(e)
            break
    if not recipe.serving.endpoints:
        try:
            servers.replica_places(recipe.serving)
        except ConfigError as e:
            yield _in_a_line(e)
        return
    for settings in used:
        try:
            external.connect_base(external.external(recipe.serving), recipe, settings)
        except ServingError as e:
            yield _in_a_line(e)
            break
    if evaluates and ADAPTER in models_of(recipe.evaluation.arms):
        yield (
            "serving.endpoints: servers that already run don't have the adapter; "
            "leave the distilled arms out of evaluation.arms, or leave serving.endpoints empty"
        )


def _in_a_line(error: DscError) -> str:
    return "; ".join(filter(None, (error.message, error.hint)))


def _quantised_by(model_folder: Path) -> str:
    """Return the method by which a model's weights are quantised (awq, gptq, fp8, ...); "" if they are not."""
    file = model_folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    section = config.get("quantization_config") or config.get("compression_config") or {}
    return str(section.get("quant_method") or "unknown method") if section else ""


def _process_problems(recipe: Recipe) -> Iterator[str]:
    """Yield a problem if training would start more processes than this machine has cores or GPUs."""
    if world_size() > 1:  # a launcher has started them
        return
    most = max(machine.cores(), len(machine.gpus()))
    if recipe.distill.processes > most:
        yield f"distill.processes: {recipe.distill.processes} is more than this machine can run: {most}"


def _check_publishing(
    context: RunContext, account: Any, model_folder: Path, disk_bytes: float
) -> tuple[list[str], list[str]]:
    """Return what would be published (repos, and their size in words), and the problems of doing so."""
    from dsc_hub.hub import repos as hub_repos
    from dsc_hub.publish import metric_space

    publish, by = context.recipe.publish, context.names_by
    names = repos_of(context.recipe, account.owner)
    base = {p.name: p for pattern in base_model.WANTED for p in model_folder.glob(pattern)} if names["base"] else {}
    kinds: list[tuple[str, Any, Any]] = [
        ("dataset", names["dataset"], by.get("dataset")),
        ("model", names["adapter"], by.get("adapter")),
    ]
    if names["base"]:
        stranger = by.get("base")
        kinds.append(("model", names["base"], stranger and stranger.with_weights(base.values())))
    problems, spaces = [], []
    if publish.metrics:
        files = sorted(set(metric_files(context.recipe).values()))
        problems += metric_space.check_metric_files(account, context.path.parent, files, publish)
        spaces = [f"space {account.owner}/{metric_space.name_of(file)}" for file in files]
    problems += hub_repos.check_targets(account, [hub_repos.repo_target(publish, *kind) for kind in kinds])
    if publish.collection and publish.private:
        problems += hub_repos.collection_is_public(account, publish.collection)
    problems += hub_repos.oversized(f"base '{names['base']}'", base)
    metadata = {"license": publish.license or context.model.license or "unknown", "language": [publish.language]}
    for repo_type in ("dataset", "model"):
        problems += [p for p in hub_repos.check_card(account, repo_type, metadata) if p not in problems]
    total = f"at most about {disk_bytes / 1e9:.2f} GB together"
    # The weights of a Hub model are not downloaded for a plan.
    if any(name.endswith(".safetensors") for name in base):
        total += f", {sum(p.stat().st_size for p in base.values()) / 1e9:.2f} GB of it the base model"
    return [*(f"{kind} {name}" for kind, name, _ in kinds), *spaces, total], problems
