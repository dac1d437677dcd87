"""A request for text, from its admission to its end, whichever interface asks: in one piece, or as a stream."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import Request, Response

from serving.access.identity import Caller
from serving.admission import Admission
from serving.calls import Calls
from serving.http.errors import json_response
from serving.http.sse import Events, EventStream, unless_gone


class Answer(Protocol):
    """One request while it is answered."""

    async def whole(self, admission: Admission) -> dict[str, Any]:
        """The answer, when it has ended."""

    async def stream(self, admission: Admission, events: Events) -> None:
        """Its events, as they come."""


async def answered(calls: Calls, request: Request, who: Caller, answer: Answer, stream: bool | None,
                   **options: Any) -> Response:
    """The response to `request`; what runs for it ends when its client goes.

    Args:
      calls: the pipeline.
      request: read to its end.
      who: makes it.
      answer: what is made.
      stream: whether the client wants events.
      **options: of `EventStream`.

    Raises:
      Rejected: nobody is let in, or it failed; a stream says so itself.
    """

    async def in_one_piece() -> Response:
        async with calls.admitted(who, "generate") as admission:
            return json_response(await answer.whole(admission))

    async def as_events(events: Events) -> None:
        async with calls.admitted(who, "generate") as admission:
            await answer.stream(admission, events)

    return EventStream(as_events, **options) if stream else await unless_gone(request, in_one_piece())
