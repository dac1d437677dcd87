"""One decoder; families as small differences.

Array names carry their shape, one letter an axis:

    B batch            T query position     S key position (or slot of a page)   D model width
    H query heads      G key/value heads    M query heads per kv head (H / G)    K head width
    F mlp width        V vocabulary         L layers                             E experts
    N flat tokens of a serving step         P pages                              R rows (requests) of a serving step
    W work items (a row and one of its pages)

`x_BTD` is thus activations by batch, position and width. Nothing outside this package imports `flax.linen`.
"""

from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameters import abstract_params, activation_rules, init_params, logical_axes, stack, unstack

__all__ = ["Decoder", "Execution", "ModelConfig", "abstract_params", "activation_rules", "init_params", "logical_axes",
           "stack", "unstack"]
