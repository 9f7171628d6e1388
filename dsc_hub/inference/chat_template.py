"""A model's chat template: what it does with the conversations of a chain and with a training row.

Jinja alone (jinja_environment.py), without a tokenizer object, so that a check imports neither transformers nor torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsc_hub.chain.chain import exchange, opening_of
from dsc_hub.config.serving import TEMPLATE_SETTINGS
from dsc_hub.errors import ModelError
from dsc_hub.inference.base_model import json_object
from dsc_hub.inference.jinja_environment import compile_template
from dsc_hub.records import Message, Prompt

THINKING = ("enable_thinking", "thinking")  # settings by which templates switch thinking on or off
_OPENED = ("<think>", "<thinking>", "<|channel>thought")  # a template may end the prompt with one of them
_THOUGHTS = (*_OPENED, "enable_thinking", "<|channel|>analysis")
# Texts of the made-up conversation: no template holds them.
_SYSTEM, _ASKED, _ANSWERED = "zqsystem", ("zqask1", "zqask2", "zqask3"), ("zqanswer1", "zqanswer2")
_ONE_TURN: list[Message] = [{"role": "user", "content": _ASKED[0]}]
_SHOWN = 60  # characters of a rendering in a message


class Refused(Exception):
    """The template refuses a conversation; the message is the template's own."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: its Jinja source, and the special tokens that it may write (`bos_token`, ...)."""

    source: str
    special: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], /, *, add_generation_prompt: bool = False, **settings: Any) -> str:
        """Return the text that the model reads; as transformers' `apply_chat_template` with `tokenize=False`.

        `Refused` if the template raises an error for this conversation.
        """
        conversation = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        values = {"tools": None, "documents": None, **self.special, **settings, **conversation}
        try:
            return compile_template(self.source).render(values)
        except Exception as e:  # a template is a program that came with the model
            raise Refused(" ".join(str(e).split()) or type(e).__name__) from None

    def renders(self, messages: Sequence[Message], /, **settings: Any) -> bool:
        """Return whether the template takes a conversation."""
        try:
            self.render(messages, **settings)
        except Refused:
            return False
        return True

    def opens_thought(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the template begins each answer with a thought, so that the model writes only its end."""
        return self.render(_ONE_TURN, add_generation_prompt=True, **settings).rstrip().endswith(_OPENED)

    @property
    def may_think(self) -> bool:
        """Whether it knows thoughts, or a setting that switches them."""
        return any(mark in self.source for mark in _THOUGHTS)


@dataclass(frozen=True)
class Findings:
    """What is to be said about a template: `problems` stop a run, `notes` don't."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_template(folder: Path) -> ChatTemplate:
    """Return the chat template of a model's folder, as transformers chooses it; ModelError if there is none."""
    config = json_object(folder / "tokenizer_config.json")
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if (own := folder / "chat_template.jinja").is_file():
        source = own.read_text(encoding="utf-8")
    if not source:
        raise ModelError(f"the model in {folder} has no chat template", "Add chat_template.jinja to its folder.")
    return ChatTemplate(source, _special_tokens(json_object(folder / "special_tokens_map.json") | config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def check_template(
    template: ChatTemplate,
    system: str | None,
    settings: Mapping[str, Any],
    count: Callable[[str], int] | None = None,
    *,
    runs_chains: bool = True,
    is_trained: bool = True,
) -> Findings:
    """Render one made-up chain and one training row, and return what a user should know before a run.

    `system` is the recipe's system text, `settings` its chat_template_kwargs, `count` counts tokens. Without
    `runs_chains` the chain is a prompt alone; without `is_trained` nothing is said of training.
    """
    opening = [{"role": "system", "content": _SYSTEM}] if system else []
    opening.append({"role": "user", "content": _ASKED[0]})
    chain = list(opening)
    if runs_chains:
        chain += [*exchange(_ANSWERED[0], _ASKED[1]), *exchange(_ANSWERED[1], _ASKED[2])]
    try:
        whole = template.render(chain, add_generation_prompt=True, **settings)
        row = template.render([*opening, {"role": "assistant", "content": _ANSWERED[0]}], **settings)
    except Refused as e:
        return Findings(problems=(_refusal(template, chain, settings, str(e)),))
    if lost := [m["role"] for m in chain if m["content"] not in whole]:
        return Findings(problems=(_loss(lost),))
    prompt = template.render(opening, add_generation_prompt=True, **settings)
    if is_trained and (problem := _trained_prompt(prompt, row)):
        return Findings(problems=(problem,))
    notes = [
        _thinking_note(template, prompt, settings),
        _rewriting_note(prompt, whole) if runs_chains else "",
        _training_note(prompt, row) if is_trained else "",
        _own_text_note(template, whole, settings, count),
        _day_note(template, chain, settings),
        _empty_answer_note(template, opening, settings) if runs_chains else "",
    ]
    return Findings(notes=tuple(filter(None, notes)))


def conversation_problems(
    template: ChatTemplate, prompts: Iterable[Prompt], system: str | None, settings: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what the template does not take of prompts that are conversations: an order of roles, or tools.

    `system` is the recipe's system text.
    """
    for prompt in _forms(prompts):
        opening, tools = opening_of(prompt, system), list(prompt.tools) or None
        roles = ", ".join(m["role"] for m in opening)
        try:
            shown = template.render(opening, add_generation_prompt=True, **settings, tools=tools)
            template.render([*opening, {"role": "assistant", "content": "Yes."}], **settings, tools=tools)
        except Refused as e:
            yield f"prompts: the model's chat template refuses a conversation with the turns {roles}: {e}"
            continue
        if lost := [m["role"] for m in opening if m["content"].strip() not in shown]:
            yield f"prompts: of the turns {roles} the model's chat template leaves out: {', '.join(lost)}"
        if tools and shown == template.render(opening, add_generation_prompt=True, **settings):
            yield "prompts.tools_column: the model's chat template leaves tools out; use a model that knows tools"


def _forms(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Yield conversations in which a role follows another one, or begins, for the first time, and the first with
    tools."""
    seen = set[tuple[str, ...]]()
    for prompt in prompts:
        if prompt.messages:
            order = itertools.pairwise(["", *(m["role"] for m in prompt.messages)])
            form = set[tuple[str, ...]](order) | ({("tools",)} if prompt.tools else set())
            if not form <= seen:
                yield prompt
            seen |= form


def _refusal(template: ChatTemplate, chain: Sequence[Message], settings: Mapping[str, Any], reason: str) -> str:
    if chain[0]["role"] == "system" and template.renders(chain[1:], add_generation_prompt=True, **settings):
        return (
            f"chain.system: the model's chat template takes no system turn ({reason}); leave chain.system out, and put "
            "what it says into the prompts"
        )
    if not template.renders(_ONE_TURN, add_generation_prompt=True, **settings):
        return (
            f"model.source: the model's chat template fails with a single turn, too: {reason}; mend chat_template.jinja"
            " in the model's folder, or use another model"
        )
    return (
        "model.source: the model's chat template refuses the conversation of a chain (user, assistant, user, assistant,"
        f" user): {reason}; use a model whose template takes several turns"
    )


def _loss(roles: Sequence[str]) -> str:
    if roles == ["system"]:
        return (
            "chain.system: the model's chat template leaves system turns out without a word; leave chain.system out, "
            "and put what it says into the prompts"
        )
    return (
        f"model.source: the model's chat template leaves turns of the conversation out ({', '.join(roles)}), so the "
        "model can't criticise what it doesn't see; use a model whose template takes several turns"
    )


def _thinking_note(template: ChatTemplate, prompt: str, settings: Mapping[str, Any]) -> str:
    if not template.may_think or set(THINKING) & settings.keys():
        return ""
    limit = "give thoughts room of their own with generation.max_thinking_tokens"
    if any(setting in template.source for setting in THINKING):
        setting = next(name for name in THINKING if name in template.source)
        return (
            f"it may think before it answers, and the recipe does not say whether it should: {limit}, or switch "
            f"them off: 'generation.extra={{{TEMPLATE_SETTINGS}: {{{setting}: false}}}}'"
        )
    when = "in every answer" if prompt.rstrip().endswith(_OPENED) else "before it answers"
    return f"it thinks {when}: {limit}"


def _rewriting_note(prompt: str, whole: str) -> str:
    generated = prompt + _ANSWERED[0]
    if whole.startswith(generated):
        return ""
    was, is_now = _difference(generated, whole)
    return (
        f"earlier turns are rendered otherwise than they were generated ({was!r}, later {is_now!r}), so little of a "
        "conversation is found in the prefix cache"
    )


def _trained_prompt(prompt: str, row: str) -> str:
    """Return a problem if what is trained of a row, that is all after its common beginning with the prompt, has a part
    of the prompt."""
    trained = row[len(os.path.commonprefix([prompt, row])) :].partition(_ANSWERED[0])[0]
    is_lost = _SYSTEM in prompt and _SYSTEM not in row
    if not (is_lost or _ASKED[0] in trained or _SYSTEM in trained):
        return ""
    was, is_now = _difference(prompt, row)
    where = "chain.system" if _SYSTEM in prompt else "model.source"
    return (
        f"{where}: the model's chat template renders a prompt otherwise once an answer follows ({was!r}, then "
        f"{is_now!r}), so training would show the model another prompt, and train it on that"
        + ("; leave chain.system out, and put what it says into the prompts" if where == "chain.system" else "")
    )


def _training_note(prompt: str, row: str) -> str:
    """Say what is trained beside the answer: the row after its common beginning with the prompt."""
    trained = row[len(os.path.commonprefix([prompt, row])) :]
    before = trained.partition(_ANSWERED[0])[0]
    if not before.strip():
        return ""
    return (
        f"a training row begins its answer with {_short(before)!r}, which is trained, too: the distilled model learns "
        "to write it" + (", and not to think" if any(mark in before for mark in _OPENED) else "")
    )


def _own_text_note(
    template: ChatTemplate, whole: str, settings: Mapping[str, Any], count: Callable[[str], int] | None
) -> str:
    if not template.renders(_ONE_TURN, **settings):
        return ""
    head = template.render(_ONE_TURN, **settings).partition(_ASKED[0])[0]
    own = max(head.splitlines() or [""], key=lambda line: len(line.split()))
    if len(own.split()) < 3 or own not in whole:
        return ""
    cost = f" ({count(head)} tokens)" if count else ""
    return f"it writes a system text of its own into every request{cost}: {_short(own)!r}; chain.system may replace it"


def _day_note(template: ChatTemplate, chain: Sequence[Message], settings: Mapping[str, Any]) -> str:
    days = {
        template.render(chain, **{**settings, "strftime_now": lambda format, day=day: day}) for day in ("zq1", "zq2")
    }
    if len(days) == 1:
        return ""
    fix = "give it a copy of the model whose chat_template.jinja has a fixed date"
    if "date_string" in template.source:
        fix = f"fix it: 'generation.extra={{{TEMPLATE_SETTINGS}: {{date_string: \"1 January 2026\"}}}}'"
    return f"it writes today's date into every request, so the same recipe asks otherwise tomorrow; {fix}"


def _empty_answer_note(template: ChatTemplate, opening: Sequence[Message], settings: Mapping[str, Any]) -> str:
    if template.renders([*opening, *exchange("", _ASKED[1])], add_generation_prompt=True, **settings):
        return ""
    return "it refuses an empty answer in a conversation: chains with an empty answer end in failed.jsonl"


def _difference(first: str, second: str) -> tuple[str, str]:
    start = len(os.path.commonprefix([first, second]))
    return _short(first[start:]), _short(second[start:])


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
