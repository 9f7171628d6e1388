"""How quick the report is with many chains, in Chromium, opened from disk.

    python -m tests.benchmarks.page [--chains 20000] [--rounds 3] [--json FILE]

Writes a run of made-up chains (three steps, 60 words a turn), builds its report, and takes: the seconds of building, the size, the
milliseconds to the first paint, until the chains can be read, and of one search, filter, sort and move, each the median of the rounds
(searches: from the key to the drawn list; the first one of a word that was not searched before).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from dsc_hub.records import prompt_id
from dsc_hub.report.page import build_page
from dsc_hub.runs.run import Run
from tests import fixture_run

WORDS_A_TURN, STEPS, VOCABULARY = 60, 3, 4000
# From the event to the frame after it.
TIMED = """async (act) => {
  const started = performance.now();
  eval(act);
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  return performance.now() - started;
}"""
ACTS = {
    "search": "$('search').value = WORD; browser.update()",
    "filter": "$('search').value = ''; $('outcome').selectedIndex = 1; browser.update()",
    "sort": "$('outcome').value = ''; $('sort').selectedIndex = 1; browser.update()",
    "move": "browser.select(browser.selected + 1)",
}


def made_up_run(folder: Path, chains: int) -> Run:
    rng = random.Random(7)
    words = ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(2, 10))) for _ in range(VOCABULARY)]

    def text() -> str:
        return " ".join(rng.choices(words, k=WORDS_A_TURN)).capitalize() + "."

    prompts = [(f"Review the film number {n // 4} for reader {n % 4}.", f"film {n // 16}") for n in range(chains // 2)]
    run = fixture_run.write(folder, prompts=prompts[:40])
    with run["prompts.jsonl"].open("w") as file:
        for t, g in prompts:
            file.write(json.dumps({"id": prompt_id(t), "text": t, "group": g, "split": "train"}) + "\n")
    reasons = ["", "", "not accepted by the rule", "repeats itself"]
    with run["chains.jsonl"].open("w") as file:
        for n in range(chains):
            steps = [
                {
                    "number": k,
                    "critique": text(),
                    "revision": text(),
                    "score": {"value": round(rng.uniform(-1, 1), 4), "reason": ""},
                    "defect": "",
                    "rejected": rng.choice(reasons),
                    "raw": "",
                }
                for k in range(1, STEPS + 1)
            ]
            row = {"prompt_id": prompt_id(prompts[n // 2 % len(prompts)][0]), "number": n % 2, "answer": text()}
            row |= {"answer_score": {"value": round(rng.uniform(-1, 1), 4), "reason": ""}, "answer_defect": ""}
            file.write(json.dumps(row | {"steps": steps, "answer_raw": ""}) + "\n")
    return run


def measured(page_file: Path, rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {}
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for number in range(rounds):
            page = browser.new_page()
            page.goto(page_file.as_uri(), wait_until="commit")
            page.wait_for_selector("#browser:not([hidden])", timeout=120_000)
            ready = page.evaluate("performance.now()")
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            taken.setdefault("first paint, ms", []).append(paint)
            taken.setdefault("chains can be read, ms", []).append(ready)
            page.wait_for_timeout(1000)  # as somebody takes to type the first word
            word = page.inner_text("#detail .text").split()[-1 - number].strip(".").lower()
            for name, act in ACTS.items():
                act = act.replace("WORD", json.dumps(word))
                taken.setdefault(f"{name}, ms", []).append(page.evaluate(TIMED, act))
            taken.setdefault("search again, ms", []).append(
                page.evaluate(TIMED, ACTS["search"].replace("WORD", json.dumps("film " + word)))
            )
            page.close()
        browser.close()
    return {name: round(statistics.median(values), 1) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsc-") as work:
        run = made_up_run(Path(work) / "run", given.chains)
        started = time.monotonic()
        build_page(run)
        result: dict[str, Any] = {"building, s": round(time.monotonic() - started, 1)}
        result["size, MB"] = round(run["report.html"].stat().st_size / 1e6, 1)
        result |= measured(run["report.html"], given.rounds)
    for name, value in result.items():
        print(f"{name:26} {value}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
