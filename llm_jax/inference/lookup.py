"""Prompt look-up decoding: the tokens that followed the last few tokens when they occurred before are proposed again.

After Saxena 2023, "Prompt Lookup Decoding" (https://github.com/apoorvumang/prompt-lookup-decoding): no draft model,
only the sequence itself. It pays where an answer repeats its prompt: summaries, edits of code, retrieved documents.
"""

from __future__ import annotations

from collections.abc import Iterable


class Lookup:
    """An index of the n-grams of one sequence, which grows with it.

    A token costs one dictionary entry for each n, however long the sequence is; a proposal costs one look-up for each.
    """

    def __init__(self, tokens: Iterable[int] = (), *, max_ngram: int = 3, min_ngram: int = 2) -> None:
        """Begins with the prompt.

        Args:
          tokens: the prompt.
          max_ngram: the longest run of last tokens that is looked for, and the first.
          min_ngram: the shortest. A single token has mostly been followed by something else.
        """
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"1 ≤ min_ngram ≤ max_ngram is needed, not {min_ngram} and {max_ngram}")
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._tokens: list[int] = []
        # Where the latest occurrence of each n-gram ends that something follows. The tuples tell their lengths apart.
        self._behind: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.extend(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token: int) -> None:
        """Takes the next token of the sequence."""
        tokens, end = self._tokens, len(self._tokens)
        for n in self._sizes:
            if n <= end:
                self._behind[tuple(tokens[end - n:])] = end
        tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens: what followed the latest earlier occurrence of the longest n-gram that has one.

        Where that occurrence is so near that its continuation runs into the end of the sequence, the sequence repeats
        itself, and the proposal goes on repeating.
        """
        tokens, end = self._tokens, len(self._tokens)
        if most <= 0:
            return []
        for n in self._sizes:
            if n > end:
                continue
            behind = self._behind.get(tuple(tokens[end - n:]))
            if behind is not None:
                period = end - behind
                return [tokens[behind + i % period] for i in range(most)]
        return []


def propose(tokens: list[int], most: int, *, max_ngram: int = 3, min_ngram: int = 2) -> list[int]:
    """`Lookup.propose` for a sequence that is looked at once."""
    return Lookup(tokens, max_ngram=max_ngram, min_ngram=min_ngram).propose(most)
