"""The safetensors format: tensors read one by one from a folder of files, and written one by one into such a folder.

A file is eight bytes with the header's length, the header (JSON: name → dtype, shape, first and last byte) and the
tensors' bytes. A checkpoint is one file, or several with an index that says which tensor lies in which. Everything a
header says is checked when a folder is opened; what the value bytes ought to be nothing in the format says.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in (
    ("BOOL", np.bool_), ("U8", np.uint8), ("I8", np.int8), ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    ("F8_E5M2", ml_dtypes.float8_e5m2), ("F8_E8M0", ml_dtypes.float8_e8m0fnu), ("I16", np.int16), ("U16", np.uint16),
    ("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("I32", np.int32), ("U32", np.uint32), ("F32", np.float32),
    ("I64", np.int64), ("U64", np.uint64), ("F64", np.float64), ("C64", np.complex64))}
NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_MOST_HEADER_BYTES = 100_000_000  # the reference reader's own bound
_CHECKPOINT_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB in a call


@dataclasses.dataclass(frozen=True)
class Info:
    """What a header says of a tensor.

    Attributes:
      dtype: as the format spells it, such as "BF16".
      shape: lengths of the axes; () for a scalar.
      file: where it lies.
      offset: of its first byte in that file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder which make up a checkpoint, or several, by their names."""
    return [path for path in directory.glob("model*.safetensors*") if re.fullmatch(_CHECKPOINT_FILES, path.name)]


class Folder:
    """The tensors of a checkpoint folder, of one file or of several with an index; only headers are read to open it.

    Attributes:
      tensors: name → `Info`, in the order of the index, else of the header.
    """

    def __init__(self, directory: str | os.PathLike):
        """Opens a folder, or a single .safetensors file.

        Raises:
          UserError: there is no checkpoint, a file is missing, cut off or damaged, or index and files disagree.
        """
        self.directory = pathlib.Path(os.path.expanduser(directory))
        self._descriptors: dict[pathlib.Path, int] = {}
        self.tensors = self._find()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor, or a range of its first axis, in memory of its own.

        Args:
          name: of the tensor.
          rows: entries of the first axis (step 1); None for all.

        Returns:
          An array of the stored dtype; bfloat16 and the eight-bit floats are those of `ml_dtypes`.

        Raises:
          UserError: the file can't be read, or became shorter since it was opened.
        """
        info = self.tensors[name]
        dtype, shape, offset = DTYPES[info.dtype], info.shape, info.offset
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            shape = (max(stop - start, 0), *shape[1:])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
        array = np.empty(shape, dtype)
        left = memoryview(array.reshape(-1).view(np.uint8))
        try:
            descriptor = self._open(info.file)
            while left:
                count = os.preadv(descriptor, [left[:_READ_BYTES]], offset)
                if count == 0:
                    raise UserError(f"{info.file} ends inside of tensor {name}: it was changed while it was read")
                left, offset = left[count:], offset + count
        except OSError as error:
            raise UserError(f"{info.file} can't be read: {error.strerror or error}") from error
        return array

    def close(self) -> None:
        """Closes the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: pathlib.Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def _find(self) -> dict[str, Info]:
        if self.directory.is_file():
            return read_header(self.directory)
        numbered = sorted(path.name for path in weight_files(self.directory) if path.name not in (SINGLE, INDEX))
        has_single, has_index = ((self.directory / name).exists() for name in (SINGLE, INDEX))
        if has_single and numbered:
            raise UserError(f"{self.directory} holds {SINGLE} and {listed(numbered, 2)}, two checkpoints, and nothing "
                            f"says which is the model: remove one of them")
        if has_index:  # which may be there for a single file too, and must then be right
            return self._read_index(self.directory / INDEX)
        if has_single:
            return read_header(self.directory / SINGLE)
        if not self.directory.is_dir():
            raise UserError(f"there is no folder {self.directory}")
        pickled = any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt*"))
        raise UserError(f"{self.directory} holds neither {SINGLE} nor {INDEX}" + (
            "; pickled weights are not read, since they can run code: save them as safetensors" if pickled else ""))

    def _read_index(self, path: pathlib.Path) -> dict[str, Info]:
        weight_map = storage.read_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", "..") or "\0" in file:
                raise UserError(f"{path} says that tensor {name} lies in {file!r}, which is no file name")
        found: dict[str, Info] = {}
        files = sorted(set(weight_map.values()))
        if SINGLE not in files and (self.directory / SINGLE).exists():
            raise UserError(f"{self.directory} holds {SINGLE}, and {path.name} says that the model lies in "
                            f"{listed(files, 2)}: remove the one that is not meant")
        missing = [file for file in files if not (self.directory / file).is_file()]
        if missing:
            raise UserError(f"{path} names {listed(missing)}, which {'is' if len(missing) == 1 else 'are'} not there: "
                            f"{len(missing)} of {len(files)} files missing")
        kinds = {re.sub(r"\d{5}(-of-\d{5})", r"*\1", glob.escape(file)) for file in files}
        beside = sorted(p.name for kind in kinds for p in self.directory.glob(kind) if p.name not in files)
        if beside:
            raise UserError(f"{self.directory} holds {listed(beside)}, of which {path.name} lists no tensor")
        for file in files:
            for name, info in read_header(self.directory / file).items():
                if name not in weight_map:
                    raise UserError(f"{info.file} holds tensor {name}, which {path.name} does not list")
                if weight_map[name] != file:
                    raise UserError(f"{info.file} holds tensor {name}, which {path.name} says lies in "
                                    f"{weight_map[name]}")
                found[name] = info
        if absent := [name for name in weight_map if name not in found]:
            raise UserError(f"{self.directory / weight_map[absent[0]]} lacks tensor {absent[0]}, which {path.name} "
                            f"says it holds ({len(absent)} such in all)")
        return {name: found[name] for name in weight_map}


def read_header(path: pathlib.Path) -> dict[str, Info]:
    """The tensors of one file, in the header's order.

    Raises:
      UserError: what the header says can't be, or does not fit the file; names the tensor.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
            if length > min(size - 8, _MOST_HEADER_BYTES):
                raise UserError(f"{path} is cut off or no safetensors file: it has {size} bytes" + (
                    f" and its header should have {length}" if len(first) == 8 else ""))
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    header = storage.parse_object(raw, f"{path}: its header", unique=True)
    header.pop("__metadata__", None)
    found = {name: _info(name, entry, path, 8 + length) for name, entry in header.items()}
    end, before = 8 + length, "the header"
    for name, info in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            kind = "overlaps" if info.offset < end else "leaves a gap after"
            raise UserError(f"{path}: tensor {name} {kind} {before}: its first byte is {info.offset}, not {end}")
        end, before = info.offset + info.nbytes, f"tensor {name}"
    if end != size:
        what = f"is cut off inside of {before}" if end > size else f"goes on after {before}, its last"
        raise UserError(f"{path} {what}: it should have {end} bytes and has {size}")
    return found


def _info(name: str, entry: Any, path: pathlib.Path, data_start: int) -> Info:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: tensor {name} lacks its dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name} has the unknown dtype {str(dtype)[:50]!r}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape) or len(shape) > 32:
        raise UserError(f"{path}: tensor {name} has the impossible shape {str(shape)[:100]}")
    if not _is_count(begin) or not _is_count(end):
        raise UserError(f"{path}: tensor {name} has impossible offsets, {str(entry['data_offsets'])[:100]}")
    info = Info(dtype, tuple(shape), path, data_start + begin)
    if end - begin != info.nbytes:
        raise UserError(f"{path}: tensor {name} of {dtype} {shape} takes {info.nbytes} bytes, its offsets span "
                        f"{end - begin}")
    return info


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Writer:
    """Writes a checkpoint folder of which all names, dtypes and shapes are known beforehand, in any order.

    Files have temporary names until `finish`; the index is the last to get its own. Files of other names stay, so the
    folder should hold no other checkpoint. The same tensors make the same bytes whatever the order in which they are
    written. As a context manager it finishes, or removes what it began if
    there was an exception.
    """

    def __init__(self, directory: str | os.PathLike, tensors: Iterable[tuple[str, str, tuple[int, ...]]], *,
                 shard_bytes: int = SHARD_BYTES, single: str | None = None):
        """Lays out the files and writes their headers.

        Args:
          directory: made if it is not there.
          tensors: (name, dtype as the format spells it, shape) of each; this order decides which shard takes which.
          shard_bytes: most bytes of a file's tensors, unless one alone has more.
          single: the name of the one file to write, however large; None for a checkpoint's own names.
        """
        self.directory = pathlib.Path(os.path.expanduser(directory))
        shards = [list(tensors)] if single else list(_shards(tensors, shard_bytes))
        count = len(shards)
        numbered = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = [single or SINGLE] if count == 1 else numbered
        self._index = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
        self._final = {self.directory / f".{name}.tmp": self.directory / name for name in names}
        self._places: dict[str, Info] = {}
        self._left: set[str] = set()
        self._descriptors: dict[pathlib.Path, int] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path, shard in zip(self._final, shards, strict=True):
                self._begin(path, shard)
        except OSError as error:
            self.abandon()
            raise UserError(f"can't write to {self.directory}: {error.strerror or error}") from error

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor; its dtype and shape must be those that were announced.

        Raises:
          UserError: the disk does not take it.
        """
        info = self._places[name]
        if array.dtype != DTYPES[info.dtype] or array.shape != info.shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, announced was {info.dtype} {info.shape}")
        left = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        offset = info.offset
        try:
            while left:
                count = os.pwrite(self._descriptors[info.file], left[:_READ_BYTES], offset)
                left, offset = left[count:], offset + count
        except OSError as error:
            raise UserError(f"can't write to {self._final[info.file]}: {error.strerror or error}") from error
        self._left.discard(name)

    def finish(self) -> None:
        """Gives the files their names; ValueError if a tensor was not written."""
        if self._left:
            raise ValueError(f"not written: {listed(sorted(self._left))}")
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            self._close()
            for temporary, final in self._final.items():
                temporary.replace(final)
            if len(self._final) > 1:
                total = sum(info.nbytes for info in self._places.values())
                content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._index.items()))}
                storage.write_atomically(self.directory / INDEX, storage.to_json(content))
        except OSError as error:
            raise UserError(f"can't write to {self.directory}: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Removes what was written."""
        self._close()
        for temporary in self._final:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abandon()
            return
        try:
            self.finish()
        except BaseException:
            self.abandon()
            raise

    def _begin(self, path: pathlib.Path, shard: list[tuple[str, str, tuple[int, ...]]]) -> None:
        """Writes one file's header; widest dtypes come first, so that every tensor is aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in sorted(shard, key=lambda tensor: -DTYPES[tensor[1]].itemsize):
            info = Info(dtype, tuple(shape), path, end)
            end += info.nbytes
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [info.offset, end]}
            self._places[name] = info
            if info.nbytes:
                self._left.add(name)
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        for name, _, _ in shard:
            self._places[name] = dataclasses.replace(self._places[name],
                                                     offset=self._places[name].offset + 8 + len(raw))
        self._descriptors[path] = descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(descriptor, struct.pack("<Q", len(raw)) + raw)
        os.ftruncate(descriptor, 8 + len(raw) + end)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _shards(tensors: Iterable[tuple[str, str, tuple[int, ...]]],
            most_bytes: int) -> Iterator[list[tuple[str, str, tuple[int, ...]]]]:
    """Cuts the tensors, in order, into files."""
    shard: list[tuple[str, str, tuple[int, ...]]] = []
    held = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if shard and held + nbytes > most_bytes:
            yield shard
            shard, held = [], 0
        shard.append((name, dtype, shape))
        held += nbytes
    yield shard
