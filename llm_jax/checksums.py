"""Checksums of a folder's files, kept in the folder, so that damage is found before anything is read from it.

`checksums.json` maps each file, by its path in the folder, to its size and SHA-256. A file in a bucket has its size
alone: the bucket keeps and checks a checksum of its own, and reading everything back would cost as much as writing it.
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
from collections.abc import Iterator
from typing import Any

from llm_jax import storage
from llm_jax.errors import UserError

NAME = "checksums.json"
_THREADS = 4  # hashing lets go of the interpreter's lock


def write(folder: Any, without: tuple[str, ...] = ()) -> None:
    """Writes `checksums.json` of what is in `folder` now, names in `without` left out; atomic, and on disk."""
    files = {name: path for name, path in _files(folder) if name not in without}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = dict(zip(files, pool.map(_sum, files.values()), strict=True))
    storage.write_atomically(folder / NAME, json.dumps({"files": sums}, indent=0, sort_keys=True).encode())


def exists(folder: Any) -> bool:
    """Whether `write` was completed for this folder."""
    return (folder / NAME).exists()


def damage(folder: Any, part: int = 0, parts: int = 1, below: str = "") -> str | None:
    """What is wrong with a folder, or None if every file is as it was; None too for a folder without checksums.

    Args:
      folder: what `write` was given.
      part, parts: look at every `parts`-th file only, from number `part` on: processes can share the reading.
      below: look at files whose path begins so only.

    Raises:
      UserError: the files can't be looked at, which says nothing of them (permissions, say).
    """
    if not exists(folder):
        return None
    try:
        wanted = json.loads((folder / NAME).read_bytes())["files"]
        names = sorted(name for name in wanted if name.startswith(below))[part::parts]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda name: _difference(folder / name, *wanted[name]), names)
            return next((f"{name} {difference}" for name, difference in zip(names, found, strict=True) if difference),
                        None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is no list of checksums"
    except OSError as error:
        if error.errno == errno.EIO:
            return f"the disk can't read it: {error}"
        raise UserError(f"can't look at the files of {folder}: {error.strerror or error}") from error


def _difference(path: Any, size: int, digest: str | None) -> str | None:
    try:
        found_size = path.stat().length if not storage.is_local(path) else os.stat(path).st_size
        if found_size != size:
            return f"has {found_size:,} bytes instead of {size:,}"
        if digest is not None and storage.sha256_of(path) != digest:
            return "is not what was written (its checksum differs)"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    return None


def _sum(path: Any) -> tuple[int, str | None]:
    if not storage.is_local(path):
        return path.stat().length, None
    return os.stat(path).st_size, storage.sha256_of(path)


def _files(folder: Any) -> Iterator[tuple[str, Any]]:
    """Path in the folder → path, of all files below it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from ((f"{path.name}/{name}", inner) for name, inner in _files(path))
        else:
            yield path.name, path
