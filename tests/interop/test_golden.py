"""Every family against what `transformers` computed (tests/golden): logits, losses, heads, rope scalings."""

from __future__ import annotations

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import hf
from llm_jax.interop import families
from llm_jax.models.rope import frequencies
from llm_jax.objectives.next_token import next_token_loss
from tests.interop.golden import DECODERS, GOLDEN, HEADS, VARIANTS, loaded, reference

# Of the largest logit. What is promised is 2e-4, but the two forms of GELU differ by no more than that.
BOUND = 2e-5


def run(model, params, *inputs):
    return jax.jit(lambda p, *args: model.apply({"params": p}, *args))(params, *map(jnp.asarray, inputs))


def segments(tokens, lengths):
    return (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)


def close(ours, theirs, real=None):
    """`ours` within BOUND of the largest of `theirs`, where `real` says that there is a token."""
    ours = np.asarray(ours)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    real = np.ones(theirs.shape[:1], bool) if real is None else np.asarray(real, bool)
    assert np.abs(ours[real] - theirs[real]).max() <= BOUND * np.abs(theirs).max()


@pytest.mark.parametrize("folder", DECODERS)
def test_a_decoder_computes_what_transformers_does(folder):
    """Three padded rows and a packed one in one batch, and their loss."""
    model, params, _ = loaded(folder)
    ref = reference(folder)
    rows, mask = len(ref["tokens"]), segments(ref["tokens"], ref["lengths"])
    tokens = np.concatenate([ref["tokens"], ref["packed_tokens"]])
    documents = np.concatenate([mask, ref["packed_segments"]])
    positions = np.concatenate([np.broadcast_to(np.arange(tokens.shape[1]), mask.shape), ref["packed_positions"]])
    logits = run(model, params, tokens, documents, positions.astype(np.int32))
    close(logits[:rows], ref["logits"], mask)
    close(logits[rows:], ref["packed_logits"], ref["packed_segments"])

    loss, _ = next_token_loss(lambda *_: logits[:rows], None, {"tokens": jnp.asarray(ref["tokens"]),
                                                               "segment_ids": jnp.asarray(mask)})
    assert float(loss) == pytest.approx(float(ref["loss"]), rel=1e-5)


@pytest.mark.parametrize("folder", ["phi3_longrope", "llama_rope"])
def test_a_row_past_the_threshold(folder):
    model, params, _ = loaded(folder)
    ref = reference(folder)
    close(run(model, params, ref["long_tokens"]), ref["long_logits"])


@pytest.mark.parametrize("folder,kind", VARIANTS)
def test_another_config_over_the_same_weights(folder, kind, tmp_path):
    os.symlink(GOLDEN / folder / "model.safetensors", tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / folder / f"{kind}.json", tmp_path / "config.json")
    model, params, config, _ = hf.load(tmp_path)
    assert config != loaded(folder)[2]
    ref = reference(folder, kind)
    mask = segments(ref["tokens"], ref["lengths"])
    close(run(model, params, ref["tokens"], mask), ref["logits"], mask)
    if "long_tokens" in ref:
        close(run(model, params, ref["long_tokens"]), ref["long_logits"])


@pytest.mark.parametrize("folder", HEADS)
def test_a_head_computes_what_transformers_does(folder):
    model, params, config = loaded(folder)
    ref = reference(folder)
    mask = segments(ref["tokens"], ref["lengths"])
    assert config.head.kind == {"sequence": "sequence_classification", "tokens": "token_classification",
                                "regression": "regression"}[folder.split("_")[1]]
    close(run(model, params, ref["tokens"], mask), ref["logits"], None if config.head.per_sequence else mask)


@pytest.mark.parametrize("folder", ["bert", "bert_hub"])
def test_bert_computes_what_transformers_does(folder):
    model, params, _ = loaded(folder)
    ref = reference(folder)
    mask = segments(ref["tokens"], ref["lengths"])
    out = run(model, params, ref["tokens"], mask, ref["token_types"])
    close(out["logits"], ref["logits"], mask)
    for name in ("nsp", "pooled", "mean"):
        close(out[name], ref[name])
    packed = run(model, params, ref["packed_tokens"], ref["packed_segments"], np.zeros_like(ref["packed_tokens"]),
                 ref["packed_positions"])
    close(packed["logits"], ref["packed_logits"], ref["packed_segments"])


@pytest.mark.parametrize("folder", ["t5", "flan_t5"])
def test_t5_computes_what_transformers_does(folder):
    model, params, config = loaded(folder)
    ref = reference(folder)
    assert config.tie_embeddings == (folder == "t5")
    mask, decoder_mask = (segments(ref[f"{side}tokens"], ref[f"{side}lengths"]) for side in ("", "decoder_"))
    inputs = ref["tokens"], ref["decoder_tokens"], mask
    close(run(model, params, *inputs), ref["logits"], decoder_mask)
    close(run(model, params, *inputs, decoder_mask), ref["logits"], decoder_mask)


CASES = json.loads(str(np.load(GOLDEN / "rope.npz")["cases"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rope_scalings_have_the_frequencies_of_transformers(case):
    config = families.config_from_hf(case["config"])
    with np.load(GOLDEN / "rope.npz") as file:
        theirs, factor = file[f"{case['name']}/inv_freq"], float(file[f"{case['name']}/attention_factor"])
    ours, our_factor = frequencies(config.rotary_width, config.rope_theta, config.rope_scaling, config.max_context,
                                   case["length"] or 1)
    np.testing.assert_allclose(ours, theirs, rtol=3e-6)
    assert float(our_factor) == pytest.approx(factor, rel=1e-6)
