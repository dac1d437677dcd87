"""What a corpus is made of: the files below its roots, each with the source it is counted under."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import stat
import sysconfig
from collections.abc import Sequence

from llm_jax import storage
from llm_jax.data import fetching
from llm_jax.errors import UserError

PYTHON_STDLIB = "python-stdlib"

# Folders that hold no text a person wrote for this corpus: tool caches and installed packages.
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
# The sources alone: installed packages are not the standard library, and some systems ship it without its tests.
_STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"})
_MAX_EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One file to read.

    Attributes:
      path: where it is.
      name: its path below the corpus root, with forward slashes; names it in reports.
      source: what its documents are counted under: the first directory below the root, "." for files at the root.
      size: bytes on disk.
    """

    path: str
    name: str
    source: str
    size: int


class SkipReport:
    """Counts of what was left out, by reason, with a few examples of each."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: str = "", count: int = 1) -> None:
        """Counts `count` things left out for `reason`."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if example and len(examples) < _MAX_EXAMPLES and example not in examples:
            examples.append(example)

    def merge(self, other: SkipReport) -> None:
        """Adds the counts and examples of another report."""
        for reason, count in other.counts.items():
            self.add(reason, count=count)
            for example in other.examples[reason]:
                self.add(reason, example, count=0)

    def to_dict(self) -> dict[str, dict]:
        """`{reason: {"count": int, "examples": [str]}}`, the most frequent reasons first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {reason: {"count": count, "examples": self.examples[reason]} for reason, count in ordered if count}


def resolve(corpus: str | Sequence[str]) -> list[str]:
    """The corpus's parts as absolute paths (or `python-stdlib`, or addresses in a bucket), in the order given.

    Raises:
      UserError: there is no part, a path that does not exist, or an address that can't be read.
    """
    parts = [corpus] if isinstance(corpus, (str, os.PathLike)) else list(corpus)
    if not parts or not all(isinstance(part, (str, os.PathLike)) and os.fspath(part) for part in parts):
        raise UserError(f"CORPUS must be 'python-stdlib', a path or a list of these, not {corpus!r}")
    resolved = []
    for part in map(os.fspath, parts):
        if not storage.is_local(part):
            storage.check_reachable(part)
            part = part.rstrip("/")
        elif part != PYTHON_STDLIB:
            part = os.path.abspath(os.path.expanduser(part))
            if not os.path.exists(part):
                raise UserError(f"the corpus {part} does not exist; give the path of a file or a folder, "
                                f"or '{PYTHON_STDLIB}'")
        resolved.append(part)
    return resolved


def list_files(parts: Sequence[str], exclude: str = "") -> tuple[list[CorpusFile], SkipReport]:
    """The files of a corpus in an order that depends on their names alone.

    Args:
      parts: what `resolve` returned.
      exclude: a folder to pass over, such as the data directory itself when it lies in the corpus.

    Returns:
      The files, and a report of folders and files left out without being opened.

    Raises:
      UserError: a folder or file that may not be read, or can't be copied from a bucket.
    """
    files: list[CorpusFile] = []
    skipped = SkipReport()
    for part in parts:
        prefix = os.path.basename(part.rstrip(os.sep)) or part if len(parts) > 1 else ""
        if not storage.is_local(part):
            part = fetching.local_corpus(part)
        found = _list_stdlib(skipped) if part == PYTHON_STDLIB else _list_path(part, exclude, skipped)
        for path, name in found:
            size = _readable_size(path, name, skipped)
            if size is not None:
                name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # names need not be UTF-8
                below = name.split("/", 1)[0] if "/" in name else "."
                source = below if not prefix else prefix if below == "." else f"{prefix}/{below}"
                files.append(CorpusFile(path, f"{prefix}/{name}" if prefix else name, source, size))
    return files, skipped


def fingerprint(files: Sequence[CorpusFile]) -> str:
    """A hash of the files' names and sizes, by which a later run notices that the corpus has changed."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\n".encode())
    return digest.hexdigest()


def _list_stdlib(skipped: SkipReport) -> list[tuple[str, str]]:
    root = sysconfig.get_paths()["stdlib"]
    if not os.path.isdir(root):
        raise UserError(f"this Python's standard library is not a folder ({root}); give CORPUS a path instead")
    skip = _SKIPPED_FOLDERS | _STDLIB_SKIPPED_FOLDERS
    return [(path, name) for path, name in _walk(root, skip, skipped) if name.endswith(".py")]


def _list_path(part: str, exclude: str, skipped: SkipReport) -> list[tuple[str, str]]:
    if exclude and os.path.realpath(part) == os.path.realpath(exclude):
        raise UserError(f"the corpus {part} is the data directory itself; choose another DATA_DIR")
    if os.path.isdir(part):
        return _walk(part, _SKIPPED_FOLDERS, skipped, exclude)
    return [(part, os.path.basename(part))]


def _walk(root: str, skip: frozenset[str], skipped: SkipReport, exclude: str = "") -> list[tuple[str, str]]:
    found = []

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=fail):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        below = "" if below == "." else below + "/"
        kept = [name for name in subfolders if name not in skip and not name.startswith(".")
                and os.path.join(folder, name) != exclude]
        for name in sorted(set(subfolders) - set(kept)):
            skipped.add("hidden, cache or excluded folder", below + name + "/")
        subfolders[:] = kept
        found += [(os.path.join(folder, name), below + name) for name in names]
    return sorted(found, key=lambda item: item[1])


def _readable_size(path: str, name: str, skipped: SkipReport) -> int | None:
    """The size of a file worth opening, or None after counting why it is not."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        skipped.add("broken link", name)
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        skipped.add("not a regular file", name)
        return None
    if status.st_size == 0:
        skipped.add("empty file", name)
        return None
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read {path}: permission denied; make it readable or take it out of the corpus")
    return status.st_size
