"""What a model is (`ModelConfig`) and how it is run (`Execution`)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from llm_jax.errors import UserError
from llm_jax.models.facts import Experts, Head, LatentAttention, RopeScaling, check, check_count, check_number

REMAT_POLICIES = ("none", "full", "stage", "dots", "save_attention")
ATTENTION = ("auto", "dense", "chunked", "strips", "splash", "cudnn", "triton")  # `kernels.attention.BACKENDS`
SEQUENCE_ATTENTION = ("ring", "gather")  # `parallel.sequence`
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "glm4", "mixtral", "qwen3_moe",
            "deepseek_v3", "bert", "t5")
ENCODER_HEADS = ("masked_lm", "pooler", "next_sentence")
_CHOICES = {
    "family": FAMILIES,
    "architecture": ("decoder", "encoder", "encoder_decoder"),
    "positions": ("rotary", "learned", "relative"),
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "sandwich"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
}
_SWITCHES = ("tie_embeddings", "rope_interleaved", "qk_norm", "qkv_bias", "output_bias", "gated_mlp", "mlp_bias",
             "embed_norm")
_PARTS = {"rope_scaling": RopeScaling, "experts": Experts, "latent": LatentAttention, "head": Head}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The facts of an architecture, as they are written to `model.json`; nothing here changes with the machine.

    The defaults are Llama's. A family is a set of these values and a map of names (`interop.families`); no layer asks
    for a family's name.

    Attributes:
      vocab_size: rows of the embedding (V).
      num_layers: blocks (L); of the decoder, where there is an encoder too.
      embed_dim: width of the residual stream (D).
      num_heads: query heads (H).
      num_kv_heads: key and value heads (G); divides num_heads.
      head_dim: width of a query and a key (K).
      mlp_dim: inner width of the dense feed-forward layer (F).
      max_context: longest sequence, in tokens, the model is meant for; rows of the table of learned positions.
      family: which family's values and names these are; kept for export.
      architecture: "decoder" (causal), "encoder" (every token sees its whole sequence) or "encoder_decoder".
      positions: "rotary" (Su et al. 2021, arXiv:2104.09864), "learned" (a vector added to the embedding) or "relative"
        (T5's bias on the scores, arXiv:1910.10683, section 2.1).
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched, if they are.
      rotary_dim: leading part of a head that is turned; None turns all of it.
      rope_interleaved: whether neighbours (x_2i, x_2i+1) are the pairs that turn, instead of (x_i, x_i+half).
      local_rope_theta: base of the frequencies, never stretched, in "local" layers; None has them as in the others.
      attention_pattern: "global" or "local", cycled over the layers; local layers see `sliding_window` keys.
      sliding_window: keys a token sees in local layers, itself included.
      qk_norm: whether each head's queries and keys pass an RMSNorm before they are turned.
      qkv_bias, output_bias: whether the attention's projections have biases.
      attention_scale: multiplies the scores; None is head_dim^-0.5.
      attention_soft_cap: scores become cap · tanh(score / cap) (Gemma 2, arXiv:2408.00118).
      latent: multi-head latent attention instead of grouped-query attention.
      norm: "rms" (RMSNorm, arXiv:1910.07467) or "layer" (LayerNorm, arXiv:1607.06450).
      norm_eps: added to the mean square or variance.
      norm_offset: added to the stored scale of an RMSNorm (Gemma stores scale − 1).
      norm_placement: "pre" x + f(norm(x)); "post" norm(x + f(x)); "sandwich" x + norm(f(norm(x))).
      activation: of the feed-forward layer; "gelu_tanh" is the tanh approximation.
      gated_mlp: down(act(gate(x)) · up(x)) if true, down(act(up(x))) if not.
      mlp_bias: whether the feed-forward layer's projections have biases.
      mlp_pattern: "dense" or "experts", cycled over the layers.
      experts: what an "experts" layer is.
      tie_embeddings: whether the output projection is the embedding's transpose.
      embed_scale: multiplies the embeddings.
      embed_norm: whether the sum of embeddings is normalised before the first block.
      token_types: rows of the table of token types (BERT's sentence A and B); 0 for none.
      logit_scale: multiplies the final hidden state before the output projection.
      logit_soft_cap: logits become cap · tanh(logit / cap).
      encoder_heads: what stands on an encoder: "masked_lm" (logits of the masked tokens), "pooler" (a vector a
        sequence) and "next_sentence" (whether B follows A, from the pooled vector).
      encoder_layers: blocks of the encoder, in an encoder–decoder.
      relative_buckets, relative_max_distance: of relative positions.
      head: a task's head in place of the output vocabulary.
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
    architecture: str = "decoder"
    positions: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    local_rope_theta: float | None = None
    attention_pattern: tuple[str, ...] = ("global",)
    sliding_window: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    latent: LatentAttention | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_placement: str = "pre"
    activation: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    mlp_pattern: tuple[str, ...] = ("dense",)
    experts: Experts | None = None
    tie_embeddings: bool = False
    embed_scale: float | None = None
    embed_norm: bool = False
    token_types: int = 0
    logit_scale: float | None = None
    logit_soft_cap: float | None = None
    encoder_heads: tuple[str, ...] = ()
    encoder_layers: int = 0
    relative_buckets: int = 0
    relative_max_distance: int = 0
    head: Head | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
                     "max_context"):
            check_count("ModelConfig", name, getattr(self, name))
        for name in ("token_types", "encoder_layers", "relative_buckets", "relative_max_distance"):
            check_count("ModelConfig", name, getattr(self, name), least=0)
        check_number("ModelConfig", "rope_theta", self.rope_theta, 1.0)
        check_number("ModelConfig", "norm_eps", self.norm_eps, 0.0)
        for name in ("attention_scale", "attention_soft_cap", "embed_scale", "logit_scale", "logit_soft_cap"):
            value = getattr(self, name)
            if value is not None:
                check_number("ModelConfig", name, value, 0.0)
                check(value > 0, f"ModelConfig.{name} must be above 0, or None")
        if self.local_rope_theta is not None:
            check_number("ModelConfig", "local_rope_theta", self.local_rope_theta, 1.0)
        for name in _SWITCHES:
            value = getattr(self, name)
            check(isinstance(value, bool), f"ModelConfig.{name} must be True or False, not {value!r}")
        for name, choices in _CHOICES.items():
            check(getattr(self, name) in choices, f"ModelConfig.{name}={getattr(self, name)!r} is not one of {choices}")
        for name, part in _PARTS.items():
            value = getattr(self, name)
            check(value is None or isinstance(value, part), f"ModelConfig.{name} must be a {part.__name__} or None")
        for name, kinds in (("attention_pattern", ("global", "local")), ("mlp_pattern", ("dense", "experts"))):
            pattern = getattr(self, name)
            check(isinstance(pattern, tuple) and 0 < len(pattern) and set(pattern) <= set(kinds),
                  f"ModelConfig.{name} must be a tuple of {' and '.join(map(repr, kinds))}, not {pattern!r}")
            check(len(pattern) <= self.num_layers,
                  f"ModelConfig.{name} has {len(pattern)} entries for {self.num_layers} layers")
        self._check_together()

    def _check_together(self) -> None:
        check(self.num_heads % self.num_kv_heads == 0,
              f"ModelConfig.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.positions == "rotary":
            width = self.rotary_width
            check(width % 2 == 0, f"ModelConfig.{'head_dim' if self.rotary_dim is None else 'rotary_dim'}={width} must "
                  f"be even: rotary positions turn pairs")
            check(0 < width <= self.head_dim, f"ModelConfig.rotary_dim={width} is more than head_dim={self.head_dim}")
            s = self.rope_scaling
            check(s is None or s.kind != "longrope" or len(s.short_factors) == width // 2,
                  f"RopeScaling has {len(s.short_factors) if s else 0} factors for {width // 2} frequencies")
        check(self.positions != "relative" or 4 <= self.relative_buckets < 2 * self.relative_max_distance,
              "ModelConfig.positions='relative' needs relative_buckets, at least 4, and a relative_max_distance of "
              "more than half of them")
        if "local" in self.attention_pattern:
            check_count("ModelConfig", "sliding_window", self.sliding_window)
        check(("experts" in self.mlp_pattern) == (self.experts is not None),
              f"ModelConfig.mlp_pattern={self.mlp_pattern!r} and experts={self.experts!r} do not go together")
        if self.latent is not None:
            whole = self.latent.nope_dim + self.latent.rope_dim
            check(self.head_dim == whole, f"ModelConfig.head_dim={self.head_dim} is not latent.nope_dim + rope_dim")
            check(self.num_kv_heads == self.num_heads, "ModelConfig.latent has as many key heads as query heads")
        if self.architecture == "encoder_decoder":
            for name in ("experts", "latent", "head"):
                check(getattr(self, name) is None,
                      f"ModelConfig.{name} does not go with architecture='encoder_decoder'")
        heads = self.encoder_heads
        check(isinstance(heads, tuple) and set(heads) <= set(ENCODER_HEADS) and len(set(heads)) == len(heads),
              f"ModelConfig.encoder_heads must be a tuple of some of {ENCODER_HEADS}, not {heads!r}")
        check(not heads or self.architecture == "encoder",
              f"ModelConfig.encoder_heads={heads!r} does not go with architecture={self.architecture!r}")
        check("pooler" in heads or "next_sentence" not in heads,
              "ModelConfig.encoder_heads: 'next_sentence' needs 'pooler'")
        if self.head is not None:
            check(self.architecture == "decoder" or not self.head.per_sequence or "pooler" in heads,
                  f"ModelConfig.head={self.head.kind!r} on an encoder needs 'pooler' among encoder_heads")
            check("masked_lm" not in heads and "next_sentence" not in heads,
                  "ModelConfig.head stands in place of 'masked_lm' and 'next_sentence' among encoder_heads")
        check((self.encoder_layers > 0) == (self.architecture == "encoder_decoder"),
              f"ModelConfig.encoder_layers={self.encoder_layers} does not go with architecture={self.architecture!r}")

    @property
    def rotary_width(self) -> int:
        """Entries of a head's query and key that turn with the position."""
        if self.latent is not None:
            return self.latent.rope_dim
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def longest_context(self) -> int:
        """The most tokens the model can be run on: `max_context`, or what its rope scaling stretches the original
        context to, where a checkpoint gives the unstretched one as its own."""
        s = self.rope_scaling
        if self.positions != "rotary" or s is None or s.kind not in ("linear", "dynamic", "yarn"):
            return self.max_context
        return max(self.max_context, int(s.factor * (s.original_context or self.max_context)))

    @property
    def switches_on_length(self) -> bool:
        """Whether rotary frequencies depend on the longest position of a call, unless `Execution.rope_context` fixes
        them."""
        return self.positions == "rotary" and self.rope_scaling is not None and self.rope_scaling.kind in (
            "dynamic", "longrope")

    def cache_widths(self) -> tuple[int, int, int]:
        """What a layer caches of a token: (heads, width of a key, width of a value).

        With latent attention the one "head" is the latent vector and the turned part of the key; a value is the first
        part of the same entry, so its own width is 0.
        """
        if self.latent is not None:
            return 1, self.latent.kv_rank + self.latent.rope_dim, 0
        return self.num_kv_heads, self.head_dim, self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `None` and the fields of absent parts included."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; a missing or unknown field is a UserError that names it."""
        return _from_dict(cls, fields)

    def num_params(self) -> int:
        """Parameters of the model, counted from the shapes."""
        return _counts(self)[0]

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one training token (forward and backward) at row length `context`.

        6 per weight that multiplies (Kaplan et al. 2020, arXiv:2001.08361, §2.1; of the experts, those a token is sent
        to), plus the two attention products, 12 · L · H · K · context / 2 under a causal mask (Chowdhery et al. 2022,
        arXiv:2204.02311, appendix B).
        """
        value_dim = self.head_dim if self.latent is None else self.latent.value_dim
        widths = self.num_heads * (self.head_dim + value_dim)
        keys = sum(min(context, 2 * (self.sliding_window or context)) if kind == "local" else context
                   for kind in (self.attention_pattern[i % len(self.attention_pattern)]
                                for i in range(self.num_layers)))
        return 6.0 * _counts(self)[1] + 3.0 * widths * keys


def _from_dict(cls: Any, fields: dict[str, Any]) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    missing = sorted(n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields)
    if unknown or missing:
        raise UserError(f"model description does not fit {cls.__name__}: missing {missing}, unknown {unknown}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    for name, part in _PARTS.items():
        if cls is ModelConfig and isinstance(values.get(name), dict):
            values[name] = _from_dict(part, values[name])
    return cls(**values)


@functools.lru_cache(maxsize=64)
def _counts(config: ModelConfig) -> tuple[int, int]:
    from llm_jax.models.parameters import count  # the shapes are the modules' to say, and those stand on this file

    return count(config)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is run; changes speed, memory and rounding, never what is computed (but for the last two).

    Attributes:
      dtype: dtype of activations and of the weights as they are multiplied; softmax and logits are float32 always.
      scan_layers: whether the layers are scanned blocks over stacked weights (training) or unrolled (serving).
      remat: what the backward pass recomputes: "none" keeps everything, "full" keeps each block's input, "dots" keeps
        matrix products without batch dimensions, "save_attention" keeps each attention's output. "stage" is "full", and
        in a pipeline keeps only what enters a stage in each tick, for one forward pass more.
      attention: how attention of whole rows is computed, see `kernels.attention.choose`; "auto" takes what is best.
      sequence_attention: how keys come to the queries of other devices where the mesh axis `sequence` divides rows:
        "ring" passes them around, "gather" gathers them first (see `parallel.sequence`).
      loss_chunk: tokens of a device whose logits exist at once in a loss (see `objectives.chunked_loss`); None holds
        those of all tokens.
      rope_context: the length that rope scalings which switch on length ("dynamic", "longrope") are computed for; None
        takes the longest position of each call, as Hugging Face's modules do. Trainer and server fix it: otherwise a
        token's logits depend on the length of other rows.
      expert_capacity: in training, an expert takes at most this factor times its even share of a row's tokens and the
        rest pass it by; None drops nothing.
      pipeline_microbatches: parts that the rows of a call are cut into where layers lie over the mesh axis `pipeline`
        (see `parallel.pipeline`); None takes as many as there are stages.
      pipeline_repeats: stretches of layers that each stage of the pipeline holds.
    """

    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    sequence_attention: str = "ring"
    loss_chunk: int | None = 512
    rope_context: int | None = None
    expert_capacity: float | None = None
    pipeline_microbatches: int | None = None
    pipeline_repeats: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"Execution.dtype={self.dtype!r} is not one of 'float32', 'bfloat16', 'float16'")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"Execution.remat={self.remat!r} is not one of {REMAT_POLICIES}")
        if self.attention not in ATTENTION:
            raise UserError(f"Execution.attention={self.attention!r} is not one of {ATTENTION}")
        if self.sequence_attention not in SEQUENCE_ATTENTION:
            raise UserError(f"Execution.sequence_attention={self.sequence_attention!r} is not one of "
                            f"{SEQUENCE_ATTENTION}")
        if self.loss_chunk is not None:
            check_count("Execution", "loss_chunk", self.loss_chunk)
        if self.expert_capacity is not None:
            check_number("Execution", "expert_capacity", self.expert_capacity, 0.0)
        if self.pipeline_microbatches is not None:
            check_count("Execution", "pipeline_microbatches", self.pipeline_microbatches)
        check_count("Execution", "pipeline_repeats", self.pipeline_repeats)
