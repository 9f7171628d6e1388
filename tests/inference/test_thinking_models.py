"""How vLLM is started for models that think."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dsc_hub.config.serving import GenerationConfig
from dsc_hub.inference import thinking_models
from dsc_hub.inference.chat_template import ChatTemplate
from tests.inference import chat_templates


def model_of(folder: Path, kind: str, template: str, *tokens: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "chat_template.jinja").write_text(template)
    words = {word: n for n, word in enumerate(("[UNK]", *tokens))}
    Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder


OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("kind", "template", "tokens", "settings", "parser"),
    [
        ("qwen3_moe", "QWEN3", ["</think>"], {}, "qwen3"),
        ("qwen3", "QWEN3", ["</think>"], {"extra": OFF}, None),  # it doesn't think, so there is nothing to be parsed
        ("qwen3", "PLAIN", ["</think>"], {}, None),  # an instruct model of the family
        ("qwen3", "QWEN3", [], {}, None),  # vLLM's parser ends at its start without the token
        ("qwen2", "R1", ["</think>"], {}, "deepseek_r1"),
        ("llama", "R1", ["</think>"], {}, "deepseek_r1"),
        ("llama", "PLAIN", ["</think>"], {}, None),
        ("gpt_oss", "HARMONY", ["<|channel|>"], {}, "openai_gptoss"),
    ],
)
def test_the_parser_is_that_of_the_family_where_the_model_thinks(tmp_path, kind, template, tokens, settings, parser):
    folder = model_of(tmp_path, kind, getattr(chat_templates, template), *tokens)
    arguments = thinking_models.vllm_arguments(folder, GenerationConfig(**settings))
    assert arguments == (["--reasoning-parser", parser] if parser else [])


def test_deepseek_v3_with_a_setting_has_another_parser_than_r1():
    switched = ChatTemplate("{% if thinking %}<think>{% endif %}")
    assert thinking_models.parser_of("deepseek_v3", switched)[0] == "deepseek_v3"
    assert thinking_models.parser_of("deepseek_v3", ChatTemplate(chat_templates.R1))[0] == "deepseek_r1"


@pytest.mark.parametrize(("limit", "extra", "ends"), [(None, {}, False), (8, {}, True), (8, OFF, False)])
def test_vllm_is_told_the_marks_of_a_thought_if_thoughts_are_limited(tmp_path, limit, extra, ends):
    folder = model_of(tmp_path, "llama", chat_templates.QWEN3)
    arguments = thinking_models.vllm_arguments(folder, GenerationConfig(max_thinking_tokens=limit, extra=extra))
    assert ("--reasoning-config" in arguments) is ends


def test_vllm_knows_all_parsers_that_we_name():
    names = {
        name for name, _ in (*thinking_models.PARSERS.values(), thinking_models._ALWAYS, thinking_models._SWITCHED)
    }
    code = "from vllm.reasoning import ReasoningParserManager as m; print(*m.list_registered())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert names <= set(done.stdout.splitlines()[-1].split()), names
