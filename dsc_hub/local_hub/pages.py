"""HTML pages for people who open the hub's address in a browser: the list of repos, and the contents of a repo.

Private repos require the token here too, since every account of a shared machine can reach the loopback interface. The
browser's own login dialog is used: user `local`, password the token.
"""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from . import access, cards
from .routing import at_repo
from .store import REPO_TYPES, Commit, Refusal, Repo

ASK = {"WWW-Authenticate": 'Basic realm="Local hub: user local, password is the token", charset="UTF-8"'}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Authorization",
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .5rem;border-bottom:1px solid #ccc}"
    "td.n{text-align:right}pre{background:#f4f4f4;padding:1rem;white-space:pre-wrap;overflow-wrap:anywhere}"
)
SIGN_IN = (
    "<p>Private repositories are not listed. <a href='/login'>Sign in</a> with user <code>local</code> and, as "
    "password, the token (in the file <code>token</code> of this hub's folder).</p>"
)
CARD_LIMIT = 200_000  # maximum bytes of README.md on a page


def index(request: Request) -> Response:
    """Return the page of all repos that the caller may read."""
    try:
        user = access.caller(request)
    except Refusal as refusal:
        return _login(refusal.message)
    visible = [repo for kind in REPO_TYPES for repo in access.visible_repos(request, kind)]
    rows = [_row_or_damage(repo) for repo in visible]
    table = _table(["Repository", "Type", "Visibility", "Last commit"], rows) if rows else "<p>Nothing to show yet.</p>"
    note = f"<p>Signed in as {escape(user)}.</p>" if user else SIGN_IN
    return _page("Local hub", "<h1>Local hub</h1>" + table + note)


def _row_or_damage(repo: Repo) -> str:
    try:
        return _index_row(repo, repo.at("main"))
    except Refusal as refusal:
        return f"<td>{escape(repo.path.name)}</td><td>{repo.type}</td><td></td><td>{escape(refusal.message)}</td>"


def login(request: Request) -> Response:
    """Make the browser request the token, once for the whole site."""
    try:
        access.signed_in(request)
    except Refusal:
        return _login("Sign in to see private repositories.")
    return RedirectResponse("/")


def repo_page(request: Request) -> Response:
    """Return the page of a repo at a revision: visibility, last commit, files with their sizes, the card as text."""
    try:
        repo = access.readable(request)
        revision = request.path_params.get("rev", "main")
        commit = repo.at(revision)
    except Refusal as refusal:
        if refusal.status == 401:
            return _login("There is no such repository, or it is private. Sign in to see private repositories.")
        return _page("Not found", f"<h1>Not found</h1><p>{escape(refusal.message)}</p>", refusal.status)
    return _page(repo.meta()["id"], _repo_body(repo, commit, revision))


def _repo_body(repo: Repo, commit: Commit, revision: str) -> str:
    meta = repo.meta()
    base = f"{_address(repo)}/resolve/{quote(revision, safe='')}/"
    rows = [
        f"<td><a href='{escape(base + quote(path))}'>{escape(path)}</a></td><td class=n>{_size(entry.size)}</td>"
        for path, entry in commit.files.items()
    ]
    total = _size(sum(entry.size for entry in commit.files.values()))
    readme = (repo.file(commit, "README.md") or b"")[:CARD_LIMIT].decode("utf-8", "replace")
    return (
        f"<p><a href='/'>Local hub</a></p><h1>{escape(meta['id'])}</h1>"
        f"<p>{repo.type}, {_visibility(meta)}; revision {escape(revision)}: {_commit_text(commit)}</p>"
        f"<p>{len(rows)} files, {total}</p>{_table(['File', 'Size'], rows)}"
        + (f"<h2>README.md</h2><pre>{escape(readme)}</pre>" if readme else "")
    )


def _index_row(repo: Repo, commit: Commit) -> str:
    meta, title = repo.meta(), cards.metadata(repo.file(commit, "README.md")).get("pretty_name")
    name = escape(meta["id"]) + (f" ({escape(str(title))})" if title else "")
    return (
        f"<td><a href='{escape(_address(repo))}'>{name}</a></td><td>{repo.type}</td>"
        f"<td>{_visibility(meta)}</td><td>{_commit_text(commit)}</td>"
    )


def _address(repo: Repo) -> str:
    return f"/{'' if repo.type == 'model' else repo.type + 's/'}{quote(repo.meta()['id'])}"


def _commit_text(commit: Commit) -> str:
    date = commit.date[:16].replace("T", " ")
    return f"{escape(commit.title)} ({commit.id[:7]}, {escape(commit.author)}, {date} UTC)"


def _visibility(meta: dict[str, Any]) -> str:
    return "private" if meta["private"] else "public"


def _size(n: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while n >= 1000 and len(units) > 1:
        n /= 1000
        units.pop(0)
    return f"{n:.0f} B" if units[0] == "B" else f"{n:.1f} {units[0]}"


def _table(heads: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _login(why: str) -> Response:
    browser = "In a browser: user <code>local</code>, password the token."
    program = "From a program: <code>Authorization: Bearer TOKEN</code>."
    return _page("Sign in", f"<h1>Sign in</h1><p>{escape(why)}</p><p>{browser} {program}</p>", 401, ASK)


def _page(title: str, body: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    head = f"<meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    html = f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>"
    return HTMLResponse(html, status, HEADERS | (headers or {}))


ROUTES = [
    Route("/", index),
    Route("/login", login),
    *at_repo("/tree/{rev:part}", repo_page),
    *at_repo("/commit/{rev:part}", repo_page),
    *at_repo("", repo_page),
]
