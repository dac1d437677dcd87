"""What attention is told of whole rows: their documents, and how and where it is computed."""

from __future__ import annotations

import jax

from llm_jax.kernels.attention import DenseContext
from llm_jax.models.activations import mesh_axes
from llm_jax.models.config import Execution
from llm_jax.models.rows import CutContext, laid_out_cut

Array = jax.Array


def dense_context(execution: Execution, segment_ids_BT: Array | None = None, key_segment_ids_BS: Array | None = None,
                  causal: bool = True) -> DenseContext:
    """The context of whole rows (see `DenseContext`), computed as `Execution.attention` says by the activation rules in
    force; where they cut rows among devices, as `Execution.sequence_attention` says.

    Raises:
      UserError: the rules cut rows, and these are not laid out for it (`rows.laid_out`).
    """
    cut = laid_out_cut()
    if cut is not None:
        return CutContext(segment_ids_BT, key_segment_ids_BS, causal, cut=cut, way=execution.sequence_attention)
    return DenseContext(segment_ids_BT, key_segment_ids_BS, causal, backend=execution.attention,
                        batch_axes=mesh_axes("batch"), head_axes=mesh_axes("activation_heads"))
