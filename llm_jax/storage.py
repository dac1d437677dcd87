"""Small file operations: paths that may be in a bucket, whole-or-nothing writes, JSON, hashes, the user's cache
directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from llm_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

_BLOCK = 1 << 20
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # by which fsspec reads them
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def as_path(path: str | os.PathLike) -> Any:
    """`path` as a pathlib-like object, `~` expanded; addresses such as `gs://…` go through etils.epath."""
    if not is_local(path):
        from etils import epath  # not needed, and slow to import, for local paths

        return epath.Path(path)
    return pathlib.Path(os.path.expanduser(path))


def located(path: str | os.PathLike) -> epath.Path:
    """`path` as an epath.Path that means the same from every folder: absolute, `~` expanded; addresses as they are."""
    from etils import epath

    path = as_path(path)
    return epath.Path(path.absolute() if isinstance(path, pathlib.Path) else path)


def is_local(path: str | os.PathLike) -> bool:
    """Whether `path` is on a disk, not an address such as `gs://…`."""
    return "://" not in os.fspath(path)


def check_reachable(path: str | os.PathLike) -> None:
    """UserError if `path` is an address of a kind that nothing here can read, or whose package is not installed."""
    if is_local(path):
        return
    scheme = os.fspath(path).split("://")[0]
    if scheme not in _PACKAGES:
        raise UserError(f"{path}: addresses may begin with {', '.join(f'{name}://' for name in _PACKAGES)}, not with "
                        f"{scheme}://")
    import fsspec

    try:
        fsspec.get_filesystem_class("gcs" if scheme == "gs" else scheme)
    except ImportError as error:
        raise UserError(f"{path}: {scheme}:// needs the package {_PACKAGES[scheme]}: pip install "
                        f"{_PACKAGES[scheme]}") from error


def write_atomically(path: Any, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    if not is_local(path):
        path.write_bytes(content)  # an object appears when all of it is there
        return
    with _written_atomically(path) as file:
        file.write(content)


def copy_atomically(source: Any, path: Any) -> None:
    """Copies a file of any size in blocks, so that a reader sees the old content or the new, never a part."""
    with source.open("rb") as original, _written_atomically(path) as file:
        shutil.copyfileobj(original, file, _BLOCK)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that an atomic write had begun; it is complete nowhere."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def _written_atomically(path: Any) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            if is_local(path):
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def parse_object(content: bytes, where: Any, unique: bool = False) -> dict[str, Any]:
    """The JSON object in `content`.

    Args:
      content: of the file.
      where: what a message calls it.
      unique: whether to refuse a name that occurs twice, of which JSON says nothing and Python takes the last.

    Raises:
      UserError: it is no JSON, or no object.
    """
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: {twice!r} occurs twice")
        return found

    try:
        value = json.loads(content.decode(), object_pairs_hook=checked if unique else None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON, or was cut short: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value


def read_object(path: Any) -> dict[str, Any]:
    """The object in a JSON file, in which no name may occur twice; a UserError if there is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    return parse_object(content, path, unique=True)


def to_json(value: Any, sort: bool = False) -> bytes:
    """JSON for people to read: indented, any script as it is, keys in the order they have or in that of the alphabet.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort) + "\n").encode()


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
