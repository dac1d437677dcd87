"""Routing and the layer of experts, against the papers' formulas in float64, token by token."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.kernels.attention import DenseContext
from llm_jax.kernels.paged import PagedContext
from llm_jax.models import Execution, ModelConfig
from llm_jax.models.experts import Experts
from llm_jax.models.facts import Experts as Facts
from llm_jax.models.routing import route
from llm_jax.objectives.balance import balance_loss

B, T, D = 2, 9, 12
KINDS = {
    "mixtral": Facts(8, 2, 10),
    "qwen3_moe": Facts(8, 3, 10, renormalize=True),
    "qwen3_moe_raw": Facts(8, 3, 10, renormalize=False),
    "deepseek_v3": Facts(12, 3, 10, scoring="sigmoid", scale=2.5, groups=4, groups_kept=2, selection_bias=True,
                         shared_dim=20),
}


def config(facts: Facts, **changes) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 40, "num_layers": 2, "embed_dim": D, "num_heads": 2, "num_kv_heads": 2,
                          "head_dim": 6, "mlp_dim": 16, "max_context": 32, "mlp_pattern": ("experts",),
                          "experts": facts, **changes})


def layer(facts: Facts, **execution):
    return Experts(config(facts), Execution(**execution))


def make_params(facts: Facts, seed: int = 0):
    made = jax.eval_shape(lambda: layer(facts).init(jax.random.key(0), jnp.zeros((1, 2, D)), DenseContext()))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32),
                        nn.meta.unbox(made["params"]))


def chosen_and_weights(facts: Facts, params, x):
    """Of one token, float64: its experts, as a set, and their weights by expert."""
    logits = x @ np.asarray(params["router"], np.float64)
    if facts.scoring == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    biased = scores + np.asarray(params.get("selection_bias", 0.0), np.float64)
    size = facts.count // facts.groups
    value = {g: sum(sorted(biased[g * size:(g + 1) * size])[-2:]) for g in range(facts.groups)}
    best_groups = sorted(value, key=value.get)[-facts.groups_kept:]
    eligible = [e for e in range(facts.count) if e // size in best_groups]
    chosen = sorted(eligible, key=lambda e: biased[e])[-facts.per_token:]
    total = sum(scores[e] for e in chosen) if facts.renormalize else 1.0
    return {e: scores[e] / total * facts.scale for e in chosen}


def gated(x, gate, up, down):
    gate, up, down = (np.asarray(w, np.float64) for w in (gate, up, down))
    h = x @ gate
    return (h / (1 + np.exp(-h)) * (x @ up)) @ down


def reference(facts: Facts, params, x_BTD):
    out = np.zeros(x_BTD.shape)
    for at in np.ndindex(*x_BTD.shape[:2]):
        x = np.asarray(x_BTD[at], np.float64)
        for e, share in chosen_and_weights(facts, params, x).items():
            out[at] += share * gated(x, params["gate"][e], params["up"][e], params["down"][e])
        if facts.shared_dim:
            out[at] += gated(x, *(params["shared"][name] for name in ("gate", "up", "down")))
    return out


@pytest.fixture(scope="module")
def x_BTD():
    return np.random.default_rng(5).normal(size=(B, T, D)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_the_papers_formulas(kind, x_BTD):
    facts = KINDS[kind]
    params = make_params(facts)
    got = jax.jit(lambda p, x: layer(facts).apply({"params": p}, x, DenseContext()))(params, x_BTD)
    expected = reference(facts, params, x_BTD)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_bias_and_groups_decide_the_choice_and_not_the_weights():
    """Made by hand: the best expert's group is not kept, and the biased expert has its unbiased weight."""
    facts = Facts(4, 2, 8, scoring="sigmoid", groups=2, groups_kept=1, selection_bias=True)
    scores = np.array([0.9, 0.1, 0.6, 0.5])
    router = np.log(scores / (1 - scores))[None].astype(np.float32)
    weight, chosen, score = route(jnp.ones((1, 1, 1)), jnp.asarray(router), None, facts)
    np.testing.assert_array_equal(chosen[0, 0], [2, 3])  # 0.6 + 0.5 is more than 0.9 + 0.1
    np.testing.assert_allclose(weight[0, 0], [0.6 / 1.1, 0.5 / 1.1], rtol=1e-6)
    np.testing.assert_allclose(score[0, 0], scores, rtol=1e-6)
    # Experts of a group that is out can't be chosen, even where every biased score that is in is negative.
    weight, chosen, _ = route(jnp.ones((1, 1, 1)), jnp.asarray(router), jnp.array([-3.0, -3.0, -1.0, -2.0]), facts)
    np.testing.assert_array_equal(chosen[0, 0], [2, 3])
    np.testing.assert_allclose(weight[0, 0], [0.6 / 1.1, 0.5 / 1.1], rtol=1e-6)
    weight, chosen, _ = route(jnp.ones((1, 1, 1)), jnp.asarray(router), jnp.array([0.0, 2.0, 0.0, 0.0]), facts)
    np.testing.assert_array_equal(chosen[0, 0], [1, 0])
    np.testing.assert_allclose(weight[0, 0], [0.1, 0.9], rtol=1e-6)


def test_routing_is_float32_whatever_the_tokens_are(x_BTD):
    facts = KINDS["deepseek_v3"]
    params = make_params(facts)
    half = jnp.asarray(x_BTD, jnp.bfloat16)
    for got, expected in zip(*(route(x, params["router"], params["selection_bias"], facts)
                               for x in (half, half.astype(jnp.float32))), strict=True):
        assert got.dtype in (jnp.float32, jnp.int32)
        np.testing.assert_array_equal(got, expected)


def test_every_parameter_has_a_gradient_but_the_selection_bias(x_BTD):
    facts = KINDS["deepseek_v3"]
    params = make_params(facts)
    module = layer(facts)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x_BTD, DenseContext()) ** 2)))(params)
    assert not np.any(grads.pop("selection_bias"))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_padding_changes_no_token_and_no_statistics(capacity, x_BTD):
    """Whatever stands in the padding, and wherever it is: the tokens' results and the router's sums are the same."""
    facts = KINDS["mixtral"]
    params = make_params(facts)
    segments = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    module = layer(facts, expert_capacity=capacity)

    @jax.jit
    def run(x):
        out, sown = module.apply({"params": params}, x, DenseContext(jnp.asarray(segments)), mutable=["router"])
        return out, sown["router"]

    one, sums = run(x_BTD)
    other, other_sums = run(np.where(segments[..., None] > 0, x_BTD, np.nan))
    np.testing.assert_array_equal(one[segments > 0], other[segments > 0])
    jax.tree.map(np.testing.assert_array_equal, sums, other_sums)
    assert sums["tokens"] == 14 and sums["assigned"].sum() == 28
    np.testing.assert_allclose(sums["probability"].sum(), 14, rtol=1e-6)
    assert (sums["dropped"] > 0) == (capacity is not None)


def test_a_capacity_that_holds_all_equals_dropless_and_a_small_one_counts_what_it_drops(x_BTD):
    facts = KINDS["qwen3_moe"]
    params = make_params(facts)

    def run(capacity):
        module = layer(facts, expert_capacity=capacity)
        return module.apply({"params": params}, x_BTD, DenseContext(), mutable=["router"])

    free, _ = run(None)
    ample, sums = run(8 / 3)
    np.testing.assert_allclose(ample, free, rtol=0, atol=1e-6 * np.abs(free).max())
    assert sums["router"]["dropped"] == 0
    # A quarter of an even share is ⌈0.25 · 3 · 9 / 8⌉ = 1 token an expert and row, so at most 8 choices of 27 a row.
    small, sums = run(0.25)
    taken = sum(min(np.sum(route(x_BTD[b:b + 1], params["router"], None, facts)[1] == e), 1)
                for b in range(B) for e in range(8))
    assert sums["router"]["dropped"] == B * T * 3 - taken
    assert sums["router"]["assigned"].sum() == B * T * 3
    assert np.abs(small - free).max() > 0.1


def paged(positions) -> PagedContext:
    return PagedContext(jnp.asarray(positions, jnp.int32), jnp.zeros(len(positions), jnp.int32),
                        decode_rows=len(positions), chunk=1)


def test_a_serving_step_never_drops_and_its_tokens_do_not_change_one_another(x_BTD):
    facts = KINDS["deepseek_v3"]
    params = make_params(facts)
    module = layer(facts, expert_capacity=0.1)
    run = jax.jit(lambda x, context: module.apply({"params": params}, x, context))
    row = x_BTD[:1]
    expected = reference(facts, params, row)
    np.testing.assert_allclose(run(row, paged(range(T))), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    # Every third token is padding full of NaN, the others are alone with other neighbours: the same result.
    is_token = np.arange(T) % 3 > 0
    mixed = run(np.where(is_token[None, :, None], row, np.nan), paged(np.where(is_token, 7, -1)))
    np.testing.assert_allclose(mixed[0, is_token], expected[0, is_token], rtol=0, atol=2e-6 * np.abs(expected).max())


def test_balance_loss_and_its_gradient_are_those_of_the_formula_over_tokens(x_BTD):
    """`transformers`' load_balancing_loss_func written out: softmax, counts of the top k, means without padding."""
    facts = KINDS["qwen3_moe"]
    params = make_params(facts)
    segments = jnp.asarray(np.arange(T) < [[T], [4]], jnp.int32)

    def ours(router):
        _, sown = layer(facts).apply({"params": params | {"router": router}}, x_BTD, DenseContext(segments),
                                     mutable=["router"])
        return balance_loss({name: value[None] for name, value in sown["router"].items()})

    x_ND = x_BTD[np.asarray(segments) > 0]

    def theirs(router):
        probability_NE = jax.nn.softmax(x_ND @ router)
        count_E = jnp.bincount(jax.lax.top_k(probability_NE, 3)[1].reshape(-1), length=8)
        return 8 * jnp.sum(count_E / len(x_ND) * probability_NE.mean(0))

    got, expected = (jax.jit(jax.value_and_grad(f))(params["router"]) for f in (ours, theirs))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=2e-6 * np.abs(expected[1]).max())


def test_router_sums_come_out_of_every_layer_in_order():
    """Scanned and unrolled, with remat, and with dense layers between."""
    facts = dataclasses.replace(KINDS["mixtral"], balance_weight=0.1)
    c = config(facts, num_layers=5, mlp_pattern=("dense", "experts", "experts", "dense", "experts"))
    params = jax.jit(lambda key: models.init_params(models.build(c), key))(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 40)

    def sums(execution, params):
        run = jax.jit(lambda p: models.build(c, execution).apply({"params": p}, tokens, mutable=["router"]))
        logits, sown = run(params)
        return logits, models.router_by_layer(sown["router"], c)

    logits, scanned = sums(Execution(remat="full"), params)
    unrolled_logits, unrolled = sums(Execution(scan_layers=False), models.unstack(params, c))
    np.testing.assert_allclose(logits, unrolled_logits, rtol=0, atol=1e-5)
    assert scanned["assigned"].shape == (3, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scanned, unrolled)
    assert np.ptp(scanned["assigned"], axis=0).any(), "layers that all look the same would show no order"
