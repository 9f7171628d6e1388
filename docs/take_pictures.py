"""Take the pictures of the documentation from a finished run:  python docs/take_pictures.py RUN_FOLDER [WORDS]

The picture of the chains shows the one with the largest gain whose texts have these words.
Needs Chromium on the path. The report is built first; the terminal's picture is what `dsc check` prints.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from dsc_hub.report.page import build_page
from dsc_hub.runs.run import Run

PICTURES = Path(__file__).parent / "pictures"
TERMINAL = """<meta charset="utf-8"><body style="margin:0;background:#16191f;color:#dfe3e8">
<pre id="t" style="font:14px/1.4 'DejaVu Sans Mono',monospace;margin:0;padding:18px;display:inline-block"></pre>"""


def report(page: Page, run: Run, name: str, width: int, height: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    page.goto(run["report.html"].resolve().as_uri())
    page.wait_for_selector("#browser:not([hidden])")
    page.screenshot(path=PICTURES / f"{name}.png")


def chains(page: Page, run: Run, words: str) -> None:
    report(page, run, "report-light", 1180, 800, "light")
    page.select_option("#sort", "largest gain")
    page.fill("#search", words)
    page.wait_for_timeout(500)
    page.locator("#chains").screenshot(path=PICTURES / "chains-light.png")


def terminal(page: Page, run: Run) -> None:
    command = [sys.executable, "-m", "dsc_hub", "check", str(run.folder)]
    env = os.environ | {"COLUMNS": "118", "NO_COLOR": "1"}
    printed = subprocess.run(command, capture_output=True, text=True, env=env, check=False).stdout
    printed = printed.replace(str(run.folder), f"runs/{run.facts.recipe.name}/{run.folder.name}")
    page.set_content(TERMINAL)
    page.evaluate("text => { document.getElementById('t').textContent = text }", f"$ dsc check quickstart\n{printed}")
    page.locator("#t").screenshot(path=PICTURES / "terminal.png")


def main(folder: str, words: str = "") -> None:
    run = Run(Path(folder))
    build_page(run)
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        report(page, run, "report-dark", 1180, 800, "dark")
        report(page, run, "report-phone", 360, 760, "light")
        chains(page, run, words)
        terminal(page, run)
        site = Path(__file__).parent / "_build" / "html" / "index.html"
        if site.is_file():  # `make docs` was run before
            page.set_viewport_size({"width": 1180, "height": 800})
            page.goto(site.as_uri())
            page.screenshot(path=PICTURES / "docs-home.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
