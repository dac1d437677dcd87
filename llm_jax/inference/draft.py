"""A smaller model that proposes tokens, which the served one then checks (Leviathan et al. 2023, arXiv:2211.17192).

The draft keeps keys and values of its own in pools of its own, page for page beside the target's: it runs over every
batch that the target runs over, so that a page that is shared, given up or computed again is so in both. A proposal is
drawn with the noise that the target's own draw of that position will use (Gumbel coupling, Daliri et al. 2024,
arXiv:2408.07978), and is accepted where the two draws agree. What is returned is therefore exactly what the target
draws alone, greedily or at any temperature; the draft decides nothing but how many steps it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.inference import programs, sampling
from llm_jax.inference.batch import (
    Asked,
    Geometry,
    StepBatch,
    StepShape,
    build,
    page_slot,
    sampling_batch,
    visible_keys,
)
from llm_jax.inference.placement import Placement
from llm_jax.inference.programs import Pools
from llm_jax.inference.scheduler import Chunk, Plan
from llm_jax.inference.scheduler import Sequence as Running
from llm_jax.kernels.backends import make_pools
from llm_jax.models import Decoder, Execution, ModelConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Wish:
    """A sequence for which tokens are to be proposed: its pages hold `count` tokens more than are known."""

    sequence: Running
    asked: Asked
    count: int


class Draft:
    """The draft's weights, pools and programs; an `Engine` owns it."""

    def __init__(self, config: ModelConfig, params: Any, target: ModelConfig, geometry: Geometry, *, dtype: str,
                 cache_dtype: str, max_context: int, rows: Sequence[int], most: int, backend: str = "xla",
                 tensor: int = 1, devices: Sequence[jax.Device] | None = None):
        """Lays out the draft.

        Args:
          config: the draft model's.
          params: per-layer, as a step multiplies them.
          target: the served model's.
          geometry: the engine's.
          dtype, cache_dtype, max_context, tensor, devices: the engine's.
          rows: the numbers of rows for which proposing is compiled.
          most: tokens proposed at once.
          backend: see `PagedContext.backend`.
        Raises:
          UserError: the draft knows other tokens, or a shorter context.
        """
        if config.vocab_size != target.vocab_size:
            raise UserError(f"the draft model knows {config.vocab_size} tokens and the served one {target.vocab_size}; "
                            "they need the same tokenizer")
        if max_context > config.longest_context:
            raise UserError(f"the draft model's context is {config.longest_context} tokens; lower max_context="
                            f"{max_context} to that")
        self.config = config
        self.geometry = dataclasses.replace(geometry, backend=backend, **visible_keys(config))
        self.most = most
        self.row_counts = sorted(rows)
        self._cache_dtype = cache_dtype
        self._placement = Placement(config, tensor, devices, backend=backend)
        self.params = self._placement.params(params)
        model = Decoder(config, Execution(dtype=dtype, scan_layers=False, rope_context=max_context))
        self.reset()

        def follow(params: Any, pools: Pools, last_S: Array, batch: StepBatch) -> Pools:
            return programs.hidden(model, params, pools, last_S, batch)[1]

        def propose(params: Any, pools: Pools, batch: StepBatch, position_KR: Array, slot_KR: Array, key_KR2: Array,
                    draw: sampling.SamplingBatch) -> tuple[Pools, Array]:
            token_R, proposed = batch.token_N, []
            for position_R, slot_R, key_R2 in zip(position_KR, slot_KR, key_KR2, strict=True):
                context = dataclasses.replace(batch.context, position_N=position_R, slot_N=slot_R)
                x_1RD, pools = model.apply({"params": params}, token_R[None], position_R[None], context, pools,
                                           method="hidden")
                logits_RV = model.apply({"params": params}, x_1RD[0], method="logits")
                token_R, _ = sampling.sample(logits_RV, dataclasses.replace(draw, key_R2=key_R2))
                proposed.append(token_R)
            return pools, jnp.stack(proposed, axis=1)

        shardings = None if self._placement.whole is None else self._placement.pool_shardings(self.pools)
        self._follow = jax.jit(follow, donate_argnums=1, out_shardings=shardings)
        self._propose = jax.jit(propose, donate_argnums=1, out_shardings=None if shardings is None else (
            shardings, self._placement.whole))

    def reset(self) -> None:
        """Fresh pools."""
        g, c = self.geometry, self.config
        self.pools: Pools = []  # first: there is no room for two
        self.pools = self._placement.pools(
            lambda: make_pools(c.num_layers, g.num_pages, g.page_size, c.cache_widths(), self._cache_dtype, g.backend))

    def compile(self) -> None:
        """Compiles proposing; following is compiled as the engine's steps are."""
        for rows in self.row_counts:
            self.run_empty(rows)

    def run_empty(self, rows: int) -> None:
        """Proposes for nobody, in the time that it takes for so many, and waits for it."""
        jax.block_until_ready(self._run((), rows))

    def follow(self, last_S: Array, batch: StepBatch) -> None:
        """Computes the draft's keys and values of a step's tokens."""
        self.pools = self._follow(self.params, self.pools, last_S, batch)

    def propose(self, wishes: Sequence[Wish]) -> list[list[int]]:
        """Tokens that the draft would draw next, for each wish `count` of them. Waits for the device.

        Args:
          wishes: of sequences whose tokens are all known, no more than the largest number of rows.
        """
        if not wishes:
            return []
        rows = next(r for r in self.row_counts if r >= len(wishes))
        token_RK = np.asarray(self._run(wishes, rows))
        return [token_RK[row, :w.count].tolist() for row, w in enumerate(wishes)]

    def _run(self, wishes: Sequence[Wish], rows: int) -> Array:
        g, spare = self.geometry, self.geometry.num_pages * self.geometry.page_size
        # Each row's last token, with lists that reach to the pages of all that will follow it.
        plan = Plan(tuple(Chunk(w.sequence, len(w.sequence.tokens) - 1, w.count) for w in wishes), ())
        batch, draws = build(plan, StepShape(0, rows), g)
        position_KR = np.full((self.most, rows), -1, np.int32)
        slot_KR = np.full((self.most, rows), spare, np.int32)
        key_KR2 = np.zeros((self.most, rows, 2), np.uint32)
        for row, w in enumerate(wishes):
            p = w.asked.params
            for i in range(w.count):
                position = len(w.sequence.tokens) - 1 + i
                position_KR[i, row] = position
                slot_KR[i, row] = page_slot(w.sequence, position, g.page_size)
                if p.temperature:
                    key_KR2[i, row] = sampling.row_key(p.seed or 0, p.sample, position + 1)
        asked = {w.sequence.id: w.asked for w in wishes}
        draw = sampling_batch(draws, asked, rows, always=True)
        self.pools, token_RK = self._propose(self.params, self.pools, batch, position_KR, slot_KR, key_KR2, draw)
        return token_RK
