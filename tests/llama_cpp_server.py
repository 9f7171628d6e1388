"""llama.cpp's own server for a GGUF file:  python -m tests.llama_cpp_server FILE [--parallel 4] [--context 1024]

Prints its address. It ends when its standard input does.
"""

from __future__ import annotations

import argparse
import os
import sys

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each request")
    options = parser.parse_args()
    settings = xllamacpp.CommonParams()
    settings.model.path = options.file
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.n_parallel, settings.n_ctx = options.parallel, options.parallel * options.context
    settings.cpuparams.n_threads = len(os.sched_getaffinity(0))  # more would wait for each other
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
