"""What a run will cost, before it starts: requests, tokens, time, disk, money, and the memory of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dsc_hub.config.arms import ADAPTER, TEACHER
from dsc_hub.config.models import is_at_endpoints, models_by_server, ways_by_model
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.stages import NAMES
from dsc_hub.distill import launcher
from dsc_hub.distill.memory import GIB, KEPT_ON_CPU, TrainingSize, peak_bytes
from dsc_hub.inference import base_model
from dsc_hub.inference.base_model import TURN_OVERHEAD, estimated_counter
from dsc_hub.pipeline import pace, work
from dsc_hub.records import SPLITS, Prompt
from dsc_hub.system import machine

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
    memory_available_gib: float


def chain_count(recipe: Recipe, prompts: Sequence[Prompt]) -> int:
    """Return the number of chains of a sampling, of each round if there are several."""
    return sum(p.split in ("train", "validation") for p in prompts) * recipe.chain.chains_per_prompt


def estimate_run(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    model_identity: str,
    base_folder: Path | None,
    done: Collection[str] = (),
    chains_left: Sequence[int] | None = None,
    prompts_identity: str = "",
    base_identity: str = "",
    stages: Collection[str] = NAMES,
) -> RunEstimate:
    """Return the planned work. Stages in `done` make no requests; only `stages` are to be done.

    `model_identity` is of the model that writes the chains; `base_identity` ("": the same one) of the base, whose files
    without the weights are in `base_folder` (None: there are none). `chains_left` are the chains that each unfinished
    round has left; None: all rounds with all chains.
    """
    splits = Counter(p.split for p in prompts)
    sampled = chain_count(recipe, prompts)
    left = [sampled] * recipe.rounds if chains_left is None else chains_left
    evaluated = splits[recipe.evaluation.split] * recipe.evaluation.samples
    ways = ways_by_model(recipe)
    requests = {
        "sampling": sum(left) * (1 + 2 * recipe.chain.steps),
        "evaluation": evaluated * _requests_a_sample(recipe, ways),
    }
    requests = {stage: 0 if stage in done else n for stage, n in requests.items()}
    tokens = {k: v * recipe.generation.most_tokens for k, v in requests.items()}
    if recipe.budget and recipe.budget.tokens is not None:
        tokens["sampling"] = min(tokens["sampling"], recipe.budget.tokens)
    stored = {
        "sampling": [] if recipe.serving.endpoints else pace.known_paces(model_identity),
        "evaluation": []
        if any(model == TEACHER or is_at_endpoints(recipe, model) for model in ways)
        else pace.known_paces(base_identity or model_identity),
    }
    at_once = {"sampling": max(left, default=0), "evaluation": evaluated}
    starts = {"sampling": len(left), "evaluation": len(models_by_server(recipe))}
    seconds = {
        k: pace.expect(
            stored[k],
            k,
            n,
            at_once[k],
            recipe.generation.most_tokens,
            starts[k],
            pace.task_of(recipe, prompts_identity, k),
            has_adapter=k == "evaluation" and ADAPTER in ways and machine.vllm_on_cpu(),
        )
        for k, n in requests.items()
    }
    return RunEstimate(
        prompts={s: splits[s] for s in SPLITS},
        groups={s: len({p.group for p in prompts if p.split == s}) for s in SPLITS},
        chains=sampled,
        requests=requests,
        new_tokens_at_most=tokens,
        seconds=seconds,
        disk_bytes=_disk_bytes(recipe, tokens, base_folder, [s for s in stages if s not in done]),
    )


def _requests_a_sample(recipe: Recipe, ways: Mapping[str | None, Collection[str]]) -> int:
    """Return the requests of the evaluation for one prompt and sample."""
    more = 2 * recipe.chain.steps
    # A chain and best-of-n begin with their model's plain answer, which is generated once.
    return sum(1 + more * ("chain" in w) + more * ("best" in w) for w in ways.values())


def _disk_bytes(recipe: Recipe, new_tokens: Mapping[str, int], base_folder: Path | None, left: Collection[str]) -> int:
    """Return about how many bytes the stages that are `left` write to the run folder, with so many tokens of each."""
    weights = sum(p.stat().st_size for p in base_folder.iterdir() if p.is_file()) if base_folder else 0
    rank = recipe.distill.lora.get("r", launcher.DEFAULT_RANK)
    adapter = (base_folder and adapter_bytes(base_folder, rank)) or weights * WEIGHTS_SHARE
    published = weights if recipe.publish.base else 0
    by_stage = {"distill": adapter, "publish": published}
    tokens = sum(n for stage, n in new_tokens.items() if stage in left)
    return int(tokens * DISK_BYTES_PER_TOKEN + sum(size for stage, size in by_stage.items() if stage in left))


def priced(
    recipe: Recipe, prompts: Sequence[Prompt], folder: Path | None, done: Collection[str], share_left: float = 1.0
) -> dict[str, Any]:
    """Return the estimates that need the tokens read; {} if the recipe has neither price nor quota.

    `folder` has the tokenizer of the model that writes the chains; `share_left` of the chains are still to be sampled.
    """
    s = recipe.serving
    if s.price is None and not (s.endpoints and (s.requests_per_minute or s.tokens_per_minute)):
        return {}
    stages = work.work_of(recipe, prompts, estimated_counter(folder))
    stages["sampling"] = stages["sampling"].times(share_left)
    stages = {stage: work.NOTHING if stage in done else w for stage, w in stages.items()}
    return {
        "prompt_tokens_at_most": {k: w.base.prompt_tokens + w.critic.prompt_tokens for k, w in stages.items()},
        "cost_usd_at_most": None if s.price is None else {k: work.cost_at_most(recipe, w) for k, w in stages.items()},
        "quota_seconds": {k: work.quota_time(recipe, w) for k, w in stages.items()},
    }


def training_need(recipe: Recipe, prompts: Sequence[Prompt], model_folder: Path, size: TrainingSize) -> TrainingNeed:
    """Return what training needs, if each row is as long as the longest prompt and a whole answer."""
    count = estimated_counter(model_folder)
    system = count(recipe.chain.system) if recipe.chain.system else 0
    longest = (
        max((work.opening_tokens(p, system, count) for p in prompts), default=0) + recipe.generation.max_new_tokens
    )
    settings = getattr(recipe.distill, recipe.distill.objective)
    rows = settings.get("per_device_train_batch_size", ROWS_A_STEP) * (2 if recipe.distill.objective == "dpo" else 1)
    length = min(longest + 2 * TURN_OVERHEAD, settings.get("max_length") or recipe.serving.context)
    on_cpu = launcher.is_on_cpu(recipe.distill)
    wide = 4 if on_cpu and machine.cpu_dtype() == "float32" else 2
    available = machine.memory_gib() if on_cpu else machine.gpu_memory_gib()
    peak = peak_bytes(size, rows, length, wide) * (recipe.distill.processes * KEPT_ON_CPU if on_cpu else 1)
    return TrainingNeed(
        parameters=size.parameters,
        trained=size.trained,
        quantised_share=size.quantised_share,
        has_experts=size.has_experts,
        memory_gib=round(peak / GIB, 1),
        memory_available_gib=available,
    )


def adapter_bytes(model_folder: Path, rank: Any) -> float | None:
    """Return the bytes of a LoRA of all linear layers with its checkpoints; None if config.json does not say enough.

    Sizes are those of a Llama-like block: attention with key and value heads, and a gated MLP.
    """
    config = base_model.config_of(model_folder)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = [n for n in (*map(config.get, names), rank) if isinstance(n, int) and n > 0]
    if len(sizes) < 5:
        return None
    hidden, inner, layers, heads, r = sizes
    keys = hidden // heads * (config.get("num_key_value_heads") or heads)
    per_layer = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return float(r * layers * per_layer * launcher.CHECKPOINT_BYTES)
