"""How evenly a mixture's routers spread the tokens over its experts, and the loss that asks them to."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Array = jax.Array


def balance_loss(router: Mapping[str, Array]) -> Array:
    """E · Σ_e f_e · P_e, the mean over the layers (Fedus et al. 2021, arXiv:2101.03961, eq. 4–6).

    f_e is the number of assignments to expert e per token (Σ f = experts a token is sent to, A), P_e its mean
    probability (Σ P = 1); padding counts in neither. So an even load costs A, the worst one E. That is `transformers`'
    `load_balancing_loss_func` of one layer, for which coefficients mean the same. Over several layers that function
    multiplies the layers' means, in which one layer's idle expert hides another's busy one; this one is the mean of the
    layers' products, so it is larger where layers differ. DeepSeek-V3's f (arXiv:2412.19437, eq.
    18) is divided by A besides.

    f is a count and has no gradient, so the loss pushes down the probability of experts in proportion to their load.

    Args:
      router: `assigned` [L, E], `probability` [L, E] and `tokens` [L], as `models.router_by_layer` gives them.

    Returns:
      float32 scalar; 0 where there is no token.
    """
    tokens_L1 = jnp.maximum(router["tokens"], 1.0)[:, None]
    products_LE = (router["assigned"] / tokens_L1) * (router["probability"] / tokens_L1)
    return router["assigned"].shape[-1] * jnp.mean(jnp.sum(products_LE, axis=-1))


def load(router: Mapping[str, Array]) -> dict[str, Array]:
    """What is reported of the routers.

    Args:
      router: as in `balance_loss`, and `dropped` [L].

    Returns:
      `router_load` [L, E]: each expert's share of its layer's assignments relative to an even share (1 is even);
      `router_most` and `router_least`, its largest and smallest entry; `router_dropped`, the share of all assignments
      that found no room; `balance_loss`, of all tokens together.
    """
    assigned_LE = router["assigned"]
    total_L1 = jnp.maximum(jnp.sum(assigned_LE, axis=-1, keepdims=True), 1.0)
    load_LE = assigned_LE / total_L1 * assigned_LE.shape[-1]
    return {"router_load": load_LE, "router_most": jnp.max(load_LE), "router_least": jnp.min(load_LE),
            "router_dropped": jnp.sum(router["dropped"]) / jnp.sum(total_L1), "balance_loss": balance_loss(router)}
