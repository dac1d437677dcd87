"""One decoder; families as small differences.

Array names carry their shape, one letter an axis:

    B batch            T query position     S key position (or slot of a page)   D model width
    H query heads      G key/value heads    M query heads per kv head (H / G)    K head width
    F mlp width        V vocabulary         L layers                             E experts
    N flat tokens of a serving step         P pages                              R rows (requests) of a serving step
    W work items (a row and one of its pages)                                    A experts a token is sent to

`x_BTD` is thus activations by batch, position and width. Nothing outside this package imports `flax.linen`.
"""

from llm_jax.models.config import Execution, ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.facts import Experts, Head, LatentAttention, RopeScaling
from llm_jax.models.heads import with_head
from llm_jax.models.parameters import (
    abstract_params,
    activation_rules,
    build,
    build_language_model,
    init_params,
    logical_axes,
    stack,
    unstack,
)
from llm_jax.models.routing import move_selection_biases, router_by_layer

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "Execution", "Experts", "Head", "LatentAttention", "ModelConfig",
           "RopeScaling", "abstract_params", "activation_rules", "build", "build_language_model", "init_params",
           "logical_axes", "move_selection_biases", "router_by_layer", "stack", "unstack", "with_head"]
