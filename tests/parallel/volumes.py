"""How many bytes each kind of collective takes in one train step, by arithmetic from the model's shapes.

What counts is the whole array on one device (`analysis.hlo.Collective.num_bytes`), in float32 (or int32), of ROWS rows
of LENGTH tokens. Norms and routers are replicated along every axis but `pipeline`.
"""

from __future__ import annotations

import math

import jax

from llm_jax import models
from llm_jax.models import ModelConfig
from tests.parallel.cases import MIXTURE
from tests.training.common import LENGTH, MODEL, ROWS

BYTES, TOKENS = 4, ROWS * LENGTH
L, D = MODEL.num_layers, MODEL.embed_dim
KEYS_AND_VALUES = 2 * TOKENS * MODEL.num_kv_heads * MODEL.head_dim  # numbers of a layer


def parameters(config: ModelConfig, without: tuple[str, ...] = ()) -> int:
    """Numbers in the parameters whose path has none of these names in it."""
    leaves = jax.tree_util.tree_leaves_with_path(models.abstract_params(models.Decoder(config)))
    return sum(math.prod(leaf.shape) for path, leaf in leaves if not {key.key for key in path} & set(without))


_ALL = parameters(MODEL)
_NORMS = _ALL - parameters(MODEL, ("scale",))
_EMBEDDING = MODEL.vocab_size * D
_LAYERS = _ALL - _NORMS - 2 * _EMBEDDING
_DEVICES = 4

# case → kind → numbers (of 4 bytes), for the cases of `cases.AXES` with one axis.
NUMBERS: dict[str, dict[str, float]] = {
    # Every gradient is added up.
    "data": {"all-reduce": _ALL},
    # Layers are gathered for the forward and the backward pass, the output projection once for both, and token ids for
    # the look-up, whose vectors (each device's share of the width, for all tokens of its group) are exchanged and whose
    # gradients are exchanged back. The other gradients are added up: XLA's CPU programs don't scatter the sum.
    "fsdp": {"all-gather": 2 * _LAYERS + _EMBEDDING + TOKENS, "all-to-all": 2 * TOKENS * D / _DEVICES,
             "all-reduce": _ALL - _EMBEDDING},
    # Parameters that were updated in parts are gathered, once.
    "zero1": {"all-gather": _ALL - _NORMS + TOKENS, "all-to-all": 2 * TOKENS * D / _DEVICES,
              "all-reduce": _ALL - _EMBEDDING},
    # A sum after attention and one after the feed-forward layer; backward one for each of q, k, v, gate and up. The
    # embedding's rows, the gradient of the last hidden state, and three numbers a token of the vocabulary's softmax.
    "tensor": {"all-reduce": TOKENS * D * (7 * L + 2) + 3 * TOKENS},
    # Keys and values make three hops, twice, and their gradients four, until they are home.
    "sequence": {"collective-permute": L * KEYS_AND_VALUES / _DEVICES * (3 + 3 + 4), "all-reduce": _ALL},
    "sequence, gathered": {"all-gather": 2 * L * KEYS_AND_VALUES + TOKENS, "reduce-scatter": L * KEYS_AND_VALUES,
                           "all-reduce": _ALL},
    # All tokens, with two choices and two weights each, and the gradient of the result are shown to all; the result,
    # and the gradients of tokens and weights, are added up and scattered.
    "expert": {"all-gather": L * TOKENS * (D + 2 + 2 + D), "reduce-scatter": L * TOKENS * (D + D + 2),
               "all-reduce": parameters(MIXTURE, ("gate", "up", "down"))},
}
