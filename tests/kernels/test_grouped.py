"""The two ways of giving tokens to experts, against each expert computing every token, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.capacity import capacity_mlp, expert_capacity
from llm_jax.kernels.grouped import block_rows, grouped_mlp

D, F = 12, 20


def every_expert(x, chosen, weight, weights):
    """Σ_e (the weight that x gives e) · e(x), in the arrays' own dtype."""
    gate, up, down = weights
    out = 0.0
    for e in range(gate.shape[0]):
        share = jnp.sum(jnp.where(chosen == e, weight, 0), axis=-1, keepdims=True)
        out = out + share * ((jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e])
    return out


def arrays(seed: int, tokens: tuple[int, ...], num_experts: int, per_token: int):
    random = np.random.default_rng(seed)
    chosen = np.argsort(random.random((*tokens, num_experts)), axis=-1)[..., :per_token].astype(np.int32)
    weights = tuple(random.normal(size=s) for s in ((num_experts, D, F), (num_experts, D, F), (num_experts, F, D)))
    return random.normal(size=(*tokens, D)), chosen, random.random((*tokens, per_token)), weights


def assert_same(compute, x, chosen, weight, weights):
    """Value, and gradients with respect to tokens, routing weights and matrices, to float32 rounding."""
    probe = np.random.default_rng(9).normal(size=x.shape)

    def both(f, *inputs):
        return f(*inputs), jax.grad(lambda *a: jnp.sum(f(*a) * probe), (0, 1, 2))(*inputs)

    small = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, weight, weights))
    got = jax.jit(lambda *a: both(lambda x, w, m: compute(x, jnp.asarray(chosen), w, m), *a))(*small)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, weight, weights))
        expected = jax.device_get(both(lambda x, w, m: every_expert(x, chosen, w, m), *wide))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert b.dtype == np.float64 and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def spread(n, num_experts, per_token, kind):
    x, chosen, weight, weights = arrays(n, (n,), num_experts, per_token)
    if kind == "one expert":
        chosen = np.broadcast_to(np.arange(per_token), chosen.shape).copy()
    if kind == "padding":
        chosen[1::2] = num_experts
        chosen[0, 0] = -1
    return x, chosen, weight, weights


@pytest.mark.parametrize("n, num_experts, per_token, kind", [
    (1, 8, 2, "even"), (5, 4, 1, "even"), (40, 8, 3, "even"), (300, 4, 2, "even"), (300, 4, 2, "one expert"),
    (37, 8, 2, "padding")])
def test_grouped_equals_every_expert_computing_every_token(n, num_experts, per_token, kind):
    x, chosen, weight, weights = spread(n, num_experts, per_token, kind)
    assert_same(lambda *a: grouped_mlp(*a, jax.nn.silu), x, chosen, weight, weights)


def test_tokens_that_go_nowhere_get_exactly_nothing_and_touch_nothing():
    x, chosen, weight, weights = spread(37, 8, 2, "padding")
    small = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, weight, weights))
    poisoned = small[0].at[1::2].set(jnp.nan)
    run = jax.jit(lambda x: grouped_mlp(x, jnp.asarray(chosen), small[1], small[2], jax.nn.silu))
    np.testing.assert_array_equal(run(poisoned), run(small[0]))
    assert not np.any(run(poisoned)[1::2])


def test_blocks_follow_the_load():
    # Fewer rows than experts: one at a time. Otherwise a power of two, a quarter to a half of an even share, in limits.
    assert [block_rows(*x) for x in ((2, 8), (8, 8), (64, 8), (1024, 8), (1600, 8), (1 << 20, 8))] == [
        1, 8, 8, 64, 64, 256]


@pytest.mark.parametrize("factor, expected", [(1.0, 8), (1.25, 10), (1.3, 11), (9.0, 32)])
def test_capacity_by_hand(factor, expected):
    assert expert_capacity(factor, 32, 2, 8) == expected


def test_capacity_that_is_large_enough_equals_every_expert():
    x, chosen, weight, weights = arrays(3, (3, 16), 4, 2)
    chosen[1, 10:] = 4  # padding
    assert_same(lambda *a: capacity_mlp(*a, jax.nn.silu, 16), x, chosen, weight, weights)


def surviving(chosen, num_experts, capacity):
    """The choices for which there is room: in each row all first choices before all second ones, by position."""
    kept = np.zeros(chosen.shape, bool)
    for row in range(chosen.shape[0]):
        room = np.full(num_experts, capacity)
        for rank in range(chosen.shape[2]):
            for position in range(chosen.shape[1]):
                expert = chosen[row, position, rank]
                if expert < num_experts and room[expert]:
                    room[expert] -= 1
                    kept[row, position, rank] = True
    return kept


def test_small_capacity_drops_late_and_low_ranked_choices():
    x, chosen, weight, weights = arrays(4, (3, 16), 4, 2)
    chosen[2, ::2] = 4  # padding among the tokens takes nobody's place
    kept = surviving(chosen, 4, 5)
    assert 0 < kept.sum() < (chosen < 4).sum() and not (kept.any(-1) | (chosen == 4).all(-1)).all()
    assert_same(lambda x, c, w, m: capacity_mlp(x, jnp.asarray(chosen), w, m, jax.nn.silu, 5),
                x, np.where(kept, chosen, 4), weight, weights)
