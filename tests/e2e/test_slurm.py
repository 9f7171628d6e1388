"""The commands of docs/howto/clusters.md on a real Slurm of one machine: an array, a cancelled job, one that is started
again, one that runs out of time.

It needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root. The chains are written by a scripted
server, so that each turn takes as long as the test wants.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.docs.test_docs import DOCS, blocks

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))) or os.geteuid() != 0,
        reason="needs root, and apt-get install slurmctld slurmd slurm-client munge",
    ),
]
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=20
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
SHARDS = 4
CHAINS = 10 * 2 * 2  # prompts of train and validation, with two chains each: see `recipe`
Slurm = Callable[..., str]


def until(holds: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Run a command of Slurm against a cluster of one node that lives as long as the module's tests."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(2)))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    daemons: list[subprocess.Popen[bytes]] = []

    def run(*words: str, code: int | None = 0) -> str:
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def said() -> str:
        return "".join(p.read_text(errors="replace") for p in folder.glob("*.log") if p.name != "munge.log")

    try:
        for command in commands:
            with (folder / f"{command[0]}.out.log").open("wb") as out:
                daemons.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
            if command[0] == "munged":
                until((folder / "munge.socket").exists, 20, said)
        until(lambda: run("sinfo", "-h", "-o", "%T", code=None).strip() in ("idle", "mixed"), 60, said)
        yield run
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait()


@pytest.fixture
def recipe(recipe_file: Path, tmp_path: Path, home: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """The recipe in the folder where jobs are submitted, whose chains a slow scripted server writes."""
    bodies: list[dict[str, Any]] = []
    server = start(pause=5.0, bodies=bodies)
    text = recipe_file.read_text().replace(
        "{train: 0.5, validation: 0.2, test: 0.3}", "{train: 1, validation: 0, test: 0}"
    )
    text += f"serving: {{endpoints: ['http://127.0.0.1:{server.server_port}/v1'], concurrency: 2}}\n"
    recipe_file.write_text(text.replace("steps: 2", "steps: 2, chains_per_prompt: 2"))
    monkeypatch.chdir(recipe_file.parent)
    monkeypatch.setenv("DSC_HUB_HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return bodies


def array_of_the_documentation() -> list[str]:
    """The words of `sbatch` in the documentation, without the GPU that this machine lacks, and with four shards."""
    (line,) = (
        line
        for block in blocks(DOCS / "howto" / "clusters.md", "text")
        for line in block.splitlines()
        if line.startswith("sbatch --wait") and "OFFLINE" not in line
    )
    options, _, command = line.partition(" --wrap ")
    words = [word for word in options.split() if not word.startswith("--gpus")]
    assert words[:3] == ["sbatch", "--wait", "--requeue"] and words[3] == "--array=1-8"
    command = command.strip("'").replace("/8", f"/{SHARDS}").replace("dsc ", f"{ROOT}/.venv/bin/python -m dsc_hub ")
    return ["sbatch", "--requeue", f"--array=1-{SHARDS}", "--output=%A_%a.log", "--wrap", command]


def rows(name: str) -> list[dict[str, Any]]:
    files = sorted(Path("runs/little").glob(f"**/{name}"))
    return [
        json.loads(line) for file in files for line in file.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"
    ]


def test_an_array_survives_a_cancelled_job_a_requeue_and_a_time_limit(slurm: Slurm, recipe: list[dict[str, Any]]):
    submit = array_of_the_documentation()
    job = slurm(*submit, "--parsable", "--time=0:30").split(";")[0].strip()  # Slurm counts in minutes
    logs = lambda: "".join(p.read_text() for p in sorted(Path().glob("*.log")))  # noqa: E731
    until(lambda: len(rows("turns.jsonl")) >= 12, 60, lambda: slurm("squeue") + logs())
    slurm("scancel", f"{job}_2")
    slurm("scontrol", "requeue", f"{job}_1")
    until(lambda: not slurm("squeue", "-h", "-j", job, code=None).strip(), 240, lambda: slurm("squeue") + logs())
    assert "DUE TO TIME LIMIT" in logs() and "CANCELLED" in logs()
    broken_off = rows("turns.jsonl")
    assert 12 <= len(broken_off) < CHAINS * 5

    slurm(*submit, "--wait")  # the same array again
    chains = Counter((row["prompt_id"], row["number"]) for row in rows("chains.jsonl"))
    turns = Counter((row["prompt_id"], row["chain"], row["step"], row["role"]) for row in rows("turns.jsonl"))
    assert len(chains) == CHAINS and set(chains.values()) == {1}
    assert len(turns) == CHAINS * 5 and set(turns.values()) == {1}
    # Only what was in flight was asked twice: two requests of each job that ended before its time, at most.
    asked = sum("messages" in body for body in recipe)
    assert CHAINS * 5 <= asked <= CHAINS * 5 + 2 * (SHARDS + 2)

    merge = [*submit[-1].split(" sample ")[0].split(), "merge", "recipe.yaml"]
    done = subprocess.run(merge, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"{len(broken_off)} turns before, {CHAINS * 5} after; asked {asked} times\n{logs()}")
