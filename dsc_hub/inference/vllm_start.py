"""Start vLLM's API server on a CPU; its processes are forks of one that has imported vLLM (vllm_forks.py).

    python -m dsc_hub.inference.vllm_start ARGUMENTS OF THE SERVER
    python -m dsc_hub.inference.vllm_start --arguments-later

The second way imports vLLM at once and reads the arguments and the API key later, from standard input: a line of JSON.
With GNU's OpenMP a fork may hang: without Intel's, the server starts without forks.
"""

from __future__ import annotations

import json
import os
import sys
from multiprocessing import forkserver

from dsc_hub.inference.vllm_forks import Context, serve

PARENT = "dsc_hub.inference.vllm_parent"
LATER = "--arguments-later"


def main() -> None:
    forks = Context() if "libiomp" in os.environ.get("LD_PRELOAD", "") else None
    if forks:
        forks.set_forkserver_preload([PARENT])
        forkserver.ensure_running()  # it begins to import vLLM
    arguments = sys.argv[1:]
    if arguments == [LATER]:
        if not (line := sys.stdin.readline()):
            return  # no server is wanted any more
        given = json.loads(line)
        arguments, os.environ["VLLM_API_KEY"] = given["arguments"], given["api_key"]
    if not forks:
        serve(arguments)
        return
    server = forks.Process(target=serve, args=(arguments, forks))
    server.start()
    server.join()
    if (code := server.exitcode or 0) < 0:
        os.kill(os.getpid(), -code)  # end as it ended
    sys.exit(code)


if __name__ == "__main__":
    main()
