"""dsc_hub: distilled self-critique, from prompts to a published adapter. This module holds the version, nothing else."""

__version__ = "0.1.0"
