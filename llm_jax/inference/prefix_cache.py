"""Full pages found again by the tokens they hold; plain Python."""

from __future__ import annotations

import array
import hashlib
import os

from llm_jax.inference.pages import PagePool
from llm_jax.inference.sequence import PENDING, Sequence

DIGEST_BYTES = 32


class PrefixCache:
    """A table from a prefix of tokens, whole pages long, to the page that holds the last of them.

    A prefix is known by a chain of hashes: the digest of page i is BLAKE2b (RFC 7693) of the digest of page i − 1 and
    the tokens of page i. The chain begins with a keyed hash of the tenant, so two tenants never find each other's pages
    and nobody can work out a digest without the secret; with 256 bits, collisions do not happen.

    Only full pages are in the table, and nobody writes to a full page, so what is shared is never written. The table
    holds no page: those of a prefix that nobody uses are cached in the pool, evicted there, and then leave the table.
    Sequences give their pages back last page first, so of a prefix the end is evicted before the beginning, without
    which it could not be found. When two sequences compute the same page, the first is in the table.

    Args:
      pool: whose pages these are; its `on_evict` is taken.
      enabled: if not, nothing is ever found.
      shared: whether tenants share prefixes. A request's time to first token then tells whether another tenant has sent
        the same beginning.
      secret: the key of the chains, up to 64 bytes; by default random.
    """

    def __init__(self, pool: PagePool, *, enabled: bool = True, shared: bool = False, secret: bytes | None = None):
        self.pool = pool
        self.enabled = enabled
        self.shared = shared
        self._secret = os.urandom(64) if secret is None else secret
        self._page: dict[bytes, int] = {}
        self._digest: dict[int, bytes] = {}
        pool.on_evict = self._evicted

    def __len__(self) -> int:
        return len(self._page)

    def match(self, sequence: Sequence) -> list[int]:
        """Pages for the beginning of a sequence that waits; its last token is left to compute. They must be shared to
        be held."""
        if not self._may_read(sequence):
            return []
        full = (len(sequence.tokens) - 1) // self.pool.page_size
        self._hash(sequence, full)
        return self._find(sequence.digests, 0, full)

    def find_more(self, sequence: Sequence) -> int:
        """Gives a running sequence the pages that others have computed since it was admitted; returns their tokens."""
        size = self.pool.page_size
        first = sequence.computed // size
        # A page that it has begun it also finishes. While host pages are copied back, they are all that it has if it
        # must wait again.
        if len(sequence.pages) != first or sequence.host_pages or not self._may_read(sequence):
            return 0
        pages = self._find(sequence.digests, first, min((len(sequence.tokens) - 1) // size, len(sequence.digests)))
        for page in pages:
            self.pool.share(page)
        sequence.pages.extend(pages)
        sequence.registered = len(sequence.pages) if pages else sequence.registered
        sequence.computed += len(pages) * size
        return len(pages) * size

    def next_page(self, sequence: Sequence) -> bytes | None:
        """The digest of the page that a sequence computes next; None if it is not known."""
        at = sequence.computed // self.pool.page_size
        return sequence.digests[at] if at < len(sequence.digests) else None

    def register(self, sequence: Sequence) -> None:
        """Shows the pages of a running sequence that have become full with known tokens."""
        size, first = self.pool.page_size, sequence.registered
        if sequence.computed < (first + 1) * size or sequence.slot < 0 or sequence.stale or not self.enabled:
            return
        known = len(sequence.tokens)
        while sequence.tokens[known - 1] == PENDING:
            known -= 1
        full = min(sequence.computed, known) // size
        self._hash(sequence, full)
        for digest, page in zip(sequence.digests[first:full], sequence.pages[first:full], strict=True):
            if digest not in self._page:
                self._page[digest] = page
                self._digest[page] = digest
                self.pool.keep(page)
        sequence.registered = max(first, full)

    def forget(self) -> None:
        """Empties the table; pages in use stay with their holders."""
        self._page.clear()
        self._digest.clear()
        self.pool.forget()

    def _may_read(self, sequence: Sequence) -> bool:
        return self.enabled and sequence.reuse and not sequence.stale

    def _find(self, digests: list[bytes], begin: int, end: int) -> list[int]:
        pages = []
        for i in range(begin, end):
            page = self._page.get(digests[i])
            if page is None:
                break
            pages.append(page)
        return pages

    def _hash(self, sequence: Sequence, num_pages: int) -> None:
        """Extends the sequence's digests to its first `num_pages` pages, of whose tokens none is pending."""
        digests, size = sequence.digests, self.pool.page_size
        if len(digests) >= num_pages:
            return
        digest = digests[-1] if digests else self._root(sequence.tenant)
        for at in range(len(digests) * size, num_pages * size, size):
            tokens = array.array("i", sequence.tokens[at:at + size]).tobytes()
            digest = hashlib.blake2b(digest + tokens, digest_size=DIGEST_BYTES).digest()
            digests.append(digest)

    def _root(self, tenant: str) -> bytes:
        name = b"" if self.shared else tenant.encode()
        return hashlib.blake2b(name, digest_size=DIGEST_BYTES, key=self._secret).digest()

    def _evicted(self, page: int) -> None:
        del self._page[self._digest.pop(page)]
