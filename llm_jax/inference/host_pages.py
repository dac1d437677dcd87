"""Pages in host memory, for sequences that had to give theirs up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.inference.programs import Pools
from llm_jax.kernels.paged import put_pages, take_pages

_BLOCK = 16  # pages copied by one call, so that one program serves any number


class HostPages:
    """Room for pages of all layers on the host, and the copies there and back."""

    def __init__(self, num_pages: int, pools: Pools, spare_page: int, backend: str, whole: Any = None):
        """Allocates the room and compiles the copies; nothing happens for 0 pages.

        Args:
          num_pages: pages of host memory.
          pools: the device's, whose layout is taken.
          spare_page: page of the device that nobody reads: what fills up a call.
          backend: see `PagedContext.backend`.
          whole: on a mesh, the sharding of what every device holds: the host has whole pages wherever pools are cut.
        """

        def take(pools: Pools, page_B: jax.Array) -> Any:
            return [take_pages(pool, page_B, backend) for pool in pools]

        def put(pools: Pools, page_B: jax.Array, contents: Any) -> Pools:
            return [put_pages(pool, page_B, one, backend) for pool, one in zip(pools, contents, strict=True)]

        places = None if whole is None else jax.tree.map(lambda pool: pool.sharding, pools)
        self._take = jax.jit(take, out_shardings=whole)
        self._put = jax.jit(put, donate_argnums=0, out_shardings=places)
        self._spare = spare_page
        shapes = jax.eval_shape(take, pools, np.zeros(_BLOCK, np.int32))
        # A page's contents lie together: leading axis of pages.
        self._kept = jax.tree.map(lambda leaf: np.zeros((num_pages, *leaf.shape[1:]), leaf.dtype), shapes)

    def compile(self, pools: Pools) -> Pools:
        """Runs both copies on the spare page; afterwards nothing compiles."""
        page_B = np.full(_BLOCK, self._spare, np.int32)
        self._take(pools, page_B)
        return self._put(pools, page_B, jax.tree.map(lambda kept: kept[:1].repeat(_BLOCK, 0), self._kept))

    def save(self, pools: Pools, device_pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copies pages to the host; waits for the steps before."""
        for page_B, count, hosts in self._blocks(device_pages, host_pages):
            contents = self._take(pools, page_B)
            jax.tree.map(lambda kept, new, hosts=hosts, count=count: kept.__setitem__(hosts, np.asarray(new)[:count]),
                         self._kept, contents)

    def load(self, pools: Pools, device_pages: Sequence[int], host_pages: Sequence[int]) -> Pools:
        """The pools (donated) with pages copied back."""
        for page_B, count, hosts in self._blocks(device_pages, host_pages):
            padded = np.concatenate([hosts, np.zeros(_BLOCK - count, np.int64)])
            pools = self._put(pools, page_B, jax.tree.map(lambda kept, rows=padded: kept[rows], self._kept))
        return pools

    def _blocks(self, device_pages: Sequence[int], host_pages: Sequence[int]
                ) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        for at in range(0, len(device_pages), _BLOCK):
            some = device_pages[at:at + _BLOCK]
            page_B = np.full(_BLOCK, self._spare, np.int32)
            page_B[:len(some)] = some
            yield page_B, len(some), np.asarray(host_pages[at:at + _BLOCK], np.int64)
