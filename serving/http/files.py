"""`/v1/files`: what batches read and what they leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.calls import Calls
from serving.errors import Reason, Rejected, invalid
from serving.http.deps import caller, make_router
from serving.http.errors import Refused, missing
from serving.http.file_store import KEPT_S, MIN_KEPT_S, FileStore, StoredFile, too_large

PURPOSES = ("batch",)
FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
FORM_BYTES = 64 << 10  # of an upload besides its file
MAX_FIELD_BYTES = 1 << 10
NO_STATE = "this server keeps no files: it was started without --state_dir"

_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "purpose"], "additionalProperties": False, "properties": {
        "file": {"type": "string", "format": "binary", "description": "One request a line, as JSON."},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_KEPT_S, "maximum": KEPT_S}}}}}}}


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None

    @classmethod
    def of(cls, stored: StoredFile) -> FileObject:
        """As the API tells it."""
        return cls(id=stored.id, bytes=stored.bytes, created_at=stored.created_at, expires_at=stored.expires_at,
                   filename=stored.filename, purpose=stored.purpose)


class FileList(BaseModel):
    """Some files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileListQuery(BaseModel):
    """Which files, in which order."""

    model_config = ConfigDict(extra="forbid")

    purpose: str | None = None
    after: str | None = None
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"


def router(calls: Calls, store: FileStore | None) -> APIRouter:
    """The paths; without a store each says that there is none."""
    routes = make_router(calls, "files", prefix="/v1/files", tags=["files"])

    def kept() -> FileStore:
        if store is None:
            raise Rejected(Reason.NOT_FOUND, NO_STATE)
        return store

    @routes.post("", openapi_extra=_FORM, max_body_size=FORM_BYTES + (store.max_bytes if store else 0))
    async def create_file(request: Request) -> FileObject:
        """Keeps a file for batches to read."""
        async with calls.admitted(caller(request), "files") as admission:
            files = kept()
            async with _form(request, files.max_bytes) as form:
                upload, purpose, kept_s = _upload(form)
                return FileObject.of(await asyncio.to_thread(
                    files.add, admission.tenant, upload.filename or "", purpose, upload.file, kept_s))

    @routes.get("")
    async def list_files(request: Request, query: Annotated[FileListQuery, Query()]) -> FileList:
        """The caller's files."""
        async with calls.admitted(caller(request), "files") as admission:
            found, more = await asyncio.to_thread(
                kept().page, admission.tenant, purpose=query.purpose, after=query.after, limit=query.limit,
                ascending=query.order == "asc")
            return FileList(data=[FileObject.of(one) for one in found], first_id=found[0].id if found else None,
                            last_id=found[-1].id if found else None, has_more=more)

    @routes.get("/{file_id}")
    async def get_file(request: Request, file_id: str) -> FileObject:
        """What is known of a file."""
        async with calls.admitted(caller(request), "files") as admission:
            return FileObject.of(await asyncio.to_thread(kept().get, admission.tenant, file_id))

    @routes.get("/{file_id}/content", response_class=FileResponse)
    async def get_file_content(request: Request, file_id: str) -> FileResponse:
        """What is in a file."""
        async with calls.admitted(caller(request), "files") as admission:
            stored = await asyncio.to_thread(kept().get, admission.tenant, file_id)
            return FileResponse(kept().path(stored.id), media_type="application/octet-stream", filename=stored.filename)

    @routes.delete("/{file_id}")
    async def delete_file(request: Request, file_id: str) -> FileDeleted:
        """Forgets a file."""
        async with calls.admitted(caller(request), "files") as admission:
            await asyncio.to_thread(kept().delete, admission.tenant, file_id)
            return FileDeleted(id=file_id)

    return routes


@contextlib.asynccontextmanager
async def _form(request: Request, most: int) -> AsyncIterator[FormData]:
    """The body as a form, its file on disk if it is large.

    Raises:
      Rejected: it is none, or too large.
    """
    try:
        form = await request.form(max_files=1, max_fields=len(FIELDS), max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        if error.status_code == 413:
            raise too_large(most) from None
        if error.status_code == 408:
            raise Rejected(Reason.TOO_SLOW, error.detail) from None
        raise invalid(f"the body is not the form that an upload is: {error.detail}") from None
    except ClientDisconnect:
        raise Rejected(Reason.CANCELLED, "the client left before the file was here") from None
    try:
        yield form
    finally:
        await form.close()


def _upload(form: FormData) -> tuple[UploadFile, str, int]:
    """The file, what it is for, and for how many seconds it is kept."""
    for name in form:
        if name not in FIELDS:
            raise Refused(Reason.INVALID, f"unknown parameter: '{name:.80}'; an upload has {', '.join(FIELDS)}",
                          "unknown_parameter", field=name[:80])
    upload, purpose = form.get("file"), form.get("purpose")
    if upload is None:
        raise missing("file", ": the body must be a form (multipart/form-data) with a part of that name")
    if not isinstance(upload, UploadFile):
        raise Refused(Reason.INVALID, "file must be a part with a file name, not a plain field", "invalid_type",
                      field="file")
    if purpose is None:
        raise missing("purpose")
    if purpose not in PURPOSES:
        raise invalid(f"purpose must be {' or '.join(map(repr, PURPOSES))}, not {purpose!r:.80}", "purpose")
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return upload, purpose, KEPT_S
    for name, value in (("expires_after[anchor]", anchor), ("expires_after[seconds]", seconds)):
        if value is None:
            raise missing(name)
    if anchor != "created_at":
        raise invalid("expires_after.anchor must be 'created_at'", "expires_after[anchor]")
    if not isinstance(seconds, str) or not seconds.isdecimal() or not MIN_KEPT_S <= int(seconds[:9]) <= KEPT_S:
        raise invalid(f"expires_after.seconds must be between {MIN_KEPT_S} and {KEPT_S}", "expires_after[seconds]")
    return upload, purpose, int(seconds)
