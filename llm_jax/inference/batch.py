"""A step's plan as the arrays of one compiled shape; NumPy only, so that nothing here can compile anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax.inference.request import SamplingParams
from llm_jax.inference.sampling import SamplingBatch, row_key
from llm_jax.inference.scheduler import Chunk, Plan
from llm_jax.kernels.paged import PagedContext, WorkList


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """The static shape of a step: `decode_rows` rows of one token and `prefill_rows` rows of `chunk` tokens."""

    prefill_rows: int
    decode_rows: int

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes that every step of an engine shares.

    Attributes:
      num_pages, page_size: the pool.
      chunk: prompt tokens of one row in one step.
      pages_per_row: pages of the longest context.
      window: keys that a token sees in the model's local layers; None where it has none.
      has_global: whether any layer sees the whole context.
    """

    num_pages: int
    page_size: int
    chunk: int
    pages_per_row: int
    window: int | None = None
    has_global: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Everything a step reads besides weights and pools.

    Attributes:
      token_N: int32 token ids; 0 for padding.
      context: positions, slots and work lists of the N tokens.
      out_R: int32, for each row the flat token whose logits are drawn from.
      sampling: how each row is drawn.
    """

    token_N: Any
    context: PagedContext
    out_R: Any
    sampling: SamplingBatch


def choose_shape(plan: Plan, shapes: Iterable[StepShape]) -> StepShape:
    """The cheapest compiled shape that holds the plan: fewest prefill rows first, as they have `chunk` tokens each."""
    return min(s for s in shapes if s.decode_rows >= len(plan.decode) and s.prefill_rows >= len(plan.prefill))


def build(plan: Plan, shape: StepShape, geometry: Geometry, params: Mapping[int, SamplingParams]) -> StepBatch:
    """The arrays of one step.

    Args:
      plan: its chunks own the pages they need.
      shape: a shape that holds the plan.
      geometry: the engine's sizes.
      params: sampling parameters by sequence id, seeds filled in; a plan without entries is drawn greedily.
    """
    g = geometry
    N = shape.decode_rows + shape.prefill_rows * g.chunk
    token_N = np.zeros(N, np.int32)
    position_N = np.full(N, -1, np.int32)
    slot_N = np.full(N, g.num_pages * g.page_size, np.int32)  # padding: the pool's spare page
    out_R = np.zeros(shape.rows, np.int32)
    rows: list[tuple[int, Chunk]] = []

    def place(chunk: Chunk, at: int, row: int) -> None:
        s, span = chunk.sequence, slice(at, at + chunk.count)
        positions = np.arange(chunk.start, chunk.start + chunk.count)
        token_N[span] = s.tokens[chunk.start:chunk.start + chunk.count]
        position_N[span] = positions
        slot_N[span] = np.asarray(s.pages)[positions // g.page_size] * g.page_size + positions % g.page_size
        out_R[row] = at + chunk.count - 1
        rows.append((row, chunk))

    for row, chunk in enumerate(plan.decode):
        place(chunk, row, row)
    for row, chunk in enumerate(plan.prefill):
        place(chunk, shape.decode_rows + row * g.chunk, shape.decode_rows + row)
    lists = {}
    for name, chunks, num_rows, most in (("decode", plan.decode, shape.decode_rows, 1),
                                         ("prefill", plan.prefill, shape.prefill_rows, g.chunk)):
        if g.has_global:
            lists[name] = _work_list(chunks, num_rows, g.pages_per_row, g)
        if g.window is not None:
            # The widest span that `most` queries see, and one page more, as it may begin in the middle of one.
            pages = min(g.pages_per_row, -(-(g.window + most - 2) // g.page_size) + 1)
            lists[f"{name}_local"] = _work_list(chunks, num_rows, pages, g, g.window)
    context = PagedContext(position_N, slot_N, decode_rows=shape.decode_rows, chunk=g.chunk, **lists)
    return StepBatch(token_N, context, out_R, _sampling(rows, shape.rows, params))


def _work_list(chunks: tuple[Chunk, ...], num_rows: int, pages_per_row: int, g: Geometry,
               window: int | None = None) -> WorkList:
    """The pages that the chunks' rows read, at most `pages_per_row` each: from the window of the first token on."""
    capacity = max(1, min(num_rows * pages_per_row, g.num_pages))
    row_W, page_W, start_W = (np.zeros(capacity, np.int32) for _ in range(3))
    count = 0
    for row, chunk in enumerate(chunks):
        first = 0 if window is None else max(chunk.start - window + 1, 0) // g.page_size
        end = -(-(chunk.start + chunk.count) // g.page_size)
        span = slice(count, count + end - first)
        row_W[span] = row
        page_W[span] = chunk.sequence.pages[first:end]
        start_W[span] = np.arange(first, end) * g.page_size
        count += end - first
    return WorkList(row_W, page_W, start_W, np.int32(count))


def _sampling(rows: list[tuple[int, Chunk]], num_rows: int, params: Mapping[int, SamplingParams]) -> SamplingBatch:
    temperature_R, top_p_R = np.zeros(num_rows, np.float32), np.ones(num_rows, np.float32)
    top_k_R, key_R2 = np.zeros(num_rows, np.int32), np.zeros((num_rows, 2), np.uint32)
    for row, chunk in rows:
        p = params.get(chunk.sequence.id)
        if p is None or not chunk.samples or p.temperature == 0:
            continue
        temperature_R[row], top_k_R[row], top_p_R[row] = p.temperature, p.top_k, p.top_p
        key_R2[row] = row_key(p.seed or 0, p.sample, len(chunk.sequence.tokens))
    return SamplingBatch(temperature_R, top_k_R, top_p_R, key_R2)
