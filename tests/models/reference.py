"""The decoder written out again in float64 NumPy, position by position, from the papers' formulas."""

from __future__ import annotations

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x, position, theta):
    """x: [heads, K]. The pair (i, i + K/2) as a complex number times e^(i · angle)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(q, keys, values):
    """q: [H, K]; keys, values: [S, G, K]: one query position over all it may see."""
    heads, width = q.shape
    per_group = heads // keys.shape[1]
    out = np.empty_like(q)
    for h in range(heads):
        g = h // per_group
        scores = keys[:, g] @ q[h] / np.sqrt(width)
        p = np.exp(scores - scores.max())
        out[h] = (p / p.sum()) @ values[:, g]
    return out


def logits(config, params, tokens):
    """float64 logits [T, V] of one document."""
    p = {k: v for k, v in params.items()}

    def f64(x):
        return np.asarray(x, np.float64)

    table = f64(p["embed"]["embedding"])
    x = table[np.asarray(tokens)]
    for i in range(config.num_layers):
        layer = p["layers"]
        a, m = layer["attention"], layer["mlp"]
        y = rms_norm(x, f64(layer["attention_norm"]["scale"][i]), config.norm_eps)
        q = np.einsum("td,dhk->thk", y, f64(a["q"][i]))
        k = np.einsum("td,dgk->tgk", y, f64(a["k"][i]))
        v = np.einsum("td,dgk->tgk", y, f64(a["v"][i]))
        q = np.stack([rotate(q[t], t, config.rope_theta) for t in range(len(x))])
        k = np.stack([rotate(k[t], t, config.rope_theta) for t in range(len(x))])
        out = np.stack([attend(q[t], k[:t + 1], v[:t + 1]) for t in range(len(x))])
        x = x + np.einsum("thk,hkd->td", out, f64(a["o"][i]))
        y = rms_norm(x, f64(layer["mlp_norm"]["scale"][i]), config.norm_eps)
        gate, up = y @ f64(m["gate"][i]), y @ f64(m["up"][i])
        x = x + (gate / (1 + np.exp(-gate)) * up) @ f64(m["down"][i])
    x = rms_norm(x, f64(p["final_norm"]["scale"]), config.norm_eps)
    return x @ (table.T if config.tie_embeddings else f64(p["unembed"]))
