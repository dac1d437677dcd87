"""Small checkpoint folders, made by hand for the tests of import and export."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_jax.interop import families
from llm_jax.interop.safetensors import DTYPES, NAMES, Folder, Writer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2}


def tensors_of(fields: Mapping[str, Any], dtype: str = "BF16", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint with that config.json."""
    rng = np.random.default_rng(seed)
    config = families.config_from_hf(fields)
    return {tensor.name: (rng.normal(size=tensor.shape) * 0.1).astype(DTYPES[dtype])
            for tensor in families.by_name(config.family).tensors(config)}


def write(directory: pathlib.Path, tensors: Mapping[str, np.ndarray], **options: Any) -> None:
    """The tensors as safetensors."""
    with Writer(directory, [(n, NAMES[a.dtype], a.shape) for n, a in tensors.items()], **options) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def make(directory: pathlib.Path, fields: Mapping[str, Any] = LLAMA,
         change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None, **options: Any) -> pathlib.Path:
    """A folder with that config.json and random bfloat16 tensors, to which `change` may do something."""
    tensors = tensors_of(fields)
    change(tensors)
    write(directory, tensors, **options)
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def read_all(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Name → values of every tensor."""
    with Folder(directory) as folder:
        return {name: folder.read(name) for name in folder.tensors}


def contents(directory: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → dtype, shape and bytes of every tensor."""
    with Folder(directory) as folder:
        return {name: (info.dtype, info.shape, folder.read(name).tobytes()) for name, info in folder.tensors.items()}
