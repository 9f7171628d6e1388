"""What can be known before hours are spent: every problem of a recipe on this machine, at once, and what the run will take."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsc_hub.config.arms import ADAPTER, ARMS, models_of
from dsc_hub.config.recipe import Recipe, all_scorers, metric_files
from dsc_hub.config.stages import NAMES, up_to
from dsc_hub.data.prompts import load_prompts
from dsc_hub.errors import ConfigError
from dsc_hub.inference import base_model
from dsc_hub.inference.base_model import TURN_OVERHEAD
from dsc_hub.metrics import registry
from dsc_hub.pipeline import pace
from dsc_hub.pipeline.context import RunContext, announce_servers, repos_of
from dsc_hub.records import SPLITS, Prompt
from dsc_hub.runs.reuse import reusable_stages
from dsc_hub.runs.run import siblings
from dsc_hub.system import machine, progress

BYTES_PER_TOKEN = 8  # on disk: the text, its JSON, and its second home in the dataset
WEIGHTS_SHARE = 0.1  # an adapter with its trainer's needs, as a share of the base's files


def too_long(recipe: Recipe, prompts: Sequence[Prompt], model_folder: Path) -> list[str]:
    """Problems with lengths: prompts whose whole conversation can't fit the context, a context the model doesn't have."""
    from tokenizers import Tokenizer

    problems = []
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    if (most := config.get("max_position_embeddings")) and recipe.serving.context > most:
        problems.append(f"serving.context: {recipe.serving.context} is more than the model's {most} positions")
    file = model_folder / "tokenizer.json"
    if not file.is_file():  # a slow tokenizer: the server will tell; nothing is guessed here
        return problems
    tokenizer = Tokenizer.from_file(str(file))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    c, new = recipe.chain, recipe.generation.max_new_tokens
    # The last request holds prompt, answer, critique request, critique, revision request, and needs room for the revision.
    fixed = 3 * new + count(c.critique) + count(c.revision) + (count(c.system) if c.system else 0) + 6 * TURN_OVERHEAD
    fixed += new * (c.critique.count("{answer}") + c.revision.count("{answer}"))
    texts = c.critique + c.revision
    times = 1 + texts.count("{prompt}") + texts.count("{group}")  # a group's name is hardly longer than its prompt
    worst = [(fixed + times * count(p.text), p) for p in prompts]
    over = [(n, p) for n, p in worst if n > recipe.serving.context]
    if over:
        n, p = max(over, key=lambda x: x[0])
        problems.append(
            f"prompts: {len(over)} of {len(prompts)} don't fit a context of {recipe.serving.context} tokens; the longest needs {n} "
            f"with its turns: '{p.text[:50]}...'. Raise serving.context, lower generation.max_new_tokens, or shorten them"
        )
    return problems


def without_group(recipe: Recipe, ungrouped: int) -> list[str]:
    """Is a group asked for in the chain's texts that so many prompts don't have? In its place the whole prompt would
    stand."""
    if not (ungrouped and recipe.chain.asks_for_group()):
        return []
    return [
        f"chain: {{group}} stands in the chain's texts, and {ungrouped} prompts have none; fill '{recipe.prompts.group_column}' in all "
        "rows, or leave these out"
    ]


def estimate(
    recipe: Recipe, prompts: Sequence[Prompt], model_identity: str, model_folder: Path, done: Collection[str] = ()
) -> dict[str, Any]:
    """What the run will do: counts by split, chains, requests, tokens at most, a range of seconds with
    the speeds that it rests on (None where nothing was measured, or nothing is left to ask for), disk. Stages
    that are `done` ask for nothing."""
    splits = Counter(p.split for p in prompts)
    sampled = (splits["train"] + splits["validation"]) * recipe.chain.chains_per_prompt
    turns = 1 + 2 * recipe.chain.steps
    evaluated = splits[recipe.evaluation.split] * recipe.evaluation.samples
    ways: dict[str | None, set[str]] = {}  # in which each model answers one prompt and sample
    for arm in (ARMS[name] for name in recipe.evaluation.arms):
        ways.setdefault(arm.model, set()).add(arm.way)
    # A chain and the best of n begin with their model's plain answer, which is asked for once.
    asked = sum((turns if "chain" in of else 1) + (turns - 1 if "best" in of else 0) for of in ways.values())
    requests = {"sampling": sampled * turns, "evaluation": evaluated * asked}
    requests = {stage: 0 if stage in done else n for stage, n in requests.items()}
    tokens = {k: v * recipe.generation.max_new_tokens for k, v in requests.items()}
    seen = [] if recipe.serving.endpoints else pace.known(model_identity)
    at_once = {"sampling": sampled, "evaluation": evaluated}
    starts = {"sampling": 1, "evaluation": len(models_by_server(recipe.evaluation.arms, recipe.serving.endpoints))}
    seconds = {
        k: pace.expect(seen, k, n, at_once[k], recipe.generation.max_new_tokens, starts[k]) for k, n in requests.items()
    }
    weights = sum(p.stat().st_size for p in model_folder.iterdir() if p.is_file())
    return {
        "prompts": {s: splits[s] for s in SPLITS},
        "groups": {s: len({p.group for p in prompts if p.split == s}) for s in SPLITS},
        "chains": sampled,
        "requests": requests,
        "new_tokens_at_most": tokens,
        "seconds": seconds,
        "disk_bytes": int(
            sum(tokens.values()) * BYTES_PER_TOKEN + weights * WEIGHTS_SHARE + (weights if recipe.publish.base else 0)
        ),
    }


def models_by_server(arms: Sequence[str], endpoints: Sequence[str]) -> list[tuple[str | None, ...]]:
    """Which models are asked of one server: base and adapter, or the base of one that knows no adapter first. On a CPU
    serving an adapter makes requests to its base half as slow again, which costs more than another start."""
    models = models_of(arms)
    if len(models) < 2 or endpoints or not machine.vllm_on_cpu():
        return [models]
    return [(model,) for model in models]


def disk(runs: Path, needed: int) -> list[str]:
    """Is there room where the runs lie?"""
    at = next(p for p in (runs, *runs.parents) if p.exists())
    free = shutil.disk_usage(at).free
    if free < needed:
        return [
            f"disk: {free / 1e9:.2f} GB free at {at}, about {needed / 1e9:.2f} GB needed; free some, or choose another place with --runs"
        ]
    return []


def check(context: RunContext, account: Any, last: str = "publish") -> dict[str, Any]:
    """All that can be wrong with the stages up to `last`, before hours are spent; the estimate if nothing is.

    ConfigError with all problems. Weights are not fetched for it.
    """
    from dsc_hub.distill import launcher
    from dsc_hub.inference import servers as inference_servers

    announce_servers(context.recipe)
    if context.recipe.publish.to != "none" and not context.recipe.publish.metrics:
        for place, file in metric_files(context.recipe).items():
            progress.say(
                f"{place}  {file} stays on this machine: others can look at what is published, but not score with its recipe; "
                "publish.metrics=true publishes the file as a Space, too"
            )
    found, dropped = load_prompts(
        context.recipe.prompts, context.path.parent, context.recipe.seed, context.identity["prompts"]
    )
    folder = base_model.materialize(context.model, weights=False)
    problems = too_long(context.recipe, found, folder) + without_group(context.recipe, dropped.ungrouped)
    outlook = reusable_stages(context.run, NAMES, context.fingerprints, siblings(context.runs, context.recipe.name))
    numbers = estimate(context.recipe, found, context.model.identity, folder, outlook) | {"dropped": asdict(dropped)}
    numbers["done"] = [stage for stage, where in outlook.items() if where is context.run]
    numbers["taken_over"] = {stage: str(where.folder) for stage, where in outlook.items() if where is not context.run}
    problems += disk(context.runs, numbers["disk_bytes"])
    for place, section in all_scorers(context.recipe).items():
        if wrong := registry.of_no_kind(section, found):
            problems.append(f"{place}: {wrong}")
        if section.metric == "judge":  # it may be asked for the first time hours from now
            problems += [f"{place}: {told}" for told in inference_servers.unusable(section.options)]
    inference_servers.external_critic(context.recipe.chain.critic)
    if not context.recipe.serving.endpoints:
        try:
            inference_servers.replica_places(context.recipe.serving)
        except ConfigError as e:
            problems.append(f"{e.message}; {e.hint}")
    else:
        inference_servers.external(context.recipe.serving)
        if "evaluation" in up_to(last) and ADAPTER in models_of(context.recipe.evaluation.arms):
            problems.append(
                "serving.endpoints: servers that already run don't have the adapter; "
                "leave the distilled arms out of evaluation.arms, or leave serving.endpoints empty"
            )
    most = max(machine.cores(), len(machine.gpus()))
    if context.recipe.distill.processes > most:
        problems.append(
            f"distill.processes: {context.recipe.distill.processes} is more than this machine can run: {most}"
        )
    if "distill" not in outlook:
        problems += launcher.check(context.recipe.distill.model_dump(mode="json"))
    if account:
        from dsc_hub.hub import repos as hub_repos
        from dsc_hub.publish import metric_space

        wanted, by = repos_of(context.recipe, account.owner), context.names_by.get("base")
        base = {p.name: p for pattern in base_model.WANTED for p in folder.glob(pattern)} if wanted["base"] else {}
        kinds = [
            ("dataset", wanted["dataset"], context.names_by.get("dataset")),
            ("model", wanted["adapter"], context.names_by.get("adapter")),
            *([("model", wanted["base"], by and by.with_weights(base.values()))] if wanted["base"] else []),
        ]
        how, spaces = context.recipe.publish, []
        if how.metrics:
            files = sorted(set(metric_files(context.recipe).values()))
            problems += metric_space.preflight(account, context.path.parent, files, how)
            spaces = [f"space {account.owner}/{metric_space.name_of(file)}" for file in files]
        problems += hub_repos.preflight(account, [hub_repos.repo_target(how, *kind) for kind in kinds])
        if how.collection and how.private:
            problems += hub_repos.collection_is_public(account, how.collection)
        problems += hub_repos.oversized(f"base '{wanted['base']}'", base)
        metadata = {"license": context.recipe.publish.license or context.model.license or "unknown"}
        metadata["language"] = [context.recipe.publish.language]
        for repo_type in ("dataset", "model"):
            problems += [p for p in hub_repos.check_card(account, repo_type, metadata) if p not in problems]
        total = f"at most about {numbers['disk_bytes'] / 1e9:.2f} GB together"
        if any(name.endswith(".safetensors") for name in base):  # a model of a Hub isn't fetched for a plan
            total += f", {sum(p.stat().st_size for p in base.values()) / 1e9:.2f} GB of it the base model"
        numbers["repos"] = [*(f"{kind} {name}" for kind, name, _ in kinds), *spaces, total]
    if problems:
        n = len(problems)
        raise ConfigError(f"{context.path} can't run here: {n} problem{'s' * (n > 1)}", problems=problems)
    return numbers
