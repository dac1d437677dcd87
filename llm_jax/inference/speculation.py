"""Whether proposing tokens pays, given how many were accepted and what it costs in time.

If each proposed token is accepted with probability α, a step that verifies k of them yields, in tokens,

    E(k) = 1 + α + … + α^k = (1 − α^(k+1)) / (1 − α)

(Leviathan et al. 2023, arXiv:2211.17192, equation 1). What it costs is measured: a decode step reads all weights
whatever it computes, so a few positions more may be nearly free or not, by device and by how many rows there are. As
the steps have compiled shapes, one proposal costs what the most do, and one row that has proposals makes the step a
wide one for all. So all rows decide together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass
class Acceptance:
    """What became of the proposals of one sequence, or of all.

    Attributes:
      proposed: tokens proposed.
      accepted: those that were what the model drew.
      steps: steps that verified at least one.
    """

    proposed: int = 0
    accepted: int = 0
    steps: int = 0

    def add(self, proposed: int, accepted: int) -> None:
        """Counts one step; of its proposals the first `accepted` were right."""
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} of {proposed} proposed tokens can't have been accepted")
        self.proposed += proposed
        self.accepted += accepted
        self.steps += proposed > 0

    @property
    def rate(self) -> float:
        """Share of the proposed tokens that was accepted; 0 before any."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a verifying step yielded on average, its own draw included; 1 before any."""
        return 1 + self.accepted / self.steps if self.steps else 1.0


@dataclasses.dataclass(frozen=True)
class Policy:
    """When to speculate.

    Attributes:
      most: proposals a sequence and step, where there are any.
      costs: (rows, time of a step that proposes and verifies for up to so many rows; 1 is that of a step without), by
        rows; for more rows nothing is proposed. Empty: it costs nothing, ever.
      margin: what the yield for its cost must exceed, as a factor, for speculation to be worth its bookkeeping.
      prior: acceptance assumed of a sequence before it has any. Hopeful: a few steps in vain cost less than never
        finding out.
      weight: of the newest token's fate in the running acceptance.
      probe_every: where it does not pay, it is tried again after so many steps.
    """

    most: int = 4
    costs: tuple[tuple[int, float], ...] = ()
    margin: float = 1.05
    prior: float = 0.8
    weight: float = 0.1
    probe_every: int = 32

    def __post_init__(self) -> None:
        if (self.most < 0 or self.margin < 1 or self.probe_every < 1 or not 0 <= self.prior <= 1
                or not 0 < self.weight <= 1):
            raise ValueError(f"speculation policy out of range: {self}")

    def cost(self, rows: int) -> float:
        """Time of a step with proposals for `rows` sequences; 1 is that of one without any."""
        if not self.costs:
            return 1.0
        return next((cost for most, cost in self.costs if rows <= most), math.inf)


class Throttle:
    """The running acceptance of one sequence."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.acceptance = policy.prior

    def update(self, proposed: int, accepted: int) -> None:
        """Takes the outcome of a step: of `proposed` tokens the first `accepted` were what the model drew.

        Tokens behind the first refused one were not tried, so they say nothing of the acceptance.
        """
        for i in range(min(accepted + 1, proposed)):
            self.acceptance += self.policy.weight * ((i < accepted) - self.acceptance)

    def missed(self) -> None:
        """Nothing was found to propose, which gains what a refused token does: the step waited for it all the same."""
        self.acceptance -= self.policy.weight * self.acceptance


class Gate:
    """Whether the coming step has proposals; of one service."""

    def __init__(self) -> None:
        self._idle = 0

    def opens(self, policy: Policy, throttles: Sequence[Throttle], rows: int) -> bool:
        """To be asked once a step.

        Args:
          policy: costs and limits.
          throttles: of the sequences that tokens can be proposed for; each then gets as many as it has room for.
          rows: sequences that run, those included.
        """
        tokens = rows - len(throttles) + sum(expected_tokens(t.acceptance, policy.most) for t in throttles)
        cost = policy.margin * rows * policy.cost(rows)
        self._idle += 1
        # What did not pay may pay further on; but never where it would not if everything were accepted.
        if tokens > cost or (self._idle > policy.probe_every and rows + len(throttles) * policy.most > cost):
            self._idle = 0
            return bool(throttles)
        return False


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens that a step yields on average if each of `k` proposals is accepted with this probability (equation 1)."""
    return float(k + 1) if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)
