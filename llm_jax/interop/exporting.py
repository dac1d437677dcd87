"""A run directory as a Hugging Face checkpoint, tensor by tensor.

An imported run that was not trained gives back every tensor, dtype, shape and byte, and its config.json as it was. One
that was trained from it has the same names and dtypes. Of a run that was born here everything is written anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib

import numpy as np

from llm_jax import runs, storage
from llm_jax.data.tokenizers import folder as tokenizer_folder
from llm_jax.errors import UserError
from llm_jax.interop import families
from llm_jax.interop.huggingface import (
    CONFIG,
    check_shapes,
    complete_tokenizer,
    dtype_field,
    load_tokenizer,
    local,
    token_fields,
)
from llm_jax.interop.importing import IGNORED, TENSORS, appearing, check_free
from llm_jax.interop.mapping import Tensor, to_ours
from llm_jax.interop.matching import parameter_dtype, place
from llm_jax.interop.safetensors import DTYPES, NAMES, SHARD_BYTES, Folder, Writer
from llm_jax.interop.slices import SliceReader
from llm_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class _Output:
    """A tensor to write: one of the model's, or (`tensor` None) one that an import kept."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: Tensor | None


def export_run(run_dir: str | os.PathLike, hf_dir: str | os.PathLike, dtype: str | None = None, step: int | None = None,
               progress: bool = False, shard_bytes: int = SHARD_BYTES) -> str:
    """Makes a checkpoint folder of a run. It appears when it is complete; a failure leaves nothing behind.

    Args:
      run_dir: the run directory, which may be read-only.
      hf_dir: what to make; must not be there yet, or be empty.
      dtype: of the weights ("float32", "bfloat16", "float16"); None takes those of the checkpoint that was imported,
        and float32 if there was none.
      step: of the run's checkpoint; None for the latest.
      progress: whether to show a bar on stderr.
      shard_bytes: most bytes of a file.

    Returns:
      One line on what was written.

    Raises:
      UserError: it is no run directory, or damaged; its family cannot express what it is; the target is taken, or the
        disk refuses.
    """
    source, target = local(run_dir), local(hf_dir)
    check_free(target, "the folder")
    chosen = parameter_dtype(dtype)
    run = runs.load(source)
    origin = source / runs.ORIGIN
    config_bytes = _config_json(origin, run.config, None if chosen is None else NAMES[chosen], source)
    with contextlib.ExitStack() as stack:
        ignored = stack.enter_context(Folder(origin / IGNORED)) if (origin / IGNORED).exists() else None
        outputs = _outputs(run.config, origin, ignored, None if chosen is None else NAMES[chosen])
        reader = SliceReader(run.directory / runs.CHECKPOINTS, step)
        check_shapes(reader.shapes, run.config, f"checkpoint {source / runs.CHECKPOINTS / str(reader.step)}")
        temporary = stack.enter_context(appearing(target))
        _write_tensors(outputs, run.config, reader, ignored, temporary, progress, shard_bytes)
        storage.write_atomically(temporary / CONFIG, config_bytes)
        _write_tokenizer(source, origin, temporary)
    total = sum(int(np.prod(o.shape, dtype=np.int64)) * DTYPES[o.dtype].itemsize for o in outputs)
    return (f"{target}: {run.config.family}, {len(outputs)} tensors, "
            f"{total / 1e9:,.2f} GB, of step {reader.step}")


def _outputs(config: ModelConfig, origin: pathlib.Path, ignored: Folder | None, dtype: str | None) -> list[_Output]:
    """What to write, in order: what was imported first, as it was called."""
    tensors = {tensor.name: tensor for tensor in families.by_name(config.family).tensors(config)}
    outputs, done = [], set()
    if (origin / TENSORS).exists():
        described = storage.read_object(origin / TENSORS)
        try:
            canonical, tied = described["canonical"], described["tied"]
            for name, facts in described["tensors"].items():
                plain = canonical.get(tied.get(name, name))
                if plain in tensors:
                    outputs.append(_Output(name, dtype or facts["dtype"], tensors[plain].shape, tensors[plain]))
                    done.add(plain)
                elif name in described["ignored"] and ignored is not None:
                    info = ignored.tensors[name]
                    outputs.append(_Output(name, info.dtype, info.shape, None))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{origin / TENSORS} is damaged: {error!r}") from error
    outputs += [_Output(name, dtype or "F32", tensor.shape, tensor) for name, tensor in tensors.items()
                if name not in done]
    return outputs


def _write_tensors(outputs: list[_Output], config: ModelConfig, reader: SliceReader, ignored: Folder | None,
                   directory: pathlib.Path, progress: bool, shard_bytes: int) -> None:
    from tqdm import tqdm

    announced = [(output.name, output.dtype, output.shape) for output in outputs]
    with (Writer(directory, announced, shard_bytes=shard_bytes) as writer,
          tqdm(total=len(outputs), unit="tensor", desc="export", disable=not progress) as bar):
        for output in outputs:
            if output.tensor is None:
                array = ignored.read(output.name)
            else:
                array = np.empty(output.shape, DTYPES[output.dtype])
                for part in output.tensor.parts:
                    ours = to_ours(part, array)
                    if not np.may_share_memory(ours, array) and array.size:
                        raise ValueError(f"{output.name}: {part} is no view")
                    reader.read_into(*place(part, config), ours)
            writer.write(output.name, array)
            bar.update()
            del array


def _config_json(origin: pathlib.Path, config: ModelConfig, dtype: str | None, source: pathlib.Path) -> bytes:
    """The original file if it still says what the model is, else a new one."""
    named = None if dtype is None else dtype_field([DTYPES[dtype]])
    path, tensors = origin / CONFIG, origin / TENSORS
    held = storage.read_object(tensors).get("tensors") if tensors.exists() else None
    if path.exists() and families.config_from_hf(fields := storage.read_object(path), str(path), held) == config:
        if named is None:
            return path.read_bytes()
        key = "torch_dtype" if "torch_dtype" in fields else "dtype"
        fields[key] = named["dtype"]
    else:
        fields = families.config_to_hf(config) | (named or {"dtype": "float32"}) | token_fields(load_tokenizer(source))
    return storage.to_json(fields)


def _write_tokenizer(source: pathlib.Path, origin: pathlib.Path, directory: pathlib.Path) -> None:
    """The files of the tokenizer and generation_config.json: those that were imported, and the run's over them."""
    if origin.is_dir():
        for path in sorted(origin.iterdir()):
            if path.is_file() and path.name not in (CONFIG, TENSORS, IGNORED):
                storage.write_atomically(directory / path.name, path.read_bytes())
    for name in tokenizer_folder.names_in(source):
        storage.write_atomically(directory / name, (source / name).read_bytes())
    tokenizer = load_tokenizer(source)
    if tokenizer is not None:
        complete_tokenizer(tokenizer, directory, convert=not origin.is_dir())
