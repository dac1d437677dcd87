"""Content filters: hooks that see every prompt before the engine does, and every answer before its reader does.

    # house_rules.py
    from serving.filters import BlockedPhrases
    rules = BlockedPhrases(["机密", "top secret"])

    python -m experiments.serve --run_dir=R --filters=house_rules:rules

A filter that fails ends the request it was asked about (INTERNAL): nothing passes unseen.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.inference.request import Delta, Usage
from serving.access.identity import Identity
from serving.errors import Reason, Rejected
from serving.mailbox import Gathered
from serving.rewriting import rewritten

FINISH_REASON = "content_filter"


class Refused(Exception):
    """Raised by `ContentFilter.before`: the prompt gets no answer, and its sender this message."""


class Stopped(Exception):
    """Raised by `Watcher.push`: the answer ends here.

    Args:
      at: characters of the answer that may still be told, counted from its beginning.
    """

    def __init__(self, at: int) -> None:
        super().__init__(f"stopped at {at}")
        self.at = at


class Watcher:
    """Sees one sample's text as it comes. This one lets everything pass."""

    def __init__(self) -> None:
        self.length = 0

    def push(self, text: str, is_last: bool) -> int | Awaitable[int]:
        """Takes the next piece.

        Args:
          text: what came, perhaps nothing.
          is_last: whether the sample has ended with it.

        Returns:
          characters of the answer so far, from its beginning, that may be told; what may turn out to be the beginning
          of something else is held back so. With `is_last`, what is still held back is never told.

        Raises:
          Stopped: the answer must end.
        """
        self.length += len(text)
        return self.length


class ContentFilter:
    """A filter that lets everything pass; a real one overrides either method, or both.

    Both run in the event loop of every door: what takes longer than a millisecond must be a coroutine that waits.
    """

    def before(self, prompt: str, identity: Identity) -> str | Awaitable[str]:
        """The prompt to answer: this one, or what is to be asked instead.

        Args:
          prompt: its text, that of a chat in the model's own template without the special tokens.
          identity: whose it is.

        Raises:
          Refused: it is not to be answered.
        """
        return prompt

    def watcher(self, identity: Identity) -> Watcher | None:
        """What will see one sample of the answer; None if it needs not be seen."""
        return None


class BlockedPhrases(ContentFilter):
    """Refuses prompts that hold one of these phrases and ends answers before them, in upper case or lower.

    Args:
      phrases: none of them empty.
      message: for who sends such a prompt.
    """

    def __init__(self, phrases: Iterable[str],
                 message: str = "the prompt holds something that this server does not answer") -> None:
        self._phrases = [_folded(phrase) for phrase in phrases]
        self._message = message
        if not all(self._phrases):
            raise UserError("a blocked phrase must have at least one character")

    def before(self, prompt: str, identity: Identity) -> str:
        folded = _folded(prompt)
        if any(phrase in folded for phrase in self._phrases):
            raise Refused(self._message)
        return prompt

    def watcher(self, identity: Identity) -> Watcher:
        return _PhraseWatcher(self._phrases)


class _PhraseWatcher(Watcher):
    def __init__(self, phrases: Sequence[str]) -> None:
        super().__init__()
        self._phrases = phrases
        self._tail = ""  # of what came, so much as a phrase may begin in

    def push(self, text: str, is_last: bool) -> int:
        self._tail += _folded(text)
        self.length += len(text)
        begins = self.length - len(self._tail)
        found = [at for phrase in self._phrases if (at := self._tail.find(phrase)) >= 0]
        if found:
            raise Stopped(begins + min(found))
        held = 0 if is_last else max((_overlap(self._tail, phrase) for phrase in self._phrases), default=0)
        self._tail = self._tail[len(self._tail) - held:]
        return self.length - held


def _overlap(text: str, phrase: str) -> int:
    """Characters at the end of `text` that may be the beginning of `phrase`."""
    return next((n for n in range(min(len(text), len(phrase) - 1), 0, -1) if phrase.startswith(text[-n:])), 0)


def _folded(text: str) -> str:
    """In lower case, as many characters as before."""
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)


class Filters:
    """Filters, asked one after another.

    Args:
      filters: each sees the prompt as those before it left it, and what the engine answered.
    """

    def __init__(self, filters: Sequence[ContentFilter]) -> None:
        self._filters = list(filters)

    @staticmethod
    def load(names: Sequence[str]) -> Filters | None:
        """The filters that the command line names; None if there are none.

        Args:
          names: "module:attribute" each: a `ContentFilter`, or a class or function that makes one without arguments.

        Raises:
          UserError: there is none of this name.
        """
        return Filters([_load(name) for name in names]) if names else None

    async def before(self, prompt_ids: Sequence[int], tokenizer: Any, identity: Identity) -> Sequence[int]:
        """The prompt to answer, as tokens: those that were sent, but where a filter has changed the text.

        Raises:
          Rejected: a filter refuses it.
        """
        text = asked = tokenizer.decode(prompt_ids)
        for one in self._filters:
            try:
                text = await _awaited(one.before(text, identity))
            except Refused as error:
                raise Rejected(Reason.FILTERED, str(error), field="prompt") from None
        return prompt_ids if text == asked else rewritten(prompt_ids, text, tokenizer)

    def watch(self, identity: Identity, num_prompt: int) -> Watch | None:
        """What sees the samples of one request; None if no filter wants to."""
        if not any(one.watcher(identity) for one in self._filters):
            return None
        return Watch(self._filters, identity, num_prompt)


class Watch:
    """The samples of one request on their way through the filters."""

    def __init__(self, filters: Sequence[ContentFilter], identity: Identity, num_prompt: int) -> None:
        self._filters = filters
        self._identity = identity
        self._num_prompt = num_prompt
        self._samples: dict[int, _Sample] = {}

    async def seen(self, news: dict[int, Delta]) -> tuple[dict[int, Delta], set[int]]:
        """What of the news may be told now, and the samples that end here."""
        told: dict[int, Delta] = {}
        stopped: set[int] = set()
        for number, delta in news.items():
            if number not in self._samples:
                watchers = [w for one in self._filters if (w := one.watcher(self._identity)) is not None]
                self._samples[number] = _Sample(watchers)
            found = await self._samples[number].seen(delta, self._num_prompt)
            if found is None:
                continue
            told[number] = found
            if found.finish_reason == FINISH_REASON:
                stopped.add(number)
        return told, stopped


class _Sample:
    """One sample: what has come, and how much of it was told.

    Tokens are told when all the text that they stand for may be: held back with it, they could be read instead.
    """

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers
        self._held: list[Delta] = []  # without their text
        self._ends: list[int] = []  # where the text of each ends
        self._text = ""  # not told yet
        self._told = 0
        self._tokens = 0

    async def seen(self, delta: Delta, num_prompt: int) -> Delta | None:
        is_last = delta.finish_reason is not None
        self._tokens += len(delta.token_ids)
        came = self._told + len(self._text) + len(delta.text)
        safe, stops = came, False
        for watcher in self._watchers:
            try:
                safe = min(safe, await _awaited(watcher.push(delta.text, is_last)))
            except Stopped as stop:
                safe, stops = min(safe, stop.at), True
        safe = max(safe, self._told)  # what was told can't be taken back
        stops = stops or (is_last and safe < came)
        if not self._held and safe == came and not stops and (delta.text or is_last):  # as nearly always
            self._told = came
            return delta
        self._held.append(dataclasses.replace(delta, text=""))
        self._ends.append(came)
        self._text += delta.text
        told = self._released(safe, all_of_it=is_last and not stops)
        if stops:
            return dataclasses.replace(told, finish_reason=FINISH_REASON,
                                       usage=delta.usage or Usage(num_prompt, self._tokens))
        return told if told != Delta() else None

    def _released(self, safe: int, all_of_it: bool) -> Delta:
        """The text up to `safe`, with the tokens whose text that is."""
        count = len(self._held) if all_of_it else sum(end <= safe for end in self._ends)
        # A token's text may come with the next: tokens behind the last text are not told before it.
        while not all_of_it and count and self._ends[count - 1] == (self._ends[count - 2] if count > 1 else self._told):
            count -= 1
        made = Gathered()
        for one in self._held[:count]:
            made.add(one)
        made.text.append(self._text[:safe - self._told])
        self._text, self._told = self._text[safe - self._told:], safe
        del self._held[:count], self._ends[:count]
        return made.joined()


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _load(name: str) -> ContentFilter:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if module and attribute else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"--filters: there is no {name} ({error})") from error
    if found is not None and not isinstance(found, ContentFilter) and callable(found):
        found = found()
    if not isinstance(found, ContentFilter):
        raise UserError(f"--filters: {name} must be MODULE:ATTRIBUTE, and name a serving.filters.ContentFilter or "
                        "what makes one")
    return found
