"""Write the reference pages that come out of the code: recipe keys, commands, metrics.json, environment.

    python docs/generate.py            writes docs/reference/*.md
    python docs/generate.py --check    exit code 1 if one of them is not what the code says

A test runs the check, so the reference can't drift.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from dsc_hub.cli import base, installation
from dsc_hub.cli.main import cli
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.stages import STAGES
from dsc_hub.runs.metrics_schema import Metrics

REFERENCE = Path(__file__).parent / "reference"
WRITTEN = "<!-- Written by docs/generate.py from the code: change that, not this page. -->"
# Values for keys whose default says nothing about how they are used.
EXAMPLES: dict[str, Any] = {
    "name": "my-reviews",
    "description": "Reviews that stay kind.",
    "model.source": "ORG/NAME",
    "model.license": "apache-2.0",
    "student.source": "ORG/SMALLER",
    "student.license": "apache-2.0",
    "prompts.path": "prompts.txt",
    "prompts.dataset": "USER/NAME",
    "prompts.dataset_config": "default",
    "prompts.group_column": "film",
    "prompts.kind_column": "kind",
    "prompts.templates": ["Write a short review of {value}."],
    "prompts.values": "films.txt",
    "prompts.limit": 200,
    "prompts.drop_overlaps": False,
    "chain.critique": "What is unkind about it? Name it in a sentence.",
    "chain.revision": "Write it again, kind this time. Write only the text.",
    "chain.system": "You are a friendly critic.",
    "chain.seed": 1,
    "chain.principles": ["Be kind.", "Be fair."],
    "chain.critic": {"model": "NAME", "endpoint": "http://127.0.0.1:8001/v1", "extra": {"top_k": 40}},
    "chain.veto": {"similarity": 0.4, "length": 0.5},
    "generation.extra": {"top_k": 40},
    "serving.endpoints": ["http://127.0.0.1:8000/v1"],
    "serving.served_model": "NAME",
    "serving.price": {"input": 0.5, "output": 1.5},
    "serving.requests_per_minute": 500,
    "serving.tokens_per_minute": 200000,
    "reward.positive_label": "POSITIVE",
    "reward.options": {"per": "text"},
    "reward.plus": [{"metric": "side_effects", "scorer": "length", "weight": 0.01}],
    "second_scorer": {"metric": "sentiment", "scorer": "minilm"},
    "third_scorer": {"metric": "sentiment", "scorer": "textblob"},
    "dataset.min_reward": 0.2,
    "dataset.phrase_limit": 3,
    "dataset.rows_per_prompt": 2,
    "distill.weight_temperature": 0.3,
    "distill.seed": 1,
    "distill.sft": {"num_train_epochs": 3, "learning_rate": 0.0002},
    "distill.dpo": {"beta": 0.1, "learning_rate": 0.00005},
    "distill.kto": {"learning_rate": 0.0001},
    "distill.lora": {"r": 16, "lora_alpha": 32},
    "distill.quantization": {"load_in_8bit": True},
    "distill.validation_prompts": 48,
    "distill.patience": 3,
    "distill.launch": "multi_gpu",
    "evaluation.temperature": 0.7,
    "publish.owner": "my-organisation",
    "publish.dataset": "my-reviews",
    "publish.adapter": "my-reviews-lora",
    "publish.base": "my-base",
    "publish.tag": "v1",
    "publish.collection": "Kind reviews",
    "publish.gated": "auto",
    "publish.content_warning": "Some of these texts are harsh.",
    "publish.rejected": False,
    "publish.license": "apache-2.0",
}


def pages() -> dict[str, str]:
    """Return the reference pages by file name."""
    return {
        "recipe.md": recipe(),
        "commands.md": commands(),
        "metrics-json.md": metrics_json(),
        "environment.md": environment(),
        "run-folder.md": run_folder(),
    }


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", WRITTEN, *parts]).rstrip() + "\n"


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def shown(value: Any) -> str:
    """Return a value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000).strip()
    return text.removesuffix("...").strip()


# -- recipe


def recipe() -> str:
    schema = Recipe.model_json_schema()
    sections = {"": schema} | {
        name: schema["$defs"][ref] for name, spec in schema["properties"].items() if (ref := reference(spec))
    }
    nested = {}
    for name, section in sections.items():
        for key, spec in section["properties"].items():
            if name and (ref := reference(spec)):
                nested[f"{name}.{key}"] = schema["$defs"][ref]
    intro = (
        "A recipe is one YAML file. Every key is checked before anything starts; unknown keys are refused with a "
        "suggestion. On the command line `KEY.SUB=VALUE` overrides any of them. `dsc schema` prints the JSON schema "
        "for editors."
    )
    parts = [intro]
    for name, section in (sections | nested).items():
        if name in ("second_scorer", "third_scorer"):
            parts.append(f"## {name}\n\nThe same keys as [reward](#reward), without `plus`.")
            continue
        about = section.get("description", "").strip() if name else ""
        rows = ["| key | type | default | example | meaning |", "|---|---|---|---|---|"]
        required = section.get("required", [])
        for key, spec in section["properties"].items():
            path = f"{name}.{key}".lstrip(".")
            if not name and reference(spec):
                continue
            default = "required" if key in required else f"`{shown(default_of(spec))}`"
            example = EXAMPLES.get(path, default_of(spec))
            example = "" if example in (None, [], {}) else f"`{shown(example)}`"
            kind = kind_of(spec)
            rows.append(f"| `{key}` | {cell(kind)} | {cell(default)} | {cell(example)} | {cell(meaning(spec))} |")
        parts.append(f"## {name or 'Top level'}\n\n" + (f"{cell(about)}\n\n" if about else "") + "\n".join(rows))
    return page("Recipe", *parts)


def reference(spec: Mapping[str, Any]) -> str:
    """Return the name of the section that a key holds; "" for a plain value."""
    for option in (spec, *spec.get("anyOf", [])):
        if "$ref" in option:
            return str(option["$ref"]).rpartition("/")[2]
    return ""


def default_of(spec: Mapping[str, Any]) -> Any:
    return spec.get("default")


def meaning(spec: Mapping[str, Any]) -> str:
    text = spec["description"]
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    of_number = next((o for o in (spec, *spec.get("anyOf", [])) if limits.keys() & o.keys()), {})
    ranges = ", ".join(f"{sign} {of_number[key]}" for key, sign in limits.items() if key in of_number)
    return f"{text} ({ranges})" if ranges else text


def kind_of(spec: Mapping[str, Any]) -> str:
    if "enum" in spec:
        return " or ".join(f"`{v}`" for v in spec["enum"])
    if "const" in spec:
        return f"`{spec['const']}`"
    if "anyOf" in spec:
        kinds = [kind_of(o) for o in spec["anyOf"] if o.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if reference(spec):
        return "section"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    if spec.get("type") == "array":
        items = spec.get("items") or {}
        return "list of " + (
            "sections"
            if reference(items)
            else kind_of(items) + "s"
            if items.get("type") == "string"
            else kind_of(items)
        )
    return "mapping" if spec.get("type") == "object" else names.get(str(spec.get("type")), "any")


# -- commands


def commands() -> str:
    parts = [
        "Also `dsc COMMAND --help`. Results go to standard output, progress and notes to standard error; `--json` "
        "prints results as JSON."
    ]
    for title, names in base.SECTIONS.items():
        parts.append(f"## {title}")
        for name in names:
            parts += list(command(cli.commands[name], f"dsc {name}"))
    return page("Commands", *parts)


def command(c: click.Command, name: str) -> Iterator[str]:
    context = click.Context(c, info_name=name)
    pieces = [piece for piece in c.collect_usage_pieces(context) if piece != "[OPTIONS]"]
    usage = " ".join([name, *pieces])
    text = "\n\n".join(cell(part) for part in (c.help or "").split("\n\n"))
    options = [p for p in c.params if isinstance(p, click.Option)]
    rows = [f"| `{cell(', '.join(o.opts))}{metavar(o, context)}` | {cell(option_help(o))} |" for o in options]
    table = "\n".join(["| option | meaning |", "|---|---|", *rows])
    yield f"### {name}\n\n```text\n{usage}\n```\n\n{text}" + (f"\n\n{table}" if rows else "")
    if isinstance(c, click.Group):
        for sub, inner in c.commands.items():
            yield from command(inner, f"{name} {sub}")


def metavar(option: click.Option, context: click.Context) -> str:
    return "" if option.is_flag else f" {option.make_metavar(context)}"


def option_help(option: click.Option) -> str:
    text = option.help or ""
    default = option.default
    has_default = option.show_default and isinstance(default, (str, int, float, Path))
    return f"{text} Default: `{default}`." if has_default else text


# -- metrics.json


def metrics_json() -> str:
    schema = Metrics.model_json_schema()
    parts = [
        "The numbers of a run, in `RUN/metrics.json` and in published repos. `dsc schema metrics` prints the JSON "
        "schema, `dsc show RUN --json` a run's own. An absent number is null, never 0.",
        table_of(schema, "metrics.json"),
    ]
    parts += [table_of(schema["$defs"][name], name) for name in schema["$defs"]]
    return page("metrics.json", *parts)


def table_of(part: Mapping[str, Any], name: str) -> str:
    about = cell(part.get("description", ""))
    rows = ["| key | type | meaning |", "|---|---|---|"]
    for key, spec in part.get("properties", {}).items():
        rows.append(f"| `{key}` | {cell(type_of(spec))} | {cell(spec.get('description', ''))} |")
    return f"## {name}\n\n" + (f"{about}\n\n" if about else "") + "\n".join(rows)


def type_of(spec: Mapping[str, Any]) -> str:
    if "$ref" in spec:
        name = str(spec["$ref"]).rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in spec:
        return " or ".join(dict.fromkeys(type_of(o) for o in spec["anyOf"]))
    if "enum" in spec:
        return " or ".join(f"`{json.dumps(v)}`" for v in spec["enum"])
    if "const" in spec:
        return f"`{json.dumps(spec['const'])}`"
    if spec.get("type") == "array":
        return "list of " + type_of(spec.get("items") or {})
    if spec.get("type") == "object" and isinstance(spec.get("additionalProperties"), dict):
        return "name → " + type_of(spec["additionalProperties"])
    return str(spec.get("type", "any"))


# -- the rest


def environment() -> str:
    codes = [
        ("0", "done"),
        (
            "1",
            "`dsc check`: the claim does not hold (it fails, or there is not enough data); `dsc verify`: something "
            "differs; `dsc grid`: a run failed",
        ),
        ("2", "something for you to mend: one message with what was got, what was expected and what to do"),
        ("130", "interrupted (Ctrl-C); the same command goes on"),
        ("143", "ended by SIGTERM; the same command goes on"),
    ]
    parts = [
        "## Exit codes\n\nAny other exit code, and a traceback, is a bug of dsc: please report it with `dsc env`.\n\n"
        + "\n".join(["| code | meaning |", "|---|---|", *(f"| {c} | {m} |" for c, m in codes)]),
        "## Environment variables\n\n`dsc env` shows those that are set.\n\n"
        + "\n".join(["| variable | meaning |", "|---|---|"])
        + "\n"
        + "\n".join(f"| `{n}` | {cell(m)} |" for n, m in (installation.VARIABLES | installation.SECRETS).items()),
    ]
    return page("Exit codes and environment", *parts)


def run_folder() -> str:
    files = {
        "run.json": "the recipe as resolved, versions, commits, hardware, the command",
        "metrics.json": "all numbers, see [metrics.json](metrics-json.md)",
        "log.txt": "what was said, with the time",
        "vllm.log": "what vLLM printed",
        "distill.log": "what the training printed",
        "lock": "held while a process works on the folder",
        "STAGE.done.json": "written last: without it a stage is not done",
    }
    about = [f"| `{name}` | {text} |" for name, text in files.items()]
    stages = [f"| {s.name} | `dsc {s.command}` | {', '.join(f'`{f}`' for f in s.files)} |" for s in STAGES]
    parts = [
        "A run lies in `runs/RECIPE/FINGERPRINT/`, below the folder that `--runs` names. The fingerprint is a hash of "
        "all that the results depend on, so a changed recipe has another folder, which takes over the stages whose "
        "inputs are the same.",
        "\n".join(["| file | what is in it |", "|---|---|", *about]),
        "## Stages\n\n" + "\n".join(["| stage | command | files |", "|---|---|---|", *stages]),
    ]
    return page("Run folder", *parts)


def main(arguments: list[str]) -> int:
    wrong = []
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = REFERENCE / name
        if "--check" in arguments:
            wrong += [name] if not path.is_file() or path.read_text(encoding="utf-8") != text else []
        else:
            path.write_text(text, encoding="utf-8")
    if wrong:
        print(f"docs/reference: {', '.join(wrong)} differ from the code; run python docs/generate.py", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
