"""How many tokens to propose for verification, given how many were accepted and how full the batch is.

The model is that of Leviathan et al. 2023 (arXiv:2211.17192, section 3.3). If each proposed token is accepted with
probability α, a step that verifies k of them yields, in tokens,

    E(k) = 1 + α + … + α^k = (1 − α^(k+1)) / (1 − α),

and it is worth its cost while E(k) / cost(k) grows. A decode step reads all weights whatever it computes, so its time
is flat up to the number of positions where computing takes as long as reading, and in proportion beyond: with r
sequences of 1 + k positions, `free` positions before the step gets slower, and a draft model whose step takes c of the
target's,

    cost(k) = max(1, r · (1 + k) / free) / max(1, r / free) + c · k.

An empty batch thus speculates as far as acceptance carries; one that already fills the step does not at all.
"""

from __future__ import annotations

import dataclasses


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
      most: proposals a step, at most.
      free: positions that one step computes in about the time it takes for one: on accelerators some hundreds, on a CPU
        a few. Measure it: the width at which a decode step takes twice as long.
      draft_cost: time of proposing one token in steps of the target; 0 for prompt look-up.
      margin: what the yield for its cost must exceed, as a factor, for speculation to be worth its bookkeeping.
      prior: acceptance assumed of a sequence before it has any.
      weight: of the newest token's fate in the running acceptance.
      probe_every: a sequence that is not worth speculating on is tried again with one token after so many steps.
    """

    most: int = 4
    free: int = 64
    draft_cost: float = 0.0
    margin: float = 1.05
    prior: float = 0.5
    weight: float = 0.1
    probe_every: int = 32

    def __post_init__(self) -> None:
        if (self.most < 0 or self.free < 1 or self.draft_cost < 0 or self.margin < 1 or self.probe_every < 1
                or not 0 <= self.prior <= 1 or not 0 < self.weight <= 1):
            raise ValueError(f"speculation policy out of range: {self}")

    def cost(self, k: int, rows: int) -> float:
        """Time of a step that verifies `k` proposals for each of `rows` sequences; 1 is that of one without any."""
        return max(1.0, rows * (1 + k) / self.free) / max(1.0, rows / self.free) + self.draft_cost * k

    def best(self, acceptance: float, rows: int) -> int:
        """The number of proposals for each of `rows` sequences that yields the most tokens for its time; 0 is none."""
        best, best_gain = 0, self.margin
        for k in range(1, self.most + 1):
            gain = expected_tokens(acceptance, k) / self.cost(k, rows)
            if gain > best_gain * (1 + 1e-9):  # not for a rounding error
                best, best_gain = k, gain
        return best


class Throttle:
    """The running acceptance of one sequence and the number of proposals that follows from it."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.acceptance = policy.prior
        self.total = Acceptance()
        self._idle = 0

    def proposals(self, rows: int, room: int | None = None) -> int:
        """How many tokens to propose in the coming step; to be asked once a step.

        Args:
          rows: sequences that decode in it.
          room: tokens that the sequence may still draw, the coming one included; fewer than that are proposed.
        """
        policy = self.policy
        most = policy.most if room is None else min(policy.most, max(0, room - 1))
        count = min(most, policy.best(self.acceptance, rows))
        if count:
            self._idle = 0
            return count
        self._idle += 1
        # What was refused here may fit further on; but never while the batch leaves no room at any acceptance.
        if most and self._idle >= policy.probe_every and policy.best(1.0, rows):
            self._idle = 0
            return 1
        return 0

    def update(self, proposed: int, accepted: int) -> None:
        """Takes the outcome of a step: of `proposed` tokens the first `accepted` were what the model drew.

        Tokens behind the first refused one were not tried, so they say nothing of the acceptance.
        """
        self.total.add(proposed, accepted)
        for i in range(min(accepted + 1, proposed)):
            self.acceptance += self.policy.weight * ((i < accepted) - self.acceptance)


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens that a step yields on average if each of `k` proposals is accepted with this probability (equation 1)."""
    return float(k + 1) if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)
