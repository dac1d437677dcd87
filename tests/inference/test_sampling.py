"""Draws against distributions computed with NumPy sorts, and their independence of everything but the request."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.inference import penalties, sampling
from llm_jax.inference.sampling import SamplingBatch, greedy, row_key, sample

R, V = 2048, 300
draw = jax.jit(sample)
_draw_from_all = jax.jit(lambda logits_RV, b: sample(logits_RV, b))


def batch(rows=R, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, number=0, positions=None):
    """Every row asks for the same, each at a position of its own."""
    def full(value, dtype):
        return np.full(rows, value, dtype)

    keys = [row_key(seed, number, position) for position in (range(rows) if positions is None else positions)]
    return SamplingBatch(full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32),
                         full(min_p, np.float32), np.array(keys, np.uint32))


def expected(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution, by sorting, in float64."""
    order = np.argsort(-logits, kind="stable")
    z = np.asarray(logits, np.float64)[order] / temperature
    p = np.exp(z - z.max())
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    keep = (np.cumsum(p) - p < top_p) & (p >= min_p * p[0])
    p = np.where(keep, p, 0)
    out = np.zeros_like(p)
    out[order] = p / p.sum()
    return out


def assert_drawn_from(p, tokens):
    """Pearson's test; tokens expected fewer than ten times are counted together."""
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0, "a token outside the allowed set was drawn"
    likely = p * len(tokens) >= 10
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(p[likely], p[~likely].sum()) * len(tokens)
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert len(wanted) == 1 or stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.fixture(scope="module")
def logits_V():
    return np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)


@pytest.fixture
def draw_from_all(monkeypatch):
    """The draw that looks at no candidates first, as on a GPU."""
    monkeypatch.setattr(sampling, "CANDIDATES", 0)
    return _draw_from_all


# Within the candidates, and (k over 64; a flat nucleus; no truncation) beyond them.
WITHIN = [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.7}, {"temperature": 0.5, "top_p": 0.9},
          {"top_k": 30, "top_p": 0.9, "min_p": 0.2}, {"temperature": 1.5, "top_p": 0.95, "min_p": 0.3}]
BEYOND = [{"top_k": 100}, {"temperature": 2.0, "top_p": 0.9}, {"top_k": 150, "top_p": 0.8}, {"temperature": 0.8}, {},
          {"min_p": 0.1}, {"top_k": 150, "top_p": 0.75, "min_p": 0.05},
          {"temperature": 3.0, "top_k": 200, "top_p": 0.9, "min_p": 0.15}, {"top_k": V + 5}]


@pytest.mark.parametrize("case", WITHIN + BEYOND, ids=str)
def test_distribution(case, logits_V):
    rows = np.tile(logits_V, (R, 1))
    tokens = np.concatenate([np.asarray(draw(rows, batch(**case, seed=s))[0]) for s in range(8)])
    assert_drawn_from(expected(logits_V, **case), tokens)


def test_both_ways_to_the_allowed_set_draw_the_same(logits_V, draw_from_all):
    """Equal logits among them: of these, the first ids are allowed first, whichever way."""
    for case in WITHIN + BEYOND:
        for logits in (logits_V, np.round(logits_V)):
            rows = np.tile(logits, (R, 1))
            fast, slow = (np.asarray(f(rows, batch(**case))[0]) for f in (draw, draw_from_all))
            np.testing.assert_array_equal(slow, fast, str(case))
            assert (expected(logits, **case)[slow] > 0).all()


def test_masked_tokens_are_never_drawn_and_count_for_nothing(logits_V, draw_from_all):
    rng = np.random.default_rng(4)
    for allowed in (1, 2, 10, 100):
        masked = np.full(V, -np.inf, np.float32)
        ids = rng.choice(V, allowed, replace=False)
        masked[ids] = logits_V[ids]
        rows = np.tile(masked, (R, 1))
        for case in ({}, {"top_k": 5}, {"top_k": 120}, {"top_p": 0.9}, {"top_p": 0.999999}, {"min_p": 0.01},
                     {"top_k": 80, "top_p": 0.7}):
            for function in (draw, draw_from_all):
                tokens, logprobs = map(np.asarray, function(rows, batch(**case)))
                assert_drawn_from(expected(masked, **case), tokens)
                assert np.isfinite(logprobs).all()


def test_rows_with_nothing_to_draw_hurt_nobody(logits_V, draw_from_all):
    rows = np.tile(logits_V, (R, 1))
    bad = rows.copy()
    bad[3], bad[5, ::7], bad[9], bad[11, 4] = -np.inf, np.nan, np.nan, np.inf
    good = np.setdiff1d(np.arange(R), (3, 5, 9, 11))
    for case in ({"temperature": 0.0}, {}, {"top_k": 5}, {"top_k": 90}, {"top_p": 0.9}, {"top_k": 90, "top_p": 0.9}):
        for function in (draw, draw_from_all):
            tokens, logprobs = map(np.asarray, function(bad, batch(**case)))
            np.testing.assert_array_equal(tokens[good], np.asarray(function(rows, batch(**case))[0])[good])
            assert tokens[3] == 0 and logprobs[3] == -np.inf and tokens[11] == 4
            assert (tokens >= 0).all() and (tokens < V).all()


def test_a_draw_depends_on_seed_sample_and_position_alone(logits_V):
    rng = np.random.default_rng(1)
    mine = batch(1, 0.9, top_p=0.8, seed=2**40 + 3, number=2, positions=[17])
    alone = int(draw(logits_V[None], mine)[0][0])
    others = batch(R - 1, 1.3, seed=5)
    for place in (0, 7, R - 1):
        mixed = jax.tree.map(lambda a, b, at=place: np.insert(np.asarray(b), at, a[0], axis=0), mine, others)
        rows = np.insert(rng.normal(size=(R - 1, V)).astype(np.float32), place, logits_V, axis=0)
        assert int(draw(rows, mixed)[0][place]) == alone
    for change in ({"seed": 4}, {"number": 3}, {"positions": range(R, 2 * R)}):
        changed = np.asarray(draw(np.tile(logits_V, (R, 1)), batch(**change))[0])
        same = np.asarray(draw(np.tile(logits_V, (R, 1)), batch())[0])
        assert (changed == same).mean() < 0.2


def test_rows_that_ask_for_different_things_draw_what_each_draws_among_its_like(draw_from_all):
    cases = [*WITHIN, *BEYOND, {"temperature": 0.0}]
    of_row = np.arange(R) % len(cases)
    alike = [batch(**case) for case in cases]
    mixed = jax.tree.map(lambda *leaves: np.stack(leaves)[of_row, np.arange(R)], *alike)
    rows = np.random.default_rng(3).normal(0, 2, (R, V)).astype(np.float32)
    for function in (draw, draw_from_all):
        together = np.asarray(function(rows, mixed)[0])
        for i, b in enumerate(alike):
            np.testing.assert_array_equal(together[of_row == i], np.asarray(function(rows, b)[0])[of_row == i])


def test_a_draft_with_the_same_noise_is_accepted_and_leaves_the_distribution(logits_V):
    """Daliri et al. 2024: the same noise for both makes them agree at (1 - TV) / (1 + TV) at least; no coupling agrees
    at more than 1 - TV. The draft's vocabulary is padded to less."""
    rng = np.random.default_rng(5)
    for spread in (0.3, 1.0):
        target, draft = logits_V, (logits_V + rng.normal(0, spread, V).astype(np.float32))[:V - 20]
        p, q = expected(target), np.append(expected(draft), np.zeros(20))
        distance = np.abs(p - q).sum() / 2
        batches = [batch(seed=s) for s in range(8)]
        drawn = np.concatenate([np.asarray(draw(np.tile(target, (R, 1)), b)[0]) for b in batches])
        proposed = np.concatenate([np.asarray(draw(np.tile(draft, (R, 1)), b)[0]) for b in batches])
        assert_drawn_from(p, drawn)
        assert_drawn_from(q, proposed)
        noise = 4 * 0.5 / np.sqrt(len(drawn))
        assert (1 - distance) / (1 + distance) - noise < (drawn == proposed).mean() < 1 - distance + noise


def test_greedy_rows_are_greedy_among_sampled_ones_and_logprobs_are_the_models(logits_V):
    rows = np.random.default_rng(2).normal(size=(R, V)).astype(np.float32)
    b = batch()
    b.temperature_R[::2] = 0
    tokens, logprobs = draw(rows, b)
    np.testing.assert_array_equal(np.asarray(tokens)[::2], rows[::2].argmax(-1))
    exact = rows - np.log(np.exp(rows.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, exact[np.arange(R), tokens], atol=1e-5)


def test_greedy_takes_the_first_of_equals():
    rows = np.round(np.random.default_rng(6).normal(size=(R, V))).astype(np.float32)
    tokens, logprobs = jax.jit(greedy)(rows)
    np.testing.assert_array_equal(tokens, rows.argmax(-1))
    exact = rows - np.log(np.exp(rows.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, exact.max(-1), atol=1e-5)
    np.testing.assert_array_equal(draw(rows, batch(temperature=0.0))[0], tokens)


def test_a_greedy_batch_runs_no_sampling_code():
    """All of it is behind a condition."""
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((4, V)), batch(4))
    outside = {str(e.primitive) for e in jaxpr.eqns}
    assert "cond" in outside and not outside & {"top_k", "shift_left", "sort", "while", "log1p"}

    def primitives(j):
        for e in j.eqns:
            yield str(e.primitive)
            for value in e.params.values():
                for inner in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        yield from primitives(getattr(inner, "jaxpr", inner))

    assert {"top_k", "shift_left", "while", "log1p"} <= set(primitives(jaxpr.jaxpr))


def test_nothing_sorts_the_vocabulary():
    """In what XLA makes of it: it takes a top-k for a sort as soon as the two best are sliced from the ten best."""
    def draw_and_tell(x, b):
        ids, logprobs = penalties.top(x, 10)
        return sample(x, b), ids[:, :2], logprobs

    text = jax.jit(draw_and_tell).lower(jnp.zeros((4, V)), batch(4)).compile().as_text()
    assert text.count('custom_call_target="TopK"') == 2 and " sort(" not in text


def test_ties_and_extremes():
    rows = np.zeros((R, V), np.float32)
    rows[:, 3], rows[:, 5] = 60.0, 50.0
    # No overflow to a tie at inf, no 0 / 0.
    for case in ({}, {"temperature": 1e-37}, {"temperature": 1e-44}, {"temperature": 100.0, "min_p": 1.0}):
        assert (np.asarray(draw(rows, batch(**case))[0]) == 3).all()
    flat = np.zeros((R, V), np.float32)  # every token ties: a nucleus of nearly all, no crash, no bias to the first
    assert_drawn_from(expected(flat[0], top_p=0.99), np.asarray(draw(flat, batch(top_p=0.99))[0]))


def test_the_mass_of_the_best():
    rng = np.random.default_rng(8)
    x = rng.normal(0, 3, (40, V))
    x[10:20] = np.round(x[10:20])
    x[20:25, 50:] = -np.inf
    x[25:30] *= 1e4
    x[30:35] = 0
    x = (x - x.max(-1, keepdims=True)).astype(np.float32)
    for k in (1, 2, 49, 50, 60, 299, 300, 1000):
        mass = jax.jit(sampling._mass_of_best)(x, np.full(40, k, np.int32), np.ones(40, bool))
        exact = np.exp(-np.sort(-x.astype(np.float64))[:, :k]).sum(-1)
        np.testing.assert_allclose(mass, exact, rtol=2e-6)


def test_the_hash_is_threefry():
    """Known answers of Random123's own test, and JAX's implementation."""
    words = sampling.threefry_2x32(np.zeros((1, 2), np.uint32), jnp.zeros(1, jnp.uint32))
    assert [int(w[0]) for w in words] == [0x6B200159, 0x99BA4EFE]
    keys = np.array([[0x13198A2E, 0x03707344], [5, 2**32 - 1]], np.uint32)
    counter = np.arange(1000, dtype=np.uint32) * 7919
    first, _ = sampling.threefry_2x32(keys[:, :, None], jnp.asarray(counter))
    for row, key in enumerate(keys):
        folded = [jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), c) for c in counter[:20]]
        np.testing.assert_array_equal([jax.random.key_data(k)[0] for k in folded], first[row, :20])


def test_noise_is_gumbel_independent_and_by_token_id():
    keys = np.array([row_key(1, 0, i) for i in range(256)], np.uint32)
    gumbel = jax.jit(sampling.gumbel, static_argnums=1)
    noise = np.asarray(gumbel(keys, 1000))
    np.testing.assert_array_equal(gumbel(keys, 300), noise[:, :300])
    ids = np.random.default_rng(9).integers(0, 1000, (256, 50))
    np.testing.assert_array_equal(jax.jit(sampling.gumbel_of)(keys, ids), np.take_along_axis(noise, ids, axis=1))
    uniform = np.exp(-np.exp(-noise.astype(np.float64)))
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
    # Neither along a row, nor between the two words of a block, nor from one position to the next.
    for a, b in ((uniform[:, :-1], uniform[:, 1:]), (uniform[:, :128], uniform[:, 128:256]),
                 (uniform[:-1], uniform[1:])):
        cells = np.histogram2d(a.ravel(), b.ravel(), bins=16, range=((0, 1), (0, 1)))[0]
        assert stats.chisquare(cells.ravel()).pvalue > 1e-3
