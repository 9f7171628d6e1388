"""Random damage to what strangers send: recipes, repos that are pulled and verified, requests to the embedded Hub; and
to what users bring and models say (tests/fuzz_files.py).

    python -m tests.fuzz recipes|tables|texts|runs|pull|verify|hub [--seconds 600] [--seed 0]

Each case is a valid input with a few changes. A finding is what a user would call a bug: a traceback, an answer of 500, a case that
takes longer than `SLOWEST_S`, a file outside the folder that was asked for. It is printed with the number of the case, which makes
the same case again, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from dsc_hub.config import recipe_files, untrusted
from dsc_hub.config.origin import MANIFEST
from dsc_hub.data import prompts
from dsc_hub.errors import DscError
from dsc_hub.hub.account import login
from dsc_hub.hub.pull import pull_repo
from dsc_hub.local_hub import app
from dsc_hub.local_hub.server import Address, running
from dsc_hub.pipeline import resolve
from dsc_hub.publish import upload
from dsc_hub.publish.verify import verify_repo
from dsc_hub.report import cards
from tests import small_run
from tests.conftest import FILMS, RECIPE
from tests.hub import at_hub

SLOWEST_S = 20.0  # of this process on a processor: other work on the machine counts for nothing
STUCK_S = 400.0
TARGETS = ("recipes", "tables", "texts", "runs", "pull", "verify", "hub")
DEEP: Any = "x"
for _ in range(400):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 10**400, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "\0", "\x1b[2J\x1b[H", "a" * 5000, "../../etc/passwd", "/dev/zero", "~", ".", "..", "a/b", "a/../b"),
    *("http://evil.example", "hub:a/b", "package:..", "{value}", "{{ 7*7 }}", "1:30:00", "2024-13-45", "=1+1", "-1"),
    *("\u202eabc", "\N{LLAMA}" * 50, "\ud800", "null", "[", "(a+)+$", "%s%n", "x.py", "CON", "main", "0" * 40),
    *([], {}, [[]] * 40, {"": ""}, {"a": {"b": {"c": None}}}, [1, "a", None], DEEP, ["x"] * 3000, {"__proto__": 1}),
)


class Finding(Exception):
    """What a case showed that should not be."""


def changed(value: Any, rng: random.Random) -> Any:
    """A copy of JSON-like data with one place replaced, removed, doubled, moved or renamed."""
    value = copy.deepcopy(value)
    node, steps = value, rng.randint(1, 6)
    parent, key = None, None
    for _ in range(steps):
        if not isinstance(node, (dict, list)) or not node:
            break
        parent = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = parent[key]
    if parent is None:
        return rng.choice(HOSTILE)
    how = rng.random()
    if how < 0.55:
        parent[key] = rng.choice(HOSTILE)
    elif how < 0.7:
        del parent[key]
    elif how < 0.8 and isinstance(parent, dict):
        parent[str(rng.choice(HOSTILE))[:60]] = parent.pop(key)
    elif how < 0.9 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif isinstance(node, str):
        parent[key] = damaged(node.encode("utf-8", "replace"), rng).decode("utf-8", "replace")
    else:
        parent[key] = [node]
    return value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, cut, doubled, or with something hostile put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        how = rng.random()
        if how < 0.3 and data:
            data[at % len(data)] = rng.randrange(256)
        elif how < 0.5:
            del data[at : at + rng.randint(1, 200)]
        elif how < 0.65:
            data[at:at] = data[max(0, at - 100) : at]
        else:
            text = rng.choice(
                ("&a ", "*a", "!!python/name:os.system ", "%YAML 1.3\n", "\t", "\n---\n", "\0", "[" * 3000, "\ufeff")
            )
            data[at:at] = text.encode()
    return bytes(data)


# -- the recipe loader, with the prompt files that a recipe names


def recipes(rng: random.Random, place: Path) -> str:
    folder = place / "recipe"
    folder.mkdir(exist_ok=True)
    names = [str(p.relative_to(PACKAGED)) for p in sorted(PACKAGED.glob("*/recipe.yaml"))]
    text = rng.choice([RECIPE, *((PACKAGED / name).read_text() for name in names)])
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.7:
            with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
                text = yaml.safe_dump(changed(yaml.safe_load(text), rng), allow_unicode=rng.random() < 0.5)
        else:
            text = damaged(text.encode("utf-8", "replace"), rng).decode("utf-8", "replace")
    (folder / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    table = [{"prompt": f"Say something about {i}", "topic": f"t{i}"} for i in range(12)]
    rows = changed(table, rng)
    try:
        jsonl = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows]))
    except ValueError:
        jsonl = ""
    for name, data in {
        "films.txt": FILMS.encode(),
        "p.jsonl": jsonl.encode(),
        "p.csv": b"prompt,topic\na b,c\n" * 9,
    }.items():
        (folder / name).write_bytes(damaged(data, rng) if rng.random() < 0.3 else data)
    path = str(folder / "recipe.yaml")
    overrides = rng.choice(
        [[], [], ["prompts.path=p.jsonl"], ["prompts.path=p.csv", "prompts.column=prompt"], ["x=[1"]]
    )
    for read in (
        lambda: untrusted.read_untrusted("a recipe", Path(path), overrides),
        lambda: resolve.load_recipe(path, overrides),
        lambda: (
            (r := recipe_files.load_recipe_file(Path(path), overrides))
            and prompts.load_prompts(r.prompts, folder, r.seed)
        ),
    ):
        only_errors_for_users(read)
    return text[:3000]


PACKAGED = Path(__file__).parent.parent / "recipes"


def only_errors_for_users(act: Callable[[], Any]) -> None:
    """Whatever is wrong, it is told as an error that a user can mend, and its text can be printed."""
    try:
        act()
    except DscError as e:
        str(e).encode("utf-8", "replace")


# -- repos that are pulled and verified


class Repo:
    """A published run on an embedded Hub, with branches that hold damaged copies of it."""

    def __init__(self, place: Path, address: Address) -> None:
        self.place, self.address = place, address
        (place / "made").mkdir()
        (place / "made" / "films.txt").write_text(FILMS)
        (place / "made" / "recipe.yaml").write_text(RECIPE)
        run, r = small_run.make(place / "run", place / "made" / "recipe.yaml")
        account = login(None, address.endpoint, address.token)
        self.api: HfApi = account.api
        upload.publish_run(run, account, place, place / "made", r.publish, lambda: cards.build_cards(run))
        self.repos = {"dataset": "local/little-dsc", "model": "local/little-dsc-lora"}
        self.files = {
            kind: {p.relative_to(f).as_posix(): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()}
            for kind, f in (
                ("dataset", pull_repo("local/little-dsc", place / "dataset").folder),
                ("model", pull_repo("local/little-dsc-lora", place / "model").folder),
            )
        }
        for files in self.files.values():
            files.pop(".dsc-pulled.json", None)
        self.n = 0

    def commit(self, rng: random.Random) -> str:
        """A branch with a damaged copy of dataset or adapter; what was changed is listed anew in its manifest half of the time."""
        kind = rng.choice(("dataset", "dataset", "model"))
        files = dict(self.files[kind])
        for _ in range(rng.randint(1, 3)):
            self._change(files, rng)
        if rng.random() < 0.6:
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
                manifest = json.loads(files[MANIFEST])
                manifest["files"] = {n: signature(d) for n, d in files.items() if n != MANIFEST}
                files[MANIFEST] = json.dumps(manifest).encode()
        self.n += 1
        repo, branch = self.repos[kind], f"case{self.n}"
        self.api.create_branch(repo, branch=branch, repo_type=kind)
        before = self.files[kind]
        adds = [CommitOperationAdd(n, d) for n, d in files.items() if n != "README.md" and before.get(n) != d]
        gone = [CommitOperationDelete(n) for n in before if n not in files]
        if adds or gone:
            self.api.create_commit(repo, [*adds, *gone], commit_message="damaged", repo_type=kind, revision=branch)
        card = files.get("README.md")
        if card not in (None, before["README.md"]):  # the client would validate the card first; a stranger's need not
            line = {
                "key": "file",
                "value": {"path": "README.md", "content": card.decode("latin-1"), "encoding": "utf-8"},
            }
            head = {"key": "header", "value": {"summary": "card", "description": ""}}
            httpx2.post(
                f"{self.address.endpoint}/api/{kind}s/{repo}/commit/{branch}",
                content="\n".join(map(json.dumps, (head, line))).encode(),
                headers={"Authorization": f"Bearer {self.address.token}", "Content-Type": "application/x-ndjson"},
                timeout=60,
            )
        return f"{repo}@{branch}"

    def _change(self, files: dict[str, bytes], rng: random.Random) -> None:
        name = rng.choice(sorted(files))
        data, how = files[name], rng.random()
        if how < 0.1:
            del files[name]
        elif how < 0.2:
            files[
                rng.choice(
                    ("x.py", "model.pkl", ".dsc-pulled.json", "a/b.json", "sft/train.parquet", "CON", ".gitattributes")
                )
            ] = data
        elif name.endswith((".json", ".yaml")) and how < 0.85:
            load, dump = (json.loads, json.dumps) if name.endswith(".json") else (yaml.safe_load, yaml.safe_dump)
            with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
                files[name] = dump(changed(load(data), rng)).encode("utf-8", "replace")
        elif name.endswith(".parquet") and how < 0.8:
            files[name] = other_table(data, rng)
        else:
            files[name] = damaged(data, rng)


def signature(data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "git": blob}


def other_table(data: bytes, rng: random.Random) -> bytes:
    """A Parquet file with a column dropped, renamed, of another type, emptied or with other values; bytes again."""
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError):
        return damaged(data, rng)
    if not table.num_columns:
        return damaged(data, rng)
    at = rng.randrange(table.num_columns)
    name, n = table.column_names[at], len(table)
    how = rng.randrange(6)
    if how == 0:
        table = table.remove_column(at)
    elif how == 1:
        table = table.rename_columns([f"{c}_" if i == at else c for i, c in enumerate(table.column_names)])
    elif how == 2:
        table = table.set_column(at, name, pa.nulls(n, table.schema.field(at).type))
    elif how == 3:
        values = [rng.choice((1, 2.5, -1, None)) for _ in range(n)]
        table = table.set_column(at, name, pa.array(values, pa.float64()))
    elif how == 4:
        table = table.set_column(
            at, name, pa.array([rng.choice(("", "\0", "\x1b[2J", "x" * 2000, "a\nb")) for _ in range(n)])
        )
    else:
        table = table.slice(0, rng.randint(0, max(0, n - 1)))
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def pulled(repo: Repo, rng: random.Random, place: Path) -> str:
    name = repo.commit(rng)
    folder = place / "out"
    only_errors_for_users(lambda: pull_repo(f"hub:{name}", folder / "repo"))
    inside = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if not inside <= {"repo"} or any(p.is_symlink() for p in folder.rglob("*")):
        raise Finding(f"pull left {sorted(inside)} behind")
    recipe = folder / "repo" / "recipe.yaml"
    if recipe.is_file():
        only_errors_for_users(lambda: resolve.load_recipe(str(recipe), []))
    only_errors_for_users(lambda: resolve.load_recipe(f"hub:{name}", []))
    return name


def verified(repo: Repo, rng: random.Random, place: Path) -> str:
    name = repo.commit(rng)
    only_errors_for_users(lambda: verify_repo(f"hub:{name}"))
    return name


# -- requests to the embedded Hub


def requests(address: Address, rng: random.Random, client: httpx2.Client) -> str:
    route = rng.choice(app.ROUTES + extra_routes())
    method = rng.choice(sorted(route.methods or {"GET"}) + ["GET", "POST", "DELETE", "PUT"])
    parts = {
        "type": ("models", "datasets", "spaces", "model", "x"),
        "name": ("local/a", "local/b", "other/a", "a", "local/..", "local/a.git", "local/A"),
        "rev": ("main", "0" * 40, "refs%2Fpr%2F1", "..", "v1", "%00", "a" * 300),
        "ref": ("v1", "main", "..", "a/b", "x" * 300),
        "path": ("README.md", "config.json", "a/b.txt", "../x", "%2e%2e/x", "", "a" * 300, "x\ty"),
    }
    path = re.sub(r"\{(\w+):\w+\}", lambda m: str(rng.choice(parts.get(m[1], ("x", "..", "0", "%ff")))), route.path)
    query = rng.choice(
        (
            "",
            "?expand=1",
            "?limit=-1",
            "?recursive=x",
            "?cursor=%00",
            "?search=" + "a" * 500,
            "?p=1e99",
            "?full=&author=..",
        )
    )
    head = {"key": "header", "value": {"summary": "s", "description": "d", "parentCommit": None}}
    content = {"path": rng.choice(parts["path"]), "content": "eA==", "encoding": "base64"}
    bodies: list[Any] = [
        {"name": "a", "organization": "local", "type": "dataset", "private": True},
        {"content": "---\nlicense: mit\n---\n", "repoType": "model"},
        {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "0" * 64, "size": 3}]},
        {"files": [{"path": "a", "size": 1, "sample": "eA=="}]},
        {"paths": ["README.md"], "expand": True},
        {"title": "t", "namespace": "local", "private": True, "item": {"type": "model", "id": "local/a"}},
        [head, {"key": "file", "value": content}],
        [head, {"key": "lfsFile", "value": {"path": "m.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}],
        [head, {"key": "deletedFolder", "value": {"path": "."}}],
    ]
    body = rng.choice(bodies)
    if rng.random() < 0.7:
        body = changed(body, rng)
    try:
        data = "\n".join(map(json.dumps, body)) if isinstance(body, list) else json.dumps(body)
    except (ValueError, RecursionError):
        data = "["
    raw = damaged(data.encode(), rng) if rng.random() < 0.3 else data.encode()
    headers = {
        "Content-Type": rng.choice(
            ("application/json", "application/x-ndjson", "application/vnd.git-lfs+json", "text/plain")
        )
    }
    if rng.random() < 0.85:
        headers["Authorization"] = f"Bearer {address.token}"
    if rng.random() < 0.2:
        headers["Range"] = rng.choice(("bytes=0-", "bytes=-1", "bytes=5-2", "bytes=" + "0-," * 500, "x"))
    case = f"{method} {path}{query} {headers} {raw[:300]!r}"
    try:
        answer = client.request(
            method, f"{address.endpoint}{path}{query}", headers=headers, content=raw, timeout=SLOWEST_S
        )
    except httpx2.ReadError:
        return case  # the server closed a kept connection, after an error that was counted
    except httpx2.TimeoutException:
        raise Finding(f"no answer within {SLOWEST_S} s: {case}") from None
    except (httpx2.InvalidURL, UnicodeError):
        return case  # the client itself would not send it
    if answer.status_code >= 500 and answer.status_code != 501:
        raise Finding(f"{answer.status_code} {answer.text[:300]}: {case}")
    return case


def extra_routes() -> list[Any]:
    """All routes of the application, wherever they are listed."""
    global _all
    if _all is None:
        with tempfile.TemporaryDirectory() as folder:
            from dsc_hub.local_hub.store import Store

            _all = [
                r for r in app.make_app(Store(Path(folder)), {}).routes if hasattr(r, "path") and hasattr(r, "methods")
            ]
    return _all


_all: list[Any] | None = None


# -- running them


@contextlib.contextmanager
def prepared(target: str, place: Path) -> Iterator[Callable[[random.Random, Path], str]]:
    """What carries out one case of a target, with what it needs around it."""
    from tests import fuzz_files  # it takes from this module

    alone = {"recipes": recipes, "tables": fuzz_files.tables, "texts": fuzz_files.texts}
    if target in alone:
        yield alone[target]
        return
    if target == "runs":
        yield fuzz_files.SmallRun(place)
        return
    with running(place / "hub") as address, pytest.MonkeyPatch.context() as patch:
        at_hub.point(patch, address, place / "cache")
        api = HfApi(endpoint=address.endpoint, token=address.token)
        if target == "hub":
            with httpx2.Client() as client:
                api.create_repo("local/keep", repo_type="dataset", private=True)
                api.upload_file(
                    path_or_fileobj=b"kept", path_in_repo="a.txt", repo_id="local/keep", repo_type="dataset"
                )
                yield lambda rng, _: requests(address, rng, client)
            names = {d.id for d in api.list_datasets(author="local")}
            kept = api.hf_hub_download("local/keep", "a.txt", repo_type="dataset", cache_dir=place / "back")
            if "local/keep" not in names or Path(kept).read_bytes() != b"kept":
                raise Finding("a repo that no request named is not what it was")
            return
        repo = Repo(place, address)
        act = {"pull": pulled, "verify": verified}[target]
        yield lambda rng, work: act(repo, rng, work)


def fuzz(target: str, seconds: float, seed: int = 0, most: int = 10**9) -> tuple[int, list[str]]:
    """Cases until the time is over; how many, and what was found, a text each (one of each kind)."""
    found: dict[str, str] = {}
    n, deadline = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="dsc-fuzz-") as folder, prepared(target, Path(folder)) as act:
        while time.monotonic() < deadline and n < most:
            work = Path(folder) / "work"
            work.mkdir(exist_ok=True)
            began, started = time.process_time(), time.monotonic()
            try:
                case = act(random.Random(f"{seed} {n}"), work)
                took, waited = time.process_time() - began, time.monotonic() - started
                if took > SLOWEST_S or waited > STUCK_S:
                    raise Finding(f"took {took:.0f} s of a processor, {waited:.0f} s in all: {case[:500]}")
            except Exception as e:
                frames = traceback.extract_tb(e.__traceback__)
                where = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "/dsc_hub/" in f.filename), "")
                kind = f"{type(e).__name__} {where or str(e)[:80]}"
                found.setdefault(
                    kind, f"case {n} of seed {seed}: {kind}\n{''.join(traceback.format_exception(e))[-2500:]}"
                )
            for left in work.iterdir():
                remove(left)
            n += 1
    return n, list(found.values())


def remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    n, found = fuzz(args.target, args.seconds, args.seed)
    print("\n\n".join(found))
    print(f"{args.target}: {n} cases in {args.seconds:.0f} s, {len(found)} findings")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
