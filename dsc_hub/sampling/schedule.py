"""Which chain comes next, where a recipe asks for a number of rows (`dataset.rows`) or sets a budget.

The chains are in an order that depends on the recipe and on earlier chains of this order, never on time: the same
recipe samples the same chains, however many requests are in flight and however often it is interrupted. The order goes
round the prompts, each time one chain of each, and leaves out prompts from which nothing more is to be had. It is laid
down in waves; a wave depends on the chains up to `AHEAD` waves before it, so that the waves between keep the server
busy.

`dataset.rows` are reached by the shortest beginning of this order whose chains give so many training rows. What is
behind it is not kept, so that quick chains are not preferred.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from dsc_hub.chain.chain import seed_of
from dsc_hub.config.recipe import Recipe, chain_seed
from dsc_hub.data.dataset import Candidate, candidate_of, select_rows
from dsc_hub.errors import RunError
from dsc_hub.records import Chain, Prompt
from dsc_hub.runs.row_index import Key

# Waves between a wave and the chains that it depends on. Chains that began together end together, so a server of 128
# requests stands still unless twice as many chains may begin: four waves of 32 kept 4 to 85 requests running. With
# fewer than about 1,000 rows, 256 requests are not always in flight; more waves would learn later.
AHEAD = 8
SMALLEST_WAVE, LARGEST_WAVE = 32, 256  # chains; between them a sixteenth of the rows that are asked for
# A prompt is given up after so many times the chains that a candidate takes on average, if none of them gave one. If
# all prompts are alike, this ends one in twenty, each of which would give one some day.
PATIENCE = 3.0
SPARE = 1.2  # times the chains that the missing rows take on average are begun at once
FEWEST_AT_ONCE = 16  # chains
RELEARN = 1.1  # times the outcomes of the last time, at which rows are counted again by prompt and pair of texts

ROWS, BUDGET, CHAINS = "rows", "budget", "chains"  # why a sampling ended: of `dataset.rows`, `budget`, the chains


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sampling ended: `by` ROWS, BUDGET or CHAINS, after so many `chains`, failed ones included."""

    by: str
    chains: int


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a chain gave: the candidate for a row (None: none), the pairs of texts of its steps, and the pair whose
    revision the candidate is (None: it is the first answer, or there is no candidate)."""

    candidate: Candidate | None
    tried: tuple[int, ...] = ()
    gave: int | None = None


class Schedule:
    """Iterator of the chains to run, as (prompt, number); None: none now, since it depends on chains in flight.

    `prompts` are those to sample; `tokens` and `hours` were used by earlier sessions. Every chain must be reported,
    with `finished` or `failed`, and its new tokens with `used`; `resume` takes the chains of earlier sessions first. A
    failed chain gives no row.
    """

    def __init__(self, recipe: Recipe, prompts: Mapping[str, Prompt], tokens: int = 0, hours: float = 0.0) -> None:
        self._recipe, self._prompts, self._target = recipe, prompts, recipe.dataset.rows
        self._tokens, self._hours, self._started = tokens, hours, time.monotonic()
        self._seed = seed = chain_seed(recipe)
        self._splits = {p.id: p.split for p in prompts.values()}
        ids = sorted(self._splits, key=lambda id_: seed_of(seed, id_, 0, 0, "order"))
        of_split = Counter(self._splits.values())
        share = of_split["validation"] / max(1, of_split["train"])
        self._validation_target = math.ceil((self._target or 0) * share)
        self._round = ((id_, n) for n in range(recipe.chain.chains_per_prompt) for id_ in ids if self._is_open(id_))
        self._wave = min(LARGEST_WAVE, max(SMALLEST_WAVE, min(self._target or self._at_most(), self._at_most()) // 16))
        self._order: list[Key] = []
        self._is_whole = False  # whether the order has its end
        self._next = 0  # position of the next chain to begin
        self._results: dict[Key, _Outcome] = {}  # of chains behind the first one that is not finished
        self._outcomes: list[_Outcome] = []  # of the beginning of the order, as far as it is finished
        self._counted = 0  # outcomes that `_is_open` knows
        self._chains, self._rows_of = Counter[str](), Counter[str]()  # by prompt; of the outcomes at the last learning
        self._validation_rows = self._candidates_then = 0  # of the same
        self._barren: set[str] = set()  # prompts with chains and without a candidate
        self._pairs = len(recipe.chain.pairs)
        self._tried, self._gave = [0] * self._pairs, [0] * self._pairs  # steps by pair of texts; those that gave rows
        self._known_at: list[tuple[list[int], list[int]]] = []  # the same for each wave, when it was laid down
        self._position: dict[Key, int] = {}  # in the order
        self._candidates: list[Candidate] = []  # of the outcomes
        self._check_at = self._target or math.inf  # candidates at which rows are selected again
        self.rows_so_far = 0  # about: training rows of all finished chains, those behind a slow one too
        self._finished_then = 0  # chains that they are of
        self._estimate_at = 1  # finished chains at which they are counted again
        self._begun: dict[Key, float] = {}  # chains in flight
        self._used = Counter[Key]()  # tokens of chains in flight
        self._seconds = 0.0  # of all chains finished in this session, from their beginning to their end
        self._timed = 0  # number of these
        self.before = 0  # chains that earlier sessions finished
        self.rows = 0  # training rows when those that count were last selected
        self.ended = ""  # ROWS, BUDGET or CHAINS; "": not yet

    def resume(self, chains: Iterator[Chain] | list[Chain]) -> None:
        """Take the chains that earlier sessions finished."""
        for chain in chains:
            if chain.prompt_id in self._splits:
                self._results[chain.prompt_id, chain.number] = self._outcome(chain)
                self.before += 1
        self._advance()

    def finished(self, chain: Chain) -> None:
        self._put((chain.prompt_id, chain.number), self._outcome(chain))

    def failed(self, key: Key) -> None:
        self._put(key, _Outcome(None))

    def used(self, key: Key, tokens: int) -> None:
        """Take the new tokens of a turn of a chain in flight."""
        self._tokens += tokens
        self._used[key] += tokens

    def choose(self, prompt_id: str, number: int, step: int) -> int:
        """Return which pair of texts a step gets, by Thompson sampling.

        For each pair, draw from Beta(1 + steps that gave a row, 1 + steps that gave none), as known when the chain's
        wave was laid down; the highest draw wins.
        """
        if self._pairs == 1:
            return 0
        gave, tried = self._known_at[self._position[prompt_id, number] // self._wave]
        rng = random.Random(seed_of(self._seed, prompt_id, number, step, "texts"))
        draws = [rng.betavariate(1 + g, 1 + t - g) for g, t in zip(gave, tried, strict=True)]
        return draws.index(max(draws))

    @property
    def target(self) -> int | None:
        """Training rows that are asked for; None: as many as there are."""
        return self._target

    @property
    def kept(self) -> list[Key]:
        """The chains that count, in their order: when the rows are there, those behind the last one do not."""
        if self.ended == ROWS:
            return self._order[: len(self._outcomes)]
        return [*self._order[: len(self._outcomes)], *self._results]

    def is_superfluous(self, key: Key) -> bool:
        """Return whether a chain of these prompts does not count. A chain of another prompt is left to other checks."""
        if self.ended != ROWS or key[0] not in self._splits:
            return False
        return self._place(key) >= len(self._outcomes)

    @property
    def expected(self) -> int:
        """About how many chains there will be."""
        if self._target is None or not self.rows_so_far:
            return self._at_most()
        return min(self._at_most(), math.ceil(self._finished_then * self._target / self.rows_so_far))

    def __iter__(self) -> Schedule:
        return self

    def __next__(self) -> tuple[Prompt, int] | None:
        if not self.ended and not self._is_affordable():
            if not self._begun:
                self.ended = BUDGET
            return None
        while not self.ended and len(self._begun) < self._most_in_flight():
            if self._next == len(self._order) and not self._lay_down():
                return None
            key = self._order[self._next]
            self._next += 1
            if key not in self._results and self._next > len(self._outcomes):
                self._begun[key] = time.monotonic()
                return self._prompts[key[0]], key[1]
        return None

    def _outcome(self, chain: Chain) -> _Outcome:
        candidate = candidate_of(chain, self._prompts[chain.prompt_id], self._recipe)
        tried = tuple(step.pair for step in chain.steps)
        if wrong := [pair for pair in tried if not 0 <= pair < self._pairs]:
            raise RunError(
                f"chains.jsonl: chain {chain.number} of {chain.prompt_id} has the pair of texts {wrong[0]}, and the "
                f"recipe has {self._pairs}",
                "The row was changed, or is of another recipe: remove its line, and run again.",
            )
        if not isinstance(candidate, Candidate):
            return _Outcome(None, tried)
        state = chain.state_step
        return _Outcome(candidate, tried, chain.steps[state - 1].pair if state else None)

    def _put(self, key: Key, result: _Outcome) -> None:
        self._results[key] = result
        self._seconds += time.monotonic() - self._begun.pop(key)
        self._used.pop(key, None)
        self._timed += 1
        self._advance()

    def _advance(self) -> None:
        """Take the results that follow without a gap; lay down waves that became known."""
        while not self.ended:
            if len(self._outcomes) == len(self._order) and not self._lay_down():
                break
            if len(self._outcomes) == len(self._order) or self._order[len(self._outcomes)] not in self._results:
                break
            result = self._results.pop(self._order[len(self._outcomes)])
            self._outcomes.append(result)
            if result.candidate is not None:
                self._candidates.append(result.candidate)
                self._select()
        if not self.ended and self._is_whole and len(self._outcomes) == len(self._order):
            self._select(at_the_end=True)
            self.ended = self.ended or CHAINS
        self._estimate()

    def _select(self, at_the_end: bool = False) -> None:
        """Count the training rows, if there are enough candidates for those that are missing."""
        if self._target is None or (len(self._candidates) < self._check_at and not at_the_end):
            return
        self.rows = self._training_rows(self._candidates)
        self._check_at = len(self._candidates) + max(1, self._target - self.rows)
        if self.rows >= self._target:
            self.ended = ROWS

    def _estimate(self) -> None:
        """Count the rows of all finished chains, now and then; it decides nothing about which chains count."""
        if self.ended == ROWS:
            self.rows_so_far, self._finished_then = self.rows, len(self._outcomes)
        elif self._target and not self.ended and self._reached >= self._estimate_at:
            behind = [o.candidate for key, o in self._results.items() if o.candidate and self._place(key) < self._next]
            self._finished_then = self._reached
            self.rows_so_far = self._training_rows([*self._candidates, *behind])
            # Rows become rarer towards the end, so the count has to be of the moment there.
            left = (self._target - self.rows_so_far) * (self._reached + 1) / (self.rows_so_far + 1)
            self._estimate_at = self._reached + max(4, min(self._target // 20, math.ceil(left)))

    def _place(self, key: Key) -> float:
        return self._position.get(key, math.inf)

    def _training_rows(self, candidates: list[Candidate]) -> int:
        chosen, _ = select_rows(candidates, self._recipe, limited=False)
        return sum(self._splits[prompt_id] == "train" for prompt_id, _ in chosen)

    def _lay_down(self) -> bool:
        """Append the next wave to the order; False if it depends on chains that are not finished, or there is none."""
        known = max(0, len(self._order) - AHEAD * self._wave)
        if self._is_whole or len(self._outcomes) < known:
            return False
        if known >= self._counted * RELEARN + 1:
            self._learn(known)
        wave = list(islice(self._round, self._wave))
        self._position |= {key: len(self._order) + i for i, key in enumerate(wave)}
        self._known_at.append((self._gave, self._tried))
        self._order += wave
        self._is_whole = len(wave) < self._wave
        return bool(wave)

    def _learn(self, known: int) -> None:
        """Count chains and rows by prompt and by pair of texts, of so many outcomes."""
        outcomes = self._outcomes[:known]
        candidates = [o.candidate for o in outcomes if o.candidate]
        chosen, _ = select_rows(candidates, self._recipe, limited=False)
        self._counted, self._candidates_then = known, len(candidates)
        self._chains = Counter(prompt_id for prompt_id, _ in self._order[:known])
        self._rows_of = Counter(prompt_id for prompt_id, _ in chosen)
        self._validation_rows = sum(self._splits[prompt_id] == "validation" for prompt_id, _ in chosen)
        self._barren = self._chains.keys() - {c.prompt_id for c in candidates}
        self._gave, self._tried = [0] * self._pairs, [0] * self._pairs
        for outcome in outcomes:
            for pair in outcome.tried:
                self._tried[pair] += 1
            if outcome.gave is not None and outcome.candidate and outcome.candidate.key in chosen:
                self._gave[outcome.gave] += 1

    def _is_open(self, prompt_id: str) -> bool:
        """Return whether another chain of a prompt may be worth its tokens."""
        if self._target is None:
            return True
        most = self._recipe.dataset.rows_per_prompt
        if most and self._rows_of[prompt_id] >= most:
            return False
        if self._splits[prompt_id] == "validation" and self._validation_rows >= self._validation_target:
            return False
        if prompt_id not in self._barren or not self._candidates_then:
            return True
        return self._chains[prompt_id] < PATIENCE * self._counted / self._candidates_then

    def _most_in_flight(self) -> float:
        """Return how many chains may be in flight: near the end no more than the missing rows need.

        This decides when chains begin and not which of them count, so all that are finished are looked at, those behind
        a slow one too. Before anything is known, each chain is expected to give a row.
        """
        if self._target is None:
            return math.inf
        chains_a_row = (self._finished_then + 1) / (self.rows_so_far + 1)
        missing = self._target - self._reached / chains_a_row
        if missing <= 0 and self._begun:
            return 0  # what is in flight decides whether these rows are enough
        return max(FEWEST_AT_ONCE, math.ceil(SPARE * missing * chains_a_row))

    @property
    def _reached(self) -> int:
        """The finished chains that this session has come to: not those behind chains that it has yet to begin."""
        return max(self._next - len(self._begun), len(self._outcomes))

    def _is_affordable(self) -> bool:
        """Return whether the budget has room for another chain beside those in flight."""
        if (budget := self._recipe.budget) is None:
            return True
        # Each chain may still use what it has not used of its full length.
        tokens = self._tokens + self._recipe.most_tokens_of_chain * (1 + len(self._begun)) - self._used.total()
        seconds = time.monotonic() - self._started + (self._seconds / self._timed if self._timed else 0.0)
        return (budget.tokens is None or tokens <= budget.tokens) and (
            budget.hours is None or self._hours + seconds / 3600 <= budget.hours
        )

    def _at_most(self) -> int:
        return len(self._splits) * self._recipe.chain.chains_per_prompt
