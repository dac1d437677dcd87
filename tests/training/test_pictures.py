from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models import Execution
from llm_jax.models.attention_maps import attention_maps
from llm_jax.training import pictures
from tests.training.common import MODEL

WINDOWED = dataclasses.replace(MODEL, attention_pattern=("local", "global"), sliding_window=4)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = models.abstract_params(models.build(WINDOWED))
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / max(s.shape[-2:]) ** 0.5, shapes)


def test_a_histogram_is_numpys():
    x = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    found = jax.device_get(jax.jit(pictures.histogram)(x))
    counts, limits = np.histogram(x, pictures.BUCKETS)
    assert found["counts"].sum() == x.size and found["low"] == x.min() and found["high"] == x.max()
    assert np.abs(found["counts"] - counts).max() <= 1  # a value on a limit may fall on either side
    np.testing.assert_allclose([found["sum"], found["squares"]], [x.sum(), np.square(x).sum()], rtol=1e-4)
    np.testing.assert_allclose(limits[[0, -1]], [found["low"], found["high"]])
    assert jax.device_get(pictures.histogram(jnp.ones(7)))["counts"].sum() == 7


def test_histograms_are_of_the_layers_that_were_asked_for(params):
    found = jax.device_get(jax.jit(lambda p: pictures.histograms(p, WINDOWED, (1,)))(params))
    split = models.unstack(params, WINDOWED)
    assert {name.split("/")[0] for name in found} == {"01", "embed", "final_norm", "unembed"}
    q = np.asarray(split["layers_1"]["attention"]["q"])
    assert found["01/attention/q"]["low"] == q.min() and found["01/attention/q"]["counts"].sum() == q.size
    assert not any("slot" in name for name in found)
    assert pictures.chosen((0, -1, 1), MODEL) == (0, 1)
    with pytest.raises(UserError, match="there is no layer 2 among 2"):
        pictures.chosen((2,), MODEL)


def test_maps_are_what_the_model_attends_with(params):
    """Rows sum to 1, see nothing ahead and nothing beyond a window; and times the values they give what the model's own
    attention does: its hidden state after one layer."""
    tokens_T = np.arange(12, dtype=np.int32) + 5
    maps = jax.device_get(jax.jit(lambda p: attention_maps(p, tokens_T, WINDOWED, (0, 1)))(params))
    ahead = np.triu(np.ones((12, 12), bool), 1)
    for weights_HTT in maps.values():
        np.testing.assert_allclose(weights_HTT.sum(-1), 1, rtol=1e-5)
        assert (weights_HTT[:, ahead] == 0).all()
    beyond = np.tril(np.ones((12, 12), bool), -4)
    assert (maps[0][:, beyond] == 0).all() and (maps[1][:, beyond] > 0).all()

    one = dataclasses.replace(WINDOWED, num_layers=1, attention_pattern=("local",))
    layer = models.unstack(params, WINDOWED)["layers_0"]
    x_TD = np.asarray(params["embed"]["table" if "table" in params["embed"] else "embedding"], np.float64)[tokens_T]
    normed = x_TD / np.sqrt(np.mean(np.square(x_TD), -1, keepdims=True) + one.norm_eps)
    normed = normed * np.asarray(layer["attention_norm"]["scale"], np.float64)
    v_THK = np.repeat(np.einsum("td,dgk->tgk", normed, np.asarray(layer["attention"]["v"], np.float64)), 2, axis=1)
    out_THK = np.einsum("hts,shk->thk", maps[0].astype(np.float64), v_THK)
    attended = np.einsum("thk,hkd->td", out_THK, np.asarray(layer["attention"]["o"], np.float64))
    model = models.build(WINDOWED, Execution(scan_layers=False))
    _, kept = model.apply({"params": models.unstack(params, WINDOWED)}, tokens_T[None],
                          capture_intermediates=lambda module, _: module.name == "attention", mutable=["intermediates"])
    own = kept["intermediates"]["layers_0"]["attention"]["__call__"][0][0]
    np.testing.assert_allclose(attended, np.asarray(own)[0], atol=2e-5)


def test_a_picture_is_dark_where_weight_is_and_grey_ahead():
    weights_HTT = np.zeros((3, 8, 8), np.float32)
    weights_HTT[:, np.arange(8), np.arange(8)] = 1.0  # each token attends to itself alone
    pixels = pictures.draw_maps(weights_HTT)
    scale, gap = 24, 10
    square = pixels[gap + 14:gap + 14 + 8 * scale, gap:gap + 8 * scale][scale // 2::scale, scale // 2::scale]
    assert (square[np.arange(8), np.arange(8)] == pictures._RAMP[-1]).all()
    assert (square[np.triu_indices(8, 1)] == pictures._FUTURE).all()
    assert (square[np.tril_indices(8, -1)] == 255).all()
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(pictures.to_png(pixels)))), pixels)
