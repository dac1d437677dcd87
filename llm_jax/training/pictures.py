"""What a number can't say: histograms of parameters and gradients, and maps of attention, of chosen layers."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.models import ModelConfig, activation_rules
from llm_jax.models.attention_maps import attention_maps
from llm_jax.models.layout import places
from llm_jax.parallel import rules as rules_lib
from llm_jax.training.assembly import Assembly
from llm_jax.training.state import moment_shardings
from llm_jax.training.step import gradients

Array = jax.Array
BUCKETS = 48
MAP_TOKENS = 48  # of the row whose attention is drawn
_PIXELS = 192  # a head's map is about so wide
_RAMP = ((255, 255, 255), (120, 170, 220), (20, 60, 130), (10, 15, 50))  # weight 0 to 1
_FUTURE, _GAP = (232, 232, 232), 10


def chosen(layers: Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    """Numbers of layers, negative ones counted from the last; UserError for one that isn't there."""
    found = []
    for layer in layers:
        if not -config.num_layers <= layer < config.num_layers:
            raise UserError(f"ReportConfig.layers={tuple(layers)!r}: there is no layer {layer} among "
                            f"{config.num_layers}")
        found.append(layer % config.num_layers)
    return tuple(dict.fromkeys(found))


def histogram(x: Array) -> dict[str, Array]:
    """`BUCKETS` equal buckets from the least value to the greatest, counted where the values lie.

    Returns:
      `low`, `high`, `sum`, `squares` (float32), `counts` (int32 [BUCKETS]).
    """
    x = x.astype(jnp.float32)
    low, high = jnp.min(x), jnp.max(x)
    limits = low + (high - low) * jnp.arange(1, BUCKETS) / BUCKETS
    # One reduction a limit, not a scatter: it needs no memory, and sharded values stay where they are.
    below = jax.lax.map(lambda limit: jnp.sum(x < limit, dtype=jnp.int32), limits)
    below = jnp.concatenate([jnp.zeros(1, jnp.int32), below, jnp.full(1, x.size, jnp.int32)])
    return {"low": low, "high": high, "sum": jnp.sum(x), "squares": jnp.sum(jnp.square(x)), "counts": jnp.diff(below)}


def histograms(tree: Any, config: ModelConfig, layers: Sequence[int]) -> dict[str, dict[str, Array]]:
    """A histogram of each leaf of chosen layers and of each leaf outside the layers.

    Args:
      tree: parameters or gradients, stacked.
      config: the model's.
      layers: numbers of layers.

    Returns:
      "03/attention/q" or "embed/table" → `histogram`.
    """
    place_of = places(config)
    stacks = {place.path for place in place_of}
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(str(getattr(key, "key", key)) for key in keys)
        stack = next((s for s in stacks if path[:len(s)] == s), None)
        if stack is None:
            layer = path[0].removeprefix("layers_")
            if path[0] == layer:
                found["/".join(path)] = histogram(leaf)
            elif int(layer) in layers:
                found["/".join((f"{int(layer):02d}", *path[1:]))] = histogram(leaf)
            continue
        for layer_number in layers:
            if place_of[layer_number].path == stack:
                name = "/".join((f"{layer_number:02d}", *path[len(stack):]))
                found[name] = histogram(leaf[place_of[layer_number].index])
    return found


def draw_maps(maps_HTT: np.ndarray) -> np.ndarray:
    """A picture of a layer's attention: a square a head, queries downwards, keys to the right.

    The darker, the more; the ramp follows the square root of a weight, so that small ones are seen. What lies in a
    token's future is grey.

    Args:
      maps_HTT: float, weights of one layer.
    Returns:
      uint8 [height, width, 3].
    """
    from PIL import Image, ImageDraw

    heads, length, _ = maps_HTT.shape
    scale = max(2, _PIXELS // length)
    side, label = scale * length, 14
    columns = math.ceil(math.sqrt(heads))
    rows = math.ceil(heads / columns)
    image = Image.new("RGB", (columns * (side + _GAP) + _GAP, rows * (side + label + _GAP) + _GAP), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    at = np.linspace(0, 1, len(_RAMP))
    future = np.triu(np.ones((length, length), bool), 1)
    for head in range(heads):
        weight = np.sqrt(np.clip(maps_HTT[head], 0, 1))
        pixels = np.stack([np.interp(weight, at, [color[c] for color in _RAMP]) for c in range(3)], axis=-1)
        pixels[future & (maps_HTT[head] == 0)] = _FUTURE
        tile = np.repeat(np.repeat(pixels.round().astype(np.uint8), scale, 0), scale, 1)
        x = _GAP + (head % columns) * (side + _GAP)
        y = _GAP + (head // columns) * (side + label + _GAP)
        draw.text((x, y), f"head {head}", fill=(60, 60, 60))
        draw.rectangle((x - 1, y + label - 1, x + side, y + label + side), outline=(170, 170, 170))
        image.paste(Image.fromarray(tile), (x, y + label))
    return np.asarray(image)


def to_png(pixels_HWC: np.ndarray) -> bytes:
    """The file's content."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class Pictures:
    """Takes them on the steps that are due; each kind costs one compile, and nothing where it is not asked for."""

    def __init__(self, parts: Assembly, *, layers: Sequence[int], histograms_every: int, attention_maps_every: int,
                 row: Callable[[], np.ndarray]):
        """Compiles nothing yet.

        Args:
          parts: the run's model, mesh and rules.
          layers: see `reporter.ReportConfig`, as the next two.
          histograms_every, attention_maps_every: steps between two; 0 is never.
          row: gives the tokens of one document, whose attention is drawn.

        Raises:
          UserError: a layer that isn't there.
        """
        self._parts = parts
        self.layers = chosen(layers, parts.config)
        self.histograms_every, self.attention_maps_every = histograms_every, attention_maps_every
        self._row = functools.cache(lambda: np.asarray(row()[:MAP_TOKENS], np.int32))
        everywhere = rules_lib.replicated(parts.mesh)  # so that the process that reports has all of it
        self._count = jax.jit(self._counted, out_shardings=everywhere)
        self._maps = jax.jit(lambda params, tokens_T: attention_maps(params, tokens_T, parts.config, self.layers,
                                                                     parts.execution.dtype), out_shardings=everywhere)

    def _counted(self, params: Any, batch: Any) -> dict[str, Any]:
        p = self._parts
        grads, _ = gradients(p.model, params, batch, None, z_loss=p.z_loss, accumulation=p.accumulation, mesh=p.mesh,
                             gradient_shardings=moment_shardings(p.model, p.mesh, p.rules),
                             rules=p.rules)
        return {"parameters": histograms(params, p.config, self.layers),
                "gradients": histograms(grads, p.config, self.layers)}

    def is_due(self, step: int) -> bool:
        """Whether anything is taken at `step`."""
        return any(every and step % every == 0 for every in (self.histograms_every, self.attention_maps_every))

    def histograms(self, step: int, state: Any, batch: Any) -> Mapping[str, Mapping[str, Any]]:
        """"parameters" and "gradients" → see `histograms`; empty if none are due before `step` is sent."""
        if not self.histograms_every or step % self.histograms_every:
            return {}
        with jax.set_mesh(self._parts.mesh), activation_rules(self._parts.rules.activations):
            return jax.device_get(self._count(state.params, batch))

    def maps(self, step: int, state: Any) -> tuple[list[int], dict[int, np.ndarray]]:
        """The row's tokens, and layer → a picture of its attention to them; empty if none are due."""
        if not self.attention_maps_every or step % self.attention_maps_every:
            return [], {}
        with jax.set_mesh(self._parts.mesh):
            found = jax.device_get(self._maps(state.params, self._row()))
        return self._row().tolist(), {layer: draw_maps(np.asarray(maps_HTT)) for layer, maps_HTT in found.items()}
