"""Repo cards: the metadata block of a README.md, validated and converted to the Hub's tags."""

from __future__ import annotations

import math
import re
from typing import Any

from dsc_hub.system import plain_yaml

FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)
LANGUAGE = re.compile(r"[a-z]{2,3}(-[\w-]+)?|code|multilingual")
# The licence identifiers that the Hub accepts in a card.
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
# Card keys that become tags, and the Hub's prefix of their values.
TAG_PREFIXES = {
    "tags": "",
    "library_name": "",
    "pipeline_tag": "",
    "language": "language:",
    "license": "license:",
    "datasets": "dataset:",
    "base_model": "base_model:",
    "task_categories": "task_categories:",
    "size_categories": "size_categories:",
    "annotations_creators": "annotations_creators:",
}


def metadata(readme: bytes | None) -> dict[str, Any]:
    """Return the card's metadata as plain JSON values; empty if it is missing or invalid."""
    block = FRONT_MATTER.match((readme or b"").decode("utf-8", "replace"))
    try:
        data = plain_yaml.load_plain_yaml(block.group(1)) if block else {}
    except ValueError:
        data = {}
    return plain(data) if isinstance(data, dict) else {}


def tags(card: dict[str, Any], repo_type: str) -> list[str]:
    """Return the tags of a card, in the Hub's spelling."""
    tag_list = []
    for key, prefix in TAG_PREFIXES.items():
        if key == "language" and repo_type == "model":
            prefix = ""
        tag_list += [f"{prefix}{value}" for value in _listed(card.get(key))]
    return list(dict.fromkeys(tag_list))


def problems(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Return errors and warnings about a README's metadata block."""
    block = FRONT_MATTER.match(content)
    if block is None or not block.group(1).strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = plain_yaml.load_plain_yaml(block.group(1))
    except ValueError as error:
        return [f"YAML parse error: {error}"], []
    if not isinstance(data, dict):
        return ["YAML metadata should be a mapping"], []
    errors = []
    for name in _listed(data.get("license")):
        if not isinstance(name, str) or name not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for language in _listed(data.get("language")):
        if not isinstance(language, str) or not LANGUAGE.fullmatch(language):
            errors.append('"language" must only contain lowercase characters (ISO 639-1/2/3)')
    for key in ("tags", "datasets", "metrics"):
        if not isinstance(data.get(key) or [], list | str):
            errors.append(f'"{key}" must be a string or an array')
    if repo_type == "model":
        errors += _model_index_problems(data.get("model-index", []))
    return errors, []


def _model_index_problems(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        if not isinstance(model, dict) or "name" not in model:
            errors.append(f'"model-index[{i}].name" is required')
        elif not isinstance(model.get("results"), list):
            errors.append(f'"model-index[{i}].results" is required')
    return errors


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def plain(value: Any) -> Any:
    """Return a YAML value as JSON: dates, NaN and non-string keys, which JSON lacks, are converted."""
    if isinstance(value, dict):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # half surrogate pairs can't be encoded
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return hex(value)[:100]  # Python refuses to convert very large integers to decimal
    if value is None or isinstance(value, bool | int) or isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)
