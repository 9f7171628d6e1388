"""Tables of a run: recorded numbers as rows of text, shared by the page, the cards and the terminal.

Functions `..._rows` return dicts of cells for templates; `..._table` lay them out for the terminal. Computes no
statistics.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from dsc_hub.report.formatting import (
    ABSENT,
    SCORE_TITLES,
    arm_name,
    count,
    difference_name,
    families,
    interval,
    measured,
    money,
    number,
    p_value,
    percent,
    shares,
)
from dsc_hub.report.sentences import criterion_sentence
from dsc_hub.report.verdicts import blind_lines
from dsc_hub.runs.metrics_schema import Blind, Evaluation
from dsc_hub.system.progress import duration

LONGEST_WORD = 16


def arm_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return one row per arm: name, scores with intervals, n, groups, unscored, failed, length, endings."""
    rows = []
    for arm, a in evaluation.arms.items():
        reward = a.reward
        row: dict[str, str] = {"arm": arm, "name": arm_name(arm)}
        for s in evaluation.score_names:
            row |= {s: interval(a.score(s)), f"{s}_unscored": count(a.score(s).unscored)}
        rows.append(
            row
            | {
                "n": count(reward.n),
                "groups": count(reward.groups),
                "unscored": count(reward.unscored),
                "failed": count(reward.failed),
                "length": number(a.new_tokens_mean, 0),
                "stops": percent(a.stops_by_itself),
                "defects": percent(a.defects),
            }
        )
    return rows


def difference_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return one row per difference: name, interval and p for each score, n, groups."""
    rows = []
    for key, d in evaluation.differences.items():
        row = {"name": difference_name(key)}
        for s in evaluation.score_names:
            row |= {s: interval(d[s]), f"{s}_p": p_value(d[s].p_holm)}
        rows.append(row | {"n": count(d["reward"].n), "groups": count(d["reward"].groups)})
    return rows


def side_effect_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return one row per side effect: label, unit, each arm's value with interval, `difference` and `p`.

    `difference` and `p` compare distilled with base ("" without these two arms, or without a difference).
    """
    side = evaluation.side_effects
    rows = []
    for name, about in side.measures.items():
        rate = about.kind == "rate"
        row = {"name": name, "label": about.label, "unit": about.unit, "difference": "", "p": ""}
        for arm in evaluation.arms:
            e = side.arms[arm][name]
            row[arm] = number(e.mean, 3) if about.kind == "whole" else (shares if rate else interval)(e)
        if "distilled - base" in side.differences and name in (by_name := side.differences["distilled - base"]):
            d = by_name[name]
            row["difference"] = shares(d, signed=True) if rate else interval(d)
            row["p"] = p_value(d.p_holm) if measured(d.mean) else ""
        rows.append(row)
    return rows


def cost_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return one row per arm with its cost.

    Tokens per answer, all generated and prompt tokens, seconds, processor hours, reward gain over the baseline per
    1,000 generated tokens.
    """
    return [
        {
            "name": arm_name(arm),
            "length": number(a.new_tokens_mean, 0),
            "new_tokens": count(a.new_tokens),
            "prompt_tokens": count(a.prompt_tokens),
            "seconds": duration(a.seconds) if measured(a.seconds) else ABSENT,
            "hours": number(a.processor_hours, 3),
            "gain": number(a.gain_per_1000_tokens),
            "usd": money(a.cost_usd) if measured(evaluation.cost_usd) else "",
        }
        for arm, a in evaluation.arms.items()
    ]


def claim_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return one row per criterion of the claim: name, verdict, measured value.

    The verdict is met, failed, undecided, unmeasured or not judged.
    """
    criteria = evaluation.claim.criteria if evaluation.claim else []
    return [{"name": c.name, "verdict": c.verdict, "measured": criterion_sentence(c)} for c in criteria]


def detail_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return one row per difference and score with its strength of evidence.

    Mean with interval, p, effect size, numbers of pairs on which the first arm was better, equal, worse, and the
    detectable difference.
    """
    return [
        {
            "name": difference_name(key),
            "score": evaluation.scores[s].name,
            "mean": interval(d[s]),
            "p": p_value(d[s].p_holm).removeprefix("p "),
            "effect": number(d[s].effect),
            "wins": f"{count(d[s].wins)} / {count(d[s].ties)} / {count(d[s].losses)}",
            "detectable": number(d[s].detectable),
        }
        for key, d in evaluation.differences.items()
        for s in evaluation.score_names
    ]


# -- for the terminal


def _numbers_table(*titles: str, **settings: Any) -> Table:
    """Return a table with text in the first column and numbers in the others; cells fold on narrow terminals."""
    layout: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = NumbersTable(title_justify="left", caption_justify="left", caption_style="", **layout, **settings)
    for i, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if i else "left", overflow="fold")
    return table


class NumbersTable(Table):
    """A table that breaks lines between words only, as long as the terminal is wide enough for the longest words.

    Each column gets the width of its longest word (of at most LONGEST_WORD letters), and a share of what is left by how
    much wider it would like to be.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [[str(c) for c in (column.header, *column.cells)] for column in self.columns]
        least = [min(LONGEST_WORD, max(len(w) for cell in cells for w in [*cell.split(), ""])) for cells in lines]
        liked = [max(len(line) for cell in cells for line in [*cell.splitlines(), ""]) for cells in lines]
        left = options.max_width - 2 * len(lines) - 1 - sum(least)
        wanted = sum(b - a for a, b in zip(least, liked, strict=True))
        for column, a, b in zip(self.columns, least, liked, strict=True):
            column.width = a + (b - a if wanted <= left else max(0, left) * (b - a) // wanted)
        yield from super().__rich_console__(console, options)


def closing_table(evaluation: Evaluation, blind: Blind | None) -> Table:
    """Return the closing table: arms by score with interval and counts, differences, and the blind comparison below."""
    scores = evaluation.score_names
    titles = [f"{SCORE_TITLES[s]}: {evaluation.scores[s].name}" for s in scores]
    notes = [
        f"In brackets: {100 * evaluation.confidence:g} % interval over groups. p: sign-flip test over groups, "
        f"after Holm{families(evaluation)}.",
        *blind_lines(blind),
    ]
    is_complete = all(row["unscored"] == row["failed"] == "0" for row in arm_rows(evaluation))
    lost = [] if is_complete else ["unscored", "failed"]
    if is_complete:
        notes.append("No answer is unscored or failed.")
    titles += ["answers / groups", *lost]
    table = _numbers_table(f"{evaluation.split} split", *titles, caption=Text("\n".join(notes)))
    for row in arm_rows(evaluation):
        cells = [row["name"], *(row[s] for s in scores), f"{row['n']} / {row['groups']}"]
        table.add_row(*map(Text, cells + [row[key] for key in lost]))
    table.add_section()
    for row in difference_rows(evaluation):
        values = [f"{row[s]}\n{row[f'{s}_p']}" for s in scores]
        cells = [row["name"], *values, f"{row['n']} / {row['groups']}", *("" for _ in lost)]
        table.add_row(*map(Text, cells))
    return table


def detail_table(evaluation: Evaluation) -> Table:
    """Return the table of `detail_rows`."""
    note = (
        "Effect size: mean over standard deviation of group means. Detectable: the true difference that so many "
        "groups would have shown four times in five."
    )
    titles = ("difference", "score", "mean", "p (Holm)", "effect size", "better / alike / worse", "detectable")
    table = _numbers_table(*titles, title="what the differences are worth", caption=Text(note))
    for row in detail_rows(evaluation):
        table.add_row(*map(Text, row.values()))
    return table


SIDE_EFFECT_NOTE = (
    "Shares: Wilson's interval, for as many independent answers as the groups are worth; their differences: "
    "Newcombe's. p of shares: "
    "McNemar's exact test with one verdict a group; p here after Holm for these measures of all pairs of arms. "
    "Distinct words and pairs: of every arm as many as the shortest arm has; the claim compares two arms alone."
)


def side_effect_table(evaluation: Evaluation) -> Table:
    """Return the table of `side_effect_rows`."""
    arms = list(evaluation.arms)
    titles = ("", *map(arm_name, arms), "distilled − base")
    table = _numbers_table(*titles, title="what else moved", caption=Text(SIDE_EFFECT_NOTE))
    for row in side_effect_rows(evaluation):
        unit = "" if row["unit"] == "share" else f" ({row['unit']})"
        table.add_row(
            *map(
                Text,
                (
                    row["label"] + unit,
                    *(row[a] for a in arms),
                    f"{row['difference']}\n{row['p']}".strip(),
                ),
            )
        )
    return table


def cost_table(evaluation: Evaluation) -> Table:
    """Return the table of `cost_rows`."""
    processor = evaluation.processors
    titles = ("", "tokens an answer", "written", "read", "time", f"{processor} hours", "reward gained for 1,000 tokens")
    priced = ("price",) if measured(evaluation.cost_usd) else ()
    table = _numbers_table(*titles, *priced, title="what it cost")
    for row in cost_rows(evaluation):
        cells = [value for key, value in row.items() if priced or key != "usd"]
        table.add_row(*map(Text, cells))
    return table


def claim_table(evaluation: Evaluation) -> Table:
    """Return the table of `claim_rows`."""
    table = Table()
    for title in ("criterion", "verdict", "measured"):
        table.add_column(title, overflow="fold")
    for row in claim_rows(evaluation):
        style = {"met": "green", "failed": "bold red"}.get(row["verdict"], "yellow")
        table.add_row(Text(row["name"]), Text(row["verdict"], style), Text(row["measured"]))
    return table
