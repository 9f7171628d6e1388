"""`dsc blind`: people judge pairs of answers on the terminal."""

from __future__ import annotations

from dsc_hub.chain.chain import seed_of
from dsc_hub.config.stages import STAGES
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.evaluation.blind import (
    JUDGEMENTS,
    Choice,
    Judgement,
    Pair,
    counted,
    order_of,
    pick,
    read_pairs,
    read_verdicts,
    record_tally,
    winner,
)
from dsc_hub.runs.results import metrics_of
from dsc_hub.runs.run import Run


def judge_pairs(run: Run, n: int, judge: str) -> None:
    """Let `judge` judge up to n pairs that they have not judged yet; store each verdict at once; print the tally."""
    from dsc_hub.cli import terminal

    if not judge.strip():
        raise ConfigError("--judge is empty", "Give a name, or leave it out.")
    pairs = read_pairs(run)
    seed = run.facts.recipe.seed
    chosen = pick(pairs, seed, n)
    done = {v.prompt_id for v in counted(pairs, read_verdicts(run)) if v.judge == judge}
    todo = [(number, p) for number, p in enumerate(chosen, 1) if p.prompt_id not in done]
    if todo:
        terminal.line(
            f"{len(todo)} of {len(chosen)} pairs are left to judge. Which answer is better? Type A, B or t (tie) and "
            "Enter; q ends, and the same command goes on from there."
        )
    elif chosen:
        terminal.line(f"All {len(chosen)} pairs are judged under this name already.")
    rows = run.rows(JUDGEMENTS)
    try:
        for number, pair in todo:
            verdict = _judged(pair, f"{number} of {len(chosen)}", seed, judge)
            if verdict is None:
                break
            rows.append(verdict)
    except KeyboardInterrupt:
        terminal.line("")
    finally:
        rows.close()
    _tell(run)


def _judged(pair: Pair, title: str, seed: int, judge: str) -> Judgement | None:
    """Show one pair and prompt until there is a valid choice; None to end."""
    from dsc_hub.cli import terminal

    coin = seed_of(seed, pair.prompt_id, 0, 0, f"blind order {judge}")
    shown = order_of(coin)
    terminal.beside([(name, pair.texts[arm], "") for name, arm in zip("AB", shown, strict=True)], (title, pair.prompt))
    while True:
        word = terminal.ask_key("better: A, B, t(ie) or q(uit)> ")
        word = "q" if word is None else word.strip().lower()
        if word in ("q", "quit"):
            return None
        if word in ("a", "b", "t", "tie"):
            choice: Choice = "A" if word == "a" else "B" if word == "b" else "t"
            return Judgement(pair.prompt_id, judge, coin, shown, choice, winner(choice, shown), pair.hashes)
        terminal.line("That is none of A, B, t, q.")


def _tell(run: Run) -> None:
    """Record and print the tally, and the stages that have to be repeated to show it."""
    from dsc_hub.cli import terminal
    from dsc_hub.report import verdicts

    before = metrics_of(run).blind
    try:
        with run.lock():
            tally = record_tally(run)
            stale = [s.name for s in STAGES if s.shows_judgements and run.marker(s.name)] if tally != before else []
            for stage in stale:
                run.unfinish(stage)
    except RunError as e:
        raise RunError(
            e.message, f"The verdicts are kept in {run[JUDGEMENTS]}; the same command counts them later."
        ) from None
    if tally is None:
        terminal.line("Nothing was judged, nothing is recorded.")
        return
    terminal.line("")
    for sentence in verdicts.blind_lines(metrics_of(run).blind):
        terminal.line(sentence)
    terminal.line(f"-> {run['metrics.json']}")
    if stale:
        terminal.line(
            f"Made before this, and no longer counted as done: {', '.join(stale)}. `dsc report RECIPE` writes the "
            f"tally into report and card{'; `dsc publish RECIPE` puts them up again' if 'publish' in stale else ''}."
        )
