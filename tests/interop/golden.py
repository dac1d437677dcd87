"""The files of tests/golden: what there is, and each checkpoint loaded once."""

from __future__ import annotations

import functools
import pathlib

import numpy as np

from llm_jax import hf

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
# Each family of decoders and the folder that stands for it; two have another.
FAMILIES = {"llama": "llama2", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
            "gemma3": "gemma3", "phi3": "phi3", "gpt2": "gpt2", "glm4": "glm4", "mixtral": "mixtral",
            "qwen3_moe": "qwen3_moe", "deepseek_v3": "deepseek_v3"}
DECODERS = (*FAMILIES.values(), "llama3", "phi3_longrope")
HEADS = ("llama_sequence", "llama_tokens", "bert_sequence", "bert_regression", "bert_tokens")
FOLDERS = (*DECODERS, *HEADS, "llama_rope", "bert", "bert_hub", "t5", "flan_t5")
# (folder, another config over its weights)
VARIANTS = [("llama_rope", kind) for kind in ("linear", "dynamic", "yarn", "yarn_untruncated", "longrope")] + [
    ("qwen2", "sliding")]


def reference(folder: str, kind: str = "reference") -> dict[str, np.ndarray]:
    """What transformers computed; tests/golden/README.md says what there is."""
    with np.load(GOLDEN / folder / f"{kind}.npz") as file:
        return dict(file)


@functools.cache
def loaded(folder: str):
    """(model, params, config) of a folder."""
    model, params, config, tokenizer = hf.load(GOLDEN / folder)
    assert tokenizer is None
    return model, params, config
