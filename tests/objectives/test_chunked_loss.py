"""The loss by chunks against the plain one: the same numbers and gradients, without the logits of all tokens."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import Decoder, Execution, Experts, ModelConfig
from llm_jax.models.embedding import Output
from llm_jax.objectives.chunked_loss import chunked_sums
from llm_jax.objectives.evaluation import evaluate_loss
from llm_jax.objectives.next_token import next_token_sums, token_losses
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.training.common import MODEL

B, T, D, V = 4, 21, 16, 50


def arrays(is_table=False, dtype="float32", seed=0):
    """Hidden states, output weight, targets and weights of some of the positions."""
    rng = np.random.default_rng(seed)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(V, D) if is_table else (D, V)), jnp.float32)
    weights_BT = rng.uniform(0.2, 2, (B, T)) * (rng.uniform(size=(B, T)) < 0.8)
    return x_BTD, weight, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), jnp.asarray(weights_BT, jnp.float32)


def plain_sum(x_BTD, output, targets_BT, weights_BT, z_loss):
    logits_BTV = output.capped(output.product(output.scaled(x_BTD), output.weight))
    losses_BT, log_z_BT = token_losses(logits_BTV, targets_BT)
    return jnp.sum((losses_BT + z_loss * jnp.square(log_z_BT)) * weights_BT)


def both(output, z_loss, chunk, given):
    """(value, gradients by hidden states, weight and weights) of the plain sum, and of the one by chunks."""
    x_BTD, weight, targets_BT, weights_BT = given

    def plain(x, w, c):
        return 0.3 * plain_sum(x, dataclasses.replace(output, weight=w), targets_BT, c, z_loss)

    def chunked(x, w, c):
        made = dataclasses.replace(output, weight=w)
        return 0.3 * chunked_sums(x, made, targets_BT, c, chunk=chunk, z_loss=z_loss)[0]

    return [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x_BTD, weight, weights_BT) for f in (plain, chunked)]


def assert_close(one, other, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())


@pytest.mark.parametrize(("is_table", "scale", "soft_cap", "z_loss", "chunk"), [
    (False, None, None, 0.0, 12),   # divides the 84 tokens
    (True, None, None, 0.0, 10),    # does not, but 14 chunks of 6 are few enough
    (False, 0.25, 2.0, 0.01, 38),   # 84 in chunks of 28
    (True, 0.25, 2.0, 0.01, 83),    # two chunks of 42
    (True, None, 2.0, 0.0, 1000),   # one chunk
    (False, None, None, 0.02, 1),
])
def test_value_and_every_gradient_are_those_of_the_plain_loss(is_table, scale, soft_cap, z_loss, chunk):
    expected, found = both(Output(None, is_table, scale, soft_cap), z_loss, chunk, arrays(is_table))
    assert_close(expected, found)
    assert all(np.abs(g).max() > 0 for g in found[1])


def test_tokens_that_no_chunk_divides_are_filled_up():
    x_BTD, weight, targets_BT, weights_BT = arrays()
    given = x_BTD[:1, :13], weight, targets_BT[:1, :13], weights_BT[:1, :13]  # 13 is prime: chunks of 4, 4, 4 and 1
    assert_close(*both(Output(None), 0.01, 5, given))


def test_parts_are_sums_that_pass_no_gradient():
    x_BTD, weight, targets_BT, weights_BT = arrays()

    def parts(x):
        total, sums = chunked_sums(x, Output(weight), targets_BT, weights_BT, chunk=12, z_loss=0.01)
        return sums["loss_sum"] + sums["z_loss_sum"], total

    (value, total), gradient = jax.value_and_grad(parts, has_aux=True)(x_BTD)
    np.testing.assert_allclose(value, total, rtol=1e-6)
    np.testing.assert_allclose(total, plain_sum(x_BTD, Output(weight), targets_BT, weights_BT, 0.01), rtol=1e-6)
    assert not np.any(gradient)


def test_positions_that_count_nothing_cost_nothing():
    x_BTD, weight, targets_BT, weights_BT = arrays()
    value, gradients = both(Output(None), 0.01, 12, (x_BTD * 1e4, weight, targets_BT, weights_BT * 0))[1]
    assert value == 0 and not np.any(gradients[0]) and not np.any(gradients[1])


def test_bfloat16_is_as_near_to_float32_as_the_plain_loss_is():
    x_BTD, weight, targets_BT, weights_BT = arrays(dtype="bfloat16")
    exact = both(Output(None), 0.01, 12, (x_BTD.astype(jnp.float32), weight, targets_BT, weights_BT))[0]
    plain, chunked = both(Output(None), 0.01, 12, (x_BTD, weight, targets_BT, weights_BT))
    assert [g.dtype for g in chunked[1]] == [jnp.bfloat16, jnp.float32, jnp.float32]

    def error(found):
        return np.array([np.linalg.norm(np.asarray(f, np.float64) - e) / np.linalg.norm(e)
                         for e, f in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True)])

    assert (error(chunked) < 6e-3).all()
    assert (error(chunked) < 1.5 * error(plain) + 1e-3).all()


def test_float16_keeps_the_gradient_of_what_is_very_unlikely():
    """e⁻¹⁸ = 1.5e-8 is 0 in float16, and so would be all gradients of that token's weight."""
    x_BTD = jnp.ones((1, 2, 1), jnp.float16)
    weight = jnp.asarray([[0.0, -18.0]], jnp.float32)
    targets_BT, weights_BT = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.float32)
    gradient = jax.grad(lambda w: chunked_sums(x_BTD, Output(w), targets_BT, weights_BT, chunk=1)[0])(weight)
    np.testing.assert_allclose(gradient[0, 1], 2 * math.exp(-18), rtol=0.05)


def batch(rows=4, length=12, vocab=MODEL.vocab_size):
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)
    segments = np.where(np.arange(length) < 5, 1, 2) * np.ones((rows, 1), np.int32)
    segments[0, 9:] = 0
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments, jnp.int32),
            "positions": jnp.asarray(np.broadcast_to(np.arange(length), (rows, length)), jnp.int32)}


def through_model(config, execution, params, z_loss=0.01):
    model = Decoder(config, execution)

    def objective(params):
        return next_token_sums(model.apply, params, batch(), z_loss=z_loss, config=config,
                               loss_chunk=execution.loss_chunk)

    (value, sums), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return (value, grads), sums


EXPERTS = dataclasses.replace(MODEL, num_layers=1, mlp_pattern=("experts",), tie_embeddings=True, logit_soft_cap=5.0,
                              experts=Experts(count=4, per_token=2, mlp_dim=16, balance_weight=0.1))


@pytest.mark.parametrize(("config", "remat"), [(MODEL, "full"), (EXPERTS, "none")])
def test_a_model_s_gradients_and_metrics_are_the_same(config, remat):
    """Tied and untied, scanned, rematerialised, with a soft cap, with what experts report."""
    params = jax.jit(lambda key: models.init_params(Decoder(config), key))(jax.random.key(0))
    plain, sums = through_model(config, Execution(remat=remat), params)
    chunked, chunked_sums_ = through_model(config, Execution(remat=remat, loss_chunk=8), params)
    assert_close(plain, chunked)
    assert jax.tree.structure(sums) == jax.tree.structure(chunked_sums_)
    assert ("router" in sums) == (config.experts is not None)
    for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(chunked_sums_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_evaluation_takes_chunks_too():
    params = jax.jit(lambda key: models.init_params(Decoder(MODEL), key))(jax.random.key(0))
    whole = batch()
    rows = [{**whole, "targets": jnp.roll(whole["tokens"], -1, 1), "weights": jnp.ones((4, 12)).at[1, 3:].set(0)}]
    one, other = (evaluate_loss(Decoder(MODEL, Execution(loss_chunk=chunk)), params, rows) for chunk in (None, 7))
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
    assert one["tokens"] == other["tokens"] == 39


def test_logits_of_all_tokens_are_never_held():
    rows, length, vocab = 4, 128, 8192
    config = ModelConfig(vocab_size=vocab, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
                         mlp_dim=16, max_context=length)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def temporary_bytes(chunk):
        model = Decoder(config, Execution(loss_chunk=chunk))

        def loss(params, tokens):
            return next_token_sums(model.apply, params, {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)},
                                   loss_chunk=chunk)[0]

        compiled = jax.jit(jax.grad(loss)).lower(models.abstract_params(model), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * rows * length * vocab
    assert temporary_bytes(None) > logits_bytes
    assert temporary_bytes(32) < 0.3 * logits_bytes


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True])
def test_a_chunk_is_a_positive_whole_number(chunk):
    with pytest.raises(UserError, match="loss_chunk"):
        Execution(loss_chunk=chunk)


RULES = {"batch": ("data", "fsdp", "expert"), "length": "sequence", "activation_vocab": "tensor"}


@pytest.fixture(scope="module")
def sharded():
    """Value and gradients on fsdp 2 × sequence 2 × tensor 2, and the compiled program."""
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))
    x_BTD, weight, targets_BT, weights_BT = arrays()
    given = x_BTD[:, :20], weight, targets_BT[:, :20], weights_BT[:, :20]

    def place(x, *spec):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    def objective(x, w, c, targets):
        with models.activation_rules(RULES):
            return 0.3 * chunked_sums(x, Output(w), targets, c, chunk=4, z_loss=0.01)[0]

    rows = "fsdp", "sequence"
    placed = (place(given[0], *rows), place(given[1], "fsdp", "tensor"), place(given[3], *rows), place(given[2], *rows))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(objective, (0, 1, 2)),
                           out_shardings=(None, tuple(x.sharding for x in placed[:3]))).lower(*placed).compile()
        return given, compiled(*placed), compiled.as_text()


def test_on_a_mesh_it_is_the_same(sharded):
    given, found, _ = sharded
    assert_close(both(Output(None), 0.01, 1000, given)[0], found)


def collectives(text):
    """(whether it is in a loop's body, bytes of the result) of every collective of a compiled program."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    found, inside = [], False
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            inside = header.group(1) in bodies
        elif op := re.search(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
                             r"(?:-start)?\(", line):
            sizes = re.findall(r"f32\[([\d,]*)\]", op.group(1))
            found.append((inside, 4 * sum(math.prod(map(int, s.split(","))) if s else 1 for s in sizes)))
    return found


def test_on_a_mesh_the_weight_is_gathered_and_its_gradient_summed_once(sharded):
    """4 rows × 20 tokens on 2 × 2 devices are 5 chunks of 4; in their loop only what is of a chunk's tokens is sent."""
    found = collectives(sharded[2])
    weight_bytes = 4 * D * V // 2  # a device's part along the vocabulary
    looped = [size for inside, size in found if inside]
    assert looped and max(looped) <= 4 * 4 * D  # gradients of a chunk's hidden states
    once = [size for inside, size in found if not inside]
    assert 1 <= sum(size >= weight_bytes / 2 for size in once) <= 4
