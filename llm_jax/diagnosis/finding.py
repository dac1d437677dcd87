"""What a diagnosis says."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    Attributes:
      kind: a word for programs: "rate_too_high", "rate_too_low", "not_learning", "data_repeated", "overfitting",
        "exploding_gradients", "slow_compile", "slow_data", "slow_float32" or "slow_small_batch".
      says: what is wrong, in a sentence.
      evidence: the figures that say so.
      advice: what to change.
    """

    kind: str
    says: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"kind": self.kind, "says": self.says, "evidence": list(self.evidence), "advice": list(self.advice)}
