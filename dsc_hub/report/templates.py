"""The templates of pages and what they contain besides: style sheet and script, from the packaged `model_cards`."""

from __future__ import annotations

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dsc_hub.system.files import packaged_folder


def page_environment() -> Environment:
    """Return the Jinja environment of pages: values are escaped, and unknown names are errors."""
    return Environment(
        loader=FileSystemLoader(packaged_folder("model_cards")),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """Return the text of a packaged style sheet or script."""
    return (packaged_folder("model_cards") / name).read_text(encoding="utf-8")
