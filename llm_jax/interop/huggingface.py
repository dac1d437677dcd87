"""Checkpoint folders of Hugging Face as a model in memory, and back.

    from llm_jax import hf

    model, params, config, tokenizer = hf.load("Qwen3-0.6B")
    logits_BTV = model.apply({"params": params}, tokens_BT)
    hf.save("out", params, config, tokenizer)

Nothing is unpickled, and no code of a checkpoint runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax import models, storage
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.tokenizers import folder as tokenizer_folder
from llm_jax.errors import UserError
from llm_jax.interop import families, sentencepiece_json
from llm_jax.interop.mapping import Part, to_ours, to_theirs
from llm_jax.interop.matching import match, parameter_dtype, place
from llm_jax.interop.placing import Placer
from llm_jax.interop.safetensors import NAMES, Folder, Writer, weight_files
from llm_jax.interop.slices import flat
from llm_jax.models import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
      UserError: there is none, or it says something that is not supported; names the key.
    """
    directory = local(directory)
    fields = read_fields(directory)
    if not any(directory.glob("*.safetensors")):
        return families.config_from_hf(fields, str(directory / CONFIG))
    with Folder(directory) as folder:
        return config_beside(folder, fields)


def read_fields(directory: pathlib.Path) -> dict[str, Any]:
    """What a folder's config.json says; UserError if there is none, or it is damaged."""
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{directory} is no checkpoint folder: it has no {CONFIG}")
    return storage.read_object(path)


def config_beside(folder: Folder, fields: dict[str, Any]) -> ModelConfig:
    """The model that `fields`, of the config.json beside the folder's tensors, describes."""
    path, count = folder.directory / CONFIG, len(folder.tensors)
    for key in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):  # before each layer gets names
        layers = fields.get(key)
        if isinstance(layers, int) and layers > count:
            raise UserError(f"{path}: {key}={layers} is more than the {count} tensors beside it")
    return families.config_from_hf(fields, str(path), folder.tensors)


def load(directory: str | os.PathLike, dtype: str | None = None,
         mesh: Mesh | None = None) -> tuple[Any, Any, ModelConfig, Tokenizer | None]:
    """Reads a checkpoint folder.

    Args:
      directory: with config.json, safetensors (one file, or several with an index) and a tokenizer, if it has one.
      dtype: of the parameters ("float32", "bfloat16", "float16"); None keeps what is stored.
      mesh: the devices over which the parameters are sharded; None puts them on the first.

    Returns:
      (model, params, config, tokenizer): the Flax module, the parameters in the stacked layout, what the model is, and
      None for the last where the folder has no tokenizer. The host holds one tensor at a time, as it is stored and,
      where that is transposed or of another dtype, as it is to be.

    Raises:
      UserError: the folder is damaged, or holds what this project does not know; nothing was put on a device.
    """
    directory = local(directory)
    fields, kept = read_fields(directory), parameter_dtype(dtype)
    with Folder(directory) as folder:
        config = config_beside(folder, fields)
        tokenizer = load_tokenizer(directory)
        matched = match(folder, config, families.by_name(config.family), kept)
        placer = Placer(matched.leaves, mesh)
        for name, tensor in in_file_order(folder, matched.tensors):
            array = folder.read(name)
            for part in tensor.parts:
                placer.put(*place(part, config), to_ours(part, array))
            del array  # before the next one is read
    return models.build(config), placer.finish(), config, tokenizer


def save(directory: str | os.PathLike, params: Any, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
    """Writes a folder that `transformers` loads.

    Everything is written into a hidden folder first and then takes its place, config.json last; until that is there
    the folder is no checkpoint.

    Args:
      directory: made if it is not there; weights, config.json and, if one is given, the tokenizer in it are replaced.
      params: stacked parameters, NumPy or JAX arrays; each tensor is written in the dtype of its leaf.
      config: the model.
      tokenizer: its files, chat template included, are written too.

    Raises:
      UserError: the parameters are not this model's, its family has no config.json for it, or the disk refuses.
    """
    directory = local(directory)
    fields = families.config_to_hf(config)
    leaves = flat(params)
    check_shapes(leaves, config, "params")
    tensors = families.by_name(config.family).tensors(config)

    def dtype_of(part: Part) -> np.dtype:
        dtype = np.dtype(leaves[place(part, config)[0]].dtype)
        if dtype not in NAMES:
            raise UserError(f"params/{'/'.join(place(part, config)[0])} is {dtype}, which safetensors does not have")
        return dtype

    def read(part: Part) -> np.ndarray:
        path, index = place(part, config)
        return np.asarray(leaves[path][index] if index else leaves[path])

    # The parts of a fused tensor come from several leaves, which may differ.
    dtypes = {t.name: np.dtype(functools.reduce(jnp.promote_types, map(dtype_of, t.parts))) for t in tensors}
    announced = [(t.name, NAMES[dtypes[t.name]], t.shape) for t in tensors]
    with _replacing(directory) as staged:
        with Writer(staged, announced) as writer:
            for tensor in tensors:
                writer.write(tensor.name, to_theirs(tensor, read).astype(dtypes[tensor.name], copy=False))
        write_sorted(staged / CONFIG, fields | dtype_field(dtypes.values()) | token_fields(tokenizer))
        if tokenizer is not None:
            tokenizer.save(staged)
            complete_tokenizer(tokenizer, staged, sentencepiece_json.is_lossless(tokenizer))


@contextlib.contextmanager
def _replacing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to be filled with a checkpoint, which takes the place of the one in `directory` at a clean end.

    The config.json there goes first and the new one comes last: at no time do weights lie under another's.
    """
    is_new = not directory.exists()
    staged = directory / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        staged.mkdir(parents=True)
        yield staged
        (directory / CONFIG).unlink(missing_ok=True)
        old = weight_files(directory)
        if tokenizer_folder.present(staged):
            old += [directory / name for name in tokenizer_folder.names_in(directory)]
        for path in old:
            path.unlink()
        for path in sorted(staged.rglob("*"), key=lambda path: path.name == CONFIG):
            if path.is_file():
                target = directory / path.relative_to(staged)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    except OSError as error:
        raise UserError(f"can't write to {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty, unless this failed
                directory.rmdir()


def load_tokenizer(directory: pathlib.Path) -> Tokenizer | None:
    """The tokenizer in a folder; None where there is none."""
    return Tokenizer.load(directory) if tokenizer_folder.present(directory) else None


def complete_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path, convert: bool) -> None:
    """Writes what a saved tokenizer brings no file for.

    Args:
      tokenizer: whose files lie in `directory`.
      directory: of the checkpoint.
      convert: whether a tokenizer.model without a tokenizer_config.json, which `transformers` would take for Llama's,
        gets a tokenizer.json beside it.

    Raises:
      UserError: it can't be converted, or the disk refuses.
    """
    if not (directory / GENERATION).exists():
        write_sorted(directory / GENERATION, token_fields(tokenizer))
    is_bare = tokenizer.files.name == tokenizer_folder.SENTENCEPIECE and not (
        directory / tokenizer_folder.CONFIG).exists()
    if convert and is_bare:
        for name, content in sentencepiece_json.files(tokenizer).items():
            write_sorted(directory / name, content)


def token_fields(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The keys of config.json that number the special tokens."""
    if tokenizer is None:
        return {}
    ends = list(tokenizer.end_ids)
    found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
             "pad_token_id": tokenizer.pad_id}
    return {name: value for name, value in found.items() if value is not None}


def dtype_field(dtypes: Any) -> dict[str, str]:
    """The key of config.json that says in which dtype the weights are: the one that most tensors have."""
    names = [str(np.dtype(dtype)) for dtype in dtypes]
    return {"dtype": max(sorted(set(names)), key=names.count)}


def check_shapes(leaves: Mapping[tuple[str, ...], Any], config: ModelConfig, where: str) -> None:
    """UserError that names the first leaf in which `leaves` differ from the stacked parameters of the model."""
    wanted = flat(models.abstract_params(models.build(config)))
    for path, leaf in wanted.items():
        if path not in leaves:
            raise UserError(f"{where} lacks {'/'.join(path)} of shape {leaf.shape}")
        if tuple(leaves[path].shape) != leaf.shape:
            raise UserError(f"{where}: {'/'.join(path)} has shape {tuple(leaves[path].shape)}, expected {leaf.shape}")
    if surplus := [path for path in leaves if path not in wanted]:
        raise UserError(f"{where}: {'/'.join(surplus[0])} is no parameter of this model")


def in_file_order(folder: Folder, tensors: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The tensors as they follow one another on disk."""
    return sorted(tensors.items(), key=lambda t: (folder.tensors[t[0]].file, folder.tensors[t[0]].offset))


def local(directory: str | os.PathLike) -> pathlib.Path:
    """`directory` as a path of this machine; a UserError for an address."""
    if "://" in os.fspath(directory):
        raise UserError(f"{directory}: checkpoints are read and written on local disks only; copy it there first")
    return pathlib.Path(os.path.abspath(os.path.expanduser(directory)))


def write_sorted(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file as `transformers` does, keys in alphabetical order."""
    try:
        storage.write_atomically(path, storage.to_json(value, sort=True))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
