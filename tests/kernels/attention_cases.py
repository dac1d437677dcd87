"""Attention of whole rows and its gradients in float64 NumPy, and cases that every backend is held to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.attention import DenseContext, dense_attention

SCALE = 0.4  # not K^-0.5: what is asked for must be what is used


@dataclasses.dataclass(frozen=True)
class Case:
    """Two rows; `segments` are "none", "packed" (documents, then padding), "keys" or "both" (cross-attention)."""

    T: int = 37
    S: int = 37
    H: int = 4
    G: int = 2
    K: int = 8
    V: int = 8
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    segments: str = "none"

    def options(self):
        return {"scale": SCALE, "window": self.window, "soft_cap": self.soft_cap}

    def inputs(self, seed=0, dtype=np.float32):
        """(q, k, v, gradient of the output); scores reach several units, so that a soft cap bends them."""
        rng = np.random.default_rng(seed)
        shapes = (self.T, self.H, self.K), (self.S, self.G, self.K), (self.S, self.G, self.V), (self.T, self.H, self.V)
        return [jnp.asarray(1.5 * rng.normal(size=(2, *shape)), dtype) for shape in shapes]

    def segment_ids(self):
        """Of queries and of keys, as `DenseContext` takes them."""
        def documents(length, *ends):
            return np.stack([np.searchsorted(np.array(e) * length // 37, np.arange(length), side="right") + 1
                             for e in ends]).astype(np.int32)

        def padded(ids, count):
            return np.where(np.arange(ids.shape[1]) < ids.shape[1] - count, ids, 0).astype(np.int32)

        ends = (5, 18), (30, 31)
        if self.segments == "packed":
            return padded(documents(self.T, *ends), 3), None
        if self.segments == "keys":
            return None, padded(documents(self.S, (), ()), 6)
        if self.segments == "both":  # the first row's third document has no keys: its queries see nothing
            keys = padded(documents(self.S, (9, 37), (20, 25)), 4)
            return documents(self.T, *ends), keys
        return None, None

    def context(self, backend):
        ids = (None if x is None else jnp.asarray(x) for x in self.segment_ids())
        return DenseContext(*ids, causal=self.causal, backend=backend)

    def allowed(self):
        """[2, T, S]."""
        t, s = np.arange(self.T)[:, None], np.arange(self.S)
        allowed = np.ones((2, self.T, self.S), bool)
        if self.causal:
            allowed &= (s <= t) & (t - s < (self.window or np.inf))
        mine, theirs = self.segment_ids()
        if mine is not None:
            return allowed & (mine[:, :, None] == (mine if theirs is None else theirs)[:, None])
        return allowed if theirs is None else allowed & (theirs != 0)[:, None]

    def expected(self, seed=0):
        """The output and the gradients of q, k and v."""
        return expected(*self.inputs(seed), self.allowed(), SCALE, self.soft_cap)


def expected(q, k, v, dout, allowed, scale, soft_cap=None):
    """Output and gradients by their formulas; a query that sees nothing gives all values the same weight."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) * scale
    slope = np.ones_like(scores)
    if soft_cap is not None:
        bent = np.tanh(scores / soft_cap)
        scores, slope = soft_cap * bent, 1 - bent**2
    allowed = allowed[:, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
    weights = np.where(allowed.any(-1, keepdims=True), weights, 1.0)
    p = weights / weights.sum(-1, keepdims=True)
    dp = np.einsum("bthv,bshv->bhts", dout, v)
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True)) * slope * allowed * scale
    dk, dv = np.einsum("bhts,bthk->bshk", ds, q), np.einsum("bhts,bthv->bshv", p, dout)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in (dk, dv))
    return np.einsum("bhts,bshv->bthv", p, v), np.einsum("bhts,bshk->bthk", ds, k), dk, dv


def results(attend, q, k, v, dout):
    """The output and the gradients of q, k and v of attend(q, k, v), compiled in one program."""
    def both(q, k, v, dout):
        out, transpose = jax.vjp(attend, q, k, v)
        return out, *transpose(dout)

    return jax.jit(both)(q, k, v, dout)


def assert_close(got, want, tolerance):
    """Relative to each array's largest entry."""
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(2.0, np.abs(b).max()),
                                   err_msg=name)


def through(case, backend, seed=0, dtype=np.float32):
    """A case's results by `dense_attention`."""
    context = case.context(backend)
    return results(lambda q, k, v: dense_attention(q, k, v, context, **case.options()), *case.inputs(seed, dtype))
