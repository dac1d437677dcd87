"""Cross-entropy of the next token that never holds the logits of a whole batch.

The logits of all tokens, B · T · V float32 numbers, are often the largest array of a training step, and their gradient
is another one. Here they are made for a chunk of tokens at a time, and while a chunk's logits are there, its part of
both gradients is made from them: ∂/∂logits = softmax − one-hot is known as soon as the softmax is. The backward pass
then only multiplies by the one number that comes from behind. So nothing is computed twice: three matrix products, as
in the plain loss. (Hsu et al. 2024, arXiv:2410.10989, section 3.2, do the same in a kernel.)

On a mesh, tokens stay on the device that has them: chunks are cut from each device's own tokens, and each device adds
up its own gradient of the output weight, which is summed over devices once, after the last chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.activations import constrained, devices_along
from llm_jax.models.embedding import Output
from llm_jax.models.ring_weight import Lie, RingWeight, unwrapped

Array = jax.Array

# Axes of what is cut into chunks: I chunk, R device along the rows, S device along the length, N token of a chunk.
_LOGITS = ("batch", "length", None, "activation_vocab")


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How [B, T] tokens become [I, R, S, N].

    Attributes:
      rows: devices that divide the rows (R).
      lengths: devices that divide the length (S).
      chunks: how many there are (I).
      tokens: of each device in a chunk (N).
    """

    rows: int
    lengths: int
    chunks: int
    tokens: int

    def into_chunks(self, x_BT: Array) -> Array:
        """[B, T, ...] → [I, R, S, N, ...], with zeros after the last token."""
        B, T, *rest = x_BT.shape
        x = x_BT.reshape(self.rows, B // self.rows, self.lengths, T // self.lengths, *rest)
        x = x.swapaxes(1, 2).reshape(self.rows, self.lengths, -1, *rest)
        missing = self.chunks * self.tokens - x.shape[2]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, missing)) + ((0, 0),) * len(rest)) if missing else x
        x = constrained(x, ("batch", "length") + (None,) * (1 + len(rest)))
        return jnp.moveaxis(x.reshape(self.rows, self.lengths, self.chunks, self.tokens, *rest), 2, 0)

    def out_of_chunks(self, x_IRSN: Array, B: int, T: int) -> Array:
        """The inverse of `into_chunks`."""
        rest = x_IRSN.shape[4:]
        x = jnp.moveaxis(x_IRSN, 0, 2).reshape(self.rows, self.lengths, -1, *rest)
        x = x[:, :, :(B // self.rows) * (T // self.lengths)]
        x = x.reshape(self.rows, self.lengths, B // self.rows, T // self.lengths, *rest).swapaxes(1, 2)
        return constrained(x.reshape(B, T, *rest), ("batch", "length") + (None,) * len(rest))


def _cut(B: int, T: int, most: int) -> _Cut:
    """Chunks of at most `most` tokens a device, of equal size if that takes no more than twice as many."""
    rows, lengths = devices_along("batch"), devices_along("length")
    rows, lengths = rows if B % rows == 0 else 1, lengths if T % lengths == 0 else 1
    own = B * T // (rows * lengths)
    fewest = -(-own // most)
    chunks = next((i for i in range(fewest, min(2 * fewest, own) + 1) if own % i == 0), fewest)
    return _Cut(rows, lengths, chunks, -(-own // chunks))


@dataclasses.dataclass(frozen=True)
class _How:
    """What is static: the logits' recipe (its weight left out), the chunks, dtypes for the backward pass, and where the
    weight lies, if its gradient is to be scattered along rings of chips."""

    output: Output
    cut: _Cut
    z_loss: float
    x_dtype: Any
    weight_dtype: Any
    lie: Lie | None


def chunked_sums(x_BTD: Array, output: Output, targets_BT: Array, weights_BT: Array, *, chunk: int,
                 z_loss: float = 0.0) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the targets and z-loss, summed by weight; equal to `next_token.token_losses` of all logits.

    Args:
      x_BTD: last hidden states, any float dtype. Products are in it, logits and all sums in float32.
      output: what turns them into logits (`Decoder.states`).
      targets_BT: int32.
      weights_BT: float32, what each position counts.
      chunk: the most tokens whose logits a device holds at once; on a mesh each device has a chunk of its own.
      z_loss: weight of log² z.

    Returns:
      The sum to minimise (float32 scalar, nats), differentiable by hidden states, output weight and weights_BT; and
      its parts `loss_sum` and `z_loss_sum`, for metrics: no gradient passes them.
    """
    B, T, _ = x_BTD.shape
    x_BTD = output.scaled(x_BTD)
    weight = unwrapped(output.weight)
    lie = output.weight.lie if isinstance(output.weight, RingWeight) else None
    if not isinstance(weight, jax.Array):  # of another kind (quantized, with an addition): multiplied out
        weight = weight.astype(x_BTD.dtype)
    how = _How(dataclasses.replace(output, weight=None), _cut(B, T, chunk), z_loss, x_BTD.dtype, weight.dtype, lie)
    objective_sum, loss_sum, z_loss_sum = _sums(how, x_BTD, weight, targets_BT, weights_BT.astype(jnp.float32))
    return objective_sum, jax.lax.stop_gradient({"loss_sum": loss_sum, "z_loss_sum": z_loss_sum})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(how: _How, x_BTD: Array, weight: Array, targets_BT: Array, weights_BT: Array) -> tuple[Array, Array, Array]:
    return _through_chunks(how, x_BTD, weight, targets_BT, weights_BT, with_gradients=False)[0]


def _forward(how: _How, x_BTD: Array, weight: Array, targets_BT: Array, weights_BT: Array) -> tuple[tuple, tuple]:
    return _through_chunks(how, x_BTD, weight, targets_BT, weights_BT, with_gradients=True)


def _backward(how: _How, gradients: tuple, cotangents: tuple) -> tuple:
    along = cotangents[0]  # the other two are of metrics
    of_x_BTD, of_weight, of_weights_BT = gradients
    return ((of_x_BTD * along).astype(how.x_dtype), (of_weight * along).astype(how.weight_dtype), None,
            of_weights_BT * along)


_sums.defvjp(_forward, _backward)


def _through_chunks(how: _How, x_BTD: Array, weight: Array, targets_BT: Array, weights_BT: Array, *,
                    with_gradients: bool) -> tuple[tuple, tuple]:
    """The three sums; and the gradients of the first by x, by the weight and by weights_BT, or nothing."""
    B, T, D = x_BTD.shape
    cut, is_table = how.cut, how.output.is_table
    # Gathered from the devices that share the model's width once, and not for every chunk.
    names = ("activation_vocab", None) if is_table else (None, "activation_vocab")
    used = constrained(weight.astype(x_BTD.dtype), names)
    # bfloat16 has float32's range; what float16 would lose to its own (probabilities under 6e-8) stays in float32.
    grad_dtype = jnp.float32 if x_BTD.dtype == jnp.float16 else x_BTD.dtype

    def one_chunk(of_weight: Array | None, pieces: tuple[Array, Array, Array]) -> tuple[Array | None, tuple]:
        x_RSND, targets_RSN, weights_RSN = pieces
        logits_RSNV = constrained(how.output.capped(how.output.product(x_RSND, used)), _LOGITS)
        top_RSN1 = jnp.max(logits_RSNV, axis=-1, keepdims=True)
        powers_RSNV = jnp.exp(logits_RSNV - top_RSN1)
        total_RSN1 = jnp.sum(powers_RSNV, axis=-1, keepdims=True)
        log_z_RSN1 = jnp.log(total_RSN1) + top_RSN1
        is_target_RSNV = jnp.arange(logits_RSNV.shape[-1], dtype=jnp.int32) == targets_RSN[..., None]
        losses_RSN = log_z_RSN1[..., 0] - jnp.sum(jnp.where(is_target_RSNV, logits_RSNV, 0.0), axis=-1)
        squares_RSN = jnp.square(log_z_RSN1[..., 0]) if how.z_loss else None
        if of_weight is None:
            return None, (losses_RSN, squares_RSN, None)
        weights_RSN1 = weights_RSN[..., None]
        # ∂/∂logits of weight · (log z − logit of the target + z_loss · log² z)
        share_RSN1 = weights_RSN1 * (1.0 + 2.0 * how.z_loss * log_z_RSN1) if how.z_loss else weights_RSN1
        slope_RSNV = powers_RSNV * (share_RSN1 / total_RSN1) - jnp.where(is_target_RSNV, weights_RSN1, 0.0)
        slope_RSNV = (slope_RSNV * how.output.slope(logits_RSNV)).astype(grad_dtype)
        of_x_RSND = jnp.einsum("rsnv,vd->rsnd" if is_table else "rsnv,dv->rsnd", slope_RSNV, used.astype(grad_dtype),
                               preferred_element_type=jnp.float32).astype(grad_dtype)
        of_weight += jnp.einsum("rsnv,rsnd->rsvd" if is_table else "rsnd,rsnv->rsdv",
                                *((slope_RSNV, x_RSND.astype(grad_dtype)) if is_table
                                  else (x_RSND.astype(grad_dtype), slope_RSNV)), preferred_element_type=jnp.float32)
        return constrained(of_weight, ("batch", "length", *names)), (losses_RSN, squares_RSN, of_x_RSND)

    of_weight = None
    if with_gradients:
        of_weight = constrained(jnp.zeros((cut.rows, cut.lengths, *weight.shape), jnp.float32),
                                ("batch", "length", *names))
    pieces = tuple(cut.into_chunks(x) for x in (x_BTD, targets_BT, weights_BT))
    of_weight, (losses, squares, of_x) = jax.lax.scan(one_chunk, of_weight, pieces)
    losses_BT = cut.out_of_chunks(losses, B, T)
    loss_sum = jnp.sum(losses_BT * weights_BT)
    z_losses_BT = how.z_loss * cut.out_of_chunks(squares, B, T) if how.z_loss else jnp.zeros_like(losses_BT)
    z_loss_sum = jnp.sum(z_losses_BT * weights_BT) if how.z_loss else jnp.zeros((), jnp.float32)
    sums = (loss_sum + z_loss_sum, loss_sum, z_loss_sum)
    if not with_gradients:
        return sums, ()
    return sums, (cut.out_of_chunks(of_x, B, T), _added_up(how.lie, of_weight), losses_BT + z_losses_BT)


def _added_up(lie: Lie | None, parts_RSDV: Array) -> Array:
    """The output weight's gradient, of which each device has a part."""
    return jnp.sum(parts_RSDV, axis=(0, 1)) if lie is None else lie.added_up(parts_RSDV)
