"""The families of models that checkpoints on Hugging Face come in, one module each.

A family's module states facts and names, and no arithmetic:

  ARCHITECTURES: the `architectures` entries of its `config.json` → "lm", or the kind of head.
  MODEL_TYPES: what `model_type` may be, where a `config.json` has it; early ones do not.
  config_from_hf(fields) -> ModelConfig; config_to_hf(config) -> dict: `config.json` in and out.
  tensors(config) -> list[mapping.Tensor]: every tensor of a checkpoint, under its canonical name.
  IGNORED: regular expressions of canonical names which checkpoints carry and the model has no use for.
  TIED: names that may stand on disk for a copy of another tensor → that tensor.
  canonical(name) -> str, if checkpoints use several names for one tensor.
  ignored(config) -> tuple[str, ...], if what has no use depends on the config; adds to IGNORED.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from llm_jax.errors import UserError
from llm_jax.interop.fields import Fields
from llm_jax.models import ModelConfig
from llm_jax.models.layout import layer_kinds


@functools.lru_cache(maxsize=1)
def all_families() -> Mapping[str, ModuleType]:
    """Name → module of every family."""
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    return {name: module for name, module in sorted(modules.items()) if hasattr(module, "ARCHITECTURES")}


def by_name(name: str) -> ModuleType:
    """The family of a `ModelConfig.family`; UserError if there is none of that name."""
    if name not in all_families():
        raise UserError(f"there is no family {name!r}; the families are {', '.join(all_families())}")
    return all_families()[name]


def family_of(hf_config: Mapping[str, Any], source: str = "config.json") -> ModuleType:
    """The family of a `config.json`; UserError, listing what is known, if its architecture is none of them."""
    known = {a: family for family in all_families().values() for a in family.ARCHITECTURES}
    named = hf_config.get("architectures") if isinstance(hf_config, Mapping) else None
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str) or named[0] not in known:
        first = ", ".join(next(iter(family.ARCHITECTURES)) for family in all_families().values())
        raise UserError(f"{source}: architectures={named!r} is not one that this project knows; it knows {first}, and "
                        f"those with a task's head instead")
    return known[named[0]]


def config_from_hf(hf_config: Mapping[str, Any], source: str = "config.json",
                   tensors: Collection[str] | None = None) -> ModelConfig:
    """The model a `config.json` describes.

    Args:
      hf_config: the file's object.
      source: what messages call it.
      tensors: names of the checkpoint's tensors, where they are known; see `Fields`.
    Raises:
      UserError: an unknown architecture, a missing or ill-typed value, a key that changes what is computed and is not
        supported; naming it.
    """
    family = family_of(hf_config, source)
    names = None if tensors is None else {canonical(family, name) for name in tensors}
    fields = Fields(hf_config, source, names)
    try:
        fields.must("model_type", *family.MODEL_TYPES)
        config = family.config_from_hf(fields)
    except UserError as error:  # ModelConfig's own checks do not know the file
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from None
    fields.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, without what a `ModelConfig` does not know (dtype, special tokens).

    Raises:
      UserError: `transformers` has no field in this family for something the config says; naming it.
    """
    written = by_name(config.family).config_to_hf(config)
    names = [tensor.name for tensor in by_name(config.family).tensors(config)]
    again = config_from_hf(written, f"config.json of family {config.family!r}", names)
    meant, read = _meaning(config), _meaning(again)
    lost = [f"{name}={getattr(config, name)!r}" for name in meant if meant[name] != read[name]]
    if lost:
        raise UserError(f"transformers' {written['architectures'][0]} cannot be told: {', '.join(lost)}")
    return written


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config, the same for configs that describe the same model."""
    kinds, rope = layer_kinds(config), config.rope_scaling
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | {
        "attention_scale": config.score_scale, "attention_pattern": tuple(kind.attention for kind in kinds),
        "mlp_pattern": tuple(kind.mlp for kind in kinds)}
    if "local" not in fields["attention_pattern"]:
        fields |= {"sliding_window": None, "local_rope_theta": None}
    elif config.local_rope_theta is None and rope is None:
        fields["local_rope_theta"] = config.rope_theta
    if config.positions != "rotary":
        return fields | dict.fromkeys(("rope_theta", "rope_scaling", "rotary_dim", "rope_interleaved"))
    if rope is not None:
        rope = dataclasses.replace(rope, original_context=rope.original_context or config.max_context)
    return fields | {"rope_scaling": rope, "rotary_dim": config.rotary_width}


def canonical(family: ModuleType, name: str) -> str:
    """The canonical name of a tensor as it is called in a checkpoint."""
    return family.canonical(name) if hasattr(family, "canonical") else name


def is_ignored(family: ModuleType, config: ModelConfig, name: str) -> bool:
    """Whether a tensor of this canonical name is one that checkpoints carry and the model has no use for."""
    patterns = (*family.IGNORED, *(family.ignored(config) if hasattr(family, "ignored") else ()))
    return any(re.fullmatch(pattern, name) for pattern in patterns)
