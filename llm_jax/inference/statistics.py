"""What a service counts, and the line that it says now and then."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from llm_jax.inference.scheduler import Plan, Scheduler
from llm_jax.inference.speculation import Acceptance


class Statistics:
    """Counts of one service; not thread-safe, the service's lock guards it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.prompt_tokens = 0
        self.most_rows = 0
        self._last: tuple[float, int, int] = (time.monotonic(), 0, 0)

    def planned(self, plan: Plan) -> None:
        """Notes a step."""
        self.most_rows = max(self.most_rows, len(plan.decode) + len(plan.prefill))
        self.prompt_tokens += sum(c.count for c in plan.prefill)

    def drew(self, tokens: int) -> None:
        """Notes tokens that were drawn and kept."""
        self.tokens += tokens

    def snapshot(self, scheduler: Scheduler, engine: Any, proposals: Acceptance) -> dict[str, Any]:
        """Requests running and waiting, pages used and in all, slots of used pages that hold nothing, steps, tokens
        drawn, prompt tokens computed, most requests seen in one step, tokens proposed and accepted, the process's
        id, and what `SchedulerStats` has."""
        return {"running": len(scheduler.running), "waiting": len(scheduler.waiting),
                "pages_used": scheduler.pool.num_used, "pages_total": scheduler.pool.num_pages,
                "wasted_slots": scheduler.wasted_slots(), "steps": engine.num_steps, "tokens": self.tokens,
                "prompt_tokens": self.prompt_tokens, "most_rows": self.most_rows,
                "proposed": proposals.proposed, "accepted": proposals.accepted, "pid": os.getpid(),
                **dataclasses.asdict(scheduler.stats)}

    def line(self, snapshot: dict[str, Any]) -> str:
        """The snapshot as one line, rates since the last one."""
        now, (then, tokens, prompt_tokens) = time.monotonic(), self._last
        seconds = max(now - then, 1e-9)
        self._last = (now, snapshot["tokens"], snapshot["prompt_tokens"])
        used = snapshot["pages_used"] / snapshot["pages_total"]
        line = (f"{snapshot['running']} running, {snapshot['waiting']} waiting, "
                f"{(snapshot['tokens'] - tokens) / seconds:,.0f} tokens/s drawn, "
                f"{(snapshot['prompt_tokens'] - prompt_tokens) / seconds:,.0f} tokens/s of prompts, "
                f"pages {used:.0%} used")
        if snapshot.get("prefix_lookups"):
            line += f", prefix hits {snapshot['prefix_hits'] / snapshot['prefix_lookups']:.0%}"
        if snapshot.get("proposed"):
            line += f", proposals {snapshot['accepted'] / snapshot['proposed']:.0%} right"
        return line
