"""The parts of git that the Hub uses: object ids, LFS pointers, .gitattributes and .gitignore patterns.

The common patterns match as in git (`*.bin`, `data/*.json`, `build/`); `**` and details of brackets are not reproduced.
"""

from __future__ import annotations

import fnmatch
import hashlib

LFS_SIZE_LIMIT = 10_000_000  # bytes; the Hub accepts larger files only through LFS

_LFS_ENDINGS = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib lfs.* mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth "
    "rar safetensors tar tflite tgz wasm xz zip zst"
)
DEFAULT_GITATTRIBUTES = "".join(f"*.{e} filter=lfs diff=lfs merge=lfs -text\n" for e in _LFS_ENDINGS.split()).encode()


def blob_oid(data: bytes) -> str:
    """Return git's blob id for this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Return the pointer file that stands for a large file in the tree."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_patterns(gitattributes: bytes) -> list[str]:
    """Return the patterns in a .gitattributes file that assign a path to LFS."""
    lines = (line.split() for line in gitattributes.decode("utf-8", "replace").splitlines())
    return [words[0] for words in lines if "filter=lfs" in words[1:]]


def wants_lfs(patterns: list[str], path: str, size: int, sample: bytes) -> bool:
    """Return whether a file is stored by LFS: by its name, its size, or because its first bytes are not text.

    Empty files never are: the clients refuse to upload zero bytes through LFS.
    """
    if size == 0:
        return False
    return size > LFS_SIZE_LIMIT or b"\0" in sample or any(matches(p, path) for p in patterns)


def ignored(gitignore: str, path: str) -> bool:
    """Return whether a .gitignore excludes this path; the last matching line decides."""
    verdict = False
    for line in map(str.strip, gitignore.splitlines()):
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        folders = path.split("/")[:-1]
        if pattern.endswith("/"):
            is_match = f"/{pattern.lstrip('/')}" in f"/{path}"
        else:
            is_match = matches(pattern, path) or any(matches(pattern, folder) for folder in folders)
        if is_match:
            verdict = not line.startswith("!")
    return verdict


def matches(pattern: str, path: str) -> bool:
    """Return whether a pattern matches: without a slash it applies to the file name, otherwise to the whole path."""
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)
    return fnmatch.fnmatchcase(path, pattern.lstrip("/").replace("**/", "*"))
