"""Static batching, to compare with."""

from __future__ import annotations

from llm_jax.inference.scheduler import Scheduler


class StaticScheduler(Scheduler):
    """Admits a batch when the one before it has ended; same kernels, slots and chunks, prompts not padded."""

    def _may_admit(self) -> bool:
        return not self.running
