"""Which experts a token is sent to, and how evenly the tokens fall on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.config import ModelConfig
from llm_jax.models.facts import Experts
from llm_jax.models.layout import layer_kinds, places

Array = jax.Array


def route(x_BTD: Array, router_DE: Array, selection_bias_E: Array | None, facts: Experts) -> tuple[Array, Array, Array]:
    """Chooses each token's experts, in float32 whatever x's dtype.

    Softmax scores: Mixtral (Jiang et al. 2024, arXiv:2401.04088, section 2.1), Qwen3-MoE (which may leave the weights
    as they are). Sigmoid scores, a bias that takes part in the choice only, and groups: DeepSeek-V3 (arXiv:2412.19437,
    section 2.1.2). A group is as good as the sum of its two best biased scores; experts of groups that are not kept
    can't be chosen, whatever the bias.

    Args:
      x_BTD: tokens.
      router_DE: one column an expert.
      selection_bias_E: added to the scores for the choice; no gradient reaches it. None adds nothing.
      facts: the rest.

    Returns:
      weight_BTA, float32: what each chosen expert's result is multiplied by; A is `facts.per_token`.
      chosen_BTA, int32: the experts, best first, equals in the order of their numbers.
      score_BTE, float32: the scores of all, without the bias.
    """
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32),
                            precision=jax.lax.Precision.HIGHEST)  # TPUs would multiply in bfloat16
    score_BTE = jax.nn.sigmoid(logits_BTE) if facts.scoring == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)
    merit_BTE = score_BTE if selection_bias_E is None else score_BTE + selection_bias_E.astype(jnp.float32)
    merit_BTE = jax.lax.stop_gradient(merit_BTE)
    if facts.groups_kept < facts.groups:
        merit_BTE = _within_groups(merit_BTE, facts.groups, facts.groups_kept)
    chosen_BTA = jax.lax.top_k(merit_BTE, facts.per_token)[1]
    weight_BTA = jnp.take_along_axis(score_BTE, chosen_BTA, axis=-1)
    if facts.renormalize:
        weight_BTA = weight_BTA / (jnp.sum(weight_BTA, axis=-1, keepdims=True) + 1e-20)
    return weight_BTA * facts.scale, chosen_BTA, score_BTE


def _within_groups(merit_BTE: Array, groups: int, kept: int) -> Array:
    """−inf for the experts that are not in the `kept` best groups."""
    merit_BTXY = merit_BTE.reshape(*merit_BTE.shape[:-1], groups, -1)  # X groups of Y experts
    best_BTX = jnp.sum(jax.lax.top_k(merit_BTXY, min(2, merit_BTXY.shape[-1]))[0], axis=-1)
    kept_BTK = jax.lax.top_k(best_BTX, kept)[1]
    is_kept_BTX = jnp.any(kept_BTK[..., None, :] == jnp.arange(groups)[:, None], axis=-1)
    return jnp.where(is_kept_BTX[..., None], merit_BTXY, -jnp.inf).reshape(merit_BTE.shape)


def router_sums(chosen_BTA: Array, score_BTE: Array, is_token_BT: Array, capacity: int | None) -> dict[str, Array]:
    """What a layer's router did, as float32 sums over the tokens that are no padding, so that microbatches add up.

    Args:
      chosen_BTA: int32 experts of each token.
      score_BTE: float32 scores.
      is_token_BT: bool, false for padding.
      capacity: tokens of a row that an expert takes; None takes all.

    Returns:
      `assigned` [E]: tokens sent to each expert. `probability` [E]: sums of the scores, each token's divided by their
      sum (a softmax's are already; DeepSeek-V3, eq. 19). `tokens`: how many there are. `dropped`: assignments for
      which there was no room.
    """
    num_experts = score_BTE.shape[-1]
    is_chosen_BTAE = (chosen_BTA[..., None] == jnp.arange(num_experts)) & is_token_BT[..., None, None]
    assigned_BE = jnp.sum(is_chosen_BTAE, axis=(1, 2), dtype=jnp.float32)
    share_BTE = score_BTE / jnp.maximum(jnp.sum(score_BTE, axis=-1, keepdims=True), 1e-20)
    dropped = jnp.zeros((), jnp.float32) if capacity is None else jnp.sum(jnp.maximum(assigned_BE - capacity, 0))
    return {"assigned": jnp.sum(assigned_BE, axis=0), "tokens": jnp.sum(is_token_BT, dtype=jnp.float32),
            "probability": jnp.sum(jnp.where(is_token_BT[..., None], share_BTE, 0.0), axis=(0, 1)),
            "dropped": dropped}


def router_by_layer(router: Mapping[str, Any], config: ModelConfig) -> dict[str, Array]:
    """The collection "router", as `apply` gives it back, with its layers in order: `router_sums`' with a leading axis
    of the model's layers of experts; layouts stacked and per layer."""
    layers: list[Mapping[str, Array]] = []
    for number, place in enumerate(places(config)):
        is_stacked = f"layers_{number}" not in router
        layer: Any = router
        for name in place.path if is_stacked else (f"layers_{number}",):
            layer = layer.get(name, {})
        if "experts" in layer:
            layers.append({name: value[place.index] if is_stacked else value
                           for name, value in layer["experts"].items()})
    return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}


def move_selection_biases(params: Any, assigned_LE: Array, config: ModelConfig, rate: float) -> Any:
    """Balances without a loss: each expert that had more than an even share of its layer's tokens becomes less likely
    to be chosen, the others more (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3).

    Args:
      params: stacked parameters.
      assigned_LE: tokens sent to each expert, from `router_by_layer`.
      config: of the model, with `Experts.selection_bias`.
      rate: by which each bias is moved, up or down.

    Returns:
      `params` with other selection biases.
    """
    rows: dict[tuple[str, ...], list[int]] = {}
    with_experts = [place for place, kind in zip(places(config), layer_kinds(config), strict=True)
                    if kind.mlp == "experts"]
    for row, place in enumerate(with_experts):
        rows.setdefault(place.path, []).append(row)
    step_LE = rate * jnp.sign(jnp.mean(assigned_LE, axis=-1, keepdims=True) - assigned_LE)

    def moved(path: tuple[Any, ...], leaf: Array) -> Array:
        names = tuple(key.key for key in path)
        if names[-2:] != ("experts", "selection_bias"):
            return leaf
        return leaf + step_LE[jnp.array(rows[names[:-2]])].astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(moved, params)
