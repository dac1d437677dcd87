"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` and the status that fits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.responses import Response

from llm_jax.errors import UserError
from serving.errors import Reason, Rejected, as_rejected

MAX_MESSAGE_BYTES = 1500  # a value that a message quotes may be of any length
MAX_NAME_CHARACTERS = 200
UNROUTED = "llm_jax.unrouted"  # in a request's state: with which status it ended before anybody admitted it
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_TAG_ERRORS = ("union_tag_invalid", "union_tag_not_found")  # the field that tells a union's alternatives apart


class ErrorObject(pydantic.BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(pydantic.BaseModel):
    """The body of every answer that is none."""

    error: ErrorObject


class Refused(Rejected):
    """`Rejected` with a `code` of its own, where OpenAI's interface has a finer one than the reason's."""

    def __init__(self, reason: Reason, message: str, code: str, *, field: str | None = None) -> None:
        super().__init__(reason, message, field=field)
        self.code = code


def missing(field: str, more: str = "") -> Refused:
    """A field is absent that must be there; `more` goes behind its name."""
    return Refused(Reason.INVALID, f"missing required parameter: '{field}'{more}", "missing_required_parameter",
                   field=field)


def no_json(what: str, why: object) -> Refused:
    """`what` was sent ("body", "message") is not JSON."""
    return Refused(Reason.INVALID, f"the {what} is not valid JSON: {why!s:.200}", "invalid_json")


def too_long(message: str, field: str) -> Refused:
    """What the model would have to read leaves no room in its context."""
    return Refused(Reason.INVALID, message, "context_length_exceeded", field=field)


def rejected_of(error: Exception) -> Rejected:
    """Any error as the reason it stands for; what was not foreseen is INTERNAL, with its traceback in the log."""
    if isinstance(error, RequestValidationError):
        return _validation(error.errors(), error.body)
    return as_rejected(error)


def error_body(error: Rejected) -> dict[str, Any]:
    """The object that a client gets."""
    told = error.reason.value
    return {"error": {"message": _shortened(error.message), "type": told.type, "param": error.field,
                      "code": getattr(error, "code", told.code)}}


def error_response(error: Exception) -> Response:
    """The answer to a request that ended with `error`."""
    rejected = rejected_of(error)
    headers = {}
    if rejected.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(rejected.retry_after_s)))
    if rejected.reason is Reason.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(rejected), rejected.reason.value.http, headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON as it is: non-ASCII text is not escaped, and a value that JSON lacks is a fault of ours."""
    return Response(to_json(content), status, headers, "application/json")


def to_json(content: Any) -> bytes:
    """UTF-8 bytes of `content`: plain values, or a pydantic model."""
    if isinstance(content, pydantic.BaseModel):
        return content.model_dump_json().encode()
    return _JSON.encode(content).encode("utf-8", errors="replace")


def install(app: FastAPI) -> None:
    """Makes `app` answer every error like that."""

    async def answered(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        request.scope["state"][UNROUTED] = error.status_code
        return _http_exception(request, error)

    for kind in (Rejected, RequestValidationError, UserError):
        app.add_exception_handler(kind, answered)
    app.add_exception_handler(HTTPException, unrouted)


def too_large(request: Request) -> Rejected:
    """The body has more bytes than its path takes."""
    most = request.scope.get(MAX_BODY_SIZE_SCOPE_KEY)
    limit = f": at most {most} bytes are taken" if most else ""
    return Rejected(Reason.TOO_LARGE, f"the request's body is too large{limit}")


def _http_exception(request: Request, error: HTTPException) -> Response:
    """What Starlette and FastAPI refuse by themselves: unknown paths, wrong methods, bodies that are too large."""
    status, detail, code, kind = error.status_code, str(error.detail), None, "invalid_request_error"
    path = f"{request.method} {request.url.path}"[:MAX_NAME_CHARACTERS]
    match status:
        case 404:
            detail, code = f"there is no {path}", "not_found"
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            detail, code = f"{path} is not supported; this path takes {allowed}", "method_not_allowed"
        case 413:
            return error_response(too_large(request))
        case _ if status >= 500:
            kind = Reason.INTERNAL.value.type
    content = {"error": {"message": _shortened(detail), "type": kind, "param": None, "code": code}}
    return json_response(content, status, error.headers)


def _validation(found: Sequence[Mapping[str, Any]], body: Any) -> Rejected:
    """The error that is deepest in the request: of a union's alternatives the one that was nearest."""
    placed = [(_path(error, body), error) for error in found]
    path, error = max(placed, key=lambda one: len(one[0]))
    where = _spelled(path) or None
    match error["type"]:
        case "json_invalid":
            return no_json("body", error.get("ctx", {}).get("error", ""))
        case "extra_forbidden":
            return Refused(Reason.INVALID, f"unknown parameter: '{where}'", "unknown_parameter", field=where)
        case "unsupported":
            return Refused(Reason.INVALID, f"{where} {error['msg']}", "unsupported_parameter", field=where)
        case "union_tag_invalid":
            wants = f"must be one of {error['ctx']['expected_tags']}, not '{error['ctx']['tag']:.80}'"
            return Refused(Reason.INVALID, f"{where} {wants}", Reason.INVALID.value.code, field=where)
        case "missing" | "union_tag_not_found":
            if where:
                return missing(where)
            return Refused(Reason.INVALID, "the request has no body: send a JSON object", "missing_required_parameter")
    if where is None:
        return Refused(Reason.INVALID, "the body must be a JSON object, sent as content-type: application/json",
                       "invalid_type")
    # All that is said of this place: a union's alternatives each say what they would take.
    wants = list(dict.fromkeys(_wanted(other["msg"]) for place, other in placed
                               if place == path and other["type"] not in ("missing", "extra_forbidden")))
    code = "invalid_type" if error["type"].endswith("_type") else Reason.INVALID.value.code
    return Refused(Reason.INVALID, f"{where} {', or '.join(wants)}", code, field=where)


def _wanted(message: str) -> str:
    for begins, instead in (("Input should ", "must "), ("Value error, ", ""), ("Assertion failed, ", ""),
                            ("String should ", "must "), ("List should ", "must "), ("Dictionary should ", "must ")):
        if message.startswith(begins):
            return instead + message[len(begins):].replace(" after validation", "")
    return message if message.startswith(("is ", "must ")) else f"is wrong: {message}"


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The fault's place in the request, without the names of a union's alternatives that pydantic puts between."""
    place, *loc = error["loc"]
    if place != "body":
        return [str(part) for part in loc] or [str(place)]
    if error["type"] == "json_invalid":
        return []
    path = list(_walked(loc, body, error["type"] == "missing"))
    if error["type"] in _TAG_ERRORS:
        path.append(error["ctx"]["discriminator"].strip("'"))
    return path


def _walked(loc: Sequence[str | int], at: Any, missing: bool) -> Iterator[str | int]:
    for i, part in enumerate(loc):
        if isinstance(at, Mapping) and part in at:
            at = at[part]
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        elif not (missing and i + 1 == len(loc)):
            continue  # the name of an alternative, or of a part of a key
        yield part


def _spelled(path: Sequence[str | int]) -> str:
    """`messages[0].content`."""
    spelled = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return spelled[:MAX_NAME_CHARACTERS]


def _shortened(message: str) -> str:
    data = message.encode("utf-8", errors="replace")
    return message if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"
