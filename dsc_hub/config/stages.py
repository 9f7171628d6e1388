"""The stages of a run, in order: ONE table."""

from __future__ import annotations

STAGES = ("prompts", "sampling", "dataset", "distill", "evaluation", "report", "cards", "publish")


# What each stage leaves behind, the file without which it isn't done first: taken over by another run whose stage has the same fingerprint.
STAGE_FILES: dict[str, tuple[str, ...]] = {
    "prompts": ("prompts.jsonl",),
    "sampling": ("chains.jsonl", "turns.jsonl", "failed.jsonl", "sessions.jsonl"),
    "dataset": ("dataset/sft", "dataset/preference", "dataset/chains"),
    "distill": ("adapter",),
    "evaluation": ("evaluation", "dataset/evaluation"),
    "report": ("report.html",),
    "cards": ("cards",),
}


# Sections of metrics.json that are not named after the stage that writes them.
WRITTEN_BY = {"test_set": "evaluation", "stages": "pipeline"}


MADE_FROM_IT = ("report", "cards", "publish")  # stages that tell the tally
