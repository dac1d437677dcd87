"""Which pages of the cache are free; plain Python."""

from __future__ import annotations


class PagePool:
    """A free list over pages 0 … num_pages − 1; every page is free or owned by exactly one caller."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs pages and page slots, not {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\1" * num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages, now owned by the caller; MemoryError, and nothing taken, if fewer are free."""
        if count > len(self._free):
            raise MemoryError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Frees `pages`; ValueError if one of them is free already."""
        for page in pages:
            if self._is_free[page]:
                raise ValueError(f"page {page} is freed twice")
            self._is_free[page] = 1
            self._free.append(page)
