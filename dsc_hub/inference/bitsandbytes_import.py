"""Import of bitsandbytes without PyTorch's compiler, and without a warning that nobody can act upon.

At its import bitsandbytes marks four functions to be compiled, which imports the compiler: 3 to 5 s of every process
that trains or quantises. They are meant for devices that are neither a CPU nor a CUDA GPU, where they run as written.
"""

from __future__ import annotations

import logging
import os
from typing import Any


def import_bitsandbytes() -> Any:
    """Return the module. To be called before transformers or peft import it themselves."""
    # An optional faster CPU kernel is missing; its own code suffices.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import bitsandbytes
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    return bitsandbytes
