"""The encoder–decoder by its properties, its positions by their formula; that it computes what T5 does,
tests/interop/test_golden.py shows."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.inference.seq2seq import generate
from llm_jax.models import EncoderDecoder, Execution, Experts, ModelConfig
from llm_jax.models.relative_positions import bucket_table, buckets_between
from llm_jax.parallel import rules
from tests.models.drawn import drawn_params

S, T, D = 9, 7, 12


def config(**changes) -> ModelConfig:
    return ModelConfig(**{
        "vocab_size": 37, "num_layers": 3, "encoder_layers": 2, "embed_dim": D, "num_heads": 2, "num_kv_heads": 2,
        "head_dim": 5, "mlp_dim": 20, "max_context": 32, "architecture": "encoder_decoder", "positions": "relative",
        "relative_buckets": 8, "relative_max_distance": 6, "attention_scale": 1.0, "activation": "relu",
        "gated_mlp": False, "tie_embeddings": True, "logit_scale": D**-0.5, "family": "t5", **changes})


PARAMS = drawn_params(config())
_IDS = np.random.default_rng(0).permutation(37).astype(np.int32)
SOURCE, TARGET = _IDS[None, :S], _IDS[None, S:S + T]  # all different
SOURCE_SEGMENTS = np.array([[1] * 3 + [2] * 4 + [0] * 2], np.int32)
SEGMENTS = np.array([[1] * 2 + [2] * 4 + [0]], np.int32)


@functools.cache
def applied(c: ModelConfig | None = None, execution: Execution | None = None):
    model = models.build(c or config(), execution)
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


@functools.cache
def jacobian():
    """A jitted function of the segments: ∂ logits_t / ∂ the embedding of every id, [T, V, D]."""
    direction_V = np.random.default_rng(1).standard_normal(37)
    untied = config(tie_embeddings=False)  # so that the table is only read, and not projected with
    params = PARAMS | {"unembed": PARAMS["embed"]["embedding"].T}

    def outputs_T(table_VD, *segments):
        filled = params | {"embed": {"embedding": table_VD}}
        return EncoderDecoder(untied).apply({"params": filled}, SOURCE, TARGET, *segments)[0] @ direction_V

    return jax.jit(jax.jacrev(outputs_T))


def sees(*segments) -> np.ndarray:
    """Whether ∂ logits_t / ∂ x is other than exactly 0, for every token x of the source and then of the target."""
    jacobian_TVD = jacobian()(PARAMS["embed"]["embedding"], *segments)
    return np.abs(np.asarray(jacobian_TVD))[:, _IDS[:S + T]].sum(-1) > 0


def test_the_decoder_is_causal_and_sees_the_whole_source():
    seen = sees(np.ones_like(SOURCE), np.ones_like(TARGET))
    assert seen[:, :S].all()
    np.testing.assert_array_equal(seen[:, S:], np.tri(T, dtype=bool))


def test_the_encoder_is_not_causal():
    encode = jax.jit(lambda tokens: EncoderDecoder(config()).apply({"params": PARAMS}, tokens, method="encode"))
    changed = encode(SOURCE) != encode(np.concatenate([SOURCE[:, :-1], [[_IDS[-1]]]], axis=1))
    assert changed.any(axis=-1).all()


def test_a_target_sees_the_source_of_its_own_number():
    seen = sees(SOURCE_SEGMENTS, SEGMENTS)
    np.testing.assert_array_equal(seen[:, :S], SEGMENTS[0][:, None] == SOURCE_SEGMENTS[0][None, :])
    np.testing.assert_array_equal(seen[:, S:], np.tri(T, dtype=bool) & (SEGMENTS[0][:, None] == SEGMENTS[0]))


def test_where_segments_of_one_side_are_absent_all_targets_see_all_of_the_source():
    mask = np.array([[1] * 7 + [0] * 2], np.int32)
    np.testing.assert_allclose(applied()(PARAMS, SOURCE, TARGET, mask), applied()(PARAMS, SOURCE[:, :7], TARGET),
                               atol=2e-6)
    np.testing.assert_allclose(applied()(PARAMS, SOURCE, TARGET, None, SEGMENTS)[:, 2:6],
                               applied()(PARAMS, SOURCE, TARGET[:, 2:6]), atol=2e-6)


def test_packed_pairs_equal_each_pair_alone():
    packed = applied()(PARAMS, SOURCE, TARGET, SOURCE_SEGMENTS, SEGMENTS)
    assert packed.dtype == jnp.float32 and np.isfinite(packed).all()
    for sources, targets in ((slice(0, 3), slice(0, 2)), (slice(3, 7), slice(2, 6))):
        alone = applied()(PARAMS, SOURCE[:, sources], TARGET[:, targets])
        np.testing.assert_allclose(packed[:, targets], alone, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, {"gated_mlp": True, "activation": "gelu_tanh", "tie_embeddings": False,
                                          "logit_scale": None}])
def test_scan_equals_unrolled_and_stacking_is_invertible(changes):
    c = config(**changes)
    params = drawn_params(c)
    layers = models.unstack(params, c)
    assert {"layers_0", "layers_1", "layers_2", "encoder"} <= set(layers)
    assert {"layers_0", "layers_1"} <= set(layers["encoder"])
    jax.tree.map(np.testing.assert_array_equal, models.stack(layers, c), params)
    a = applied(c)(params, SOURCE, TARGET)
    b = applied(c, Execution(scan_layers=False))(layers, SOURCE, TARGET)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_changes_no_gradient():
    def gradient(execution):
        model = EncoderDecoder(config(), execution)
        loss = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, SOURCE, TARGET)).mean()))
        return jax.tree.leaves(loss(PARAMS))

    for a, b in zip(gradient(Execution()), gradient(Execution(remat="full")), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    c = config(attention_scale=0.1)  # scores as large as those of PARAMS magnify every rounding
    exact = applied(c)(PARAMS, SOURCE, TARGET)
    rounded = applied(c, Execution(dtype="bfloat16"))(PARAMS, SOURCE, TARGET)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 5e-2


def test_logits_are_scaled_where_the_config_says_so():
    a = applied()(PARAMS, SOURCE, TARGET)
    b = applied(config(logit_scale=None))(PARAMS, SOURCE, TARGET)
    np.testing.assert_allclose(a, b * D**-0.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("buckets, furthest_exact", [(32, 128), (8, 20), (64, 300), (7, 12)])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_by_the_formula(buckets, furthest_exact, causal):
    """Half of a direction's buckets hold one distance each; distance n of the rest falls into bucket
    exact + ⌊(buckets − exact) · log(n / exact) / log(max / exact)⌋, the last at most. In float64, off the borders."""
    length = 330
    c = config(relative_buckets=buckets, relative_max_distance=furthest_exact)
    found = buckets_between(length, c, causal)
    one_way = buckets if causal else buckets // 2
    exact = one_way // 2
    checked = 0
    for back in range(-length + 1, length):  # query position − key position
        query, key = (back, 0) if back >= 0 else (0, -back)
        distance = abs(back)
        if causal and back < 0:
            expected = 0.0
        elif distance < exact:
            expected = float(distance)
        else:
            position = (one_way - exact) * math.log(distance / exact) / math.log(furthest_exact / exact)
            if abs(position - round(position)) < 1e-5 and position < one_way - exact:
                continue
            expected = min(exact + math.floor(position + 1e-9), one_way - 1)
        checked += 1
        assert found[query, key] == expected + (one_way if back < 0 and not causal else 0), back
    assert checked > 600 and found.max() == buckets - 1 - (0 if causal else buckets % 2)


def test_buckets_of_t5_on_their_borders():
    """8 · log2(n / 8) / 4 is a whole number at 16, 32, 64 and 128: those distances begin a bucket."""
    table = bucket_table(200, 16, 128)
    assert [int(table[n]) for n in (7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 200)] == [
        7, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15]


def test_generation_is_the_likeliest_token_again_and_again():
    sources, start = np.stack([_IDS[:5], _IDS[10:15]]), 2
    c = config(tie_embeddings=False, logit_scale=None)
    model, params = EncoderDecoder(c), drawn_params(c, seed=10)
    params["embed"]["embedding"] *= 3  # else every answer is one token said again and again
    expected = np.full((2, 1), start, np.int32)
    full = jax.jit(lambda t: model.apply({"params": params}, sources, t))
    for t in range(6):
        read = np.pad(expected, ((0, 0), (0, 6 - t)))
        expected = np.concatenate([expected, np.argmax(full(read)[:, t], -1)[:, None]], axis=1)
    expected = expected[:, 1:]
    assert len(set(expected[1].tolist())) > 3, "a model that says the same all over shows nothing"
    tokens, lengths = generate(model, params, sources, max_tokens=6, start_id=start, end_ids=())
    np.testing.assert_array_equal(tokens, expected)
    assert lengths.tolist() == [6, 6]

    # Behind padding the same; and an end token ends its own row alone.
    end = int(expected[1, 2])
    first = [6, 3]
    assert end not in expected[0] and end not in expected[1, :2]
    padded = np.pad(sources, ((0, 0), (0, 3)), constant_values=4)
    mask = np.pad(np.ones_like(sources), ((0, 0), (0, 3)))
    tokens, lengths = generate(model, params, padded, mask, max_tokens=6, start_id=start, end_ids=(end,))
    assert lengths.tolist() == first
    for row, length in enumerate(first):
        np.testing.assert_array_equal(tokens[row, :length], expected[row, :length])
        assert (tokens[row, length:] == start).all()


def test_t5_small_has_as_many_parameters_as_published():
    small = config(vocab_size=32128, num_layers=6, encoder_layers=6, embed_dim=512, num_heads=8, num_kv_heads=8,
                   head_dim=64, mlp_dim=2048, relative_buckets=32, relative_max_distance=128)
    assert small.num_params() == 60_506_624


def test_every_axis_has_a_sharding_rule():
    model = EncoderDecoder(config(tie_embeddings=False))
    axes, shapes = models.logical_axes(model), models.abstract_params(model)
    jax.tree.map(lambda a, s: len(rules.partition_spec(a)) == len(s.shape) or pytest.fail(f"{a} {s.shape}"),
                 axes, shapes, is_leaf=lambda a: isinstance(a, tuple))


@pytest.mark.parametrize("changes, named", [
    ({"encoder_layers": 0}, "encoder_layers"), ({"relative_buckets": 0}, "relative_buckets"),
    ({"relative_max_distance": 4}, "relative_max_distance"), ({"head": models.Head("reward")}, "head"),
    ({"experts": Experts(2, 1, 8), "mlp_pattern": ("experts",)}, "experts")])
def test_what_does_not_go_with_it_is_named(changes, named):
    with pytest.raises(UserError, match=named):
        config(**changes)
