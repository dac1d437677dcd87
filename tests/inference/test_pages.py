"""The free list alone."""

from __future__ import annotations

import pytest

from llm_jax.inference.pages import PagePool


def test_take_give_back_and_double_free():
    pool = PagePool(4, 16)
    mine = pool.take(3)
    assert len(set(mine)) == 3 and pool.num_free == 1 and pool.num_used == 3
    with pytest.raises(MemoryError):
        pool.take(2)
    assert pool.num_free == 1  # a refused take takes nothing
    pool.give_back(mine[:1])
    with pytest.raises(ValueError, match="twice"):
        pool.give_back(mine[:1])


@pytest.mark.parametrize("tokens, pages", [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens, pages):
    assert PagePool(4, 16).pages_for(tokens) == pages
