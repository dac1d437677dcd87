"""Which layers repeat: how a stack of unlike layers is cut into scanned groups, and where each layer's weights lie.

Gemma 3's 26 layers (five local, one global, and so on) are four scanned periods of six and two layers at the end;
DeepSeek-V3's 61 are three dense ones and 58 scanned. Weights of a group are stacked: their leading axis counts the
group's periods. In a period of several layers each has a slot of its own.
"""

from __future__ import annotations

import dataclasses
import functools

from llm_jax.models.config import ModelConfig

STACKS = ("first_layers", "layers", "last_layers")  # in which stacked weights lie, in the layers' order


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What sets a layer apart from its neighbours: "global" or "local" attention, "dense" or "experts" after it."""

    attention: str = "global"
    mlp: str = "dense"


@dataclasses.dataclass(frozen=True)
class Group:
    """Neighbouring layers that are scanned together.

    Attributes:
      name: of their parameters: one of `STACKS`.
      start: the first layer's number.
      pattern: the kinds of one period's layers.
      repeats: periods.
    """

    name: str
    start: int
    pattern: tuple[LayerKind, ...]
    repeats: int

    def layer(self, repeat: int, slot: int) -> int:
        """The number, counted from the model's first layer, of a period's layer."""
        return self.start + repeat * len(self.pattern) + slot

    def path(self, slot: int) -> tuple[str, ...]:
        """Where in the parameter tree a slot's stacked weights lie."""
        return (self.name,) if len(self.pattern) == 1 else (self.name, slot_name(slot))


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer's weights: entry `index` of the leading axis of every leaf under `path`."""

    path: tuple[str, ...]
    index: int


def encoder_part(config: ModelConfig) -> ModelConfig:
    """The config of an encoder–decoder's encoder, whose layers lie under "encoder" as a decoder's do at the top."""
    return dataclasses.replace(config, architecture="encoder", num_layers=config.encoder_layers, encoder_layers=0)


def slot_name(slot: int) -> str:
    return f"slot_{slot}"


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    a, m = config.attention_pattern, config.mlp_pattern
    return tuple(LayerKind(a[i % len(a)], m[i % len(m)]) for i in range(config.num_layers))


def groups(config: ModelConfig) -> tuple[Group, ...]:
    """The cut with the fewest layers to trace: a scanned period, and what does not repeat before and after it."""
    return _cut(layer_kinds(config))


@functools.lru_cache(maxsize=256)
def _cut(kinds: tuple[LayerKind, ...]) -> tuple[Group, ...]:
    total = len(kinds)
    best: tuple[int, int, int, int] | None = None  # layers to trace, start, period, repeats
    for start in range(total):
        for period in range(1, total - start + 1):
            repeats = 1
            while kinds[start + repeats * period:start + (repeats + 1) * period] == kinds[start:start + period]:
                repeats += 1
            candidate = (total - (repeats - 1) * period, start, period, repeats)
            if best is None or candidate < best:
                best = candidate
    assert best is not None
    _, start, period, repeats = best
    end = start + period * repeats
    cut = ((0, kinds[:start], 1), (start, kinds[start:start + period], repeats), (end, kinds[end:], 1))
    return tuple(Group(name, *rest) for name, rest in zip(STACKS, cut, strict=True) if rest[1])


def places(config: ModelConfig) -> tuple[Place, ...]:
    """Where the weights of each layer lie in the stacked parameters."""
    found: dict[int, Place] = {}
    for group in groups(config):
        for slot in range(len(group.pattern)):
            for repeat in range(group.repeats):
                found[group.layer(repeat, slot)] = Place(group.path(slot), repeat)
    return tuple(found[i] for i in range(config.num_layers))
