"""The encoder by its properties; that it computes what BERT does, tests/interop/test_golden.py shows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import Decoder, Encoder, Execution, ModelConfig
from llm_jax.parallel import rules
from tests.models.drawn import drawn_params

T, D = 11, 16
ALL = ("masked_lm", "pooler", "next_sentence")


def config(**changes) -> ModelConfig:
    return ModelConfig(**{
        "vocab_size": 41, "num_layers": 2, "embed_dim": D, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
        "mlp_dim": 24, "max_context": 32, "architecture": "encoder", "positions": "learned", "token_types": 2,
        "embed_norm": True, "norm": "layer", "norm_placement": "post", "activation": "gelu", "gated_mlp": False,
        "mlp_bias": True, "qkv_bias": True, "output_bias": True, "tie_embeddings": True, "encoder_heads": ALL,
        "family": "bert", **changes})


PARAMS = drawn_params(config())
TOKENS = np.random.default_rng(3).permutation(41)[:T][None].astype(np.int32)  # all different
TYPES = np.array([[0] * 6 + [1] * (T - 6)], np.int32)
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [0] * 2], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]], np.int32)


@functools.cache
def applied(c: ModelConfig | None = None, execution: Execution | None = None):
    model = models.build(c or config(), execution)
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def test_every_token_sees_its_whole_document_and_no_other():
    """∂ hidden_t / ∂ x_s, exactly 0 across documents and not 0 within one, before and after."""
    direction_D = np.random.default_rng(4).standard_normal(D)  # a norm's output has a sum that does not change

    def outputs_T(table_VD):
        params = PARAMS | {"embed": PARAMS["embed"] | {"embedding": table_VD}}
        out = Encoder(config()).apply({"params": params}, TOKENS, SEGMENTS, TYPES, POSITIONS)
        return out["hidden"][0] @ direction_D

    jacobian_TVD = jax.jit(jax.jacrev(outputs_T))(PARAMS["embed"]["embedding"])
    size_TT = np.abs(np.asarray(jacobian_TVD))[:, TOKENS[0]].sum(-1)
    np.testing.assert_array_equal(size_TT > 0, SEGMENTS[0][:, None] == SEGMENTS[0][None, :])


def test_padding_and_neighbours_change_nothing():
    """A document alone, before padding, behind padding, and packed behind another."""
    alone = applied()(PARAMS, TOKENS[:, 4:9], np.ones((1, 5), np.int32), TYPES[:, 4:9])
    for padding in (((0, 0), (0, 4)), ((0, 0), (4, 0))):
        tokens, types = (np.pad(x[:, 4:9], padding, constant_values=1) for x in (TOKENS, TYPES))
        mask = np.pad(np.ones((1, 5), np.int32), padding)
        positions = np.pad(np.arange(5, dtype=np.int32)[None], padding)
        padded = applied()(PARAMS, tokens, mask, types, positions)
        for name in ("nsp", "pooled", "mean"):
            np.testing.assert_allclose(padded[name], alone[name], atol=2e-6, err_msg=name)
        for name in ("hidden", "logits"):
            np.testing.assert_allclose(padded[name][mask == 1], alone[name][0], atol=4e-6, err_msg=name)
    packed = applied()(PARAMS, TOKENS, SEGMENTS, TYPES, POSITIONS)
    np.testing.assert_allclose(packed["logits"][0, 4:9], alone["logits"][0], atol=4e-6)
    assert all(np.isfinite(value).all() for value in packed.values())


def test_what_is_one_a_sequence_by_hand():
    """pooled = tanh(h_0 W + b), nsp = pooled W + b, mean over the tokens that are not padding."""
    mask = np.array([[1] * 8 + [0] * 3], np.int32)
    out = {name: np.asarray(value, np.float64) for name, value in applied()(PARAMS, TOKENS, mask, TYPES).items()}
    pooled_D = np.tanh(out["hidden"][0, 0] @ PARAMS["pooler"]["kernel"] + PARAMS["pooler"]["bias"])
    np.testing.assert_allclose(out["pooled"][0], pooled_D, atol=1e-6)
    nsp = pooled_D @ PARAMS["next_sentence"]["kernel"] + PARAMS["next_sentence"]["bias"]
    np.testing.assert_allclose(out["nsp"][0], nsp, atol=2e-6)
    np.testing.assert_allclose(out["mean"][0], out["hidden"][0, :8].mean(0), atol=1e-6)
    everything = applied()(PARAMS, TOKENS, None, TYPES)
    np.testing.assert_allclose(everything["mean"][0], everything["hidden"][0].mean(0), atol=1e-6)


def test_token_types_count_and_their_default_is_the_first():
    out = applied()
    np.testing.assert_array_equal(out(PARAMS, TOKENS)["logits"],
                                  out(PARAMS, TOKENS, None, np.zeros_like(TYPES))["logits"])
    assert np.abs(out(PARAMS, TOKENS, None, TYPES)["logits"] - out(PARAMS, TOKENS)["logits"]).max() > 0.01


@pytest.mark.parametrize("changes", [
    {}, {"positions": "relative", "relative_buckets": 8, "relative_max_distance": 6, "norm_placement": "pre"}])
def test_scan_equals_unrolled(changes):
    c = config(**changes)
    params = drawn_params(c)
    a = applied(c)(params, TOKENS, SEGMENTS)["logits"]
    b = applied(c, Execution(scan_layers=False))(models.unstack(params, c), TOKENS, SEGMENTS)["logits"]
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.dtype == jnp.float32


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    exact, rounded = applied()(PARAMS, TOKENS), applied(None, Execution(dtype="bfloat16"))(PARAMS, TOKENS)
    assert rounded["hidden"].dtype == jnp.bfloat16
    for name in ("logits", "nsp", "pooled", "mean"):
        assert rounded[name].dtype == jnp.float32
        assert 1e-5 < np.linalg.norm(rounded[name] - exact[name]) / np.linalg.norm(exact[name]) < 5e-2, name


def test_the_mapping_holds_what_the_model_has():
    for heads in ((), ("masked_lm",), ("pooler",), ("pooler", "next_sentence")):
        c = config(encoder_heads=heads)
        params = {name: value for name, value in PARAMS.items()
                  if name in ("embed", "layers", *heads) or (name == "output_bias" and "masked_lm" in heads)}
        assert jax.tree.structure(params) == jax.tree.structure(models.abstract_params(Encoder(c)))
        shapes = jax.eval_shape(Encoder(c).apply, {"params": params}, TOKENS)
        of = {"masked_lm": "logits", "pooler": "pooled", "next_sentence": "nsp"}
        assert set(shapes) == {"hidden", "mean", *(of[name] for name in heads)}


def test_bert_base_has_as_many_parameters_as_published():
    base = config(vocab_size=30522, num_layers=12, embed_dim=768, num_heads=12, num_kv_heads=12, head_dim=64,
                  mlp_dim=3072, max_context=512, encoder_heads=("pooler",))
    assert base.num_params() == 109_482_240
    # Its masked-LM head: a 768 × 768 map with a bias, a norm, and a bias a token; then two outputs a sequence.
    assert dataclasses.replace(base, encoder_heads=ALL).num_params() - base.num_params() == (
        768 * 768 + 3 * 768 + 30522 + 2 * 768 + 2)
    # Untied, the output projection is a matrix of its own.
    untied = dataclasses.replace(base, encoder_heads=ALL, tie_embeddings=False)
    assert untied.num_params() - dataclasses.replace(base, encoder_heads=ALL).num_params() == 30522 * 768


def test_every_axis_has_a_sharding_rule():
    for c in (config(), config(tie_embeddings=False), config(positions="relative", relative_buckets=8,
                                                             relative_max_distance=6)):
        model = Encoder(c)
        axes, shapes = models.logical_axes(model), models.abstract_params(model)
        jax.tree.map(lambda a, s: len(rules.partition_spec(a)) == len(s.shape) or pytest.fail(f"{a} {s.shape}"),
                     axes, shapes, is_leaf=lambda a: isinstance(a, tuple))


@pytest.mark.parametrize("changes, named", [
    ({"encoder_heads": ("masked",)}, "encoder_heads"), ({"encoder_heads": ("next_sentence",)}, "pooler"),
    ({"architecture": "decoder"}, "encoder_heads"),
    ({"head": models.Head("reward"), "encoder_heads": ()}, "pooler"),
    ({"head": models.Head("reward")}, "masked_lm")])
def test_heads_that_do_not_go_together_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        config(**changes)


def test_a_module_of_another_architecture_is_refused():
    with pytest.raises(UserError, match="models.build"):
        models.abstract_params(Decoder(config()))
    with pytest.raises(UserError, match="models.build"):
        models.abstract_params(Encoder(config(architecture="decoder", encoder_heads=())))
