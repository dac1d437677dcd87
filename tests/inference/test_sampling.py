"""Draws against distributions computed with NumPy sorts, and their independence of everything but the request."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.inference import sampling
from llm_jax.inference.sampling import SamplingBatch, row_key, sample

R, V = 2048, 300
draw = jax.jit(sample)


def batch(rows=R, temperature=1.0, top_k=0, top_p=1.0, seed=7, number=0, positions=None):
    """Every row asks for the same, each at a position of its own."""
    def full(value, dtype):
        return np.full(rows, value, dtype)

    keys = [row_key(seed, number, position) for position in (range(rows) if positions is None else positions)]
    return SamplingBatch(full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32),
                         np.array(keys, np.uint32))


def expected(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution, by sorting, in float64."""
    order = np.argsort(-logits, kind="stable")
    z = np.asarray(logits, np.float64)[order] / temperature
    p = np.exp(z - z.max())
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    keep = np.cumsum(p) - p < top_p
    p = np.where(keep, p, 0)
    out = np.zeros_like(p)
    out[order] = p / p.sum()
    return out


@pytest.fixture(scope="module")
def logits_V():
    return np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)


# Within the candidates, and (k over 64; a flat nucleus; no truncation) beyond them.
CASES = [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.7}, {"temperature": 0.5, "top_p": 0.9},
         {"top_k": 100}, {"temperature": 2.0, "top_p": 0.9}, {"top_k": 150, "top_p": 0.8}, {"temperature": 0.8}, {}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distribution(case, logits_V):
    p = expected(logits_V, **case)
    rows = np.tile(logits_V, (R, 1))
    tokens = np.concatenate([np.asarray(draw(rows, batch(**case, seed=s))[0]) for s in range(8)])
    counts = np.bincount(tokens, minlength=V)
    assert counts[p == 0].sum() == 0, "a token outside the allowed set was drawn"
    likely = p * len(tokens) >= 10
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(p[likely], p[~likely].sum()) * len(tokens)
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_both_ways_to_the_allowed_set_draw_the_same(case, logits_V, monkeypatch):
    """A row whose allowed tokens are among the candidates draws what the whole vocabulary would have given it."""
    rows = np.tile(logits_V, (64, 1))
    fast = np.asarray(sample(rows, batch(64, **case))[0])
    monkeypatch.setattr(sampling, "CANDIDATES", 1)
    np.testing.assert_array_equal(np.asarray(sample(rows, batch(64, **case))[0]), fast)


def test_a_draw_depends_on_seed_sample_and_position_alone(logits_V):
    rng = np.random.default_rng(1)
    mine = batch(1, 0.9, top_p=0.8, seed=2**40 + 3, number=2, positions=[17])
    alone = int(draw(logits_V[None], mine)[0][0])
    others = batch(16, 1.3, seed=5)
    for place in (0, 7, 16):
        mixed = jax.tree.map(lambda a, b, at=place: np.insert(np.asarray(b), at, a[0], axis=0), mine, others)
        rows = np.insert(rng.normal(size=(16, V)).astype(np.float32), place, logits_V, axis=0)
        assert int(draw(rows, mixed)[0][place]) == alone
    for change in ({"seed": 4}, {"number": 3}, {"positions": range(R, 2 * R)}):
        changed = np.asarray(draw(np.tile(logits_V, (R, 1)), batch(**change))[0])
        same = np.asarray(draw(np.tile(logits_V, (R, 1)), batch())[0])
        assert (changed == same).mean() < 0.2


def test_greedy_rows_are_greedy_among_sampled_ones_and_logprobs_are_the_models(logits_V):
    rows = np.random.default_rng(2).normal(size=(R, V)).astype(np.float32)
    b = batch()
    b.temperature_R[::2] = 0
    tokens, logprobs = draw(rows, b)
    np.testing.assert_array_equal(np.asarray(tokens)[::2], rows[::2].argmax(-1))
    exact = rows - np.log(np.exp(rows.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, exact[np.arange(R), tokens], atol=1e-5)


def test_a_greedy_batch_runs_no_sampling_code():
    """All of it, top_k included, is behind a condition; nothing sorts the vocabulary."""
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((4, V)), batch(4))
    outside = {str(e.primitive) for e in jaxpr.eqns}
    assert "cond" in outside and not outside & {"top_k", "random_bits", "sort", "while", "exp2"}

    def primitives(j):
        for e in j.eqns:
            yield str(e.primitive)
            for value in e.params.values():
                for inner in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        yield from primitives(getattr(inner, "jaxpr", inner))

    everything = set(primitives(jaxpr.jaxpr))
    assert "sort" not in everything and "top_k" in everything


def test_ties_and_extremes():
    rows = np.zeros((64, V), np.float32)
    rows[:, 3] = np.float32(60.0)
    assert (np.asarray(draw(rows, batch(64))[0]) == 3).all()
    rows[:, 5] = np.float32(50.0)
    assert (np.asarray(draw(rows, batch(64, temperature=1e-37))[0]) == 3).all()  # no overflow to a tie at inf
    flat = np.zeros((64, V), np.float32)  # every token ties: a nucleus of all, no crash, no bias to the first
    assert len(set(np.asarray(draw(flat, batch(64, top_p=0.99))[0]).tolist())) > 40
