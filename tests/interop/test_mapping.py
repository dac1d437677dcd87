"""Parts are exact slices of tensors, both ways, and the builders put the numbers where the arithmetic wants them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.interop.mapping import Part, Tensor, conv1d, fused, matrix, same, to_ours, to_theirs, vector


@st.composite
def tensors(draw) -> Tensor:
    """Any tensor of up to three axes, cut along any of them, each part permuted and reshaped at will."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    inner = draw(st.sets(st.integers(1, shape[axis] - 1))) if shape[axis] > 1 else set()
    parts = []
    for i, (start, stop) in enumerate(itertools.pairwise([0, *sorted(inner), shape[axis]])):
        permutation = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
        size = math.prod(shape) // shape[axis] * (stop - start)
        rows = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        parts.append(Part((str(i),), (rows, size // rows), start=start, stop=stop, axis=axis, permutation=permutation))
    return Tensor("any", shape, tuple(parts))


@settings(max_examples=100, deadline=None)
@given(tensors(), st.sampled_from([np.float32, np.int16]))
def test_there_and_back(tensor, dtype):
    stored = np.arange(math.prod(tensor.shape), dtype=dtype).reshape(tensor.shape)
    ours = {part: to_ours(part, stored) for part in tensor.parts}
    assert [array.shape for array in ours.values()] == [part.shape for part in tensor.parts]
    assert sorted(x for array in ours.values() for x in array.ravel()) == list(stored.ravel())
    again = to_theirs(tensor, ours.__getitem__)
    assert again.dtype == dtype and again.flags.c_contiguous
    np.testing.assert_array_equal(again, stored)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_matrix_is_a_torch_linear():
    """torch computes x · Wᵀ; our heads are axes of their own."""
    tensor = matrix("w", ("w",), (4,), (3, 5))
    w, x = draw(15, 4), draw(2, 4)
    ours = to_ours(tensor.parts[0], w)
    np.testing.assert_allclose(np.einsum("bd,dhk->bhk", x, ours).reshape(2, 15), x @ w.T, rtol=1e-5)
    back = matrix("o", ("o",), (3, 5), (4,))
    o = draw(4, 15)
    np.testing.assert_allclose(np.einsum("bhk,hkd->bd", x[:, :3, None] * np.ones(5), to_ours(back.parts[0], o)),
                               np.repeat(x[:, :3], 5, axis=1) @ o.T, rtol=1e-5)


def test_conv1d_is_stored_the_other_way_round():
    w, x = draw(4, 15), draw(2, 4)
    ours = to_ours(conv1d("w", ("w",), (4,), (3, 5)).parts[0], w)
    np.testing.assert_allclose(np.einsum("bd,dhk->bhk", x, ours).reshape(2, 15), x @ w, rtol=1e-5)


def test_fused_pieces_follow_one_another():
    """Queries, keys and values of unlike widths: rows 0–5, 6–7 and 8–9 of one matrix."""
    w, path = draw(10, 4), ("q",)
    tensor = fused("qkv", matrix("", path, (4,), (3, 2)), matrix("", ("k",), (4,), (1, 2)),
                   matrix("", ("v",), (4,), (2,)))
    assert tensor.shape == (10, 4)
    q, k, v = (to_ours(part, w) for part in tensor.parts)
    np.testing.assert_array_equal(q.reshape(4, 6), w[:6].T)
    np.testing.assert_array_equal(k.reshape(4, 2), w[6:8].T)
    np.testing.assert_array_equal(v, w[8:].T)
    columns = fused("c_attn", conv1d("", path, (4,), (3,)), conv1d("", ("k",), (4,), (3,)), axis=1)
    assert columns.shape == (4, 6)
    np.testing.assert_array_equal(to_ours(columns.parts[1], draw(4, 6)), draw(4, 6)[:, 3:])


def test_vectors_and_tables():
    np.testing.assert_array_equal(to_ours(vector("b", ("b",), (3, 2)).parts[0], np.arange(6)), [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(to_ours(same("e", ("e",), (3, 2)).parts[0], draw(3, 2)), draw(3, 2))


@pytest.mark.parametrize("parts", [
    (), (Part(("a",), (2, 4), stop=2),), (Part(("a",), (2, 4), stop=2), Part(("b",), (1, 4), start=3)),
    (Part(("a",), (2, 4), stop=2), Part(("b",), (3, 4), start=1)), (Part(("a",), (4, 3)),),
    (Part(("a",), (2, 4), stop=2), Part(("b",), (4, 2), start=2, axis=1)),
])
def test_parts_that_do_not_make_up_the_tensor(parts):
    """None at all, one that ends early, a gap, an overlap, a wrong size, unlike axes."""
    with pytest.raises(ValueError, match="odd"):
        Tensor("odd", (4, 4), parts)
