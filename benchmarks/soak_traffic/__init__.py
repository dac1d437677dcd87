"""What the soak sends: good requests by every door, and the kinds of clients that a server has to live with.

An action is a function of an `Asker`, which either returns or raises `Wrong`: an answer that is not what it should be,
or comes twice, or not at all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from benchmarks.soak_traffic import batches, chat, completions, files, leavers, refused, slow
from benchmarks.soak_traffic.asker import Asker, Known

Action = Callable[[Asker], Awaitable[None]]

# Kind, its share of the requests (the rest is good), and what is asked for in a conversation or without one.
KINDS: tuple[tuple[str, float, tuple[Action, ...]], ...] = (
    ("cancelled", 0.20, leavers.CANCELLED),
    ("malformed", 0.05, refused.MALFORMED),
    ("oversized", 0.02, refused.OVERSIZED),
    ("slow", 0.04, slow.SLOW),
    ("stalled", 0.02, slow.STALLED),
    ("dropped", 0.05, leavers.DROPPED),
    ("batch", 0.01, batches.BATCHES),
)
GOOD: tuple[Action, ...] = (*completions.GOOD, *chat.GOOD, *files.GOOD)
TALKING = frozenset((*chat.GOOD, *leavers.TALKING))  # left out for a model that has no chat template


def choose(ask: Asker) -> tuple[str, Action]:
    """What `ask` does next, and its kind."""
    r = ask.random.random()
    kind, actions = "good", GOOD
    for other, share, others in KINDS:
        if 0 <= r < share:
            kind, actions = other, others
        r -= share
    return kind, ask.random.choice([one for one in actions if ask.known.chats or one not in TALKING])


async def learn(ask: Asker, prompt: str) -> None:
    """Notes what the model says to `prompt`, now that nobody else asks, by each interface that has its own prompt.

    Where two tokens are too near to each other for the answer to be the same in any company, nothing is noted.
    """
    await completions.learn(ask, prompt)
    if ask.known.talks:
        await chat.learn(ask, prompt)


__all__ = ["GOOD", "KINDS", "Action", "Asker", "Known", "choose", "learn"]
