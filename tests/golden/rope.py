"""transformers' own rotary frequencies and attention factors, for every kind of scaling."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_BASE = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 4096}
_FACTORS = {"short_factor": [1.0 + 0.02 * i for i in range(32)], "long_factor": [1.0 + 0.5 * i for i in range(32)],
            "original_max_position_embeddings": 4096}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# name -> (changes of the model, rope_parameters, sequence length or None)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "linear": ({}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, None),
    "dynamic_short": ({}, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 4000),
    "dynamic_at": ({}, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 4096),
    "dynamic_past": ({}, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 4097),
    "dynamic_far": ({}, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 131072),
    "yarn": ({"max_position_embeddings": 131072}, {
        "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}, None),
    "yarn_betas": ({}, {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 20.0,
                        "beta_slow": 2.0, "original_max_position_embeddings": 2048}, None),
    "yarn_untruncated": ({}, {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "truncate": False,
                              "original_max_position_embeddings": 4096}, None),
    "yarn_factor": ({}, {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "attention_factor": 0.75,
                         "original_max_position_embeddings": 4096}, None),
    "yarn_mscale": ({"max_position_embeddings": 163840}, {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 4096}, None),
    "yarn_mscale_alone": ({}, {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 0.7,
                               "original_max_position_embeddings": 4096}, None),
    "llama3": ({"max_position_embeddings": 131072, "head_dim": 128}, _LLAMA3, None),
    "llama3_small": ({"max_position_embeddings": 131072}, _LLAMA3 | {"factor": 32.0}, None),
    "longrope_short": ({"max_position_embeddings": 131072}, {
        "rope_type": "longrope", "rope_theta": 10000.0, **_FACTORS}, 4096),
    "longrope_long": ({"max_position_embeddings": 131072}, {
        "rope_type": "longrope", "rope_theta": 10000.0, **_FACTORS}, 4097),
    "longrope_unscaled": ({"max_position_embeddings": 4096}, {
        "rope_type": "longrope", "rope_theta": 10000.0, **_FACTORS}, 100),
    "longrope_factor": ({"max_position_embeddings": 131072}, {
        "rope_type": "longrope", "rope_theta": 10000.0, "attention_factor": 1.19, **_FACTORS}, 8000),
}


def make(path: pathlib.Path) -> None:
    """Writes NAME/inv_freq float32 [head_dim / 2] and NAME/attention_factor, and `cases`: JSON of name, the
    config.json of a Llama with it, and the sequence length."""
    arrays: dict[str, Any] = {}
    cases = []
    for name, (changes, parameters, length) in CASES.items():
        fields = _BASE | changes
        config = transformers.LlamaConfig(**fields, vocab_size=96, num_hidden_layers=1, intermediate_size=64,
                                          rope_parameters=dict(parameters))
        length_given = torch.tensor(length) if length is not None and parameters["rope_type"] == "dynamic" else length
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length_given)
        arrays[f"{name}/inv_freq"] = frequencies.to(torch.float32).numpy()
        arrays[f"{name}/attention_factor"] = np.float64(factor)
        written = {k: v for k, v in config.to_dict().items() if v is not None} | {"architectures": ["LlamaForCausalLM"]}
        cases.append({"name": name, "config": written, "length": length})
    arrays["cases"] = np.array(json.dumps(cases))
    new = path.with_name(".rope.new.npz")
    np.savez_compressed(new, **arrays)
    os.replace(new, path)
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size:,} bytes")
