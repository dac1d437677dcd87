"""What a folder of golden files is made from, and its random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Gains:
    """Sizes of random weights, such that attention is peaked and logits spread over several units.

    Attributes:
      qk: standard deviation of queries' and keys' entries for inputs of unit mean square.
      qk_norm: mean scale of the norms of queries and keys.
      embed: standard deviation of the embedding.
      norm_offset: whether norms multiply by 1 + scale.
    """

    qk: float = 1.6
    qk_norm: float = 1.0
    embed: float = 0.7
    norm_offset: bool = False


@dataclasses.dataclass(frozen=True)
class Spec:
    """One folder.

    Attributes:
      config: makes the transformers configuration.
      seed: of weights and tokens.
      dtype: of the weights on disk.
      model: the transformers class; None is the causal language model of the configuration.
      kind: which references are made: "decoder", "bert", "sequence" or "tokens" (task heads), "t5".
      gains: sizes of the weights.
      old: keys of config_v4.json that differ from config.json, as checkpoints of transformers 4 have them; None makes
        no such file.
      old_drops: keys which such checkpoints do not have.
      generation: generation_config.json, where there is one.
      hub: which rewriting of names makes the file as it is on the hub (`make.HUB`).
      variants: name -> keys changed in config.json, each with references of its own over the same weights.
      long_row: tokens of one row past the threshold of a rope scaling; 0 for none.
      greedy: tokens of the greedy continuation.
      lengths: tokens of each row; a decoder has a packed row as well, unless there is only one row.
    """

    config: Callable[[], Any]
    seed: int
    dtype: str = "float32"
    model: str | None = None
    kind: str = "decoder"
    gains: Gains = Gains()
    old: dict[str, Any] | None = None
    old_drops: tuple[str, ...] = ()
    generation: dict[str, Any] | None = None
    hub: str | None = None
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    long_row: int = 0
    greedy: int = 12
    lengths: tuple[int, ...] = (28, 25, 13)


def _is_norm(name: str) -> bool:
    return any(word in name.lower() for word in ("norm", "ln_", ".ln"))


def randomize(model: torch.nn.Module, gains: Gains, seed: int) -> None:
    """Overwrites every parameter and correction bias; the same numbers for the same seed and shapes."""
    rng = np.random.default_rng(seed)
    tensors = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if name.endswith("correction_bias")}
    for name in sorted(tensors):
        t = tensors[name]
        noise = rng.standard_normal(tuple(t.shape))
        last = name.rsplit(".", 1)[-1]
        conv = name.rsplit(".", 2)[-2] in ("c_attn", "c_proj", "c_fc")  # GPT-2's, stored [in, out]
        fan_in = t.shape[0] if conv else t.shape[-1]
        if last.endswith("correction_bias"):
            value = 0.3 * noise
        elif t.ndim == 1 and _is_norm(name) and last == "weight":
            mean = gains.qk_norm if any(w in name for w in ("q_norm", "k_norm")) else 1.0
            value = mean + 0.2 * noise - (1.0 if gains.norm_offset else 0.0)
        elif t.ndim == 1:
            value = 0.3 * noise
        elif "relative_attention_bias" in name:
            value = 1.0 * noise
        elif "embed_tokens" in name or name in ("shared.weight", "transformer.wte.weight") or "word_embeddings" in name:
            value = gains.embed * noise
        elif "position_embeddings" in name or "wpe" in name or "token_type_embeddings" in name:
            value = 0.5 * noise
        elif "lm_head" in name or "score." in name or "classifier" in name or "seq_relationship" in name:
            value = 3.0 * noise / np.sqrt(fan_in)
        elif any(w in name for w in (".q.", ".k.", "q_proj", "k_proj", "qkv", "c_attn", "query", "key", "q_b", "kv_b")):
            value = gains.qk * noise / np.sqrt(fan_in)
        elif name.endswith("gate.weight"):  # a router
            value = 2.0 * noise / np.sqrt(fan_in)
        else:
            value = 1.3 * noise / np.sqrt(fan_in)
        with torch.no_grad():
            t.copy_(torch.from_numpy(value.astype(np.float32)))
