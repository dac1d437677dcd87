"""Layers of unlike kind: the cut into scanned groups, and the way between the stacked and the per-layer layout."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import Decoder, Execution, Experts, LatentAttention, ModelConfig
from llm_jax.models.layout import groups, layer_kinds, places
from tests.models.drawn import drawn_params


def config(num_layers: int, **changes) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 31, "num_layers": num_layers, "embed_dim": 16, "num_heads": 2,
                          "num_kv_heads": 1, "head_dim": 8, "mlp_dim": 24, "max_context": 32, "sliding_window": 3,
                          **changes})


@pytest.mark.parametrize("num_layers, pattern, expected", [
    (4, ("global",), [("layers", 1, 4)]),
    (6, ("local", "global"), [("layers", 2, 3)]),
    (26, ("local",) * 5 + ("global",), [("layers", 6, 4), ("last_layers", 2, 1)]),  # Gemma 3 1B
    (61, ("global",) * 3 + ("local",) * 58, [("first_layers", 3, 1), ("layers", 1, 58)]),  # DeepSeek-V3's shape
    (8, ("global",) * 6 + ("local",) * 2, [("layers", 1, 6), ("last_layers", 2, 1)]),  # Qwen2 with max_window_layers
])
def test_published_stacks_are_cut_where_they_repeat(num_layers, pattern, expected):
    cut = groups(config(num_layers, attention_pattern=pattern))
    assert [(g.name, len(g.pattern), g.repeats) for g in cut] == expected


@given(st.lists(st.sampled_from(["global", "local"]), min_size=1, max_size=14))
def test_every_layer_has_one_place_and_its_own_kind(kinds):
    c = config(len(kinds), attention_pattern=tuple(kinds))
    assert len({(p.path, p.index) for p in places(c)}) == len(kinds)
    seen = [kind.attention for g in groups(c) for _ in range(g.repeats) for kind in g.pattern]
    assert seen == kinds == [kind.attention for kind in layer_kinds(c)]
    numbers = [g.layer(r, s) for g in groups(c) for r in range(g.repeats) for s in range(len(g.pattern))]
    assert numbers == list(range(len(kinds)))


LATENT = {"latent": LatentAttention(query_rank=6, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=6), "num_kv_heads": 2,
          "head_dim": 12, "rope_interleaved": True}
MIXED = {
    "periods and a rest": config(5, attention_pattern=("local", "global"), norm_placement="sandwich", qk_norm=True,
                                 local_rope_theta=100.0, norm_offset=1.0, attention_soft_cap=2.0, logit_soft_cap=3.0),
    "dense, then experts, latent": config(3, mlp_pattern=("dense", "experts", "experts"),
                                          experts=Experts(count=4, per_token=2, mlp_dim=8, shared_dim=8), **LATENT),
    "learned positions, LayerNorm, biases": config(2, positions="learned", norm="layer", activation="gelu_tanh",
                                                   gated_mlp=False, mlp_bias=True, qkv_bias=True, output_bias=True),
}


@pytest.fixture(scope="module", params=MIXED, ids=list(MIXED))
def made(request):
    c = MIXED[request.param]
    return c, drawn_params(c)


def test_scan_equals_unrolled_and_neither_the_future_nor_padding_is_seen(made):
    c, params = made
    tokens = np.random.default_rng(0).integers(0, 31, (2, 10))
    scanned = jax.jit(lambda p, t, s: Decoder(c).apply({"params": p}, t, s))
    unrolled = jax.jit(lambda p, t: Decoder(c, Execution(scan_layers=False)).apply({"params": p}, t))
    whole = scanned(params, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(whole, unrolled(models.unstack(params, c), tokens), atol=2e-5 * np.abs(whole).max())
    later = scanned(params, np.where(np.arange(10) < 7, tokens, 5), np.ones_like(tokens))
    np.testing.assert_array_equal(later[:, :7], whole[:, :7])  # causal, exactly
    assert (later[:, 7:] != whole[:, 7:]).any()
    padded = scanned(params, np.where(np.arange(10) < 7, tokens, 5), np.where(np.arange(10) < 7, 1, 0) * [[1], [1]])
    np.testing.assert_allclose(padded[:, :7], whole[:, :7], atol=2e-6 * np.abs(whole).max())


def test_stack_and_unstack_are_inverse(made):
    c, params = made
    layers = models.unstack(params, c)
    assert sum(name.startswith("layers_") for name in layers) == c.num_layers
    again = models.stack(layers, c)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_shapes_axes_and_counts_agree(made):
    c, params = made
    axes = models.logical_axes(Decoder(c))
    jax.tree.map(lambda leaf, names: None if leaf.ndim == len(names) else pytest.fail(f"{leaf.shape} {names}"), params,
                 axes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == c.num_params()


def test_rows_past_a_table_of_positions_are_refused_unless_they_are_packed():
    c = MIXED["learned positions, LayerNorm, biases"]
    tokens = np.zeros((1, 40), np.int32)
    with pytest.raises(UserError, match="40 tokens are longer than the model's 32 learned positions"):
        jax.eval_shape(lambda p: Decoder(c).apply({"params": p}, tokens), models.abstract_params(Decoder(c)))
    jax.eval_shape(lambda p: Decoder(c).apply({"params": p}, tokens, tokens + 1, tokens),
                   models.abstract_params(Decoder(c)))
