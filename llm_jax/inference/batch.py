"""A step's plan as the arrays of one compiled shape; NumPy only, so that nothing here can compile anything."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.inference.penalties import Extras, no_extras
from llm_jax.inference.request import MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingParams
from llm_jax.inference.sampling import SamplingBatch, row_key
from llm_jax.inference.scheduler import PENDING, Chunk, Plan
from llm_jax.inference.scheduler import Sequence as Running
from llm_jax.kernels.paged import PagedContext, WorkList
from llm_jax.models import ModelConfig
from llm_jax.models.layout import layer_kinds

# Entries of the bias table: a request's own, and -inf for the tokens that min_tokens forbids.
MAX_BIAS = MAX_LOGIT_BIAS + 2 * MAX_STOP_IDS


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """The static shape of a step: `decode_rows` rows of `width` tokens and `prefill_rows` rows of `chunk` tokens.

    Attributes:
      least_rows: fewest rows of logits; steps that are padded to the same number share the programs that draw.
    """

    prefill_rows: int
    decode_rows: int
    width: int = 1
    least_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows of logits: every token of a decoding row, the last token of a prefilling one, and padding."""
        return max(self.decode_rows * self.width + self.prefill_rows, self.least_rows)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes that every step of an engine shares.

    Attributes:
      num_pages, page_size: the pool.
      chunk: prompt tokens of one row in one step.
      pages_per_row: pages of the longest context.
      num_slots: sequences that run at once.
      vocab_size: the model's.
      window: keys that a token sees in the model's local layers; None where it has none.
      has_global: whether any layer sees the whole context.
      backend: see `PagedContext.backend`.
      deterministic: see `PagedContext.deterministic`.
    """

    num_pages: int
    page_size: int
    chunk: int
    pages_per_row: int
    num_slots: int = 1
    vocab_size: int = 1
    window: int | None = None
    has_global: bool = True
    backend: str = "xla"
    deterministic: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """Everything a step's forward pass reads besides weights, pools and the last tokens.

    Attributes:
      token_N: int32 token ids; 0 for padding; −1 − slot for the token that the step before drew for that slot.
      context: positions, slots and page lists of the N tokens.
      out_R: int32, for each row of logits the flat token they are of.
      slot_R: int32, the sequence slot whose last token is drawn there; num_slots where none is.
    """

    token_N: Any
    context: PagedContext
    out_R: Any
    slot_R: Any


@dataclasses.dataclass(frozen=True)
class Draws:
    """Which rows of logits belong to which sequence: `count` rows from `row` on (several: a proposal is checked)."""

    sequence_id: int
    row: int
    count: int


def visible_keys(config: ModelConfig) -> dict[str, Any]:
    """The fields of `Geometry` that say which keys a model's layers see."""
    kinds = {kind.attention for kind in layer_kinds(config)}
    return {"window": config.sliding_window if "local" in kinds else None, "has_global": "global" in kinds}


def page_slot(sequence: Running, position: int, page_size: int) -> int:
    """Where the pool keeps the token at a position of a sequence: page · page_size + offset."""
    return sequence.pages[position // page_size] * page_size + position % page_size


def choose_shape(plan: Plan, shapes: Iterable[StepShape]) -> StepShape:
    """The cheapest compiled shape that holds the plan: fewest prefill rows first, as they have `chunk` tokens each."""
    width = 1 + max((c.proposed for c in plan.decode), default=0)
    return min((s for s in shapes if s.decode_rows >= len(plan.decode) and s.prefill_rows >= len(plan.prefill)
                and s.width >= width), key=lambda s: (s.prefill_rows, s.width, s.decode_rows))


def build(plan: Plan, shape: StepShape, geometry: Geometry) -> tuple[StepBatch, tuple[Draws, ...]]:
    """The arrays of one step, and who draws where.

    Args:
      plan: its chunks own the pages they need.
      shape: a shape that holds the plan.
      geometry: the engine's sizes.
    """
    g, width = geometry, shape.width
    num_decode = shape.decode_rows * width
    N = num_decode + shape.prefill_rows * g.chunk
    token_N = np.zeros(N, np.int32)
    position_N = np.full(N, -1, np.int32)
    slot_N = np.full(N, g.num_pages * g.page_size, np.int32)  # padding: the pool's spare page
    out_R = np.zeros(shape.rows, np.int32)
    out_R[:num_decode] = np.arange(num_decode)
    slot_R = np.full(shape.rows, g.num_slots, np.int32)
    draws: list[Draws] = []
    for row, chunk in enumerate(plan.decode):
        s, at = chunk.sequence, row * width
        last = s.tokens[chunk.start]
        token_N[at] = ~s.slot if last == PENDING else last
        for i in range(1 + chunk.proposed):
            position = chunk.start + i
            position_N[at + i] = position
            slot_N[at + i] = page_slot(s, position, g.page_size)
        if chunk.proposed:
            token_N[at + 1:at + 1 + chunk.proposed] = s.proposal[:chunk.proposed]
        else:
            slot_R[at] = s.slot
        draws.append(Draws(s.id, at, 1 + chunk.proposed))
    for row, chunk in enumerate(plan.prefill):
        s, at = chunk.sequence, num_decode + row * g.chunk
        span, positions = slice(at, at + chunk.count), np.arange(chunk.start, chunk.start + chunk.count)
        token_N[span] = s.tokens[chunk.start:chunk.start + chunk.count]
        position_N[span] = positions
        first = chunk.start // g.page_size
        pages = np.asarray(s.pages[first:(chunk.start + chunk.count - 1) // g.page_size + 1])
        slot_N[span] = pages[positions // g.page_size - first] * g.page_size + positions % g.page_size
        out_R[num_decode + row] = at + chunk.count - 1
        if chunk.samples:
            slot_R[num_decode + row] = s.slot
            draws.append(Draws(s.id, num_decode + row, 1))
    lists = _tables(plan, shape, g) if g.backend != "xla" or g.deterministic else _lists(plan, shape, g)
    context = PagedContext(position_N, slot_N, decode_rows=shape.decode_rows, chunk=g.chunk, decode_width=width,
                           backend=g.backend, deterministic=g.deterministic, **lists)
    return StepBatch(token_N, context, out_R, slot_R), tuple(draws)


def _lists(plan: Plan, shape: StepShape, g: Geometry) -> dict[str, Any]:
    lists: dict[str, Any] = {}
    for name, chunks, num_rows, most in (("decode", plan.decode, shape.decode_rows, shape.width),
                                         ("prefill", plan.prefill, shape.prefill_rows, g.chunk)):
        if g.has_global:
            lists[name] = _work_list(chunks, num_rows, g.pages_per_row, g)
        if g.window is not None:
            # The widest span that `most` queries see, and one page more, as it may begin in the middle of one.
            pages = min(g.pages_per_row, -(-(g.window + most - 2) // g.page_size) + 1)
            lists[f"{name}_local"] = _work_list(chunks, num_rows, pages, g, g.window)
    return lists


def _work_list(chunks: tuple[Chunk, ...], num_rows: int, pages_per_row: int, g: Geometry,
               window: int | None = None) -> WorkList:
    """The pages that the chunks' rows read, at most `pages_per_row` each: from the window of the first token on."""
    # Pages may be shared between rows, so that more may be read than there are.
    capacity = max(1, num_rows * pages_per_row)
    firsts = [0 if window is None else max(c.start - window + 1, 0) // g.page_size for c in chunks]
    ends = [-(-(c.start + c.count + c.proposed) // g.page_size) for c in chunks]
    counts = [end - first for first, end in zip(firsts, ends, strict=True)]
    count = sum(counts)
    row_W, page_W, start_W = (np.zeros(capacity, np.int32) for _ in range(3))
    row_W[:count] = np.repeat(np.arange(len(chunks)), counts)
    page_W[:count] = np.fromiter(itertools.chain.from_iterable(
        c.sequence.pages[first:end] for c, first, end in zip(chunks, firsts, ends, strict=True)), np.int32, count)
    offsets = np.cumsum([0, *counts[:-1]]) if counts else np.zeros(0, int)
    start_W[:count] = (np.arange(count) - np.repeat(offsets - firsts, counts)) * g.page_size
    return WorkList(row_W, page_W, start_W, np.int32(count))


def _tables(plan: Plan, shape: StepShape, g: Geometry) -> dict[str, Any]:
    rows = shape.decode_rows + shape.prefill_rows
    table_RP = np.full((rows, g.pages_per_row), g.num_pages, np.int32)
    length_R = np.zeros(rows, np.int32)
    for row, chunk in [*enumerate(plan.decode), *enumerate(plan.prefill, shape.decode_rows)]:
        length_R[row] = chunk.start + chunk.count + chunk.proposed
        count = -(-int(length_R[row]) // g.page_size)
        table_RP[row, :count] = chunk.sequence.pages[:count]
    return {"table_RP": table_RP, "length_R": length_R}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks of its next draws.

    Attributes:
      params: its parameters, the seed filled in.
      slot, next_position: of its sequence: where its token counts are, and the index of the token to draw first.
      forbidden: tokens that must not be drawn now (`min_tokens`).
      mask: uint32 words of the tokens that the constraint allows; None without one.
      entering: if its counts begin with this draw, its tokens so far, `num_prompt` of them the prompt's.
    """

    params: SamplingParams
    slot: int
    next_position: int
    forbidden: tuple[int, ...] = ()
    mask: Any = None
    entering: tuple[int, ...] = ()
    num_prompt: int = 0

    @property
    def is_shaped(self) -> bool:
        """Whether its logits are changed before the draw."""
        p = self.params
        return (self.mask is not None or bool(self.forbidden) or bool(p.logit_bias) or self.is_counted)

    @property
    def is_counted(self) -> bool:
        """Whether its draws depend on how often it has had each token."""
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def sampling_batch(draws: Sequence[Draws], asked: Mapping[int, Asked], num_rows: int,
                   always: bool = False) -> SamplingBatch | None:
    """How the rows are drawn; None if all of them take the likeliest token, unless `always`."""
    if not always and not any(asked[d.sequence_id].params.temperature for d in draws if d.sequence_id in asked):
        return None
    return _sampling_batch(draws, asked, num_rows)


def _sampling_batch(draws: Sequence[Draws], asked: Mapping[int, Asked], num_rows: int) -> SamplingBatch:
    temperature_R, top_p_R = np.zeros(num_rows, np.float32), np.ones(num_rows, np.float32)
    top_k_R, key_R2 = np.zeros(num_rows, np.int32), np.zeros((num_rows, 2), np.uint32)
    min_p_R = np.zeros(num_rows, np.float32)
    for d in draws:
        a = asked.get(d.sequence_id)
        if a is None or not a.params.temperature:
            continue
        p, rows = a.params, slice(d.row, d.row + d.count)
        temperature_R[rows], top_k_R[rows], top_p_R[rows], min_p_R[rows] = p.temperature, p.top_k, p.top_p, p.min_p
        for i in range(d.count):
            key_R2[d.row + i] = row_key(p.seed or 0, p.sample, a.next_position + i)
    return SamplingBatch(temperature_R=temperature_R, top_k_R=top_k_R, top_p_R=top_p_R, min_p_R=min_p_R, key_R2=key_R2)


def extras(draws: Sequence[Draws], asked: Mapping[int, Asked], num_rows: int, g: Geometry,
           always: bool = False) -> tuple[SamplingBatch, Extras] | None:
    """What changes the rows' logits, and how they are drawn then; None if nothing changes any, unless `always`."""
    shaped = [d for d in draws if d.sequence_id in asked and asked[d.sequence_id].is_shaped]
    if not shaped and not always:
        return None
    made = no_extras(num_rows, MAX_BIAS, g.vocab_size, g.num_slots)
    for d in shaped:
        a, p, rows = asked[d.sequence_id], asked[d.sequence_id].params, slice(d.row, d.row + d.count)
        if a.is_counted:
            made.slot_R[rows] = a.slot
        made.repetition_R[rows], made.presence_R[rows] = p.repetition_penalty, p.presence_penalty
        made.frequency_R[rows] = p.frequency_penalty
        ids, amounts = zip(*p.logit_bias, strict=True) if p.logit_bias else ((), ())
        if ids or a.forbidden:
            count = len(ids) + len(a.forbidden)
            made.bias_id_RB[rows, :count] = (*ids, *a.forbidden)
            made.bias_RB[rows, :count] = (*amounts, *[-np.inf] * len(a.forbidden))
        if a.mask is not None:
            made.mask_RW[rows] = a.mask
    return _sampling_batch(draws, asked, num_rows), made
