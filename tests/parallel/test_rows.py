"""A model whose rows are cut among devices takes them in their order, and in no other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.models.rows import laid_out
from llm_jax.parallel import rules
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from llm_jax.parallel.sequence import row_order
from tests.models.drawn import drawn_params
from tests.parallel.test_sharded_training import DECODER, batch
from tests.training.common import LENGTH, MODEL

PARTS = 4


def logits(params, rows):
    return DECODER.apply({"params": params}, rows["tokens"], rows["segment_ids"], rows["positions"])


def test_rows_that_nobody_laid_out_are_refused():
    rows, params = batch(), drawn_params(MODEL)
    whole = jax.jit(logits)(params, rows)
    with jax.set_mesh(make_mesh(MeshConfig(sequence=PARTS))), models.activation_rules(rules.ACTIVATIONS):

        def refused():
            with pytest.raises(UserError, match=r"among 4 devices \(sequence\).*not in the order for that.*"
                                                r"`models.rows.laid_out`.*MeshConfig.sequence at 1"):
                jax.eval_shape(logits, params, rows)

        refused()

        def in_their_order(params, rows):
            with laid_out(rows) as cut:
                return logits(params, cut)

        cut = jax.jit(in_their_order)(params, rows)
        with pytest.raises(UserError, match="rows of 30 tokens can't be divided among 4 devices"):
            jax.eval_shape(in_their_order, params, {name: x[:, :30] for name, x in rows.items()})
        refused()
    real = rows["segment_ids"] > 0
    order = row_order(LENGTH, PARTS)
    np.testing.assert_allclose(np.asarray(cut)[:, np.argsort(order)][real], np.asarray(whole)[real], atol=1e-4)
    assert np.abs(np.asarray(cut) - np.asarray(whole))[real].max() > 0.1, "the order is another one"


def test_where_no_row_is_cut_nothing_is_asked():
    rows, params = batch(), drawn_params(MODEL)
    with jax.set_mesh(make_mesh(MeshConfig(data=PARTS))), models.activation_rules(rules.ACTIVATIONS):
        assert jax.eval_shape(logits, params, rows).shape == (*rows["tokens"].shape, MODEL.vocab_size)
        with laid_out({name: jnp.asarray(x) for name, x in rows.items()}) as same:
            assert all((same[name] == x).all() for name, x in rows.items())
