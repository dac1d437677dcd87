"""Which pages of the cache are free, in use, or kept for a prompt that may come again; plain Python."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable


class PagePool:
    """Pages 0 … num_pages − 1. Each is free, or held by n > 0 sequences, or cached.

    A page that was marked by `keep` does not become free when its last holder gives it back: it is cached, its content
    stays, and `share` takes it up again. When the free pages do not suffice, `take` evicts cached pages, those first
    that were given back first.

    Attributes:
      on_evict: called with each page that `take` evicts.
      evictions: how many that were.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs pages and page slots, not {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.on_evict: Callable[[int], None] = lambda page: None
        self.evictions = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._kept = bytearray(num_pages)
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()  # the next to evict first

    @property
    def num_free(self) -> int:
        """Pages whose content nobody wants."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds but whose content is kept."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - len(self._free) - len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """`count` pages held by the caller alone; MemoryError, and nothing taken, if fewer are available."""
        if count > self.num_available:
            raise MemoryError(f"{count} pages wanted, {self.num_available} available")
        while len(self._free) < count:
            page, _ = self._cached.popitem(last=False)
            self._kept[page] = 0
            self._free.append(page)
            self.evictions += 1
            self.on_evict(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One more holds the page; ValueError if it is free, its content being nobody's."""
        if not self._holders[page]:
            if page not in self._cached:
                raise ValueError(f"page {page} is free and cannot be shared")
            del self._cached[page]
        self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One less holds each of `pages`; ValueError if nobody held one of them."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is freed twice")
            self._holders[page] -= 1
            if not self._holders[page]:
                if self._kept[page]:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """From now on the page's content outlives its holders, until it is evicted; ValueError if nobody holds it."""
        if not self._holders[page]:
            raise ValueError(f"page {page} is held by nobody")
        self._kept[page] = 1

    def forget(self) -> None:
        """No content is kept any longer: cached pages are free, held ones will be."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._kept = bytearray(self.num_pages)

    def check(self) -> None:
        """AssertionError unless every page is in exactly one of the three states."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, n in enumerate(self._holders) if n}
        assert min(self._holders) >= 0, "a page has fewer than no holders"
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(cached) + len(held) == self.num_pages == len(free | cached | held), "a page is lost"
        assert all(self._kept[page] for page in cached), "a cached page is not kept"
        assert not any(self._kept[page] for page in free), "a free page is kept"
