"""Start vLLM's API server on a CPU; its processes are forks of one that has imported vLLM (vllm_forks.py).

    python -m dsc_hub.inference.vllm_start ARGUMENTS OF THE SERVER
    python -m dsc_hub.inference.vllm_start --arguments-later

The second way imports vLLM at once and reads the arguments and the API key later, from standard input: a line of JSON.
With GNU's OpenMP a fork may hang: without Intel's, the server starts without forks.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from multiprocessing import forkserver

from dsc_hub.inference.vllm_forks import SERVER, Context, serve

PARENT = "dsc_hub.inference.vllm_parent"
LATER = "--arguments-later"
_UNKNOWN = 255  # exit code of a child whose fork server could not say it any more


def main() -> None:
    forks = Context() if "libiomp" in os.environ.get("LD_PRELOAD", "") else None
    if forks:
        forks.set_forkserver_preload([PARENT])
        forkserver.ensure_running()  # it begins to import vLLM
    arguments = sys.argv[1:]
    if arguments == [LATER]:
        if not forks:
            importlib.import_module(SERVER)
            del sys.modules[SERVER]  # which runs as __main__; what it imports stays
        if not (line := sys.stdin.readline()):
            return  # no server is wanted
        given = json.loads(line)
        arguments, os.environ["VLLM_API_KEY"] = given["arguments"], given["api_key"]
    server = forks.Process(target=serve, args=(arguments, forks)) if forks else None
    try:
        if server:
            server.start()
    except (OSError, EOFError):  # the fork server has ended: vLLM can't be imported
        server = None
    if not server:
        serve(arguments)  # the last words of the log say why, if it can't either
        return
    server.join()
    _end_like(server.exitcode or 0)


def _end_like(code: int) -> None:
    """End with the exit code of a child, or by the signal that ended it (below 0) or its fork server."""
    if code == _UNKNOWN and (of_server := forkserver._forkserver._forkserver_pid):  # type: ignore[attr-defined]
        ended, status = os.waitpid(of_server, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else code
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
