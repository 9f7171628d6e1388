"""A whole small run, made by the stages themselves: only the model is scripted, and nothing is trained."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from dsc_hub import __version__
from dsc_hub.config import recipe, recipe_files
from dsc_hub.config.recipe import Recipe
from dsc_hub.data import dataset, prompts
from dsc_hub.evaluation import arms
from dsc_hub.evaluation.answers import collect_answers, write_answers
from dsc_hub.evaluation.summary import summarise_evaluation
from dsc_hub.inference.client import Completion
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.batching import BatchScorer
from dsc_hub.records import SPLITS, Prompt
from dsc_hub.report import cards
from dsc_hub.runs.cost import add_session, cost_of
from dsc_hub.runs.run import Run
from dsc_hub.sampling import sample, summary
from dsc_hub.system.files import write_json
from tests import fixture_run

OVERRIDES = (
    "evaluation.arms=[base, self_critique, distilled]",
    "second_scorer.scorer=textblob",
    "evaluation.samples=2",
    "publish.to=local",
)
GOOD = "wonderful lovely charming brilliant warm delightful superb gentle".split()
BAD = "dull tedious awful clumsy boring bleak annoying weak".split()
NOUNS = "story score cast scene ending voice camera script".split()


async def complete(messages: list[dict[str, str]], seed: int, model: str | None = None, tools: Any = ()) -> Completion:
    """A sentence that request and model alone decide, kinder the further the chain and in the distilled model."""
    h = hashlib.sha256(f"{messages}{seed}{model}".encode()).digest()
    if messages[-1]["content"].startswith("What is wrong"):
        return Completion(f"It could say more of the {NOUNS[h[0] % 8]}.", "stop", 30, 9)
    kind = 2 * (len(messages) > 2) + 3 * (model is not None)
    words = [(GOOD if h[i] % 6 < 1 + kind else BAD)[h[i + 8] % 8] for i in range(3)]
    text = f"A film with a {words[0]} {NOUNS[h[20] % 8]}, and I found the {NOUNS[h[21] % 8]} {words[1]} and {words[2]}."
    return Completion(text, "stop", 30 + len(messages), 20 + h[22] % 5)


def make(folder: Path, recipe_file: Path, *overrides: str) -> tuple[Run, Recipe]:
    """Prompts, chains, dataset, adapter (bytes that stand for one) and evaluation in a run folder, with cards."""
    run, r = Run(folder), recipe_files.load_recipe_file(recipe_file, [*OVERRIDES, *overrides])
    folder.mkdir(parents=True)
    found, dropped = prompts.load_prompts(r.prompts, recipe_file.parent, r.seed)
    rows = run.rows("prompts.jsonl")
    for prompt in found:
        rows.append(prompt.as_row())
    rows.close()
    identity = {"model": "package:x@abc", "prompts": "0123"} | {
        place: registry.identify_scorer(section, registry.Code(recipe_file.parent))
        for place, section in recipe.all_scorers(r).items()
    }
    scorers = {name: s.score for name, s in loading.load_all(r, identity, recipe_file.parent).items()}
    facts = fixture_run.facts()
    names = {"owner": "local", "dataset": "local/little-dsc", "adapter": "local/little-dsc-lora", "base": None}
    facts |= {"recipe": r.model_dump(mode="json"), "identity": identity, "repos": names}
    facts["versions"]["dsc_hub"] = __version__
    facts["model"] |= {"published_as": "HuggingFaceTB/SmolLM2-135M-Instruct", "published_commit": None}
    write_json(run["run.json"], facts)
    counts: dict[str, Any] = {s: sum(p.split == s for p in found) for s in SPLITS}
    groups = {s: len({p.group for p in found if p.split == s}) for s in SPLITS}
    run.add_metrics("prompts", counts | {"groups": groups} | dropped.as_metrics())
    _sample(run, r, [p for p in found if p.split != "test"], scorers)
    chains = sample.read_chains(run)
    run.add_metrics("dataset", dataset.build_dataset(run, r, {p.id: p for p in found}, chains))
    _adapter(run)
    _evaluate(run, r, [p for p in found if p.split == "test"], scorers)
    for name in ("arms", "steps", "loss"):
        run["cards"].mkdir(exist_ok=True)
        run[f"cards/{name}.png"].write_bytes(b"a picture")
    cards.build_cards(run)
    return run, r


def _sample(run: Run, r: Recipe, asked: list[Prompt], scorers: dict[str, Any]) -> None:
    asyncio.run(sample.sample(run, r, asked, complete, BatchScorer(scorers["reward"])))
    chains, group_of, c = sample.read_chains(run), {p.id: p.group for p in asked}.__getitem__, r.chain
    numbers = summary.chain_numbers(chains, group_of, len(asked) * c.chains_per_prompt, c)
    new_tokens = sum(row["new_tokens"] for row in run.rows("turns.jsonl"))
    add_session(run, "sampling", {"seconds": 2.0, "new_tokens": new_tokens})
    run.add_metrics("sampling", numbers | cost_of(run, "sampling", "turns.jsonl") | {"reused_turns": 0})
    run.finish("sampling", "s", 1.0, {"result": {"finished": len(chains)}})


def _adapter(run: Run) -> None:
    run["adapter"].mkdir()
    run["adapter/adapter_model.safetensors"].write_bytes(bytes(range(256)) * 100)
    write_json(run["adapter/adapter_config.json"], {"r": 8, "peft_type": "LORA", "rank_pattern": {}})
    run["adapter/training_log.jsonl"].write_text('{"step": 1, "loss": 2.0}\n')
    weights = hashlib.sha256(run["adapter/adapter_model.safetensors"].read_bytes()).hexdigest()
    run.add_metrics("distill", fixture_run.metrics()["distill"] | {"adapter_sha256": weights})
    run.finish("distill", "d", 1.0, {"result": {"adapter_sha256": weights}})


def _evaluate(run: Run, r: Recipe, asked: list[Prompt], scorers: dict[str, Any]) -> None:
    asyncio.run(arms.answer_prompts(run, r, asked, complete, BatchScorer(scorers["reward"])))
    answers = collect_answers(run, r, asked, scorers)
    about = fixture_run.metrics()["evaluation"]["scores"]
    neutral = {"base": {"one": 3.0, "two": 3.5}, "distilled": {"one": 3.1, "two": 3.4}}
    numbers = summarise_evaluation(r, asked, answers, about, dict.fromkeys(r.evaluation.arms), neutral, look=1)
    rest = {"processors": "core", "neutral_texts": 2, "neutral": neutral, "scores": about, "served_on": "a script"}
    run.add_metrics("evaluation", numbers | rest)
    run.add_metrics("test_set", {"id": "abc", "adapters_scored": 1, "position": 1})
    run.add_metrics("stages", {"sampling": 2.0})
    write_answers(run, answers, r.evaluation.split)
    run.finish("evaluation", "e", 1.0, {"result": numbers})
