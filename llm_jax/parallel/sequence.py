"""Attention among the tokens of rows that are cut among devices (context parallelism).

A row of T tokens is cut into 2n stretches of C = T / 2n, and device i of n holds two, number i and number 2n − 1 − i
(`row_order`): what a causal mask lets the early one see and what it lets the late one see add up to the same on every
device. Queries stay. The keys and values of the others come one device at a time, around a ring (Liu et al. 2023,
arXiv:2310.01889), or all at once by an all-gather; either way each device has one device's keys before it at a time,
and computes the two pairs of stretches that its queries may see of them: its late queries see the other's early keys,
and of the other two pairs the one that lies in the past. Pairs that a window rules out are passed by, and where it
rules out all pairs of a distance around the ring, that distance is skipped.

The backward pass keeps queries, keys, values, the output and one number a query of a device's own tokens. Keys and
values come around once more, and their gradients travel with them, in float32, until they are home.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llm_jax.kernels.chunked_attention import ABSENT, SAVED, merge, partial_attention, partial_gradients
from llm_jax.parallel.rules import devices_along

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RowCut:
    """How [B, T, H, K] lies over the mesh that is set.

    Attributes:
      axis: the mesh axis that divides T.
      parts: devices along it (n).
      rows: mesh axes that divide B.
      heads: mesh axes that divide H, and the heads of keys and values too.
    """

    axis: str
    parts: int
    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def spec(self, *rest: Any) -> PartitionSpec:
        return PartitionSpec(self.rows or None, self.axis, *rest)


@dataclasses.dataclass(frozen=True)
class _How:
    """What of a call is static: see `row_attention`."""

    cut: RowCut
    way: str
    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    block: tuple[int, int]


def row_order(length: int, parts: int) -> np.ndarray:
    """int [T]: the index in its row of each token, as rows lie among `parts` devices: first the two stretches of the
    first device, then those of the second."""
    stretches = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([stretches[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def row_attention(q_BTHK: Array, k_BTGK: Array, v_BTGV: Array, segment_ids_BT: Array | None, cut: RowCut, *,
                  way: str = "ring", scale: float, causal: bool = True, window: int | None = None,
                  soft_cap: float | None = None, block: tuple[int, int] = (512, 512)) -> Array:
    """What `kernels.attention.dense_attention` computes of whole rows, for rows in the order of `row_order`.

    Args:
      q_BTHK, k_BTGK, v_BTGV, scale, window, soft_cap: as of `kernels.attention.attention`.
      segment_ids_BT: int32, the document of each token; None: one document a row.
      cut: how the arrays lie.
      way: "ring" passes keys and values around, and a device never holds more than two devices'; "gather" gathers them
        all first.
      causal: whether a token sees only itself and what is before it.
      block: see `kernels.chunked_attention.partial_attention`.
    Returns:
      [B, T, H, V] in q's dtype.
    """
    mesh, H, G = jax.sharding.get_abstract_mesh(), q_BTHK.shape[2], k_BTGK.shape[2]
    if q_BTHK.shape[0] % devices_along(mesh, cut.rows):
        cut = dataclasses.replace(cut, rows=())
    if G % devices_along(mesh, cut.heads):  # fewer heads of keys than devices that share the heads
        k_BTGK, v_BTGV = (jnp.repeat(x, H // G, axis=2) for x in (k_BTGK, v_BTGV))
    how = _How(cut, way, scale, causal, window, soft_cap, block)
    return _attend(how, q_BTHK, k_BTGK, v_BTGV, segment_ids_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q_BTHK: Array, k_BTGK: Array, v_BTGV: Array, segments_BT: Array | None) -> Array:
    return _forward(how, q_BTHK, k_BTGK, v_BTGV, segments_BT)[0]


def _on_mesh(how: _How, local: Callable[..., Any], arrays: tuple, outputs: str) -> Any:
    """`local` on each device's part; `outputs` has a letter a result: "v" for vectors of heads, "n" for numbers."""
    heads = how.cut.heads or None
    specs = {"v": how.cut.spec(heads, None), "n": how.cut.spec(heads)}
    given = tuple(None if x is None else how.cut.spec() if x.ndim == 2 else specs["n" if x.ndim == 3 else "v"]
                  for x in arrays)
    return jax.shard_map(functools.partial(local, how), in_specs=given, out_specs=tuple(specs[o] for o in outputs),
                         check_vma=False)(*arrays)


def _forward(how: _How, q_BTHK: Array, k_BTGK: Array, v_BTGV: Array, segments_BT: Array | None) -> tuple[Array, tuple]:
    arrays = (q_BTHK, k_BTGK, v_BTGV, segments_BT)
    kept = tuple(checkpoint_name(x, SAVED) for x in _on_mesh(how, _forward_here, arrays, "vn"))
    return kept[0], (*arrays, *kept)


def _backward(how: _How, saved: tuple, dout_BTHV: Array) -> tuple:
    return (*_on_mesh(how, _backward_here, (*saved, dout_BTHV), "vvv"), None)


_attend.defvjp(_forward, _backward)


def _forward_here(how: _How, q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Array]:
    """Output, and the logarithm of what the exponentials sum to, of this device's queries.

    Arrays that end in 2 have the device's two stretches in front: [2, B, C, ...] of [B, 2C, ...].
    """
    q2, segments2 = _in_stretches(q), _in_stretches(segments)

    def visit(done2: tuple, block2: tuple, sums2: tuple, pair: _Pair) -> tuple[tuple, tuple]:
        def compute(done2: tuple) -> tuple:
            k2, v2, k_segments2 = block2
            term = partial_attention(_of(q2, pair.query), _of(k2, pair.key), _of(v2, pair.key),
                                     **pair.options(how, segments2, k_segments2, k2))
            out, log_sum = (_of(x, pair.query) for x in done2)
            both = merge(out, log_sum, *term)
            return tuple(_put(x, pair.query, new) for x, new in zip(done2, both, strict=True))

        return pair.if_seen(compute, done2), sums2

    begin = (jnp.zeros((*q2.shape[:-1], v.shape[-1]), jnp.float32), jnp.full(q2.shape[:-1], ABSENT, jnp.float32))
    (out2, log_sum2), _ = _walk(how, visit, begin, tuple(_in_stretches(x) for x in (k, v, segments)), ())
    return _joined(out2).astype(q.dtype), _joined(log_sum2)


def _backward_here(how: _How, q: Array, k: Array, v: Array, segments: Array | None, out: Array, log_sum: Array,
                   dout: Array) -> tuple[Array, Array, Array]:
    """Gradients of this device's queries, keys and values."""
    q2, segments2, out2, log_sum2, dout2 = (_in_stretches(x) for x in (q, segments, out, log_sum, dout))

    def visit(dq2: Array, block2: tuple, sums2: tuple, pair: _Pair) -> tuple[Array, tuple]:
        def compute(sums: tuple) -> tuple:
            k2, v2, k_segments2 = block2
            terms = partial_gradients(_of(q2, pair.query), _of(k2, pair.key), _of(v2, pair.key), _of(out2, pair.query),
                                      _of(log_sum2, pair.query), _of(dout2, pair.query),
                                      **pair.options(how, segments2, k_segments2, k2))
            return tuple(_put(x, index, _of(x, index) + new.astype(jnp.float32))
                         for x, index, new in zip(sums, (pair.query, pair.key, pair.key), terms, strict=True))

        dq2, *more = pair.if_seen(compute, (dq2, *sums2))
        return dq2, tuple(more)

    block2 = tuple(_in_stretches(x) for x in (k, v, segments))
    sums2 = tuple(jnp.zeros(x.shape, jnp.float32) for x in block2[:2])
    dq2, (dk2, dv2) = _walk(how, visit, jnp.zeros(q2.shape, jnp.float32), block2, sums2)
    return _joined(dq2).astype(q.dtype), _joined(dk2).astype(k.dtype), _joined(dv2).astype(v.dtype)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A stretch of queries and one of keys that is not after it.

    Attributes:
      query, key: which of a device's two each is, perhaps traced; None: both as one, where the order means nothing.
      distance: the query stretch's number in the row less the key stretch's, perhaps traced.
      seen: whether some query sees some key by its place in the row, perhaps traced.
    """

    query: Any
    key: Any
    distance: Any
    seen: Any = True

    def if_seen(self, compute: Callable[[Any], Any], state: Any) -> Any:
        return compute(state) if self.seen is True else jax.lax.cond(self.seen, compute, lambda state: state, state)

    def options(self, how: _How, q_segments2: Array | None, k_segments2: Array | None, k2: Array) -> dict[str, Any]:
        """What the kernel is told. Keys of a stretch before the queries' are all in the past; only a window needs a
        mask there."""
        is_own = isinstance(self.distance, int) and self.distance == 0
        place = jnp.arange(_of(k2, self.key).shape[1], dtype=jnp.int32)
        return {"q_segment_BT": _of(q_segments2, self.query), "k_segment_BS": _of(k_segments2, self.key),
                "q_position_T": place + self.distance * len(place), "k_position_S": place,
                "causal": how.causal and (is_own or how.window is not None), "scale": how.scale, "window": how.window,
                "soft_cap": how.soft_cap, "block": how.block}


def _pairs(how: _How, me: Any, source: Any, stretch: int) -> list[_Pair]:
    """The pairs of stretches that device `me` computes while it has the keys of device `source`, another one."""
    if not how.causal:
        return [_Pair(None, None, 0)]
    is_before = source < me
    beside, across = abs(me - source), 2 * how.cut.parts - 1 - me - source
    same = jnp.where(is_before, 0, 1)
    return [_Pair(same, same, beside, _is_seen(how, beside, stretch)),
            _Pair(1, 0, across, _is_seen(how, across, stretch))]


def _own_pairs(how: _How, me: Any, stretch: int) -> list[_Pair]:
    if not how.causal:
        return [_Pair(None, None, 0)]
    across = 2 * how.cut.parts - 1 - 2 * me
    return [_Pair(0, 0, 0), _Pair(1, 1, 0), _Pair(1, 0, across, _is_seen(how, across, stretch))]


def _is_seen(how: _How, distance: Any, stretch: int) -> Any:
    """Whether a window reaches from the first query of a stretch to the last key of one that lies `distance` before."""
    return True if how.window is None else (distance - 1) * stretch + 1 < how.window


def hops(how: _How, stretch: int) -> list[int]:
    """How far around the ring keys are needed from: r where some device computes something with the keys of the device
    r before it."""
    n = how.cut.parts
    if how.window is None:
        return list(range(n))
    return [0] + [r for r in range(1, n) if any(
        _is_seen(how, distance, stretch) for me in range(n) for source in [(me - r) % n]
        for distance in (abs(me - source), 2 * n - 1 - me - source))]


def _walk(how: _How, visit: Callable[..., Any], carry: Any, block2: tuple, sums2: tuple) -> tuple[Any, tuple]:
    """visit(carry, a device's keys and values, sums that belong to them, pair) → (carry, sums) for all that this device
    has to compute; the sums come back to the device whose keys they belong to."""
    axis, n, stretch = how.cut.axis, how.cut.parts, block2[0].shape[2]
    me, distances = jax.lax.axis_index(axis), hops(how, stretch)

    def visit_all(pairs: list[_Pair], carry: Any, block2: tuple, sums2: tuple) -> tuple[Any, tuple]:
        for pair in pairs:
            carry, sums2 = visit(carry, block2, sums2, pair)
        return carry, sums2

    def there(hop: Any, carry: Any, block2: tuple, sums2: tuple) -> tuple[Any, tuple]:
        return visit_all(_pairs(how, me, (me - hop) % n, stretch), carry, block2, sums2)

    own = _own_pairs(how, me, stretch)
    if how.way == "gather":
        everyones = jax.tree.map(lambda x: jax.lax.all_gather(x, axis), block2)
        sums = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), sums2)
        carry, sums2 = visit_all(own, carry, block2, sums2)
        sums = _put_all(sums, me, sums2)

        def step(state: tuple, hop: Array) -> tuple[tuple, None]:
            carry, sums = state
            source = (me - hop) % n
            carry, sums2 = there(hop, carry, _of_all(everyones, source), _of_all(sums, source))
            return (carry, _put_all(sums, source, sums2)), None

        (carry, sums), _ = jax.lax.scan(step, (carry, sums), jnp.asarray(distances[1:], jnp.int32))
        return carry, jax.tree.map(lambda x: jax.lax.psum_scatter(x, axis, scatter_dimension=0), sums)

    def send(tree: Any, by: int) -> Any:
        to = [(device, (device + by) % n) for device in range(n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to), tree)

    carry, sums2 = visit_all(own, carry, block2, sums2)
    if len(distances) == 1:
        return carry, sums2
    steps = np.diff(distances).tolist()
    block2, sums2, hop = send(block2, steps[0]), send(sums2, steps[0]), jnp.int32(steps[0])
    for by, run in itertools.groupby(steps[1:]):

        def pass_on(state: tuple, _: None, by: int = by) -> tuple[tuple, None]:
            carry, block2, sums2, hop = state
            following2 = send(block2, by)  # under way while this device's is computed
            carry, sums2 = there(hop, carry, block2, sums2)
            return (carry, following2, send(sums2, by), hop + by), None

        (carry, block2, sums2, hop), _ = jax.lax.scan(pass_on, (carry, block2, sums2, hop), None, length=len(list(run)))
    carry, sums2 = there(hop, carry, block2, sums2)
    return carry, send(sums2, n - distances[-1])


def _in_stretches(x: Array | None) -> Array | None:
    """[B, 2C, ...] → [2, B, C, ...]"""
    return None if x is None else jnp.moveaxis(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), 1, 0)


def _joined(x2: Array) -> Array:
    """The inverse of `_in_stretches`."""
    x = jnp.moveaxis(x2, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _of(x2: Array | None, index: Any) -> Any:
    """One stretch of the two, or both as one."""
    if x2 is None or index is None:
        return None if x2 is None else _joined(x2)
    return jax.lax.dynamic_index_in_dim(x2, index, 0, keepdims=False)


def _put(x2: Array, index: Any, new: Array) -> Any:
    return _in_stretches(new) if index is None else jax.lax.dynamic_update_index_in_dim(x2, new, index, 0)


def _of_all(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: _of(x, index), tree)


def _put_all(tree: Any, index: Array, new: Any) -> Any:
    return jax.tree.map(lambda x, y: _put(x, index, y), tree, new)
