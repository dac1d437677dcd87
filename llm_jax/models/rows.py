"""Rows whose tokens are cut among devices: what the activation rules in force say of them, the order in which their
tokens lie, and attention among them.

Wherever the rules divide "length", a row's tokens lie in the order of `parallel.sequence.row_order`. Everything but
attention looks at a token alone, or at its position, which is given; so it is enough that a batch is brought into that
order once (`laid_out`, in which `objectives.next_token` calls the model), its targets with it. A model that is called
outside of it, whose rows would be in any other order, refuses.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.kernels.attention import DenseContext
from llm_jax.kernels.attention import attention as whole_attention
from llm_jax.models.activations import constrained, mesh_axes
from llm_jax.parallel.sequence import RowCut, row_attention, row_order

Array = jax.Array

_is_laid_out = contextvars.ContextVar("is_laid_out", default=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CutContext(DenseContext):
    """Rows that attend to themselves, cut among devices.

    Attributes:
      cut: how; static.
      way: "ring" or "gather", see `parallel.sequence.row_attention`; static.
    """

    cut: RowCut | None = dataclasses.field(default=None, metadata={"static": True})
    way: str = dataclasses.field(default="ring", metadata={"static": True})


def row_cut() -> RowCut | None:
    """How the rules in force cut rows [B, T, H, K] on the mesh that is set; None where each token of a row is on the
    same device."""
    mesh, axes = jax.sharding.get_abstract_mesh(), mesh_axes("length")
    if mesh.empty or not axes or mesh.shape[axes[0]] == 1:
        return None
    return RowCut(axes[0], mesh.shape[axes[0]], mesh_axes("batch"), mesh_axes("activation_heads"))


def laid_out_cut() -> RowCut | None:
    """`row_cut` of rows that a model is given.

    Raises:
      UserError: they are cut, and nobody has brought them into the order for it.
    """
    cut = row_cut()
    if cut is not None and not _is_laid_out.get():
        raise UserError(f"the rules in force divide the tokens of a row among {cut.parts} devices ({cut.axis}), and "
                        "these rows are not in the order for that: call the model inside of `models.rows.laid_out`, as "
                        "`objectives.next_token` does, or leave MeshConfig.sequence at 1")
    return cut


@contextlib.contextmanager
def laid_out(batch: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """A batch as the rules in force lay it out: as it is, or its tokens in the order in which devices share a row's.

    Within the context a model may be called with such rows; what it gives is in their order.

    Args:
      batch: arrays [B, T]. Neighbours may be no neighbours afterwards, so what is told by the next token has to be
        there already: `targets` and `weights`. Without `positions` they are 0, 1, 2, … along the row.

    Raises:
      UserError: the rules can't divide rows of this length.
    """
    token = _is_laid_out.set(True)
    try:
        yield _in_order(batch)
    finally:
        _is_laid_out.reset(token)


def _in_order(batch: Mapping[str, Array]) -> dict[str, Array]:
    cut, T = row_cut(), batch["tokens"].shape[1]
    if cut is None:
        return dict(batch)
    if T % (2 * cut.parts):
        raise UserError(f"rows of {T} tokens can't be divided among {cut.parts} devices ({cut.axis}), each with two "
                        f"stretches of a row; choose a multiple of {2 * cut.parts}")
    order = row_order(T, cut.parts)
    along = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), batch["tokens"].shape)
    return {name: constrained(x_BT[:, order], ("batch", "length"))
            for name, x_BT in ({"positions": along} | dict(batch)).items()}


def attention(q_BTHK: Array, k_BSGK: Array, v_BSGV: Array | None, context: Any, cache: Any = None,
              **options: Any) -> tuple[Array, Any]:
    """`kernels.attention.attention`, whose arguments these are, also of rows that are cut among devices."""
    if not isinstance(context, CutContext):
        return whole_attention(q_BTHK, k_BSGK, v_BSGV, context, cache, **options)
    bias_HTS = options.pop("bias_HTS", None)
    if bias_HTS is not None or context.key_segment_ids_BS is not None or q_BTHK.shape[1] != k_BSGK.shape[1]:
        raise UserError("attention with a bias, or to other tokens, can't be cut along the tokens of a row: leave "
                        "MeshConfig.sequence at 1")
    return row_attention(q_BTHK, k_BSGK, v_BSGV, context.segment_ids_BT, context.cut, way=context.way,
                         causal=context.causal, **options), cache
