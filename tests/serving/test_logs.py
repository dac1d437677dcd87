"""Log lines: both formats, the request's id, and no key whoever logs it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from llm_jax.errors import UserError
from serving import logs

KEY = "sk-llmjax-Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6"


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def written(log_format, log) -> str:
    stream = io.StringIO()
    logs.set_up(log_format, stream)
    log(logging.getLogger("serving.test"))
    return stream.getvalue()


def test_json_lines():
    token = logs.request_id.set("req-1")
    try:
        line = json.loads(written("json", lambda log: log.warning("你好, %d\nsecond line", 3)))
    finally:
        logs.request_id.reset(token)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "logger": "serving.test", "message": "你好, 3\nsecond line",
                    "request_id": "req-1"}


@pytest.mark.parametrize("log_format", logs.FORMATS)
def test_an_id_that_is_a_key_is_not_written_either(log_format):
    found = written(log_format, lambda log: log.info("ready", extra={"request_id": f"req-1/{KEY}"}))
    assert KEY not in found and "req-1/[key]" in found


def test_a_line_about_no_request_has_no_id():
    assert "request_id" not in json.loads(written("json", lambda log: log.info("ready")))
    assert "[" not in written("text", lambda log: log.info("ready"))


def test_text_lines():
    line = written("text", lambda log: log.error("broken", extra={"request_id": "req-2"}))
    assert line.endswith("ERROR serving.test [req-2] broken\n")


@pytest.mark.parametrize("log_format", logs.FORMATS)
@pytest.mark.parametrize("text", [
    f"GET /v1/stream?api_key={KEY}&x=1", f"headers: {{'authorization': 'Bearer {KEY}'}}", f"x-api-key: {KEY}",
    f"(b'authorization', b'Bearer {KEY[3:]}')", f"the key {KEY} is wrong"])
def test_no_key_is_written(log_format, text):
    def log(logger):
        logger.info(text)
        try:
            raise ValueError(text)
        except ValueError:
            logger.exception("failed")

    found = written(log_format, log)
    assert KEY not in found and KEY[3:] not in found and found.count("[key]") >= 2


def test_ordinary_words_stay():
    text = "basic training: the bearer of the api_key file; sk-learn"
    assert logs.without_keys(text) == text


def test_uvicorn_logs_with_the_rest(caplog):
    caplog.set_level(logging.INFO, "uvicorn.error")  # which a server of another test may have changed
    logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())
    found = written("json", lambda log: logging.getLogger("uvicorn.error").info("started"))
    assert json.loads(found)["logger"] == "uvicorn.error"


def test_an_unknown_format_is_named():
    with pytest.raises(UserError, match="log_format must be one of text, json, not 'xml'"):
        logs.set_up("xml")
