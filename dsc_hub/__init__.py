"""dsc_hub: distilled self-critique, from prompts to a published adapter.

From Python: `from dsc_hub import resolve, plan, run, load_run` (see `dsc_hub.api`). Nothing is imported before it is
used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Results", "fetch", "load_run", "plan", "pull", "resolve", "run", "try_out", "verify"]

if TYPE_CHECKING:
    from dsc_hub.api import Results, fetch, load_run, plan, pull, resolve, run, try_out, verify


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dsc_hub import api

        return getattr(api, name)
    raise AttributeError(f"module 'dsc_hub' has no attribute '{name}'")
