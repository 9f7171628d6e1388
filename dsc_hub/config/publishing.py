"""The section of the recipe for what is published, and what of it only the publisher decides."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from dsc_hub.config.section import Section

# Keys of `publish:` that the publisher decides: no pulled recipe may set them, and no published recipe contains them.
PUBLISHERS_OWN = ("owner", "private", "branch", "pull_request", "tag", "collection", "overwrite", "gated", "metrics")


def _norwegian(value: Any) -> Any:
    """Return the value with `no` as a language: YAML reads a bare one as false."""
    if isinstance(value, (list, tuple)):
        return [_norwegian(item) for item in value]
    return "no" if value is False else value


class PublishConfig(Section):
    """Where to: `local` (the embedded Hub), `hub` (HF_ENDPOINT, the public Hub by default) or `none`.

    Names are without owner.
    """

    to: Literal["local", "hub", "none"] = Field(
        "hub", description="hub: HF_ENDPOINT, the public Hub by default; local: the embedded Hub; none: nowhere"
    )
    owner: str | None = Field(None, description="user or organisation; null: whoever the token belongs to")
    dataset: str | None = Field(None, description="name of the dataset repo; null: <recipe>-dsc")
    adapter: str | None = Field(None, description="name of the adapter repo; null: <recipe>-dsc-lora")
    base: str | None = Field(
        None, description="publish the base model too, under this name (needed when it is on no Hub)"
    )
    private: bool = Field(True, description="new repos are private; an existing public one never gets private data")
    branch: str = Field(
        "main", pattern=r"^[\w][\w./-]{0,99}$", description="branch to commit to; made if it isn't there"
    )
    pull_request: bool = Field(
        False, description="propose the commits as pull requests instead; the repos must be there"
    )
    tag: str | None = Field(
        None,
        pattern=r"^[\w][\w.-]{0,99}$",
        description="tag for the commits; null: no tag. One that exists is not moved",
    )
    collection: str | None = Field(
        None,
        min_length=1,
        max_length=60,
        description="title of a collection that gets dataset, adapter and base; null: none",
    )
    overwrite: bool = Field(
        False, description="write over files that somebody changed on the Hub since dsc published them (a card, say)"
    )
    gated: Literal["auto", "manual"] | None = Field(
        None,
        description=(
            "who wants the files must ask: auto lets in whoever does, manual whom you accept; null: as the repo is"
        ),
    )
    content_warning: str | None = Field(
        None,
        min_length=1,
        description=(
            "a sentence on top of the cards where prompts or answers may hurt; answers that were not kept then stay"
            " here"
        ),
    )
    rejected: bool | None = Field(
        None, description="publish answers that were not kept, too; null: unless there is a content_warning"
    )
    metrics: bool = Field(
        False,
        description=(
            "publish metric files of one's own (METRIC.py), too, as Spaces, and name these in the published recipe: "
            "without them nobody else can run it"
        ),
    )
    license: str | None = Field(None, description="licence of dataset and adapter; null: the base model's")
    language: Annotated[str | tuple[str, ...], BeforeValidator(_norwegian)] = Field(
        "en", description="language of the texts, for the cards: an ISO 639 code, or a list of them"
    )

    @model_validator(mode="after")
    def _proposed_or_set(self) -> PublishConfig:
        if self.pull_request and (self.tag or self.branch != "main"):
            raise ValueError("pull_request: with branch or tag there is nothing to propose; leave them out")
        if self.pull_request and self.metrics:
            raise ValueError("metrics: a Space is not proposed with the run; publish it first (dsc publish-metric)")
        return self

    @model_validator(mode="after")
    def _names(self) -> PublishConfig:
        for key in ("owner", "dataset", "adapter", "base"):
            name = getattr(self, key)
            if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII):
                raise ValueError(
                    f"{key}: a name has letters, digits, '-', '_' and '.', at most 96, no owner; got {name[:99]!r}"
                )
        return self


def languages(publish: PublishConfig) -> list[str]:
    """Return the codes of the languages of the texts."""
    return [publish.language] if isinstance(publish.language, str) else list(publish.language)


def publishes_rejected(publish: PublishConfig) -> bool:
    """Return whether answers that were not kept (all the base's, rejected revisions) are published."""
    return publish.rejected if publish.rejected is not None else publish.content_warning is None
