"""The input file of a batch: one request a line, checked before any of them is run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINES = 50_000
MAX_CUSTOM_ID = 512  # characters
MAX_ERRORS = 100  # that are told
FIELDS = ("custom_id", "method", "url", "body")


@dataclasses.dataclass(frozen=True)
class Line:
    """A request of a batch.

    Attributes:
      number: of the line in the file, from 1; blank lines count.
      custom_id: what its answer is called.
      start, size: where the line lies in the file, in bytes.
    """

    number: int
    custom_id: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a look through the whole file found: `lines` and `model`, or `errors` as the API tells them."""

    lines: list[Line]
    model: str | None
    errors: list[dict[str, Any]]


def check(path: pathlib.Path, endpoint: str, max_line_bytes: int) -> Checked:
    """Reads every line. Takes a second for some 100 MB: not for an event loop's own thread.

    Args:
      path: the file.
      endpoint: what each line's `url` must be.
      max_line_bytes: no request has more.
    """
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    models: dict[str, int] = {}
    start = number = 0
    if not path.exists():
        return Checked([], None, [_error("file_not_found", "the input file is gone", "input_file_id", None)])
    with open(path, "rb") as file:
        while (data := file.readline(max_line_bytes + 1)) and len(errors) < MAX_ERRORS:
            number += 1
            error = None
            if len(data) > max_line_bytes and not data.endswith(b"\n"):
                errors.append(_error("line_too_long", f"this line has more than {max_line_bytes} bytes", None, number))
                break
            if data.strip():
                request, error = _parsed(data, endpoint)
                if error is None and request["custom_id"] in seen:
                    error = ("duplicate_custom_id", f"the custom_id {request['custom_id']!r} is line "
                             f"{seen[request['custom_id']]}'s already; each must be its own", "custom_id")
                if error is None:
                    seen[request["custom_id"]] = number
                    models.setdefault(request["body"].get("model"), number)
                    lines.append(Line(number, request["custom_id"], start, len(data)))
                else:
                    errors.append(_error(*error, number))
            start += len(data)
    if len(lines) > MAX_LINES:
        errors.append(_error("too_many_requests", f"the file has {len(lines)} requests; at most {MAX_LINES} can be in "
                             "one batch", None, None))
    if len(models) > 1:
        errors.append(_error("mismatched_model", f"all requests of a batch must be to one model, not to "
                             f"{', '.join(map(repr, list(models)[:5]))}", "body.model", list(models.values())[1]))
    if not lines and not errors:
        errors.append(_error("empty_file", "the file has no requests", None, None))
    return Checked(lines, next(iter(models), None), errors)


def read(path: pathlib.Path, line: Line) -> dict[str, Any]:
    """The request of a line that was checked."""
    with open(path, "rb") as file:
        file.seek(line.start)
        return json.loads(file.read(line.size))


def _parsed(data: bytes, endpoint: str) -> tuple[dict[str, Any], tuple[str, str, str | None] | None]:
    """The request, or why it is none: (code, message, field)."""
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return {}, ("invalid_json_line", "this line is not parseable as valid JSON in UTF-8", None)
    if not isinstance(request, dict):
        return {}, ("invalid_json_line", "this line is not a JSON object", None)
    for name in FIELDS:
        if name not in request:
            return {}, ("missing_required_parameter", f"this line lacks the field {name!r}", name)
    for name in request:
        if name not in FIELDS:
            message = f"the field {name!r:.80} is not known; a line has {', '.join(FIELDS)}"
            return {}, ("unknown_parameter", message, name[:80])
    custom_id, method, url, body = (request[name] for name in FIELDS)
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID or not _is_text(custom_id):
        return {}, ("invalid_value", f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    if method != "POST":
        return {}, ("invalid_method", f"method must be 'POST', not {method!r:.80}", "method")
    if url != endpoint:
        return {}, ("mismatched_endpoint", f"url must be the batch's endpoint {endpoint!r}, not {url!r:.80}", "url")
    if not isinstance(body, dict):
        return {}, ("invalid_value", "body must be a JSON object", "body")
    if body.get("stream"):
        return {}, ("invalid_value", "the answers of a batch are not streamed: leave stream out", "body.stream")
    if body.get("background"):
        return {}, ("invalid_value", "a batch is in the background as it is: leave background out", "body.background")
    if not isinstance(body.get("model"), str | None):
        return {}, ("invalid_value", "model must be a string", "body.model")
    return request, None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        return False
    return True


def _error(code: str, message: str, param: str | None, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message[:1000], "param": param, "line": line}
