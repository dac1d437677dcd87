"""Floating-point operations of one instruction: matrix products, convolutions, and custom calls that are products."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

import numpy as np

from llm_jax.analysis.hlo_text import Array, Computation, Instruction

_GEMM = re.compile(r"gemm|matmul", re.IGNORECASE)
# Kernels of attention, JAX's splash attention and `kernels.triton_attention`: of the scores' size, two products
# forward; scores, gradient by weights and by queries; scores, gradient by weights, by keys and by values.
_ATTENTION = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)|/attention_(forward|dq|dkv)/")
_PRODUCTS = {"fwd": 2, "forward": 2, "dq": 3, "dkv": 4}
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2")  # written by hand: Pallas


def is_product(instruction: Instruction) -> bool:
    """Whether it multiplies, or is a kernel that may."""
    if instruction.opcode == "custom-call":
        target = _target(instruction)
        return bool(_GEMM.search(target)) or "fmha" in target or target in _KERNELS
    return instruction.opcode in ("dot", "ragged-dot", "convolution")


def flops(computation: Computation, instruction: Instruction, kernel_share: float = 1.0) -> float | None:
    """Operations of one execution, a multiplication and an addition counted as two; None if they can't be told.

    Args:
      computation: the one that holds the instruction.
      instruction: one for which `is_product` says yes.
      kernel_share: share of all pairs of queries and keys that attention kernels visit.
    """
    kernel = _ATTENTION.search(f"{instruction.name} {instruction.op_name}")
    if kernel and instruction.opcode == "custom-call":
        # Splash attention has heads before tokens, Triton's kernels tokens before heads.
        whole = _attention_flops(computation, instruction, _PRODUCTS[kernel[1] or kernel[2]], -2 if kernel[1] else -3)
        return None if whole is None else whole * kernel_share
    inputs = [computation.operand(instruction, i) for i in range(2)]
    operands = [operand.arrays[0] for operand in inputs if operand is not None and operand.arrays]
    if not instruction.arrays:
        return None
    result = instruction.arrays[0]
    if instruction.opcode == "custom-call":
        return _custom_flops(instruction, operands, result)
    if len(operands) < 2:
        return None
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, operands[0], operands[1], result)
    contracted = instruction.numbers("lhs_contracting_dims")
    whole = 2.0 * result.size * math.prod(operands[0].dims[axis] for axis in contracted)
    if set(instruction.numbers("lhs_ragged_dims")) & set(contracted):
        whole /= result.dims[0]  # each row is of one group only
    return whole


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _custom_flops(instruction: Instruction, operands: list[Array], result: Array) -> float | None:
    target, attributes = _target(instruction), instruction.attributes
    said = re.search(r'"cost_estimate":\s*\{[^}]*?"flops":\s*"?(\d+)', attributes)
    if said:
        return float(said[1])
    if "fmha" in target:
        return _fused_attention_flops(attributes, backward="Backward" in target)
    if not _GEMM.search(target) or len(operands) < 2:
        return None
    numbers = _config(attributes, "dot_dimension_numbers")
    if numbers is not None:
        contracted = [int(axis) for axis in numbers.get("lhs_contracting_dimensions", [])]
        return 2.0 * result.size * math.prod(operands[0].dims[axis] for axis in contracted)
    # Rows × inner by inner × columns, batched alike: the inner length follows from the three sizes.
    batch = math.prod(result.dims[:-2])
    inner = math.sqrt(operands[0].size * operands[1].size / max(result.size * batch, 1))
    return 2.0 * result.size * inner


def _attention_flops(computation: Computation, instruction: Instruction, count: int, tokens: int) -> float | None:
    """`count` products of all pairs of a kernel whose first operands of three or four axes are queries and keys, whose
    axis of tokens is `tokens`."""
    found = [computation.operand(instruction, i) for i in range(len(instruction.operands))]
    wide = [operand.arrays[0] for operand in found if operand is not None and operand.arrays
            and "f" in operand.arrays[0].dtype and len(operand.arrays[0].dims) >= 3]
    return 2.0 * count * wide[0].size * wide[1].dims[tokens] if len(wide) > 1 else None


def _fused_attention_flops(attributes: str, backward: bool) -> float | None:
    """Two products forward, five backward, of the scores' shape [B, H, T, S]; a causal mask halves them."""
    scores = _config(attributes, "intermediate_tensor_shape")
    width = re.search(r"operand_layout_constraints=\{[a-z0-9]+\[([\d,]+)\]", attributes)
    if scores is None or width is None:
        return None
    size = math.prod(int(n) for n in scores["dimensions"])
    mask = re.search(r'"mask_type":"(\w+)"', attributes)
    share = 0.5 if mask and "CAUSAL" in mask[1] else 1.0
    return 2.0 * (5 if backward else 2) * size * int(width[1].split(",")[-1]) * share


def _config(attributes: str, name: str) -> dict[str, Any] | None:
    """The JSON object called `name` in the backend's configuration."""
    found = re.search(rf'"{name}":\s*(?=\{{)', attributes)
    try:
        return json.JSONDecoder().raw_decode(attributes, found.end())[0] if found else None
    except ValueError:
        return None


def _convolution_flops(instruction: Instruction, lhs: Array, rhs: Array, result: Array) -> float:
    """By the positions of the window that lie on an entry of the input, not on padding or between dilated entries.

    Compilers for TPU turn every matrix product into a convolution, batch axes among its window's.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if found is None:
        return 0.0
    of_input, of_kernel, of_result = found[1], found[2], found[3]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = [int(n[1]) if (n := re.search(rf"{name}=(\d+)", instruction.attributes)) else 1
              for name in ("feature_group_count", "batch_group_count")]
    rank = len(of_input) - 2
    count = lhs.dims[of_input.index("b")] // groups[1] * rhs.dims[of_kernel.index("i")]
    count *= rhs.dims[of_kernel.index("o")]
    for axis in range(rank):
        def field(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default
        low = int(field("pad", "0_0").split("_")[0])
        count *= _positions(lhs.dims[of_input.index(str(axis))], rhs.dims[of_kernel.index(str(axis))],
                            result.dims[of_result.index(str(axis))], int(field("stride", "1")), low,
                            int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1")))
    return 2.0 * count


@functools.lru_cache(maxsize=1024)
def _positions(size: int, window: int, results: int, stride: int, low: int, dilation: int, spacing: int) -> int:
    """Pairs of (place in the window, result) along one axis that meet an entry of the input."""
    first = np.arange(results, dtype=np.int64) * stride - low
    total = 0
    for place in range(window):
        at = first + place * spacing
        total += int(np.count_nonzero((at >= 0) & (at % dilation == 0) & (at // dilation < size)))
    return total
