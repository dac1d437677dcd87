"""What a data directory holds, and whether it still holds it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from llm_jax import storage
from llm_jax.data import fetching
from llm_jax.errors import UserError

FILE_NAME = "manifest.json"
FORMAT = 1
# Up to here every load hashes all files, in about a second; beyond, a file is hashed again when it has changed.
_ALWAYS_HASH_BYTES = 256 << 20


def load_manifest(data_dir: str | os.PathLike, verify: bool = True) -> dict:
    """Reads a data directory's manifest.

    Args:
      data_dir: what `prepare` wrote.
      verify: whether to check the files it lists (`verify_shards`).

    Raises:
      UserError: there is no manifest, it cannot be read, or a file is missing or damaged.
    """
    path = storage.as_path(data_dir) / FILE_NAME
    try:
        manifest = json.loads(path.read_bytes())
        listed = manifest["files"]
        known = manifest["format"]
    except FileNotFoundError as error:
        raise UserError(f"{data_dir} holds no prepared data (no {FILE_NAME}); run experiments/prepare.py with "
                        f"--gin.DATA_DIR=\"'{data_dir}'\"") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; {_again(data_dir)}") from error
    if known != FORMAT or not isinstance(listed, dict):
        raise UserError(f"{path} is of format {known}, and this version reads format {FORMAT}; {_again(data_dir)}")
    if verify:
        verify_shards(data_dir, manifest)
    return manifest


def verify_shards(data_dir: str | os.PathLike, manifest: dict) -> None:
    """Checks that every file the manifest lists is there, has its size and has its SHA-256.

    Directories of at most 256 MiB are hashed each time. For larger ones, what was hashed is remembered in the user's
    cache directory by path, size, inode and times of change, and only files that differ from that are hashed again.

    Raises:
      UserError: naming the first file that is missing, truncated or altered.
    """
    folder = fetching.local_folder(data_dir)
    total = 0
    stamps = {}
    for name, facts in manifest["files"].items():
        try:
            status = os.stat(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} is missing; {_again(data_dir)}") from error
        if status.st_size != facts["size"]:
            raise UserError(f"{folder / name} has {status.st_size} bytes where the manifest says {facts['size']}: "
                            f"it is truncated or altered; {_again(data_dir)}")
        total += status.st_size
        stamps[name] = [facts["sha256"], status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    remembered = _Remembered(folder) if total > _ALWAYS_HASH_BYTES else None
    known = remembered.load() if remembered else {}
    for name, facts in manifest["files"].items():
        if known.get(name) != stamps[name]:
            try:
                found = storage.sha256_of(folder / name)
            except OSError as error:
                raise UserError(f"cannot read {folder / name}: {error.strerror}") from error
            if found != facts["sha256"]:
                raise UserError(f"{folder / name} is damaged: its SHA-256 is {found[:12]}… where the manifest says "
                                f"{facts['sha256'][:12]}…; {_again(data_dir)}")
    if remembered and known != stamps:
        remembered.save(stamps)


def data_hash(files: dict[str, dict]) -> str:
    """One hash for all of a data directory: of its files' names and SHA-256s, in order of name."""
    lines = "".join(f"{name} {facts['sha256']}\n" for name, facts in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _again(data_dir: str | os.PathLike) -> str:
    return f"prepare {data_dir} again with --gin.FORCE=True"


class _Remembered:
    """Stamps of files that were hashed and found right, kept in the user's cache directory."""

    def __init__(self, folder: pathlib.Path) -> None:
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        self._path = storage.cache_dir() / "verified" / f"{name}.json"

    def load(self) -> dict:
        try:
            stamps = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return stamps if isinstance(stamps, dict) else {}

    def save(self, stamps: dict) -> None:
        try:
            storage.write_atomically(self._path, json.dumps(stamps).encode())
        except OSError:
            pass  # a cache directory that cannot be written costs time, not correctness
