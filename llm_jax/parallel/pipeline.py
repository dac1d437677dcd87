"""Layers over the mesh axis `pipeline`: devices hold stretches of them, and microbatches pass from one to the next.

With S stages and R repeats a stack of layers is cut into S · R stretches; stage s holds stretches s, S + s, 2S + s, …,
so a microbatch goes round the stages R times (the circular schedule of GSPMD, Xu et al. 2021, arXiv:2105.04663, section
3.3; interleaving in Megatron-LM, Narayanan et al. 2021, arXiv:2104.04473, section 2.2). All stages work at once, a tick
is one stretch on one microbatch, and after each tick every stage hands what it made to the next. Microbatches enter in
groups of S: a group has gone round just when the first stage is free for its next repeat, so nothing waits and nothing
has to be kept. Of M · R + S − 1 ticks each stage idles S − 1.

This is written for one device, with `ppermute`, and `shard_map` is manual over `pipeline` alone: the other mesh axes
stay the compiler's. The backward pass is the derivative of the loop over ticks: the same schedule, backwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llm_jax.errors import UserError

Array = jax.Array
AXIS = "pipeline"
# What `keep_all_but_slices` does not keep: it picks and converts, of which nothing is slow to do again.
_CHEAP = frozenset(("dynamic_slice", "squeeze", "reshape", "transpose", "convert_element_type", "broadcast_in_dim"))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which stretch of layers each stage works on, and for which microbatch, at each tick.

    Attributes:
      stages: devices along the axis (S).
      repeats: stretches of layers that a stage holds (R).
      microbatches: parts that the rows are cut into (M); at least S, and with more than one repeat a multiple of it.
    """

    stages: int
    repeats: int
    microbatches: int

    def __post_init__(self) -> None:
        s, m = self.stages, self.microbatches
        if m < s or (self.repeats > 1 and m % s):
            wanted = f"a multiple of {s}" if self.repeats > 1 else f"at least {s}"
            raise UserError(f"Execution.pipeline_microbatches={m} does not keep {s} stages with {self.repeats} "
                            f"stretches of layers each busy: choose {wanted}")

    @property
    def turns(self) -> int:
        """Ticks in which a stage has work."""
        return self.microbatches * self.repeats

    @property
    def ticks(self) -> int:
        """Ticks from the first stage's first to the last stage's last."""
        return self.turns + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of ticks in which a stage has nothing to do, the same for all: (S − 1) / (M · R + S − 1)."""
        return (self.stages - 1) / self.ticks

    def work(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """(whether there is work, the repeat, the microbatch) of a stage at a tick; whole numbers or arrays of them."""
        turn = tick - stage
        is_working = (turn >= 0) & (turn < self.turns)
        turn = jnp.clip(turn, 0, self.turns - 1)
        in_group = turn % (self.stages * self.repeats)
        group = turn // (self.stages * self.repeats)
        return is_working, in_group // self.stages, group * self.stages + in_group % self.stages

    def check_layers(self, periods: int, period: int = 1) -> None:
        """UserError unless the layers can be cut into stretches of the same length.

        Args:
          periods: how often the pattern of layers repeats.
          period: layers of the pattern.
        """
        parts = self.stages * self.repeats
        if periods % parts:
            what = f"{periods} layers" if period == 1 else f"{periods} periods of {period} layers"
            raise UserError(f"{what} can't be divided among {self.stages} stages of the pipeline with {self.repeats} "
                            f"stretches each (Execution.pipeline_repeats): {parts} does not divide {periods}; choose "
                            f"MeshConfig.pipeline × pipeline_repeats out of the divisors of {periods}")

    def check_rows(self, rows: int, shards: int = 1) -> None:
        """UserError unless `rows`, of which `shards` devices each have a part, can be cut into the microbatches."""
        if rows % (shards * self.microbatches):
            unit = shards * self.microbatches
            raise UserError(f"{rows} rows on {shards} devices can't be cut into Execution.pipeline_microbatches="
                            f"{self.microbatches} parts; choose a batch of a multiple of {unit} rows, such as "
                            f"{unit * math.ceil(rows / unit)}, or other microbatches")

    def __str__(self) -> str:
        return (f"pipeline of {self.stages} stages × {self.repeats} stretches of layers, {self.microbatches} "
                f"microbatches: {self.stages - 1} of {self.ticks} ticks idle ({self.bubble:.1%})")


def stages() -> int:
    """Devices along the axis `pipeline` of the mesh that is set; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(AXIS, 1)


def schedule(stages: int, repeats: int, microbatches: int | None) -> Schedule:
    """The schedule of a run; None takes as many microbatches as there are stages, the fewest there can be."""
    return Schedule(stages, repeats, stages if microbatches is None else microbatches)


def cut(x: Array, count: int) -> Array:
    """Rows [B, …] as microbatches [M, B / M, …]: row r goes to microbatch r mod M, so devices cut their own rows."""
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)


def join(x: Array) -> Array:
    """The inverse of `cut`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def through_stages(stretch: Callable[..., tuple[Array, Any]], weights: Any, x: Array, by_row: Any, schedule: Schedule,
                   policy: Callable[..., bool] | None) -> tuple[Array, Any]:
    """What all layers make of `x`, one stretch after the other, on the mesh that is set.

    Args:
      stretch: (weights of k periods, x [b, …], one microbatch of `by_row`) → (the same shape as x, sums [k, …]): a
        stretch of layers, and whatever adds up over microbatches; a tree, possibly empty.
      weights: tree of arrays [n, …] whose leading axis, the n = S · R · k periods in order, lies over `pipeline`.
      x: microbatches [M, b, …].
      by_row: tree of arrays [M, b, …], the same for all layers.
      schedule: who does what when.
      policy: of `jax.checkpoint`, what a tick keeps for its backward pass besides its input; None keeps nothing.

    Returns:
      [M, b, …], and the sums [n, …] over all microbatches, in the order of the layers.

    Collectives: a `ppermute` of one microbatch each tick, forward and backward; a sum over the stages of x's gradient
    and one of the result (only the last stage has it), each of the size of x; and with R > 1, since a stage's stretches
    are not neighbours in the stack, R of each weight's stretches, forward and backward (see `_own_stretches`).
    """
    last = schedule.stages - 1
    # Without repeats nothing returns to the first stage.
    ring = [(s, (s + 1) % schedule.stages) for s in range(schedule.stages if schedule.repeats > 1 else last)]

    def on_stage(stage_1: Array, weights: Any, x: Array, by_row: Any) -> tuple[Array, Any]:
        stage = stage_1[0]
        held = _own_stretches(weights, schedule, stage)

        def tick(arrived: Array, now: Array) -> tuple[Array, tuple[Array, Any]]:
            is_working, repeat, micro = schedule.work(now, stage)
            entering = jnp.where((stage == 0) & (repeat == 0), _at(x, micro), arrived)
            # Zeros, not whatever is there: no overflow in an idle tick may reach a gradient as 0 · inf.
            entering = jnp.where(is_working, entering, jnp.zeros_like(entering))
            mine = jax.tree.map(lambda leaf: leaf[0] if schedule.repeats == 1 else _at(leaf, repeat), held)
            made, sums = stretch(mine, entering, jax.tree.map(lambda leaf: _at(leaf, micro), by_row))
            return jax.lax.ppermute(made, AXIS, ring), (made, sums)

        ticks = jnp.arange(schedule.ticks, dtype=jnp.int32)
        tick = jax.checkpoint(tick, policy=policy, prevent_cse=False)
        _, (made, sums) = jax.lax.scan(tick, jnp.zeros_like(x[0]), ticks)
        is_working, repeat, _ = schedule.work(ticks, stage)
        of_repeat = (repeat[:, None] == jnp.arange(schedule.repeats)) & is_working[:, None]
        sums = jax.tree.map(lambda leaf: jnp.einsum("tr,tk...->rk...", of_repeat.astype(leaf.dtype), leaf), sums)
        return jnp.where(stage == last, _finished(made, schedule), 0)[None], sums

    numbers = jnp.arange(schedule.stages, dtype=jnp.int32)
    of_stage = PartitionSpec(AXIS)
    run = jax.shard_map(on_stage, in_specs=(of_stage, of_stage, PartitionSpec(), PartitionSpec()),
                        out_specs=(of_stage, PartitionSpec(None, AXIS)), axis_names={AXIS}, check_vma=False)
    made, sums = run(numbers, weights, x, by_row)
    # `jnp.sum` would add (and send) 16-bit numbers as float32; all but one of them are zeros.
    out = jax.lax.reduce(made, np.zeros((), made.dtype), jax.lax.add, (0,))
    return out, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sums)


def keep_all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that keeps what was computed, but not the weights that a tick picked or converted to do so."""
    return primitive.name not in _CHEAP


def _at(leaf: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)


def _finished(made: Array, schedule: Schedule) -> Array:
    """Of what the last stage made at all ticks [ticks, …], what its last repeat made, by microbatch."""
    s, r = schedule.stages, schedule.repeats
    made = made[s - 1:]
    if r == 1:
        return made
    return made.reshape(-1, r, s, *made.shape[1:])[:, -1].reshape(-1, *made.shape[1:])


def _own_stretches(weights: Any, schedule: Schedule, stage: Array) -> Any:
    """Each stage's stretches [R, k, …], out of a stack that the stages hold as neighbouring periods [R · k, …].

    Stage s holds stretches s · R … s · R + R − 1 of the stack and needs s, S + s, …; in each of R rounds every stage
    sends one and receives one. So a device sends what it holds once forward, and its gradient once backward.
    """
    repeats = schedule.repeats
    cut_up = jax.tree.map(lambda leaf: leaf.reshape(repeats, -1, *leaf.shape[1:]), weights)
    if repeats == 1:
        return cut_up
    moves = exchange(schedule.stages, repeats)
    sent_RS, received_RS = jnp.asarray(moves.sent), jnp.asarray(moves.received)

    def exchanged(leaf: Array) -> Array:
        own = jnp.zeros_like(leaf)
        for i, pairs in enumerate(moves.pairs):
            came = jax.lax.ppermute(_at(leaf, sent_RS[i, stage]), AXIS, pairs)
            own = jax.lax.dynamic_update_index_in_dim(own, came, received_RS[i, stage], 0)
        return own

    return jax.tree.map(exchanged, cut_up)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How stretches come to their stages, in rounds.

    Attributes:
      pairs: [R] lists of (stage that sends, stage that receives), a permutation each.
      sent: int32 [R, S], which of its R neighbouring stretches a stage sends in a round.
      received: int32 [R, S], which of its repeats a stage receives in a round.
    """

    pairs: list[list[tuple[int, int]]]
    sent: np.ndarray
    received: np.ndarray


def exchange(stages: int, repeats: int) -> Exchange:
    """Stretch q, which stage q // R holds, goes to stage q mod S as its repeat q // S.

    If stage s sends its stretch (i + s // S') mod R in round i, S' = S / gcd(S, R), the receivers of a round are all
    different: s · R mod S takes each multiple of the gcd once among S' neighbours, and s // S' tells those blocks apart
    modulo the gcd.
    """
    block = stages // math.gcd(stages, repeats)
    stage = np.arange(stages)
    sent = ((np.arange(repeats)[:, None] + stage // block) % repeats).astype(np.int32)
    stretch = stage * repeats + sent
    received = np.zeros_like(sent)
    np.put_along_axis(received, stretch % stages, (stretch // stages).astype(np.int32), axis=1)
    pairs = [[(int(s), int(q) % stages) for s, q in enumerate(row)] for row in stretch]
    return Exchange(pairs, sent, received)
