"""Log lines of the doors: text or JSON, each with the id of the request it is about, none with a key in it."""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import re
import sys
from typing import Any, TextIO

from llm_jax.errors import UserError

FORMATS = ("text", "json")

# The request that the running task answers; the doors set it, tasks and threads started for the request inherit it.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

# A credential, whoever logged it: uvicorn a query, a library a header, an exception an argument.
_SECRETS = (
    (re.compile(r"\b(bearer|basic)(\s+)[\w.~+/=-]{16,}", re.IGNORECASE), r"\1\2[key]"),
    (re.compile(r"""\b((?:x-)?api[-_]key|authorization)(["']?\s*[:=]\s*["']?)(?!bearer\s|basic\s)[^\s"',;&)\]}]+""",
                re.IGNORECASE), r"\1\2[key]"),
    (re.compile(r"\bsk-[\w-]{8,}|sk-lljx-[\w-]+"), "[key]"),  # others' keys by their form, ours wherever they stand
)


def without_keys(line: str) -> str:
    """The line with what looks like a credential cut out."""
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line


class TextFormatter(logging.Formatter):
    """`2026-11-01T12:00:00.123Z WARNING serving.calls [req-1] message`."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {record.name} "
        if found := _request_id(record):
            line += f"[{found}] "
        line += record.getMessage()
        if more := _traceback(self, record):
            line += "\n" + more
        return without_keys(line)


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, and where there are any request_id and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name,
                                "message": without_keys(record.getMessage())}
        if found := _request_id(record):
            line["request_id"] = without_keys(found)
        if more := _traceback(self, record):
            line["traceback"] = without_keys(more)
        return json.dumps(line, ensure_ascii=False)


def check_format(log_format: str) -> None:
    """Raises a UserError unless it is one of `FORMATS`."""
    if log_format not in FORMATS:
        raise UserError(f"log_format must be one of {', '.join(FORMATS)}, not {log_format!r}")


def set_up(log_format: str = "text", stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Sends every logger's lines to `stream` (standard error) in that format, uvicorn's and asyncio's too.

    Run uvicorn with `log_config=None`, or it brings handlers of its own.

    Raises:
      UserError: the format is unknown.
    """
    check_format(log_format)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in ("httpx", "httpcore", "casbin", "websockets"):  # a line for each request, header or policy
        logging.getLogger(name).setLevel(logging.WARNING)


def _request_id(record: logging.LogRecord) -> str:
    return getattr(record, "request_id", "") or request_id.get()


def _time(record: logging.LogRecord) -> str:
    when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    return "\n".join(parts + ([record.stack_info] if record.stack_info else []))
