"""Models that think before they answer, as vLLM serves them: the parser of the family, and a limit of the thought.

Thoughts are kept apart from texts whatever the server does (chain/thinking.py). The parser is for families whose marks
are special tokens, which vLLM would otherwise drop from the text, so that nothing shows where the thought ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from dsc_hub.config.serving import GenerationConfig
from dsc_hub.inference import base_model
from dsc_hub.inference.chat_template import THINKING, ChatTemplate, load_template
from dsc_hub.inference.vllm import ENDS_THOUGHTS

# model_type of config.json, or its beginning -> vLLM's parser, and the mark that ends a thought
_THINK, _GEMMA = "</think>", "<channel|>"
PARSERS: Mapping[str, tuple[str, str]] = {
    "qwen3": ("qwen3", _THINK),
    "gpt_oss": ("openai_gptoss", "<|channel|>"),
    "gemma4": ("gemma4", _GEMMA),
    "glm4_moe": ("glm45", _THINK),
    "ernie4_5": ("ernie45", _THINK),
    "olmo3": ("olmo3", _THINK),
    "nemotron_h": ("nemotron_v3", _THINK),
    "minimax_m2": ("minimax_m2", _THINK),
    "kimi_k2": ("kimi_k2", _THINK),
    "seed_oss": ("seed_oss", "</seed:think>"),
    "step3": ("step3", _THINK),
    "mimo": ("mimo", _THINK),
}
# Models distilled from DeepSeek-R1 have the types of their bases; their template opens the thought.
_ALWAYS = ("deepseek_r1", _THINK)
_SWITCHED = ("deepseek_v3", _THINK)


def vllm_arguments(folder: Path, settings: GenerationConfig) -> list[str]:
    """Return vLLM's arguments for the thoughts of the model in `folder`; empty if it does not think.

    With `max_thinking_tokens`, vLLM is told the marks of a thought, so that it can end one (`thinking_token_budget` of
    a request).
    """
    template = load_template(folder)
    if not template.may_think or _is_off(settings):
        return []
    config = base_model.config_of(folder)
    parser, mark = parser_of(str(config.get("model_type", "")), template)
    arguments = ["--reasoning-parser", parser] if parser and _vocabulary(folder)(mark) else []
    if settings.max_thinking_tokens and "<think>" in template.source:
        marks = {"reasoning_start_str": "<think>", "reasoning_end_str": _THINK}
        arguments += [ENDS_THOUGHTS, json.dumps(marks)]
    return arguments


def parser_of(model_type: str, template: ChatTemplate) -> tuple[str, str]:
    """Return the name of vLLM's parser for a kind of model and the mark it looks for; ("", "") if there is none."""
    for kind, entry in PARSERS.items():
        if model_type.startswith(kind):
            return entry
    if model_type.startswith("deepseek") and re.search(r"\bthinking\b", template.source):
        return _SWITCHED
    return _ALWAYS if template.opens_thought({}) else ("", "")


def _is_off(settings: GenerationConfig) -> bool:
    return any(settings.template_settings.get(name) is False for name in THINKING)


def _vocabulary(folder: Path) -> Callable[[str], bool]:
    """Return whether a text is one token of the model; without tokenizer.json nothing is."""
    from tokenizers import Tokenizer

    if not (file := folder / "tokenizer.json").is_file():
        return lambda text: False
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.token_to_id(text) is not None
