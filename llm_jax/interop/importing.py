"""A Hugging Face checkpoint as a run directory, which evaluates, generates, serves and is trained further.

Tensors go from file to file one at a time, each as slices of our stacked leaves, so memory does not grow with the
model. The folder's small files are kept as they were under `huggingface/`, for the way back (`exporting`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping

from etils import epath

from llm_jax import runs, storage
from llm_jax.data.tokenizers import folder as tokenizer_folder
from llm_jax.errors import UserError
from llm_jax.inference import generation_config
from llm_jax.interop import families
from llm_jax.interop.huggingface import (
    CONFIG,
    GENERATION,
    config_beside,
    in_file_order,
    load_tokenizer,
    local,
    read_fields,
)
from llm_jax.interop.mapping import Path, to_ours
from llm_jax.interop.matching import Leaf, Match, describe, match, parameter_dtype, place
from llm_jax.interop.safetensors import Folder, Writer
from llm_jax.interop.slices import SliceWriter, chunk_shape
from llm_jax.models import ModelConfig
from llm_jax.parallel import rules as rules_lib
from llm_jax.parallel.mesh import MeshConfig

TENSORS, IGNORED = "tensors.json", "ignored.safetensors"
# Beside those that `data.tokenizers` knows: files of tokenizers in their older forms, which `transformers` reads.
_SMALL_FILES = (CONFIG, GENERATION, "added_tokens.json", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt")


def import_run(hf_dir: str | os.PathLike, run_dir: str | os.PathLike, mesh: MeshConfig | None = None,
               dtype: str | None = None, progress: bool = False) -> ModelConfig:
    """Makes a run directory of a checkpoint folder. It appears when it is complete; a failure leaves nothing behind.

    Args:
      hf_dir: the checkpoint folder.
      run_dir: what to make; must not be there yet, or be empty.
      mesh: the devices that will read it: each will find its share in chunks of its own. Any other mesh reads it too.
      dtype: of the parameters ("float32", "bfloat16", "float16"); None keeps what is stored.
      progress: whether to show a bar on stderr.

    Returns:
      The model's config.

    Raises:
      UserError: the folder is damaged or holds what this project does not know (nothing is written then), the target
        is taken, or the disk refuses.
    """
    source, target = local(hf_dir), local(run_dir)
    check_free(target, "the run directory")
    fields, kept = read_fields(source), parameter_dtype(dtype)
    with Folder(source) as folder:
        config = config_beside(folder, fields)
        tokenizer = load_tokenizer(source)
        generation_config.read(source)  # it is kept; what is wrong in it must be said now, not when the run is used
        if tokenizer is not None and tokenizer.text_vocab_size > config.vocab_size:
            raise UserError(f"{source}: the tokenizer makes ids up to {tokenizer.text_vocab_size - 1}, the model knows "
                            f"{config.vocab_size}")
        matched = match(folder, config, families.by_name(config.family), kept)
        chunks = _chunks(matched.leaves, mesh or MeshConfig())
        with appearing(target) as temporary:
            _keep_files(source, folder, matched, temporary)
            _write_params(folder, config, matched, chunks, temporary / runs.CHECKPOINTS, progress)
            imported = {"from": str(source), "architecture": fields["architectures"], "dtype": dtype or "as stored"}
            facts = {"imported": imported, "parameters": config.num_params(), "metrics": {}}
            runs.create(epath.Path(temporary), config, None, "# Imported: there is no configuration to replay.\n",
                        facts)
    return config


def check_free(target: pathlib.Path, what: str) -> None:
    """UserError if something is at `target` already; an empty folder is nothing."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{what} {target} is there already; choose another, or remove it")


@contextlib.contextmanager
def appearing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `target` to be filled, which takes that name at a clean end and is removed at any other."""
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        for _ in range(50):  # writes that were under way when an interrupt came may still make files
            shutil.rmtree(temporary, ignore_errors=True)
            if not temporary.exists():
                break
            time.sleep(0.1)


def _chunks(leaves: Mapping[Path, Leaf], mesh: MeshConfig) -> dict[Path, tuple[int, ...]]:
    """How each leaf is cut on disk; UserError if the mesh does not divide one."""
    sizes = dataclasses.asdict(mesh)
    if min(sizes.values()) < 1:
        raise UserError(f"an import's mesh must be told in numbers: {mesh}")
    chunks = {}
    for path, leaf in leaves.items():
        shard = list(leaf.shape)
        for axis, names in enumerate(rules_lib.partition_spec(leaf.axes)):
            for name in (names,) if isinstance(names, str) else names or ():
                if shard[axis] % sizes[name]:
                    raise UserError(f"{'/'.join(path)} {leaf.shape}: its axis {leaf.axes[axis]!r} can't be divided "
                                    f"among the {sizes[name]} devices of mesh axis {name}")
                shard[axis] //= sizes[name]
        chunks[path] = chunk_shape(leaf.shape, leaf.dtype.itemsize, leaf.unit, tuple(shard))
    return chunks


def _write_params(folder: Folder, config: ModelConfig, matched: Match, chunks: Mapping[Path, tuple[int, ...]],
                  checkpoints: pathlib.Path, progress: bool) -> None:
    from tqdm import tqdm

    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in matched.leaves.items()}
    total = sum(folder.tensors[name].nbytes for name in matched.tensors)
    with (SliceWriter(epath.Path(checkpoints), shapes, chunks, {"imported": True}) as writer,
          tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=not progress) as bar):
        for name, tensor in in_file_order(folder, matched.tensors):
            array = folder.read(name)
            for part in tensor.parts:
                writer.write(*place(part, config), to_ours(part, array))
            bar.update(array.nbytes)
            del array  # before the next one is read


def _keep_files(source: pathlib.Path, folder: Folder, matched: Match, run: pathlib.Path) -> None:
    """The originals under `huggingface/`, what tools read of them at the top."""
    kept = run / runs.ORIGIN
    names = dict.fromkeys((*_SMALL_FILES, *tokenizer_folder.names_in(source)))
    for name in names:
        if (source / name).is_file():
            content = (source / name).read_bytes()
            storage.write_atomically(kept / name, content)
            if name != CONFIG:
                storage.write_atomically(run / name, content)
    storage.write_atomically(kept / TENSORS, describe(folder, matched))
    if matched.ignored:
        infos = [(name, folder.tensors[name].dtype, folder.tensors[name].shape) for name in matched.ignored]
        with Writer(kept, infos, single=IGNORED) as writer:
            for name in matched.ignored:
                writer.write(name, folder.read(name))
