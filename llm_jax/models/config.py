"""What a model is (`ModelConfig`) and how it is run (`Execution`)."""

from __future__ import annotations

import dataclasses

from llm_jax.errors import UserError

REMAT_POLICIES = ("none", "full", "dots", "save_attention")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The facts of an architecture, as they are written to `model.json`; nothing here changes with the machine.

    Attributes:
      family: name of the family whose name map and values these are; "llama" is the plain decoder.
      vocab_size: rows of the embedding (V).
      num_layers: decoder blocks (L).
      embed_dim: width of the residual stream (D).
      num_heads: query heads (H).
      num_kv_heads: key and value heads (G); divides num_heads.
      head_dim: width of a head (K); even, because rotary positions turn pairs.
      mlp_dim: inner width of the gated feed-forward layer (F).
      max_context: longest sequence, in tokens, the model is meant for.
      rope_theta: base of the rotary frequencies (Su et al. 2021, arXiv:2104.09864).
      norm_eps: added to the mean square in RMSNorm.
      tie_embeddings: whether the output projection is the embedding's transpose.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_context: int
    family: str = "llama"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
                     "max_context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"ModelConfig.{name} must be a positive whole number, not {value!r}")
        for name, least in (("rope_theta", 1.0), ("norm_eps", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise UserError(f"ModelConfig.{name} must be a number, at least {least:g}, not {value!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise UserError(f"ModelConfig.tie_embeddings must be True or False, not {self.tie_embeddings!r}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"ModelConfig.num_heads={self.num_heads} is not a multiple of "
                            f"num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"ModelConfig.head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if self.family != "llama":
            raise UserError(f"ModelConfig.family={self.family!r} is not known; known: 'llama'")

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> ModelConfig:
        """The inverse of `to_dict`; a missing or unknown field is a UserError that names it."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        missing = sorted(n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields)
        if unknown or missing:
            raise UserError(f"model description does not fit ModelConfig: missing {missing}, unknown {unknown}")
        return cls(**fields)

    def num_params(self) -> int:
        """Parameters of the model, counted from the shapes."""
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        block = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * block + embeddings + self.embed_dim

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one training token (forward and backward) at row length `context`.

        6 per weight that multiplies (Kaplan et al. 2020, arXiv:2001.08361, §2.1), plus the two attention products,
        12 · L · H · K · context / 2 under a causal mask (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
        """
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
        norms = (2 * self.num_layers + 1) * self.embed_dim
        multiplying = self.num_params() - embedding - norms
        return 6.0 * multiplying + 6.0 * self.num_layers * self.num_heads * self.head_dim * context


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is run; changes speed, memory and rounding, never what is computed.

    Attributes:
      dtype: dtype of activations and of the weights as they are multiplied; softmax and logits are float32 always.
      scan_layers: whether the layers are one scanned block over stacked weights (training) or unrolled (serving).
      remat: what the backward pass recomputes: "none" keeps everything, "full" keeps each block's input, "dots" keeps
        matrix products without batch dimensions, "save_attention" keeps each attention's output.
    """

    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"Execution.dtype={self.dtype!r} is not one of 'float32', 'bfloat16', 'float16'")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"Execution.remat={self.remat!r} is not one of {REMAT_POLICIES}")
