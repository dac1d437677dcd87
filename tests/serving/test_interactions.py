"""The log of interactions: what is in it, what is masked, and that nobody waits for it."""

from __future__ import annotations

import json
import os
import stat
import threading
import time

import pytest

from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint
from serving import interactions, pii
from serving.client import Client, RequestFailed
from serving.interactions import Interactions
from serving.options import ServerOptions
from tests.serving.doubles import running_server, wait_until


@pytest.mark.parametrize(("text", "masked"), [
    ("写信给 zhang.san+x@example.com.cn 吧", "写信给 [email] 吧"),
    ("邮箱zhang@example.com，谢谢", "邮箱[email]，谢谢"),
    ("电话13812345678或+86 138 1234 5678", "电话[phone]或[phone]"),
    ("座机010-62345678。", "座机[phone]。"),
    ("call (650) 253-0000 or +44 20 7946 0018", "call [phone] or [phone]"),
    ("身份证110101199003078515号", "身份证[id]号"),
    ("11010519491231002X", "[id]"),
    ("card 4111 1111 1111 1111, or 5500-0000-0000-0004", "card [card], or [card]"),
    ("IBAN DE89 3704 0044 0532 0130 00 und mehr", "IBAN [iban] und mehr"),
    ("gb82west12345698765432", "[iban]"),
    ("来自192.168.0.1，和2001:db8::ff00:42:8329", "来自[ip]，和[ip]"),
    ("::ffff:10.0.0.1 and fe80::1", "[ip] and [ip]"),
    ("a@b.co, a@b.co", "[email], [email]"),
    ("", ""),
])
def test_personal_data_is_masked(text, masked):
    assert pii.mask(text) == masked


@pytest.mark.parametrize("text", [
    "110101199003078516",  # its check digit is wrong
    "4111 1111 1111 1112", "DE89 3704 0044 0532 0130 01", "订单号 2024011500013",
    "std::vector<int> at 12:30:45", "256.1.1.1", "version 1.2.3", "x = a @ b", "def main():\n    return 12345678",
    "共 3,141,592,653 元", "π ≈ 3.14159265358979",
])
def test_what_is_none_stays(text):
    assert pii.mask(text) == text


@pytest.mark.parametrize("piece", ["a", "1 ", "DE89 ", "a@", ":", "1.1.", "ab:", "1-", "+1", "你"])
def test_no_text_takes_long(piece):
    began = time.thread_time()
    pii.mask(piece * (10_000 // len(piece)))
    assert time.thread_time() - began < 2  # it is 0.1 s; what is quadratic takes minutes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "interactions.jsonl"


@pytest.fixture
def server(path):
    options = ServerOptions(interactions_file=str(path), response_cache_entries=8)
    with running_server(options=options) as running:
        yield running


def _lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _wait_for(path, count: int) -> list[dict]:
    assert wait_until(lambda: path.exists() and len(_lines(path)) >= count)
    return _lines(path)


def test_a_line_tells_what_was_asked_and_answered_with_personal_data_masked(server, path):
    prompt = "我的电话是13812345678。"
    with Client(server.address) as client:
        for _ in range(2):  # the second time from the cache
            list(client.generate(prompt, max_tokens=30, num_samples=2, stop=["x"], tenant="甲",
                                 constraint=Constraint("regex", ".*")))
    first, again = _wait_for(path, 2)
    assert "13812345678" not in path.read_text(encoding="utf-8")
    assert first["prompt"] == "我的电话是[phone]。"
    assert first["answers"] == [{"text": "我的电话是[phone]。我的电话是13812345", "finish_reason": "length"}] * 2
    assert first["sampling"] == {"max_tokens": 30, "stop": ["x"], "constraint": {"kind": "regex", "text": ".*"}}
    assert (first["tenant"], first["key_id"], first["interface"]) == ("甲", "", "grpc")
    assert first["method"] == "/llm_jax.serving.v1.Inference/Generate" and first["time"].endswith("Z")
    assert first.pop("request_id") != again.pop("request_id")
    assert {**first, "time": 0} == {**again, "time": 0}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_nothing_personal_and_no_key_is_in_what_was_asked_for_either(server, path):
    key = "sk-lljx-Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6"
    with Client(server.address) as client:
        list(client.generate(f"key {key} ", max_tokens=2, stop=["tom@example.com"],
                             constraint=Constraint("regex", "(电话13812345678|x).*")))
    line, = _wait_for(path, 1)
    assert line["prompt"] == "key [key] "
    assert line["sampling"]["stop"] == ["[email]"]
    assert line["sampling"]["constraint"] == {"kind": "regex", "text": "(电话[phone]|x).*"}


def test_what_was_cut_short_is_told_as_far_as_it_came(server, path):
    with Client(server.address) as client:
        stream = client.generate("ab", max_tokens=9000)
        next(stream)
        stream.close()
        line, = _wait_for(path, 1)
        assert line["answers"][0]["finish_reason"] is None and line["answers"][0]["text"].startswith("a")
        with pytest.raises(RequestFailed):
            list(client.generate("ab", top_p=2.0))
        with pytest.raises(RequestFailed):
            list(client.generate([5] * 9_999 + [6], max_tokens=1))
    assert len(_lines(path)) == 1  # what was never asked of the model is none


def test_the_file_may_be_moved_away(server, path):
    with Client(server.address) as client:
        list(client.generate("ab", max_tokens=1))
        _wait_for(path, 1)
        path.rename(path.with_suffix(".1"))
        list(client.generate("cd", max_tokens=1))
    assert [line["prompt"] for line in _wait_for(path, 1)] == ["cd"]


def test_nobody_waits_for_a_slow_log(path, monkeypatch, caplog):
    monkeypatch.setattr(interactions, "MAX_WAITING", 2)
    hold = threading.Event()

    def slow(text: str) -> str:
        hold.wait(10)
        return text

    log = Interactions(path, slow)
    monkeypatch.setattr("serving.parts.Interactions", lambda _path: log)
    options = ServerOptions(interactions_file=str(path), response_cache_entries=0)
    with running_server(options=options) as running:
        try:
            with Client(running.address) as client:
                for i in range(6):
                    assert "".join(c.text for c in client.generate(f"{i}你", max_tokens=2)) == f"{i}你"
                assert wait_until(lambda: log.dropped == 3)  # one is being masked, two wait
        finally:
            hold.set()
        assert [line["prompt"] for line in _wait_for(path, 3)] == ["0你", "1你", "2你"]
    assert caplog.text.count("are not in the log") == 1


def test_a_long_text_is_cut_and_nothing_in_it_is_cut_in_two(path, monkeypatch):
    monkeypatch.setattr(interactions, "MAX_CHARACTERS", 12)
    log = Interactions(path)
    try:
        assert log._masked("0123456 13812345678 " + "x" * 1000) == "0123456 [pho…"
        assert log._masked("138") == "138"
    finally:
        log.close()


def test_a_file_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write the interactions file"):
        Interactions(tmp_path / "file" / "x")
