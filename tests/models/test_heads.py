"""Heads for tasks: which vector each reads, and putting one on a model that had none."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import Head, ModelConfig
from llm_jax.models.facts import HEADS
from tests.models import test_encoder, test_encoder_decoder
from tests.models.drawn import drawn_params

TOKENS = np.random.default_rng(0).integers(0, 41, (3, 8)).astype(np.int32)
LENGTHS = np.array([8, 5, 1])
MASK = (np.arange(8) < LENGTHS[:, None]).astype(np.int32)


def decoder(head: Head | None, **changes) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 41, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1,
                          "head_dim": 8, "mlp_dim": 24, "max_context": 32, "head": head, **changes})


def encoder(head: Head | None, **changes) -> ModelConfig:
    heads = () if head is None or not head.per_sequence else ("pooler",)
    return test_encoder.config(head=head, encoder_heads=heads, **changes)


@functools.cache
def body(make) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """Parameters but for the head, and the vectors it reads, by way of a model without one."""
    head = Head("sequence_classification", 3)
    params = drawn_params(make(head))
    rest = {name: value for name, value in params.items() if name != "head"}
    if make is encoder:
        bare = models.build(test_encoder.config(encoder_heads=("pooler",)))
        out = jax.jit(bare.apply)({"params": rest}, TOKENS, MASK)
        return rest, np.asarray(out["hidden"]), np.asarray(out["pooled"])
    # A decoder whose output projection is the identity gives its last hidden state for logits.
    identity = rest | {"unembed": np.eye(16, 41, dtype=np.float32)}
    hidden = jax.jit(models.build(decoder(None)).apply)({"params": identity}, TOKENS, MASK)
    return rest, np.asarray(hidden)[..., :16], None


@pytest.mark.parametrize("make", [decoder, encoder])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_reads_the_vectors_it_should(make, kind):
    """A decoder's last token that is not padding, an encoder's pooled vector, or every token's; a linear map of it."""
    head = Head(kind, 1 if kind in ("reward", "value") else 3)
    rest, hidden_BTD, pooled_BD = body(make)
    if make is decoder:
        pooled_BD = hidden_BTD[np.arange(3), LENGTHS - 1]
    elif not head.per_sequence:
        rest = {name: value for name, value in rest.items() if name != "pooler"}
    own = drawn_params(make(head), seed=7)["head"]
    assert set(own) == ({"kernel"} if make is decoder and head.per_sequence else {"kernel", "bias"})
    out = jax.jit(models.build(make(head)).apply)({"params": rest | {"head": own}}, TOKENS, MASK)
    expected = (pooled_BD if head.per_sequence else hidden_BTD) @ own["kernel"] + own.get("bias", 0)
    expected = expected[..., 0] if kind in ("reward", "value") else expected
    assert out.dtype == jnp.float32 and out.shape == expected.shape
    assert out.shape == ((3,) if head.per_sequence else (3, 8)) + ((3,) if head.labels == 3 else ())
    real = np.ones(3, bool) if head.per_sequence else MASK.astype(bool)
    np.testing.assert_allclose(out[real], expected[real], atol=1e-5)


def test_without_segment_ids_a_decoder_reads_the_last_token():
    head = Head("reward")
    rest, _, _ = body(decoder)
    params = rest | {"head": drawn_params(decoder(head), seed=7)["head"]}
    apply = jax.jit(models.build(decoder(head)).apply)
    np.testing.assert_array_equal(apply({"params": params}, TOKENS), apply({"params": params}, TOKENS,
                                                                          np.ones_like(MASK)))
    assert (apply({"params": params}, TOKENS) != apply({"params": params}, TOKENS, MASK))[1:].all()


@pytest.mark.parametrize("config, kept, dropped, fresh", [
    (decoder(None), {"embed", "layers", "final_norm"}, {"unembed"}, {"head"}),
    (decoder(None, tie_embeddings=True), {"embed", "layers", "final_norm"}, set(), {"head"}),
    (test_encoder.config(), {"embed", "layers", "pooler"}, {"masked_lm", "output_bias", "next_sentence"}, {"head"}),
    (test_encoder.config(encoder_heads=("masked_lm",)), {"embed", "layers"}, {"masked_lm", "output_bias"},
     {"head", "pooler"}),
    (decoder(Head("token_classification", 5)), {"embed", "layers", "final_norm"}, set(), {"head"}),
])
def test_a_head_is_put_on_a_trained_model(config, kept, dropped, fresh):
    params = drawn_params(config)
    head = Head("sequence_classification", 4)
    new_config, new = models.with_head(config, params, head, jax.random.key(0))
    assert new_config.head == head and set(params) - set(new) == dropped
    assert {name for name in new if new[name] is params.get(name)} == kept
    assert set(new) - kept == fresh
    expected = models.abstract_params(models.build(new_config))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(lambda s: s.shape, expected)
    other = models.with_head(config, params, head, jax.random.key(1))[1]
    assert (other["head"]["kernel"] != new["head"]["kernel"]).all()
    assert ModelConfig.from_dict(new_config.to_dict()) == new_config


@pytest.mark.parametrize("config, named", [
    (test_encoder.config(), "encoder"), (test_encoder_decoder.config(), "encoder_decoder"),
    (decoder(Head("token_classification", 3)), "token_classification")])
def test_what_trains_and_measures_text_refuses_models_of_another_kind(config, named):
    with pytest.raises(UserError, match=named):
        models.build_language_model(config)
    assert isinstance(models.build_language_model(decoder(None)), models.Decoder)


def test_an_encoder_decoder_takes_no_head():
    config = test_encoder_decoder.config()
    with pytest.raises(UserError, match="encoder–decoder"):
        models.with_head(config, {}, Head("reward"), jax.random.key(0))
