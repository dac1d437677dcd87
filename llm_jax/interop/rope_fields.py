"""Rotary positions as `config.json` says them: `rope_theta` with `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

from llm_jax.errors import UserError
from llm_jax.interop.fields import Fields
from llm_jax.models.config import ModelConfig
from llm_jax.models.facts import RopeScaling

_KINDS = {"default": "default", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3",
          "longrope": "longrope", "su": "longrope"}


def read(f: Fields, head_width: int, max_context: int, *, partial: float | None = None) -> dict[str, Any]:
    """The rotary facts of a model whose layers all turn alike.

    Args:
      f: its default "rope_theta" is set; a default "original_max_position_embeddings" where the family keeps that key
        beside the others (it then wins over one inside `rope_scaling`).
      head_width: entries of a head that turn where nothing says fewer.
      max_context: the model's.
      partial: the family's default of `partial_rotary_factor`; None in families whose models turn whole heads.
    Returns:
      the arguments rope_theta, rope_scaling and rotary_dim of `ModelConfig`.
    """
    old, new = f.nested("rope_scaling"), f.nested("rope_parameters")
    if old is not None and new is not None and old.values and new.values and old.values != new.values:
        f.refuse("rope_scaling", "one of rope_scaling and rope_parameters, or both alike")
    inner = old if old is not None and old.values else new
    theta, scaling, factor = _one(f, inner, max_context)
    width = None
    if partial is None:
        if factor not in (None, 1.0):
            f.refuse("partial_rotary_factor", "1.0 in this family", factor)
    else:
        factor = partial if factor is None else factor
        width = int(head_width * factor)
        if not 0 < width <= head_width or width % 2:
            f.refuse("partial_rotary_factor", f"an even part of the head's {head_width}", factor)
    rotary_dim = None if width == head_width else width
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_dim": rotary_dim}


def read_layered(f: Fields, max_context: int, theta: float, local_theta: float) -> dict[str, Any]:
    """The rotary facts of a model whose local layers turn by a base of their own, never stretched (Gemma 3).

    Args:
      f: of the file.
      max_context: the model's.
      theta, local_theta: the family's defaults.
    Returns:
      the arguments rope_theta, rope_scaling and local_rope_theta of `ModelConfig`.
    """
    f.default(rope_theta=theta, rope_local_base_freq=local_theta)
    f.must("partial_rotary_factor", 1.0)
    old, layered = f.nested("rope_scaling"), f.nested("rope_parameters")
    if layered is None:
        found, scaling, _ = _one(f, old, max_context)
        return {"rope_theta": found, "rope_scaling": scaling, "local_rope_theta": f.number("rope_local_base_freq")}
    if old is not None and old.values:
        f.refuse("rope_scaling", "one of rope_scaling and rope_parameters")
    full, local = layered.nested("full_attention"), layered.nested("sliding_attention")
    layered.finish()
    found, scaling, factor = _one(f, full, max_context)
    if local is not None:
        local.default(rope_theta=f.number("rope_local_base_freq"))
        local_theta = local.number("rope_theta")
        local.must("rope_type", "default")
        local.must("type", "default")
        local.must("partial_rotary_factor", 1.0)
        local.finish()
    else:
        local_theta = f.number("rope_local_base_freq")
    if factor not in (None, 1.0):
        f.refuse("partial_rotary_factor", "1.0 in this family", factor)
    return {"rope_theta": found, "rope_scaling": scaling, "local_rope_theta": local_theta}


def _one(f: Fields, inner: Fields | None, max_context: int) -> tuple[float, RopeScaling | None, float | None]:
    """Base, scaling and turned fraction (None if nothing says) from the top of the file and the object inside it."""
    inner = Fields({}, f.source) if inner is None else inner
    theta = _agreed(f, inner, "rope_theta")
    factor = _agreed(f, inner, "partial_rotary_factor")
    scaling = _scaling(f, inner, max_context)
    inner.finish()
    if theta is None:
        theta = f.number("rope_theta")
    return theta, scaling, factor


def _agreed(f: Fields, inner: Fields, key: str) -> float | None:
    """A number that may stand in either place; UserError where both have it and differ."""
    found = [place.number(key) for place in (inner, f) if place.given(key)]
    f.ignore(key)
    inner.ignore(key)
    if len(found) == 2 and found[0] != found[1]:
        f.refuse(key, f"the same value as in {inner.source.rsplit(': ', 1)[-1]}, {found[0]}")
    return found[0] if found else None


def _scaling(f: Fields, inner: Fields, max_context: int) -> RopeScaling | None:
    inner.default(rope_type=inner.values.get("type", "default"), factor=None, attention_factor=None, beta_fast=None,
                  beta_slow=None, mscale=None, mscale_all_dim=None, truncate=True,
                  original_max_position_embeddings=None)
    inner.ignore("type")
    f.ignore("original_max_position_embeddings")
    kind = inner.choice("rope_type", _KINDS)
    if inner.given("type") and _KINDS.get(inner.values["type"]) != kind:
        inner.refuse("type", f"the same as rope_type, {kind!r}")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        if kind == "dynamic":  # the switch is at max_position_embeddings, whatever else is written here
            inner.must("original_max_position_embeddings", max_context)
        return RopeScaling(kind, _factor(inner))
    f.default(original_max_position_embeddings=inner.raw("original_max_position_embeddings"))
    original = f.maybe_integer("original_max_position_embeddings") or max_context
    if kind == "llama3":
        return RopeScaling(kind, _factor(inner), original, low_freq_factor=inner.number("low_freq_factor"),
                           high_freq_factor=inner.number("high_freq_factor"))
    factor = max(1.0, max_context / original) if inner.raw("factor") is None else _factor(inner)
    given = inner.maybe_number("attention_factor")
    if kind == "longrope":
        for name in ("mscale", "mscale_all_dim"):
            inner.must(name)
        return RopeScaling(kind, factor, original, given, short_factors=_numbers(inner, "short_factor"),
                           long_factors=_numbers(inner, "long_factor"))
    return RopeScaling(kind, factor, original, given, inner.maybe_number("beta_fast") or 32.0,
                       inner.maybe_number("beta_slow") or 1.0, inner.maybe_number("mscale"),
                       inner.maybe_number("mscale_all_dim"), inner.flag("truncate"))


def _factor(inner: Fields) -> float:
    value = inner.number("factor") if inner.raw("factor") is not None else 0.0
    if value < 1:
        inner.refuse("factor", "numbers from 1")
    return value


def _numbers(inner: Fields, key: str) -> tuple[float, ...]:
    value = inner.raw(key)
    if not isinstance(value, list) or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value):
        inner.refuse(key, "lists of numbers")
    return tuple(float(x) for x in value)


def write(config: ModelConfig) -> dict[str, Any]:
    """The rotary keys of a `config.json`, in the older form, which every version of `transformers` reads."""
    fields: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": _scaling_fields(config)}
    if config.rotary_dim is not None:
        fraction = config.rotary_dim / config.head_dim
        while int(config.head_dim * fraction) < config.rotary_dim:  # it is rounded down by whoever reads it
            fraction = math.nextafter(fraction, 1.0)
        fields["partial_rotary_factor"] = fraction
    return fields


def _scaling_fields(config: ModelConfig) -> dict[str, Any] | None:
    s = config.rope_scaling
    if s is None:
        return None
    original = s.original_context or config.max_context
    fields: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("linear", "dynamic"):
        if s.kind == "dynamic" and original != config.max_context:
            raise UserError(f"RopeScaling.original_context={original} of kind 'dynamic' must be max_context="
                            f"{config.max_context} to be written for transformers, which has no field for it")
        return fields
    fields["original_max_position_embeddings"] = original
    if s.kind == "llama3":
        return fields | {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    optional = {"attention_factor": s.attention_factor}
    if s.kind == "longrope":
        fields |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    else:
        fields |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        optional |= {"mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim}
    return fields | {name: value for name, value in optional.items() if value is not None}
