"""What lies in a bucket is read from a copy on this machine: prepared data, since shards are read at random places, and
corpora, since their files are read in parts by several processes.

Copies lie in the user's cache directory (`$XDG_CACHE_HOME/llm_jax/data` and `…/corpora`) and are made once, by one of
the processes of a machine; prepared data are then checked by the manifest's SHA-256s like any other data directory. A
copy is as large as what it is of; what does not fit is better mounted (gcsfuse, mount-s3), and then is a path like any
other.
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
    with _copying(source, folder):
        missing = [file for file, facts in files.items() if not _has_size(folder / file, facts["size"])]
        _announce(source, folder, sum(files[file]["size"] for file in missing))
        for file in missing:
            storage.copy_atomically(source / file, folder / file)
        if not (folder / _MANIFEST).exists():
            storage.write_atomically(folder / _MANIFEST, manifest)
    return folder


def local_corpus(address: str) -> str:
    """The path of a copy on this machine of a file or folder of texts in a bucket; another one when names, sizes or
    what the bucket says of contents have changed.

    Raises:
      UserError: there is nothing, or it can't be copied.
    """
    import fsspec

    scheme, source = address.split("://")[0], storage.as_path(address)
    system = fsspec.filesystem("gcs" if scheme == "gs" else scheme)
    root = system._strip_protocol(address)
    digest, found = hashlib.sha256(os.fsencode(address)), {}
    try:
        for name, facts in sorted(system.find(root, detail=True, refresh=True).items()):
            below = name[len(root):].strip("/")
            if facts["type"] != "file" or ".." in below.split("/"):
                continue
            found[below] = facts["size"]
            version = [str(facts.get(key)) for key in ("size", "etag", "ETag", "md5Hash", "mtime", "created")]
            digest.update("\0".join([below, *version, ""]).encode())
    except OSError as error:
        raise UserError(f"can't list the corpus {address}: {error.strerror or error}") from error
    if not found:
        raise UserError(f"the corpus {address} does not exist, or holds no file")
    folder = storage.cache_dir() / "corpora" / digest.hexdigest()[:32]
    copy = folder / root.rsplit("/", 1)[-1]
    with _copying(address, folder):
        missing = [below for below, size in found.items() if not _has_size(copy / below, size)]
        _announce(address, folder, sum(found[below] for below in missing))
        for below in missing:
            storage.copy_atomically(source / below if below else source, copy / below)
    return str(copy)


@contextlib.contextmanager
def _copying(source: Any, folder: pathlib.Path) -> Iterator[None]:
    """Alone in `folder`, which is made; UserError for what a disk or a bucket refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            yield
    except OSError as error:
        raise UserError(f"can't copy {source} to {folder}: {error.strerror or error}; set XDG_CACHE_HOME to a disk "
                        "with room, or mount the bucket") from error


def _announce(source: Any, folder: pathlib.Path, num_bytes: int) -> None:
    if num_bytes:
        print(f"copying {source} to {folder} ({num_bytes / 1e6:,.1f} MB)", file=sys.stderr, flush=True)


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
