"""The parts of a `ModelConfig` that only some models have: rope scaling, experts, latent attention, a task's head."""

from __future__ import annotations

import dataclasses

from llm_jax.errors import UserError

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope")


def check(condition: bool, message: str) -> None:
    """UserError(message) unless `condition`."""
    if not condition:
        raise UserError(message)


def check_count(owner: str, name: str, value: object, least: int = 1) -> None:
    """UserError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise UserError(f"{owner}.{name} must be {kind}, not {value!r}")


def check_number(owner: str, name: str, value: object, least: float) -> None:
    """UserError unless `value` is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise UserError(f"{owner}.{name} must be a number, at least {least:g}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the context a model was first trained on; formulas in `models.rope`.

    Attributes:
      kind: "linear" (Chen et al. 2023, arXiv:2306.15595), "dynamic" (NTK-aware, switched on by length), "yarn" (Peng et
        al. 2023, arXiv:2309.00071), "llama3" (Llama 3.1's), "longrope" (Ding et al. 2024, arXiv:2402.13753).
      factor: how many times the original context.
      original_context: tokens of the context before scaling; None takes the model's `max_context`.
      attention_factor: multiplies cos and sin; None takes the kind's own formula (1 where it has none).
      beta_fast, beta_slow: yarn; rotations per original context above and below which a frequency is kept or divided.
      mscale, mscale_all_dim: yarn; DeepSeek's two coefficients of the attention factor, None where there is none.
      truncate: yarn; whether the bounds of its ramp are rounded to whole dimensions.
      low_freq_factor, high_freq_factor: llama3; bounds of its ramp, as fractions of the original context.
      short_factors, long_factors: longrope; a divisor of each frequency (rotated width / 2), for sequences that fit the
        original context and for longer ones.
    """

    kind: str
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check(self.kind in ROPE_SCALINGS, f"RopeScaling.kind={self.kind!r} is not one of {ROPE_SCALINGS}")
        check_number("RopeScaling", "factor", self.factor, 1.0)
        if self.original_context is not None:
            check_count("RopeScaling", "original_context", self.original_context)
        if self.kind == "longrope":
            check(bool(self.short_factors) and len(self.short_factors) == len(self.long_factors),
                  "RopeScaling.short_factors and long_factors must be of one length, half the rotated width")
            for value in (*self.short_factors, *self.long_factors):
                check(value > 0, f"RopeScaling: longrope factors must be positive, not {value!r}")
        if self.kind == "llama3":
            check(self.high_freq_factor > self.low_freq_factor > 0,
                  "RopeScaling.high_freq_factor must be above low_freq_factor, and that above 0")


@dataclasses.dataclass(frozen=True)
class Experts:
    """A feed-forward layer of which each token passes through a few of many copies (Shazeer et al. 2017).

    Attributes:
      count: experts (E).
      per_token: experts each token is sent to.
      mlp_dim: inner width of an expert (F).
      scoring: "softmax" over the experts, or "sigmoid" of each (DeepSeek-V3, arXiv:2412.19437).
      renormalize: whether the chosen experts' weights are divided by their sum.
      scale: multiplies the weights after that.
      groups, groups_kept: experts lie in `groups` equal groups, of which only the best `groups_kept` are eligible.
      selection_bias: whether a stored bias is added to the scores for the choice (not for the weights).
      shared_dim: inner width of a gated layer that every token passes through besides; 0 for none.
      balance_weight: coefficient of the load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4) in training.
    """

    count: int
    per_token: int
    mlp_dim: int
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    selection_bias: bool = False
    shared_dim: int = 0
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "mlp_dim", "groups", "groups_kept"):
            check_count("Experts", name, getattr(self, name))
        check_count("Experts", "shared_dim", self.shared_dim, least=0)
        check_number("Experts", "balance_weight", self.balance_weight, 0.0)
        check(self.scoring in ("softmax", "sigmoid"), f"Experts.scoring={self.scoring!r} is not 'softmax' or 'sigmoid'")
        check(self.count % self.groups == 0, f"Experts.count={self.count} is not a multiple of groups={self.groups}")
        check(self.groups_kept <= self.groups, f"Experts.groups_kept={self.groups_kept} is more than {self.groups}")
        eligible = self.count // self.groups * self.groups_kept
        check(self.per_token <= eligible, f"Experts.per_token={self.per_token} is more than the {eligible} eligible")


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values are projected up from one small vector a token, which is all that
    is cached (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
      query_rank: width of the queries' own bottleneck; None projects them directly.
      kv_rank: width of the latent vector.
      nope_dim: part of a key that carries no position.
      rope_dim: part that does, one for all heads. `ModelConfig.head_dim` is the sum of both.
      value_dim: width of a value.
    """

    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
            check_count("LatentAttention", name, getattr(self, name))
        if self.query_rank is not None:
            check_count("LatentAttention", "query_rank", self.query_rank)
        check(self.rope_dim % 2 == 0, f"LatentAttention.rope_dim={self.rope_dim} must be even")


HEADS = ("sequence_classification", "token_classification", "regression", "reward", "value")


@dataclasses.dataclass(frozen=True)
class Head:
    """What stands on the last hidden state in place of the output vocabulary.

    Attributes:
      kind: "sequence_classification" (one of `labels` a sequence), "token_classification" (one a token), "regression"
        (`labels` numbers a sequence), "reward" (one number a sequence), "value" (one number a token). What is one a
        sequence is read from a decoder's last token, and from an encoder's pooled vector.
      labels: outputs; 1 for "reward" and "value".
    """

    kind: str
    labels: int = 1

    def __post_init__(self) -> None:
        check(self.kind in HEADS, f"Head.kind={self.kind!r} is not one of {HEADS}")
        check_count("Head", "labels", self.labels)
        check(self.labels == 1 or self.kind not in ("reward", "value"), f"Head.labels must be 1 for {self.kind!r}")

    @property
    def per_sequence(self) -> bool:
        """Whether there is one result a sequence, not one a token."""
        return self.kind not in ("token_classification", "value")
