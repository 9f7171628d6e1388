"""Load, clean, de-duplicate and split the prompts: files in, `Prompt` rows out.

Splitting is by group (film, topic), so that no phrasing of a test film is in the training data; without named groups,
n-gram overlap between splits is checked as well. The split of a group does not depend on the order of files and rows:
groups are ranked by a seeded hash.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsc_hub.config.sampling import TABLES, PromptsConfig, SplitShares, table_suffix
from dsc_hub.data.conversations import json_objects, parse_conversation, parse_tools
from dsc_hub.data.table_files import check_row, read_lines, read_table
from dsc_hub.errors import DataError
from dsc_hub.records import SPLITS, Message, Prompt, Split, Tool, prompt_id

# Punctuation of sentences.
EDGES = ".,;:!?()[]{}\"'\u2026\u2018\u2019\u201c\u201d\u00bf\u00a1\u3001\u3002\uff01\uff0c\uff1f"
SHOWN_DROPS = 3  # number of dropped prompts of each kind to show
OVERLAP_WORDS = 8  # a held-out prompt that shares an n-gram of this length with training is dropped ...
WORDING_GROUPS = 2  # ... unless more than this many training groups share it


def identify_prompts(section: PromptsConfig, base: Path) -> str:
    """Return the prompts' identity for the run's fingerprint: hash of the files' bytes, or the dataset's commit."""
    if section.dataset:
        from dsc_hub.hub import client

        return f"{section.dataset}@{client.dataset_commit(section.dataset, section.revision)}"
    h = hashlib.sha256()
    for name in (section.path, section.values):
        if name:
            h.update(_file(base, name).read_bytes())
    return h.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class PromptCells:
    """What a row says of a prompt; `group` is "" if it names none, so that the prompt is its own group."""

    text: str
    group: str = ""
    kind: str = ""
    messages: tuple[Message, ...] = ()  # as in Prompt
    tools: tuple[Tool, ...] = ()

    @property
    def id(self) -> str:
        return prompt_id(self.text, self.messages, self.tools)

    @property
    def split_group(self) -> str:
        """The named group, or the prompt itself: its text, of a conversation its id."""
        return self.group or (self.id if self.messages else self.text)


@dataclass(frozen=True, slots=True)
class Drop:
    """A dropped prompt (`text`), the kept prompt that it copies, and for an overlap the shared words."""

    text: str
    kept: str
    shared: str = ""


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of the rows: `read`, dropped as `duplicates`, dropped as `overlaps` of held-out with training prompts.

    `ungrouped` rows have no group, so each is its own group. `first_duplicates` and `first_overlaps` are the first few
    dropped prompts, for display.
    """

    read: int
    duplicates: int = 0
    overlaps: int = 0
    ungrouped: int = 0
    first_duplicates: tuple[Drop, ...] = ()
    first_overlaps: tuple[Drop, ...] = ()

    def as_metrics(self) -> dict[str, int]:
        """Return the counts under their names in metrics.json."""
        return {"read": self.read, "duplicates_dropped": self.duplicates, "overlapping_dropped": self.overlaps}


def load_prompts(section: PromptsConfig, base: Path, seed: int, identity: str = "") -> tuple[list[Prompt], Counts]:
    """Return all prompts with their splits, and the counts of dropped rows.

    `identity` (from `identify_prompts`) holds the commit at which a dataset is read; without it the recipe's revision
    is used. Raises DataError: file missing or empty, column missing, too few groups for the requested splits.
    """
    if section.templates:
        rows = list(_from_templates(section, base))
    elif section.dataset:
        rows = list(_from_dataset(section, identity.partition("@")[2] or section.revision))
    else:
        rows = list(_from_file(section, base))
    if not rows:
        source = section.dataset or base / str(section.values or section.path)
        raise DataError(
            f"{source} holds no prompts",
            "Write one prompt a line, or name the right column with prompts.column.",
        )
    for row in rows:
        for text in (row.text, *(m["content"] for m in row.messages)):
            _check_encodable(text)
    unique, duplicates = _without_duplicates(rows)
    unique = unique[: section.limit]
    splits = split_groups({row.split_group for row in unique}, section.split, seed)
    prompts = [
        Prompt(row.id, row.text, row.split_group, splits[row.split_group], row.kind, row.messages, row.tools)
        for row in unique
    ]
    kept, overlaps = (prompts, []) if section.drop_overlaps is False else without_overlaps(prompts, by_ngrams(section))
    for split in SPLITS:
        if getattr(section.split, split) > 0 and not any(p.split == split for p in kept):
            dropped = sum(p.split == split for p in prompts)
            raise DataError(
                f"no prompt is left for the split '{split}': all {dropped} overlap with training prompts, as "
                f"{overlaps[0].text[:60]!r} does with {overlaps[0].kept[:60]!r}",
                "Give prompts that differ more, name what they have in common with prompts.group_column, or set "
                "prompts.drop_overlaps=false.",
            )
    return kept, Counts(
        read=len(rows),
        duplicates=len(duplicates),
        overlaps=len(overlaps),
        ungrouped=sum(not row.group for row in unique) if section.group_column else 0,
        first_duplicates=tuple(duplicates[:SHOWN_DROPS]),
        first_overlaps=tuple(overlaps[:SHOWN_DROPS]),
    )


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"a prompt holds half a character (a lone surrogate): {text[:50]!r}", "Mend or remove it."
        ) from None


def _without_duplicates(rows: Iterable[PromptCells]) -> tuple[list[PromptCells], list[Drop]]:
    """Return the rows with distinct texts, of conversations with distinct turns or tools, and the dropped ones."""
    seen: dict[object, PromptCells] = {}
    dropped = []
    for row in rows:
        turns = tuple((m["role"], _normal(m["content"])) for m in row.messages)
        first = seen.setdefault((turns, str(row.tools)) if turns else _normal(row.text), row)
        if first is not row:
            dropped.append(Drop(row.text, first.text))
    return list(seen.values()), dropped


def by_ngrams(section: PromptsConfig) -> bool:
    """Return whether held-out prompts that share an n-gram with a training prompt are dropped.

    By default not if groups are named: splitting by group already separates related prompts, and text shared between
    groups is the wording of the task.
    """
    if section.drop_overlaps is None:
        return not (section.templates or section.group_column)
    return section.drop_overlaps


def split_groups(groups: Iterable[str], shares: SplitShares, seed: int) -> dict[str, Split]:
    """Assign each group to a split. Every split with a share above 0 gets at least one group."""
    ranked = sorted(set(groups), key=lambda g: hashlib.sha256(f"{seed}/{g}".encode()).digest())
    positive = {s: getattr(shares, s) for s in SPLITS if getattr(shares, s) > 0}
    if len(ranked) < len(positive):
        raise DataError(
            f"{len(ranked)} prompt group(s) can't be split into {', '.join(positive)}",
            f"Give at least {len(positive)} different groups, better 30 or more.",
        )
    n_test = max(1, round(len(ranked) * shares.test)) if shares.test else 0
    n_validation = max(1, round(len(ranked) * shares.validation)) if shares.validation else 0
    # Rounding must leave a group for each split; validation is reduced first.
    n_validation = min(n_validation, len(ranked) - 1 - bool(n_test))
    n_test = min(n_test, len(ranked) - n_validation - 1)
    n_train = len(ranked) - n_validation - n_test
    counts: tuple[tuple[Split, int], ...] = (("test", n_test), ("validation", n_validation), ("train", n_train))
    return dict(zip(ranked, (split for split, n in counts for _ in range(n)), strict=True))


def without_overlaps(prompts: Sequence[Prompt], ngrams: bool = True) -> tuple[list[Prompt], list[Drop]]:
    """Drop held-out near-copies of training prompts; return the kept prompts and the dropped ones.

    A near-copy has the same words as a training prompt, ignoring punctuation, or with `ngrams` shares an n-gram of
    OVERLAP_WORDS words. An n-gram that more than WORDING_GROUPS training groups share is the wording of the task
    ("Write a short review of the following film") and does not indicate a copy. Of a conversation all turns are
    compared but the system's, which many conversations share.
    """
    groups_of: dict[tuple[str, ...], set[str]] = defaultdict(set)
    first: dict[tuple[str, ...], str] = {}
    same: dict[tuple[str, ...], str] = {}
    for p in prompts:
        if p.split == "train":
            text = _turns(p)
            same.setdefault(_words(text), p.text)
            for gram in _ngrams(text) if ngrams else ():
                groups_of[gram].add(p.group)
                first.setdefault(gram, p.text)

    def overlap(p: Prompt) -> Drop | None:
        text = _turns(p)
        if (words := _words(text)) in same:
            return Drop(p.text, same[words], " ".join(words))
        shared = [g for g in _ngrams(text) if 0 < len(groups_of.get(g, ())) <= WORDING_GROUPS]
        return Drop(p.text, first[min(shared)], " ".join(min(shared))) if shared else None

    kept, dropped = [], []
    for p in prompts:
        if p.split != "train" and (drop := overlap(p)):
            dropped.append(drop)
        else:
            kept.append(p)
    return kept, dropped


def _turns(prompt: Prompt) -> str:
    return "\n".join(m["content"] for m in prompt.conversation if m["role"] != "system")


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    n = min(OVERLAP_WORDS, len(words))
    return set(zip(*(words[i:] for i in range(n)), strict=False)) if n else set()


def _words(text: str) -> tuple[str, ...]:
    """Return the words without punctuation at their edges; meaningful signs (+, #, %, *) are kept."""
    return tuple(bare for word in _normal(text).split() if (bare := word.strip(EDGES)))


def _normal(text: str) -> str:
    """Normalise a text for duplicate detection: NFKC, case folded, single spaces. Signs stay: C, C++ and C# differ."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _file(base: Path, name: str) -> Path:
    path = base / name
    if path.is_dir():
        raise DataError(f"prompts: {path} is a folder, expected a file", "Name a file in it.")
    if not path.is_file():
        raise DataError(f"prompt file {path} not found", "Paths in a recipe are relative to the recipe's folder.")
    return path


def _from_templates(section: PromptsConfig, base: Path) -> Iterator[PromptCells]:
    for value in read_lines(_file(base, str(section.values))):
        for template in section.templates:
            yield PromptCells(template.replace("{value}", value), value)


def _from_file(section: PromptsConfig, base: Path) -> Iterator[PromptCells]:
    path = _file(base, str(section.path))
    if (suffix := table_suffix(path.name)) not in TABLES:
        yield from map(PromptCells, read_lines(path, section.column))
        return
    columns = [c for c in (section.column, section.group_column, section.kind_column, section.tools_column) if c]
    yield from _from_rows(section, read_table(path, columns), str(path), is_csv=suffix in (".csv", ".tsv"))


def _from_dataset(section: PromptsConfig, revision: str) -> Iterator[PromptCells]:
    from dsc_hub.hub import client

    rows = client.dataset_rows(str(section.dataset), section.dataset_config, section.dataset_split, revision)
    yield from _from_rows(section, rows, f"dataset {section.dataset}, {section.dataset_split}")


def _from_rows(
    section: PromptsConfig, rows: Iterable[Mapping[str, object]], where: str, is_csv: bool = False
) -> Iterator[PromptCells]:
    for number, row in enumerate(rows, 1):
        keys = ("column", "group_column", "kind_column", "tools_column")
        check_row(row, f"{where} row {number}", {f"prompts.{key}": getattr(section, key) for key in keys})
        try:
            text, messages, tools = _prompt_cells(section, row, is_csv)
        except DataError as e:
            raise DataError(f"{where} row {number}: {e.message}", e.hint) from None
        if text:
            yield PromptCells(text, _cell(row, section.group_column), _cell(row, section.kind_column), messages, tools)


def _prompt_cells(
    section: PromptsConfig, row: Mapping[str, object], is_csv: bool
) -> tuple[str, tuple[Message, ...], tuple[Tool, ...]]:
    """Return text, messages and tools of a row, as in Prompt; the text is "" if the cell is blank."""
    cell = row[section.column]
    if is_csv and isinstance(cell, str):  # a cell of it can't be a list
        cell = json_objects(cell)
    if not isinstance(cell, (str, list)):
        got = "null" if cell is None else type(cell).__name__
        raise DataError(f"'{section.column}' should be text or a list of messages, got {got}")
    if isinstance(cell, str) and not cell.strip():
        return "", (), ()
    messages: tuple[Message, ...] = ({"role": "user", "content": cell.strip()},) if isinstance(cell, str) else ()
    messages = messages or parse_conversation(list(cell), section.drop_last_answer)
    tools = parse_tools(row[section.tools_column]) if section.tools_column else ()
    text = messages[-1]["content"].strip()
    return text, () if len(messages) == 1 and not tools else messages, tools


def _cell(row: Mapping[str, object], column: str | None) -> str:
    """Return a cell as text; "" if it is empty or null, or if no column is named."""
    value = row[column] if column else None
    is_empty = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if is_empty else str(value).strip()
