"""Where the pages of preempted sequences lie on the host; plain Python, the copies are the engine's."""

from __future__ import annotations

from llm_jax.inference.sequence import Sequence, Swap


class SwapSpace:
    """Host pages 0 … num_pages − 1, and the copies that the next plan must carry.

    Host pages that are copied back stay taken until their plan is dispatched, so the copies of one plan have no host
    page in common.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._out: dict[int, Swap] = {}
        self._in: dict[int, Swap] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take_out(self, sequence: Sequence) -> bool:
        """Orders the sequence's pages, which it then may give back, to be copied to the host; False for no room."""
        if self._in.pop(sequence.id, None) is not None:  # let in by the same plan: its host pages are still good
            return True
        if not sequence.computed or len(sequence.pages) > len(self._free):
            return False
        sequence.host_pages = [self._free.pop() for _ in sequence.pages]
        self._out[sequence.id] = Swap(sequence.id, tuple(sequence.pages), tuple(sequence.host_pages))
        return True

    def bring_in(self, sequence: Sequence, first: int) -> None:
        """Orders what belongs into the sequence's pages, but for those before `first`, to be copied there."""
        end = len(sequence.pages)  # fewer than it had, if it had some for proposals
        self._in[sequence.id] = Swap(sequence.id, tuple(sequence.pages[first:]), tuple(sequence.host_pages[first:end]))

    def forget(self, sequence: Sequence) -> None:
        """The sequence's host pages are free, and no copies of them are ordered any more."""
        if sequence.host_pages:
            self._free.extend(sequence.host_pages)
            sequence.host_pages = []
            self._out.pop(sequence.id, None)
            self._in.pop(sequence.id, None)

    def orders(self) -> tuple[tuple[Swap, ...], tuple[Swap, ...]]:
        """The copies to the host and those back, for the plan that is made now."""
        if not self._out and not self._in:
            return (), ()
        orders = tuple(self._out.values()), tuple(self._in.values())
        self._out, self._in = {}, {}
        return orders
