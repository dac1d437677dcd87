"""How much arithmetic a train step should take, worked out from the model: what a compiled program's count is held
against."""

from __future__ import annotations

import dataclasses

from llm_jax.models import Execution, ModelConfig

# (products of the size of the scores forward, backward) of ways to compute attention. Those that don't keep the scores
# make them again; splash attention and the kernels for Triton make them, and the gradient by them, in each of their two
# backward kernels.
_PRODUCTS = {"dense": (2, 4), "chunked": (2, 5), "strips": (2, 5), "cudnn": (2, 5), "triton": (2, 7),
             "splash": (2, 7)}
_BLOCK = 512  # about the size of the blocks in which kernels pass by what the mask rules out


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one train step on all devices together.

    Attributes:
      model: `ModelConfig.flops_per_token` of its tokens: what a model-FLOPs utilisation counts.
      attention: what attention computes beside that: products with what the mask rules out, and scores made again.
      recomputed: what the backward pass computes a second time (`Execution.remat`).
      slots: what experts compute beside their even share (`Execution.expert_capacity`).
    """

    model: float
    attention: float
    recomputed: float
    slots: float

    @property
    def hardware(self) -> float:
        """All of it: what the devices are expected to compute."""
        return self.model + self.attention + self.recomputed + self.slots


def step_flops(config: ModelConfig, execution: Execution, rows: int, row_length: int, attention: str) -> StepFlops:
    """Works out the arithmetic of a step.

    A matrix product of a weight costs 2 operations an entry forward and 4 backward. A causal mask rules out half of the
    products of queries and keys; kernels compute the blocks that it does not rule out whole.

    Args:
      config, execution: the model and how it is run.
      rows, row_length: the batch.
      attention: how attention is computed, one of `kernels.attention.BACKENDS` but "auto".

    Returns:
      The parts, of the whole batch. Bubbles of a pipeline are not counted.
    """
    tokens = float(rows * row_length)
    pairs, seen = _score_pairs(config, row_length, whole=attention == "dense")
    forward, backward = _PRODUCTS[attention]
    width = config.head_dim if config.latent is None else (config.head_dim + config.latent.value_dim) / 2
    product = 2.0 * config.num_heads * width * rows  # operations of one product, a pair of query and key
    weights = _layer_weights(config)
    factor = 1.0 if execution.expert_capacity is None or config.experts is None else execution.expert_capacity
    slots = (factor - 1.0) * 2.0 * weights.experts * tokens
    # The last product of a block gives only what the next block has kept as its input.
    spared = weights.last + factor * weights.experts / 3.0 if config.norm_placement == "pre" else 0.0
    blocks = 2.0 * (weights.all - spared) * tokens + slots
    recomputed = 0.0
    if execution.remat in ("full", "stage"):
        recomputed = blocks + forward * product * pairs
    elif execution.remat == "dots":
        recomputed = forward * product * pairs if attention == "dense" else 0.0
    elif execution.remat == "save_attention":
        recomputed = blocks + (product * pairs if attention == "dense" else 0.0)
    return StepFlops(
        model=config.flops_per_token(row_length) * tokens,
        attention=product * ((forward + backward) * pairs - 6 * seen),
        recomputed=recomputed,
        slots=3 * slots)


def kernel_share(config: ModelConfig, row_length: int) -> float:
    """The share of all pairs of queries and keys that kernels of attention visit, over all layers."""
    return _score_pairs(config, row_length, whole=False)[0] / (config.num_layers * row_length**2)


def _score_pairs(config: ModelConfig, row_length: int, whole: bool) -> tuple[float, float]:
    """Pairs of query and key of a row in all layers: those computed, and those that `flops_per_token` counts."""
    computed = counted = 0.0
    block = min(_BLOCK, row_length)
    for layer in range(config.num_layers):
        kind = config.attention_pattern[layer % len(config.attention_pattern)]
        window = min(row_length, config.sliding_window or row_length) if kind == "local" else row_length
        counted += row_length * min(row_length, 2 * window) / 2
        if whole:
            computed += row_length**2
        else:
            blocks = range(-(-row_length // block))
            computed += sum(min(i + 1, -(-window // block) + 1) for i in blocks) * block**2
    return computed, counted


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Entries of weights that a token is multiplied by in all layers: all, those of experts (a third of them the last
    product), and the last products of the other blocks."""

    all: float
    experts: float
    last: float


def _layer_weights(config: ModelConfig) -> _Weights:
    # 6 · weights is what is left of the operations of a token without attention; of those the output's are no layer's.
    multiplying = (config.flops_per_token(1) - _attention_flops(config, 1)) / 6.0
    kinds = [config.mlp_pattern[i % len(config.mlp_pattern)] for i in range(config.num_layers)]
    facts = config.experts
    experts = 0.0
    if facts is not None:
        experts = 3.0 * config.embed_dim * facts.mlp_dim * facts.per_token * kinds.count("experts")
    last = config.embed_dim * config.mlp_dim * kinds.count("dense")
    return _Weights(multiplying - config.vocab_size * config.embed_dim, experts, last)


def _attention_flops(config: ModelConfig, context: int) -> float:
    value_dim = config.head_dim if config.latent is None else config.latent.value_dim
    return 3.0 * config.num_heads * (config.head_dim + value_dim) * config.num_layers * context
