"""Sections of the recipe for the servers: how texts are drawn, who serves the models, what their tokens cost."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from dsc_hub.config.section import Section, auto_or
from dsc_hub.system.addresses import checked_address, checked_key_name

TEMPLATE_SETTINGS = "chat_template_kwargs"  # parameter of servers, and column of trl

SERVERS = ("endpoint", "api_key_env")  # options that depend on the machine: no pulled recipe may set them
# The same for sections: which servers are asked, and what their tokens cost.
CRITICS_OWN = (*SERVERS, "price")
SERVERS_OWN = ("endpoints", "served_model", "api_key_env", "price", "requests_per_minute", "tokens_per_minute")


ServerAddress = Annotated[str, AfterValidator(checked_address)]


KeyName = Annotated[str, AfterValidator(checked_key_name)]


class PriceConfig(Section):
    """What a server's tokens cost."""

    input: float = Field(ge=0, description="USD for a million tokens that it reads")
    output: float = Field(ge=0, description="USD for a million tokens that it writes")


# Parameters of a request that the recipe's other keys decide.
OWNED = frozenset("model messages prompt seed temperature top_p max_tokens max_completion_tokens n stream".split())
# What a caller of a chat template decides, and no setting does: servers refuse it, or do something else than training.
NO_TEMPLATE_SETTINGS = frozenset(
    "chat_template tokenize tools conversation conversations messages add_generation_prompt continue_final_message"
    " return_assistant_tokens_mask".split()
)
_WithExtra = TypeVar("_WithExtra", "CriticConfig", "GenerationConfig")


def _without_owned(section: _WithExtra) -> _WithExtra:
    """Return the section; ValueError if its `extra` sets what dsc sets itself."""
    if taken := sorted(OWNED & section.extra.keys()):
        raise ValueError(f"extra.{taken[0]} is set by dsc itself; remove it")
    settings = section.extra.get(TEMPLATE_SETTINGS)
    if settings is None:
        return section
    if not (isinstance(settings, dict) and all(isinstance(name, str) for name in settings)):
        raise ValueError(f"extra.{TEMPLATE_SETTINGS}: expected names with a value each, got {settings!r:.60}")
    if taken := sorted(NO_TEMPLATE_SETTINGS & settings.keys()):
        raise ValueError(f"extra.{TEMPLATE_SETTINGS}.{taken[0]} is no setting of a chat template; remove it")
    return section


class CriticConfig(Section):
    """Another model than the base that writes the critiques, at an OpenAI-compatible server."""

    model: str = Field(min_length=1, description="its name there")
    endpoint: ServerAddress | None = Field(
        None, description="address up to and including /v1; of this machine alone, so no published recipe has one"
    )
    api_key_env: KeyName = Field("OPENAI_API_KEY", description="variable that holds the endpoint's key")
    extra: dict[str, Any] = Field(
        {},
        description="further parameters of its server, sent with every critique as they are; `generation.extra` is not",
    )
    price: PriceConfig | None = Field(
        None, description="what its tokens cost, {input, output} in USD a million; null: not known"
    )

    @model_validator(mode="after")
    def _not_ours(self) -> CriticConfig:
        return _without_owned(self)


class GenerationConfig(Section):
    """How texts are drawn, in chains and (but for evaluation.temperature) in the evaluation."""

    temperature: float = Field(0.8, ge=0, le=5, description="of the softmax; 0: the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest tokens that have this probability")
    max_new_tokens: int = Field(128, ge=1, description="most tokens of one turn; a longer answer is cut, and not kept")
    max_thinking_tokens: int | None = Field(
        None,
        ge=1,
        description=(
            "room for the thought before each turn, in tokens beside max_new_tokens, of a model that thinks; null: "
            "thoughts count against max_new_tokens"
        ),
    )
    extra: dict[str, Any] = Field(
        {},
        description=(
            "further parameters of the base's server, sent with every request to it as they are (vLLM: top_k, min_p, "
            "repetition_penalty, chat_template_kwargs ...); a critic at another server has chain.critic.extra"
        ),
    )

    @model_validator(mode="after")
    def _not_ours(self) -> GenerationConfig:
        return _without_owned(self)

    @property
    def most_tokens(self) -> int:
        """Most tokens that one request may generate: the text, and a thought before it."""
        return self.max_new_tokens + (self.max_thinking_tokens or 0)

    @property
    def template_settings(self) -> dict[str, Any]:
        """The settings with which the server renders conversations; empty if there are none."""
        settings = self.extra.get(TEMPLATE_SETTINGS)
        return settings if isinstance(settings, dict) else {}


class ServingConfig(Section):
    """How the models are served. `endpoints` (local recipes and overrides only): servers that already run and have the
    model of the chains. The adapter, and with it the base of the comparison, is always served by dsc."""

    context: int = Field(2048, ge=128, description="tokens of prompt and answer together")
    concurrency: Annotated[int | Literal["auto"] | tuple[int | Literal["auto"], ...], auto_or(4096, several=True)] = (
        Field(
            "auto",
            description=(
                "requests in flight at each server; auto: it begins with 128 (short texts at vLLM and SGLang: 256) and"
                " doubles as long as that brings more tokens a second. A list: one for each of `endpoints`"
            ),
        )
    )
    replicas: Annotated[int | Literal["auto"], auto_or(1024)] = Field(
        "auto", description="vLLM servers on this machine; auto: one for each GPU, or group of GPUs, one on a CPU"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs that hold one replica together")
    start_timeout_s: float = Field(600, gt=0, description="seconds that a vLLM may take to start")
    request_timeout_s: float = Field(600, gt=0, description="seconds that one request may take before it is sent again")
    kv_cache_gib: float = Field(2, gt=0, description="CPU only: memory for the KV cache")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="GPU only: share of its memory for vLLM")
    endpoints: tuple[ServerAddress, ...] = Field(
        (), description="addresses (up to and including /v1) of servers that already run; none: dsc starts vLLM"
    )
    served_model: str | None = Field(
        None, description="name of the model at the endpoints; null: NAME of an api:NAME, or the only one there"
    )
    api_key_env: KeyName = Field("OPENAI_API_KEY", description="variable that holds the endpoints' key")
    price: PriceConfig | None = Field(
        None, description="what their tokens cost, {input, output} in USD a million; null: no cost is shown"
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="most requests a minute to each of `endpoints`, kept to; null: no limit is known"
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="most tokens a minute, read and written, of each of `endpoints`; null: as above"
    )

    @model_validator(mode="after")
    def _one_for_each(self) -> ServingConfig:
        if isinstance(self.concurrency, tuple) and (
            not self.concurrency or len(self.concurrency) != len(self.endpoints)
        ):
            raise ValueError(
                f"concurrency: {len(self.concurrency)} numbers for {len(self.endpoints)} endpoints; give one for "
                "each, or one for all"
            )
        return self
