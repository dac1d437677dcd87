"""`/v1/responses`: the assistant's next turn as items and typed events, and what was kept of earlier ones."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi import Response as HttpResponse

from serving.calls import Calls
from serving.errors import invalid
from serving.http.answering import answered
from serving.http.conversation import Conversations
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.errors import json_response
from serving.http.response_answer import ResponseAnswer
from serving.http.response_schemas import DeletedResponse, ItemList, Response, ResponseRequest
from serving.http.response_store import ResponseStore
from serving.http.sse import described

_STREAM = described("With stream: `response.created`, what comes, and at last `response.completed`, "
                    "`response.incomplete` or `response.failed`.")


def router(calls: Calls, info: ModelInfo, *, store: ResponseStore | None = None) -> APIRouter:
    """The paths; `store` keeps what may be asked for again."""
    routes = make_router(calls, "generate", prefix="/v1/responses", tags=["responses"])
    conversations = Conversations(calls, info.tool_format)
    kept = ResponseStore() if store is None else store
    background: set[asyncio.Task[None]] = set()

    @routes.post("", response_model=Response, responses=_STREAM)
    async def create_response(request: Request, body: ResponseRequest) -> HttpResponse:
        """Says what comes next."""
        who, answer = caller(request), ResponseAnswer(calls, info, conversations, kept, body)
        if body.background:
            return json_response(await answer.in_background(who, background))
        return await answered(calls, request, who, answer, body.stream, done=None, failure=answer.failure)

    @routes.get("/{response_id}", response_model=Response)
    async def get_response(request: Request, response_id: str, stream: bool = False) -> HttpResponse:
        """A response that was kept, or is being made in the background."""
        async with calls.admitted(caller(request), "generate") as admission:
            if stream:
                raise invalid("stream is for new responses: what was told of this one is not told again", "stream")
            return json_response(kept.get(admission.tenant, response_id).now())

    @routes.delete("/{response_id}", response_model=DeletedResponse)
    async def delete_response(request: Request, response_id: str) -> HttpResponse:
        """Forgets a response; one that is being made ends."""
        async with calls.admitted(caller(request), "generate") as admission:
            found = kept.delete(admission.tenant, response_id)
            if found.task is not None:
                found.task.cancel()
            return json_response({"id": response_id, "object": "response", "deleted": True})

    @routes.post("/{response_id}/cancel", response_model=Response)
    async def cancel_response(request: Request, response_id: str) -> HttpResponse:
        """Ends a response that is made in the background; it is kept as far as it came."""
        async with calls.admitted(caller(request), "generate") as admission:
            found = kept.get(admission.tenant, response_id)
            if not found.body["background"]:
                raise invalid("only responses with background can be cancelled; others end when their client leaves",
                              "response_id")
            if found.task is not None:
                found.task.cancel()
                await asyncio.wait((found.task,))
            return json_response(found.now())

    @routes.get("/{response_id}/input_items", response_model=ItemList)
    async def list_input_items(
            request: Request, response_id: str, limit: Annotated[int, Query(ge=1, le=100)] = 20,
            order: Literal["asc", "desc"] = "desc", after: str | None = None) -> HttpResponse:
        """What a response was asked with, without what came before it."""
        async with calls.admitted(caller(request), "generate") as admission:
            items = kept.get(admission.tenant, response_id).input
            return json_response(_page(items if order == "asc" else items[::-1], limit, after))

    return routes


def _page(items: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """So many of the items, from behind the one with the id `after` on."""
    ids = [one["id"] for one in items]
    if after is not None and after not in ids:
        raise invalid(f"after must be the id of an item of this response, not {after!r:.80}", "after")
    begin = 0 if after is None else ids.index(after) + 1
    page = items[begin:begin + limit]
    return {"object": "list", "data": page, "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None, "has_more": begin + limit < len(items)}
