"""What the Hub takes over from git: object ids, LFS pointers, .gitattributes and .gitignore patterns.

Patterns are matched as git matches the common ones (`*.bin`, `data/*.json`, `build/`); `**` and bracket subtleties are
not reproduced.
"""

from __future__ import annotations

import fnmatch
import hashlib

LFS_SIZE_LIMIT = 10_000_000  # bytes; the Hub takes larger files only through LFS

_LFS_ENDINGS = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib lfs.* mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth "
    "rar safetensors tar tflite tgz wasm xz zip zst"
)
DEFAULT_GITATTRIBUTES = "".join(f"*.{e} filter=lfs diff=lfs merge=lfs -text\n" for e in _LFS_ENDINGS.split()).encode()


def blob_oid(data: bytes) -> str:
    """The id git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The small text that stands for a large file in the tree."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_patterns(gitattributes: bytes) -> list[str]:
    """The patterns of a .gitattributes file that send a path to LFS."""
    lines = (line.split() for line in gitattributes.decode("utf-8", "replace").splitlines())
    return [words[0] for words in lines if "filter=lfs" in words[1:]]


def wants_lfs(patterns: list[str], path: str, size: int, sample: bytes) -> bool:
    """Whether a file is kept by LFS: by its name, its size, or because its first bytes are not text.

    Empty files never are: the clients refuse to upload zero bytes through LFS.
    """
    if size == 0:
        return False
    return size > LFS_SIZE_LIMIT or b"\0" in sample or any(matches(p, path) for p in patterns)


def ignored(gitignore: str, path: str) -> bool:
    """Whether a .gitignore leaves this path out; the last line that speaks about it decides."""
    verdict = False
    for line in map(str.strip, gitignore.splitlines()):
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        folders = path.split("/")[:-1]
        if pattern.endswith("/"):
            hit = f"/{pattern.lstrip('/')}" in f"/{path}"
        else:
            hit = matches(pattern, path) or any(matches(pattern, folder) for folder in folders)
        if hit:
            verdict = not line.startswith("!")
    return verdict


def matches(pattern: str, path: str) -> bool:
    """A pattern without a slash is about the file's name, any other about the whole path."""
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)
    return fnmatch.fnmatchcase(path, pattern.lstrip("/").replace("**/", "*"))
