"""Chat with base and distilled side by side on the terminal: one server, the adapter unmerged.

Every question is sent to both with the settings of the recipe's evaluation and one seed: concurrently if that is safe
(see `_answer`), else one after the other. `Talk` holds the history that fits the context and sends no requests;
`start_chat` reads questions, sends them and shows the answers. Writes nothing into the run folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_hub.chain.chain import seed_of, system_turn
from dsc_hub.cli import terminal
from dsc_hub.config import origin, untrusted
from dsc_hub.config.arms import ADAPTER
from dsc_hub.config.models import base_place
from dsc_hub.config.recipe import Recipe, generation_at_evaluation
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference import external, servers, thinking_models
from dsc_hub.inference.base_model import TURN_OVERHEAD, estimated_counter
from dsc_hub.inference.client import Completion, Generator
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.inference.weights import evaluation_weights
from dsc_hub.pipeline.context import announce_servers
from dsc_hub.records import Message, prompt_id
from dsc_hub.runs.run import Run
from dsc_hub.system import cache, event_loop
from dsc_hub.system.progress import duration, moving_line, say

# arm -> model name in the request (None: the endpoint's base model)
ARMS: Mapping[str, str | None] = {
    "base": None,
    "distilled": ADAPTER,
}


@dataclass(frozen=True)
class Exchange:
    """A question and one arm's answer, with the number of tokens that both take in the next request."""

    question: str
    answer: str
    tokens: int


class Talk:
    """The history of each arm. Both are truncated together, so that they always contain the same questions.

    `context` is the limit in tokens for history, question and `room` (tokens of a new answer); `count` returns the
    number of tokens of a text.
    """

    def __init__(self, system: str | None, context: int, room: int, count: Callable[[str], int]) -> None:
        self._system, self._context, self._room, self._count = system, context, room, count
        self._fixed = 0  # tokens of the template and the system text: measured at the first answer
        self.said: dict[str, list[Exchange]] = {arm: [] for arm in ARMS}
        self.asked = 0  # number of questions so far, including forgotten ones

    def forget(self) -> None:
        self.said, self.asked = {arm: [] for arm in ARMS}, 0

    def messages(self, arm: str, question: str) -> list[Message]:
        """Return the messages of the request to one arm."""
        pairs = [((e.question, "user"), (e.answer, "assistant")) for e in self.said[arm]]
        turns = [{"role": role, "content": text} for pair in pairs for text, role in pair]
        return [*system_turn(self._system), *turns, {"role": "user", "content": question}]

    def make_room(self, question: str) -> int:
        """Drop the oldest exchanges of both arms until the question and its answer fit; return the number dropped."""
        forgotten = 0
        while any(self.said.values()) and max(map(self._needed, ARMS)) + self._count(question) > self._context:
            for exchanges in self.said.values():
                del exchanges[:1]
            forgotten += 1
        return forgotten

    def _needed(self, arm: str) -> int:
        return self._fixed + sum(e.tokens for e in self.said[arm]) + TURN_OVERHEAD + self._room

    def take(self, question: str, answers: Mapping[str, Completion]) -> None:
        """Add the answers of both arms to the history."""
        self.asked += 1
        for arm, c in answers.items():
            if not self.said[arm]:
                self._fixed = max(0, c.prompt_tokens - self._count(question))
            before = self._fixed + sum(e.tokens for e in self.said[arm])
            self.said[arm].append(Exchange(question, c.text, max(0, c.prompt_tokens + c.new_tokens - before)))


def start_chat(run: Run) -> None:
    """Serve base and adapter, and answer questions until `/quit` or the end of input."""
    recipe = run.facts.recipe
    if where := origin.of_another(run.folder):
        untrusted.check_untrusted(f"{run.folder}, downloaded from {where},", recipe)
    if run.marker("distill") is None or not (run["adapter"] / "adapter_model.safetensors").is_file():
        raise RunError(
            f"{run.folder} has no finished adapter to talk to",
            f"Run `dsc distill RECIPE` first (this run was started as `{run.facts.command}`).",
        )
    folder = run.facts.base.weights
    with _endpoints(run, recipe, folder) as endpoints:
        at_once = all(endpoint.restart for endpoint in endpoints)  # servers of our own
        talk = Talk(
            recipe.chain.system, recipe.serving.context, recipe.generation.most_tokens, estimated_counter(folder)
        )
        terminal.line(
            "Both answer every line, each with its own memory. /new forgets the conversation; /quit or Ctrl-D ends."
        )
        while (question := _read_question()) is not None:
            if question == "/new":
                talk.forget()
                terminal.line("forgotten")
            elif re.fullmatch(r"/\w+", question):
                terminal.line(f"{question} is no command: there are /new and /quit")
            elif question:
                _answer(recipe, endpoints, talk, question, at_once)


@contextlib.contextmanager
def _endpoints(run: Run, recipe: Recipe, folder: Path) -> Iterator[list[servers.Endpoint]]:
    """Yield the recipe's endpoints, if they serve the adapter too, or a vLLM server that ends with the block."""
    section, settings = recipe.serving, generation_at_evaluation(recipe)
    if section.endpoints and not recipe.student:  # a teacher's servers never have the student
        announce_servers(recipe)
        try:
            adapted = external.external(section.model_copy(update={"served_model": ADAPTER}))
            # A server that answers to any name would answer as the base.
            if not all(ADAPTER in external.listed(endpoint) for endpoint in adapted):
                raise ServingError(f"the recipe's servers list no model {ADAPTER}")
            external.connect_base(adapted, recipe, settings)
            endpoints = external.connect_base(external.external(section), recipe, settings)
        except ServingError as e:
            say(
                f"{e.message}; so base and adapter are served here. Servers that serve the adapter as '{ADAPTER}' "
                f"beside the base (vLLM: --enable-lora --lora-modules {ADAPTER}={run['adapter']}) are asked instead"
            )
        else:
            yield endpoints
            return
    if not folder.is_dir():
        raise RunError(f"the base model is no longer at {folder}", "`dsc evaluate RECIPE` puts it there again.")
    # The same weights as in the evaluation.
    identity = run.facts.identity[base_place(recipe)]
    weights, _ = evaluation_weights(folder, identity, recipe.distill, recipe.evaluation.weights)
    started = time.monotonic()
    log = cache.writable_home() / "chat.vllm.log"
    more = thinking_models.vllm_arguments(weights, recipe.generation)
    with servers.serve_model(weights, section, log, {ADAPTER: run["adapter"]}, more=more) as endpoints:
        say(f"vLLM serves base and adapter, ready after {duration(time.monotonic() - started)}")
        yield endpoints


def _read_question() -> str | None:
    """Return the user's next line; None to end. Ctrl-C drops the line: it may have been meant for the last answer."""
    try:
        typed = terminal.ask_key("\nyou> ")
    except KeyboardInterrupt:
        terminal.line("\n/quit or Ctrl-D ends")
        return ""
    return None if typed is None or typed.strip() == "/quit" else typed.strip()


def _answer(
    recipe: Recipe, endpoints: Sequence[servers.Endpoint], talk: Talk, question: str, at_once: bool = False
) -> None:
    """Send the question to both arms and show the answers. Failed or cancelled exchanges are not added to the history.

    `at_once` must be False for external servers: on a CPU, vLLM's own kernels apply the adapter to the base's tokens of
    the same batch, too (their index -1 selects the last adapter; vllm-project/vllm#48421).
    """
    if n := talk.make_room(question):
        subject = "the oldest exchange is" if n == 1 else f"the oldest {n} exchanges are"
        terminal.line(f"The conversation no longer fits {recipe.serving.context} tokens: {subject} forgotten.")
    try:
        answers = event_loop.run_coroutine(_ask_both(recipe, endpoints, talk, question, at_once))
    except KeyboardInterrupt:
        terminal.line("cancelled: the question is not part of the conversation")
        return
    terminal.beside([(arm, *_shown(answer)) for arm, answer in answers.items()])
    completions = {arm: a for arm, a in answers.items() if isinstance(a, Completion)}
    if len(completions) == len(ARMS):
        talk.take(question, completions)
    else:
        terminal.line("Not both could answer: the question is not part of the conversation. /new begins a new one.")


def _shown(answer: Completion | RequestFailed) -> tuple[str, str]:
    """Return the text of an answer and its caption."""
    if isinstance(answer, RequestFailed):
        return str(answer), "failed"
    end = {"stop": "ended by itself", "length": "cut at its limit"}.get(answer.finish_reason, answer.finish_reason)
    return answer.text, f"{answer.new_tokens} tokens, {end}"


async def _ask_both(
    recipe: Recipe, endpoints: Sequence[servers.Endpoint], talk: Talk, question: str, at_once: bool
) -> dict[str, Completion | RequestFailed]:
    """Return one answer per arm, in the order of ARMS. ServingError if a server is unreachable.

    The seed is that of the evaluation, so that a held-out prompt as first question repeats the evaluated request.
    """
    seed = seed_of(recipe.seed, prompt_id(question), 0, talk.asked, "answer")
    started = time.monotonic()

    async def one(arm: str, generator: Generator) -> Completion | RequestFailed:
        try:
            return await generator.complete(talk.messages(arm, question), seed, ARMS[arm])
        except RequestFailed as e:
            return e

    async def tell(line: Any) -> None:
        while True:
            line.show(f"both are answering  {duration(time.monotonic() - started)}  (Ctrl-C cancels)")
            await asyncio.sleep(0.2)

    async with Generator(endpoints, generation_at_evaluation(recipe), recipe.serving.request_timeout_s) as generator:
        with moving_line() as line:
            clock = asyncio.create_task(tell(line))
            try:
                if at_once:
                    answers = await asyncio.gather(*(one(arm, generator) for arm in ARMS))
                else:
                    answers = [await one(arm, generator) for arm in ARMS]
                return dict(zip(ARMS, answers, strict=True))
            finally:
                clock.cancel()
