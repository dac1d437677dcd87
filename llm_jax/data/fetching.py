"""Prepared data in a bucket: read from a copy on this machine, since shards are read at random places.

The copy lies in the user's cache directory (`$XDG_CACHE_HOME/llm_jax/data`), is made once, by one of the processes of a
machine, and is checked by the manifest's SHA-256s like any other data directory. It is as large as the data; what does
not fit is better mounted (gcsfuse, mount-s3), and then is a path like any other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from llm_jax import storage
from llm_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: processes may copy the same file twice, each whole
    fcntl = None  # type: ignore[assignment]

_MANIFEST = "manifest.json"


def local_folder(data_dir: str | os.PathLike) -> pathlib.Path:
    """A folder on this machine with the files of a data directory: itself, or for an address the copy of it.

    Raises:
      UserError: a file that the manifest lists is not there, or can't be copied.
    """
    path = storage.as_path(data_dir)
    if storage.is_local(path):
        return pathlib.Path(os.path.abspath(path))
    content = (path / _MANIFEST).read_bytes()  # which is read each time: the data may have been prepared again
    return _copied(path, content)


@functools.lru_cache(maxsize=8)
def _copied(source: Any, manifest: bytes) -> pathlib.Path:
    name = hashlib.sha256(os.fsencode(source) + b"\0" + manifest).hexdigest()[:32]
    folder = storage.cache_dir() / "data" / name
    files = json.loads(manifest)["files"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            missing = [file for file, facts in files.items() if not _has_size(folder / file, facts["size"])]
            total = sum(files[file]["size"] for file in missing)
            if missing:
                print(f"copying {source} to {folder} ({total / 1e6:,.1f} MB)", file=sys.stderr, flush=True)
            for file in missing:
                storage.copy_atomically(source / file, folder / file)
            if not (folder / _MANIFEST).exists():
                storage.write_atomically(folder / _MANIFEST, manifest)
    except OSError as error:
        raise UserError(f"can't copy {source} to {folder}: {error.strerror or error}; set XDG_CACHE_HOME to a disk "
                        "with room, or mount the bucket") from error
    return folder


def _has_size(path: pathlib.Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other process of this machine is in here."""
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
