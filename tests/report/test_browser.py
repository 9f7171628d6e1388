"""The report in a real browser: Chromium by Playwright, on a page as it is opened from disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsc_hub.report.page import build_page
from dsc_hub.runs.run import Run
from tests import fixture_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Continuous integration has to have one; elsewhere these tests are for those who do.
pytestmark = pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on the path")

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = fixture_run.write(tmp_path_factory.mktemp("report") / "run")
    chains = [json.loads(line) for line in run["chains.jsonl"].read_text().splitlines()]
    for n, chain in enumerate(chains):
        chain["answer_score"]["value"] -= 0.01 * n
        chain["answer_defect"] = "" if n % 3 else "repeats itself"  # then there is no gain to speak of
    run["chains.jsonl"].write_text("".join(json.dumps(chain) + "\n" for chain in chains))
    build_page(run)
    return run


class Opened:
    """A page, on which nothing may go wrong unless that is expected."""

    def __init__(self, browser: playwright.Browser, path: Path, **options: object) -> None:
        self.page = browser.new_page(**options)
        self.problems: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on("request", lambda r: self.problems.append(r.url) if not r.url.startswith("file:") else None)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#browser:not([hidden])")

    def __enter__(self) -> playwright.Page:
        return self.page

    def __exit__(self, kind: object, *_: object) -> None:
        self.page.close()
        if kind is None:
            assert self.problems == []


def count(page: playwright.Page) -> tuple[int, int]:
    shown, _, whole, _ = page.inner_text("#count").replace(",", "").split()
    return int(shown), int(whole)


def test_a_conversation_is_shown_turn_by_turn_and_found_by_its_earlier_turns(chromium, tmp_path: Path):
    run = fixture_run.write(tmp_path / "run")
    rows = [json.loads(line) for line in run["prompts.jsonl"].read_text().splitlines()]
    turns = [
        ("system", f"Be a fierce critic. {HOSTILE}"),
        ("user", "Seen it?"),
        ("assistant", "Twice."),
        ("user", "So?"),
    ]
    row = rows[0] | {"text": "So?", "group": rows[0]["id"]}
    rows[0] = row | {"messages": [{"role": role, "content": text} for role, text in turns]}
    run["prompts.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_page(run)
    with Opened(chromium, run["report.html"]) as page:
        page.fill("#search", "fierce twice")
        page.wait_for_function("document.querySelector('#rows .title').textContent === 'So?'")
        detail = page.locator("#detail")
        assert detail.locator(".before .label").all_inner_texts() == ["system", "user", "assistant"]
        assert detail.locator(".before .text").all_inner_texts() == [text for _, text in turns[:3]]
        assert detail.locator(".prompt").inner_text() == "So?" and 0 < count(page)[0] < count(page)[1]
        assert rows[0]["id"] not in page.inner_text("#rows") and page.evaluate("window.hacked") is None


def test_a_chain_shows_its_steps_with_their_decisions_and_what_changed(chromium, run: Run):
    with Opened(chromium, run["report.html"]) as page:
        assert count(page)[0] == count(page)[1] > 1
        detail = page.inner_text("#detail")
        assert "First answer" in detail and "Critique" in detail and ("accepted" in detail or "rejected: " in detail)
        assert page.locator("#detail ins, #detail del").count() > 0
        before, after = page.locator("#detail .turn").nth(0).locator(".text"), page.locator("#detail .turn").nth(1)
        whole = after.locator(".text").nth(1)
        kept_and_new = whole.evaluate(
            "e => [...e.childNodes].filter(n => n.nodeName != 'DEL').map(n => n.textContent).join('')"
        )
        kept_and_old = whole.evaluate(
            "e => [...e.childNodes].filter(n => n.nodeName != 'INS').map(n => n.textContent).join('')"
        )
        assert kept_and_old == before.first.text_content() and kept_and_new != kept_and_old


def test_search_filters_and_order_choose_what_is_listed(chromium, run: Run):
    with Opened(chromium, run["report.html"]) as page:
        everything = count(page)[1]
        page.fill("#search", "no such word anywhere")
        assert count(page) == (0, everything) and "Nothing fits" in page.inner_text("#detail")
        page.fill("#search", "")
        options = page.locator("#outcome option").all_inner_texts()
        name = next(o for o in options if o.startswith("rejected: ")).rpartition(" (")[0]
        page.select_option("#outcome", name)
        assert 0 < count(page)[0] <= everything and name in page.inner_text("#detail")
        page.select_option("#outcome", "")
        for name, is_descending in (("largest gain", True), ("smallest gain", False)):
            page.select_option("#sort", name)
            gains = page.locator(".row .gain").all_inner_texts()
            known = [float(g.replace("−", "-")) for g in gains if g != "–"]
            assert 1 < len(known) < len(gains) and known == sorted(known, reverse=is_descending)
            assert gains[len(known) :] == ["–"] * (len(gains) - len(known))  # those without a value come last


def test_answers_of_the_arms_stand_side_by_side(chromium, run: Run):
    with Opened(chromium, run["report.html"]) as page:
        page.select_option("#view", "answers")
        assert page.locator("#detail .answer").count() >= 2
        assert {"base", "distilled"} <= set(page.locator("#detail .answer h4").all_inner_texts())


def test_the_keyboard_reaches_all_of_it(chromium, run: Run):
    with Opened(chromium, run["report.html"]) as page:
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"
        page.focus("#list")
        page.keyboard.press("ArrowDown")
        assert page.locator("[aria-selected=true]").get_attribute("id") == "row-1"
        assert page.get_attribute("#list", "aria-activedescendant") == "row-1"
        page.keyboard.press("End")
        last = page.locator("[aria-selected=true]")
        assert int(last.get_attribute("aria-posinset")) == int(last.get_attribute("aria-setsize"))


def test_hostile_texts_are_shown_and_do_nothing(chromium, tmp_path: Path):
    prompts = [(f"{HOSTILE} {n}", f"{HOSTILE} group {n % 2}") for n in range(4)]
    run = fixture_run.write(tmp_path / "run", prompts=prompts)
    build_page(run)
    opened = Opened(chromium, run["report.html"])
    with opened as page:
        assert HOSTILE in page.inner_text("#detail .prompt")
        page.select_option("#view", "answers")
        assert page.evaluate("window.hacked") is None and page.locator("#chains img").count() == 0
        assert opened.problems == []
        # Were something not escaped, the policy would hold.
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))")
        page.wait_for_timeout(300)
        assert page.evaluate("window.hacked") is None
        opened.problems = [p for p in opened.problems if "Content Security Policy" not in p]


def test_on_a_phone_each_number_stands_beside_what_it_is_of(chromium, run: Run):
    """A table of numbers would scroll sideways in itself, and begin with what interests least."""
    with Opened(chromium, run["report.html"], viewport={"width": 360, "height": 800}) as page:
        shown = page.evaluate("""() => [...document.querySelectorAll('table.titled')].map((table) => ({
            overflows: table.parentElement.scrollWidth > table.parentElement.clientWidth,
            titles: [...table.rows[1].cells].slice(1).map((cell) => getComputedStyle(cell, '::before').content),
        }))""")
        assert len(shown) >= 3 and not any(table["overflows"] for table in shown)
        assert shown[0]["titles"][0].startswith('"reward: ') and '"mean tokens"' in shown[0]["titles"]
        assert all(title not in ('""', "none") for table in shown for title in table["titles"])


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_never_scrolls_sideways_and_has_no_serious_finding_of_axe(chromium, run: Run, width: int, scheme: str):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with Opened(chromium, run["report.html"], viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.select_option("#view", "answers")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        findings = axe.run(page).response["violations"]
        serious = [
            f"{f['id']}: {f['nodes'][0]['html'][:120]}" for f in findings if f["impact"] in ("serious", "critical")
        ]
        assert serious == []
