"""Small file operations: paths that may be in a bucket, whole-or-nothing writes, hashes, the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import pathlib
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

_BLOCK = 1 << 20


def as_path(path: str | os.PathLike) -> Any:
    """`path` as a pathlib-like object, `~` expanded; addresses such as `gs://…` go through etils.epath."""
    if "://" in os.fspath(path):
        from etils import epath  # not needed, and slow to import, for local paths

        return epath.Path(path)
    return pathlib.Path(os.path.expanduser(path))


def located(path: str | os.PathLike) -> epath.Path:
    """`path` as an epath.Path that means the same from every folder: absolute, `~` expanded; addresses as they are."""
    from etils import epath

    path = as_path(path)
    return epath.Path(path.absolute() if isinstance(path, pathlib.Path) else path)


def write_atomically(path: Any, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        if isinstance(path, pathlib.Path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        else:
            temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a local file, in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> pathlib.Path:
    """This project's folder in the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "llm_jax"
