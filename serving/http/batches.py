"""`/v1/batches`: many requests that run behind the others, and whose answers are fetched later."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from serving.calls import Calls
from serving.errors import Reason, Rejected, invalid
from serving.http.batch_store import Batch, BatchStore
from serving.http.deps import caller, make_router
from serving.http.file_store import KEPT_S, MIN_KEPT_S
from serving.http.files import NO_STATE
from serving.http.schemas import Body

WINDOW_SECONDS = {"m": 60, "h": 3_600, "d": 86_400}
MIN_WINDOW_S, MAX_WINDOW_S = 60, 14 * 86_400

Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
                     Field(max_length=16)]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class OutputExpiresAfter(Body):
    """How long the output and error files are kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_KEPT_S, le=KEPT_S)


class BatchRequest(Body):
    """A new batch."""

    input_file_id: str = Field(description="A file of purpose 'batch': a JSON object a line, with custom_id, method "
                               "('POST'), url (the endpoint) and body (the request).")
    endpoint: Endpoint
    completion_window: str = Field(examples=["24h"], json_schema_extra={"pattern": r"^[0-9]{1,5}[mhd]$"},
                                   description="After this the lines that have no answer yet get none: minutes, hours "
                                   "or days, from 1m to 14d.")
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None

    @property
    def window_s(self) -> int:
        """The completion window in seconds.

        Raises:
          Rejected: it is none, too short or too long.
        """
        found = re.fullmatch(r"([0-9]{1,5})([mhd])", self.completion_window)
        seconds = int(found[1]) * WINDOW_SECONDS[found[2]] if found else 0
        if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
            raise invalid("completion_window must be a number of minutes, hours or days from '1m' to '14d', such as "
                          f"'24h', not {self.completion_window[:80]!r}", "completion_window")
        return seconds


class BatchError(BaseModel):
    """What is wrong with the input file."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(BaseModel):
    """All that is wrong with it."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Lines of the input file."""

    total: int
    completed: int
    failed: int


class InputDetails(BaseModel):
    """Of the prompts' tokens."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Of the answers' tokens."""

    reasoning_tokens: Literal[0] = 0


class BatchUsage(BaseModel):
    """Tokens of the answers so far."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchObject(BaseModel):
    """A batch; times in seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
                    "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: Batch) -> BatchObject:
        """As the API tells it: its files only once they are there."""
        row: dict[str, Any] = {name: getattr(batch, name) for name in cls.model_fields if hasattr(batch, name)}
        ended = getattr(batch, f"{batch.status}_at", None) is not None and batch.status == batch.outcome
        row |= {"output_file_id": batch.output_file_id if ended else None,
                "error_file_id": batch.error_file_id if ended else None,
                "errors": batch.errors and BatchErrors(data=json.loads(batch.errors)),
                "metadata": batch.metadata and json.loads(batch.metadata)}
        return cls(**row, request_counts=RequestCounts(total=batch.total, completed=batch.completed,
                                                       failed=batch.failed),
                   usage=BatchUsage(input_tokens=batch.prompt_tokens, output_tokens=batch.completion_tokens,
                                    total_tokens=batch.prompt_tokens + batch.completion_tokens,
                                    input_tokens_details=InputDetails(cached_tokens=batch.cached_tokens),
                                    output_tokens_details=OutputDetails()))


class BatchList(BaseModel):
    """Some batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchListQuery(BaseModel):
    """Which batches."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    limit: Annotated[int, Query(ge=1, le=100)] = 20


def router(calls: Calls, store: BatchStore | None, wake: Callable[..., None]) -> APIRouter:
    """The paths; without a store each says that there is none.

    Args:
      wake: `BatchRunner.wake`.
    """
    routes = make_router(calls, "batch", prefix="/v1/batches", tags=["batches"])

    def kept() -> BatchStore:
        if store is None:
            raise Rejected(Reason.NOT_FOUND, NO_STATE)
        return store

    @routes.post("")
    async def create_batch(request: Request, body: BatchRequest) -> BatchObject:
        """Begins a batch; its key's rate limits count it as one request, its quota every token of it."""
        async with calls.admitted(caller(request), "batch") as admission:
            kept_s = body.output_expires_after.seconds if body.output_expires_after else KEPT_S
            batch = await asyncio.to_thread(
                kept().add, admission.tenant, admission.identity.key_id if admission.identity else "",
                endpoint=body.endpoint, input_file_id=body.input_file_id, window=body.completion_window,
                window_s=body.window_s, metadata=body.metadata, output_kept_s=kept_s)
            wake()
            return BatchObject.of(batch)

    @routes.get("")
    async def list_batches(request: Request, query: Annotated[BatchListQuery, Query()]) -> BatchList:
        """The caller's batches, the newest first."""
        async with calls.admitted(caller(request), "batch") as admission:
            found, more = await asyncio.to_thread(kept().page, admission.tenant, after=query.after, limit=query.limit)
            return BatchList(data=[BatchObject.of(one) for one in found], first_id=found[0].id if found else None,
                             last_id=found[-1].id if found else None, has_more=more)

    @routes.get("/{batch_id}")
    async def get_batch(request: Request, batch_id: str) -> BatchObject:
        """How a batch stands."""
        async with calls.admitted(caller(request), "batch") as admission:
            return BatchObject.of(await asyncio.to_thread(kept().get, admission.tenant, batch_id))

    @routes.post("/{batch_id}/cancel")
    async def cancel_batch(request: Request, batch_id: str) -> BatchObject:
        """Stops a batch; what has been answered by then is in its files."""
        async with calls.admitted(caller(request), "batch") as admission:
            batch = await asyncio.to_thread(kept().cancel, admission.tenant, batch_id)
            wake(batch_id)
            return BatchObject.of(batch)

    return routes
