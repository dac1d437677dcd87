"""Attention written out in float64 NumPy, one query and one head at a time."""

from __future__ import annotations

import numpy as np


def causal(window=None):
    """sees(t, s): whether query t sees key s."""
    return lambda t, s: 0 <= t - s < (window or np.inf)


def attend(q, k, v, sees, scale, soft_cap=None, bias=None):
    """[T, H, V] of q [T, H, K], k [S, G, K], v [S, G, V], bias [H, T, S]; a query that sees nothing gets NaN."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.full((*q.shape[:2], v.shape[2]), np.nan)
    for t in range(len(q)):
        seen = np.array([s for s in range(len(k)) if sees(t, s)], int)
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            scores = k[seen, g] @ q[t, h] * scale
            if bias is not None:
                scores = scores + np.asarray(bias, np.float64)[h, t, seen]
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if len(seen):
                p = np.exp(scores - scores.max())
                out[t, h] = p @ v[seen, g] / p.sum()
    return out
