"""One WebSocket, several requests: each gets its text and one end, whatever else is sent beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from llm_jax.inference.request import Delta, Usage
from serving.access.guard import Guard
from serving.http import websocket as door
from tests.serving.access.keyring import NOW, Keyring
from tests.serving.doubles import FakeService, wait_until
from tests.serving.http.chat_doubles import ChatService
from tests.serving.http.conftest import MODEL, RunningApp, running_app

SCOPE = {"type": "websocket", "path": "/v1/stream", "headers": [], "query_string": b"", "subprotocols": [],
         "client": None, "scheme": "ws", "root_path": "", "raw_path": b"/v1/stream"}  # of a WebSocket without a socket


class Client:
    """A plain WebSocket client that speaks the protocol's JSON."""

    def __init__(self, app, **options) -> None:
        self._socket = connect(app.url.replace("http", "ws") + "/v1/stream", proxy=None, **options)
        self.close = self._socket.close
        self.subprotocol = self._socket.subprotocol

    def send(self, **message) -> None:
        self._socket.send(json.dumps(message, ensure_ascii=False))

    def send_raw(self, message) -> None:
        self._socket.send(message)

    def take(self) -> dict:
        return json.loads(self._socket.recv(timeout=10))

    def ends(self, *names: str) -> dict[str, list[dict]]:
        """All that comes of these requests, until each has ended."""
        found: dict[str, list[dict]] = {name: [] for name in names}
        while any(not all_ or all_[-1]["type"] == "delta" for all_ in found.values()):
            message = self.take()
            found[message["id"]].append(message)
        return found

    def answer(self, **message) -> list[dict]:
        self.send(type="start", id="问", **message)
        return self.ends("问")["问"]


def text(messages: list[dict], index: int = 0) -> str:
    return "".join(one["text"] for one in messages if one["type"] == "delta" and one["index"] == index)


@pytest.fixture
def ws(app):
    client = Client(app)
    yield client
    client.close()


def test_a_stream_has_the_text_that_http_gives_in_one_piece(ws, client):
    asked = {"prompt": "从前有座山", "max_tokens": 23, "n": 2, "logprobs": 1}
    *deltas, last = ws.answer(**asked)
    alone = client.completions.create(model=MODEL, **asked)
    assert [text(deltas, i) for i in (0, 1)] == [choice.text for choice in alone.choices]
    # How many tokens come in a piece is for whoever reads fast or slowly enough; what comes is the same.
    of_first = [value for one in deltas if one["index"] == 0 for value in one["logprobs"]["token_logprobs"]]
    assert len(deltas) > 2 and of_first == alone.choices[0].logprobs.token_logprobs == [-0.5] * 23
    assert last["choices"] == [{"index": i, "finish_reason": "length"} for i in (0, 1)]
    assert last["usage"]["completion_tokens"] == 46 and last["request_id"].startswith("req-")


def test_a_conversation_with_a_tool():
    said = '查一下。\n<tool_call>\n{"name": "weather", "arguments": {"城市": "北京"}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with running_app(ChatService(lambda prompt, sample: said if "天气" in prompt else "你好！")) as app:
        client = Client(app)
        *deltas, last = client.answer(messages=[{"role": "user", "content": "在吗"}])
        assert text(deltas) == "你好！" and last["choices"] == [{"index": 0, "finish_reason": "stop"}]
        *deltas, last = client.answer(messages=[{"role": "user", "content": "天气"}], tools=[tool])
        calls = [call["function"] for one in deltas for call in one.get("tool_calls", ())]
        assert text(deltas).strip() == "查一下。" and calls[0]["name"] == "weather"
        assert json.loads("".join(call.get("arguments", "") for call in calls)) == {"城市": "北京"}
        assert last["choices"] == [{"index": 0, "finish_reason": "tool_calls"}] and last["usage"]["completion_tokens"]


def test_several_requests_come_interleaved_and_each_ends_once(ws, app):
    names = [f"第{i}" for i in range(8)]
    for i, name in enumerate(names):
        ws.send(type="start", id=name, prompt=f"甲{i}乙", max_tokens=30 + i)
    order, found = [], {name: [] for name in names}
    while len(order) < 8:
        message = ws.take()
        found[message["id"]].append(message)
        if message["type"] != "delta":
            order.append(message["id"])
    assert sorted(order) == names
    firsts = [found[name][0] for name in names]
    assert all(one["type"] == "delta" for one in firsts), "nobody waits for another's end"
    for i, name in enumerate(names):
        assert text(found[name]) == (f"甲{i}乙" * 20)[:30 + i]
        assert [one["type"] for one in found[name]].count("done") == 1
    ws.send(type="start", id=names[0], prompt="又", max_tokens=1)  # a name is free again after its end
    assert text(ws.ends(names[0])[names[0]]) == "又"


def test_cancel_ends_one_request_and_no_other(ws, app):
    ws.send(type="start", id="停", prompt="停", max_tokens=9000)
    ws.send(type="start", id="留", prompt="留", max_tokens=200)
    while ws.take()["id"] != "停":
        pass
    ws.send(type="cancel", id="停")
    ws.send(type="cancel", id="停")
    ws.send(type="cancel", id="nobody's")
    found: dict[str, list[dict]] = {"停": [], "留": []}
    while not all(all_ and all_[-1]["type"] == "done" for all_ in found.values()):
        message = ws.take()
        found[message["id"]].append(message)
    assert found["停"][-1]["choices"] == [{"index": 0, "finish_reason": "cancelled"}]
    assert found["留"][-1]["choices"] == [{"index": 0, "finish_reason": "length"}]
    assert len(app.service.cancelled) == 1


@pytest.mark.parametrize("message, name, param, code, says", [
    ("{", None, None, "invalid_json", "not valid JSON"),
    ('{"type": "start", "id": "a", "prompt": NaN}', None, None, "invalid_json", "not valid JSON"),
    ("[" * 50_000, None, None, "invalid_json", "not valid JSON"),
    ("[1]", None, None, "invalid_type", "must be a JSON object"), (b"{}", None, None, "invalid_type", "text messages"),
    ({"type": "begin"}, None, "type", "invalid_value", "must be 'start' or 'cancel', not 'begin'"),
    ({"id": "b"}, None, "type", "missing_required_parameter", "'start' or 'cancel'"),
    ({"type": "cancel"}, None, "id", "missing_required_parameter", "1 to 128"),
    ({"type": "start", "id": "", "prompt": "a"}, None, "id", "invalid_value", "1 to 128"),
    ({"type": "start", "id": 7, "prompt": "a"}, None, "id", "invalid_type", "1 to 128"),
    ({"type": "start", "id": "长", "prompt": "a"}, None, "id", "invalid_value", "still runs"),
    ({"type": "start", "id": "b"}, "b", "prompt", "missing_required_parameter", "either 'prompt' or 'messages'"),
    ({"type": "start", "id": "b", "prompt": "a", "messages": []}, "b", "prompt", "invalid_value", "either"),
    ({"type": "start", "id": "b", "prompt": "a", "stream": False}, "b", "stream", "invalid_value", "leave stream out"),
])
def test_a_wrong_message_is_told_and_costs_nothing(ws, message, name, param, code, says):
    """A start that is refused ends under its own id; what is none, or could be taken for another's end, has none."""
    ws.send(type="start", id="长", prompt="长", max_tokens=300)
    ws.send_raw(message if isinstance(message, str | bytes) else json.dumps(message))
    found = {name: [], "长": []}
    while not (found[name] and found["长"] and found["长"][-1]["type"] == "done"):
        one = ws.take()
        found[one["id"]].append(one)
    error = found[name][0]
    assert (error["type"], error["status"]) == ("error", 400)
    assert (error["error"]["param"], error["error"]["code"]) == (param, code) and says in error["error"]["message"]
    assert ("request_id" in error) == (name is not None)
    assert text(found["长"]) == "长" * 300


@pytest.mark.parametrize("asked, status, param", [
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"), ({"prompt": "a", "colour": "红"}, 400, "colour"),
    ({"prompt": "a", "model": "other"}, 404, "model"), ({"prompt": "a", "temperature": "热"}, 400, "temperature"),
    ({"messages": [{"role": "user", "content": "你好"}]}, 400, "messages"),  # the double has no chat template
])
def test_a_request_is_refused_as_over_http(ws, http, asked, status, param):
    [error] = ws.answer(**asked)
    path = "/v1/completions" if "prompt" in asked else "/v1/chat/completions"
    answer = http.post(path, json=asked | {"stream": True})
    assert (error["status"], error["error"]) == (answer.status_code, answer.json()["error"])
    assert (error["status"], error["error"]["param"]) == (status, param)
    assert text(ws.answer(prompt="好", max_tokens=1)) == "好"


def test_a_fault_on_the_way_ends_that_request(ws, app):
    app.service.faults["坏"] = [[_delta("坏"), _delta("", finish_reason="error", error="the step failed")]]
    first, error = ws.answer(prompt="坏", max_tokens=5)
    assert first["text"] == "坏"
    assert (error["type"], error["status"], error["error"]["code"]) == ("error", 500, "internal_error")
    assert text(ws.answer(prompt="好", max_tokens=1)) == "好"


def _delta(said: str, **fields) -> Delta:
    return Delta(text=said, token_ids=(9,) * len(said), logprobs=(-1.0,) * len(said), usage=Usage(1, 1), **fields)


def test_one_connection_has_so_many_requests(ws, app, monkeypatch):
    monkeypatch.setattr(door, "MAX_REQUESTS", 2)
    for name in "甲乙丙":
        ws.send(type="start", id=name, prompt=name, max_tokens=5000)
    while (error := ws.take())["type"] != "error":
        pass
    assert (error["id"], error["status"]) == ("丙", 429) and "'丙' was not started" in error["error"]["message"]
    assert error["error"]["code"] == "rate_limit_exceeded" and error["request_id"].startswith("req-")
    ws.send(type="cancel", id="甲")
    while (ended := ws.take())["type"] != "done":
        pass
    assert ended["id"] == "甲"
    ws.send(type="start", id="丙", prompt="丙", max_tokens=2)  # there is room again, and the name was never taken
    while (ended := ws.take())["id"] != "丙" or ended["type"] == "delta":
        pass
    assert ended["type"] == "done"


def test_a_client_that_talks_nonsense_is_told_so_often_and_no_oftener(ws, app, monkeypatch):
    monkeypatch.setattr(door, "MAX_FAULTS", 3)
    ws.send(type="start", id="长", prompt="长", max_tokens=9000)
    for _ in range(2):
        ws.send_raw("{")
    ws.send(type="start", id="坏")  # a request, if a wrong one
    ws.send_raw("{")
    told = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            told.append(ws.take())
    assert [one["id"] for one in told if one["type"] == "error"] == [None, None, "坏", None]
    assert closed.value.rcvd.code == 1008 and "protocol" in closed.value.rcvd.reason
    assert wait_until(lambda: app.service.stats()["running"] == 0 and app.calls.running == 0)


def test_messages_that_come_together_let_others_have_a_turn(app):
    """Of many that are there at once each is one turn of the event loop, and not all of them one."""

    async def turns() -> int:
        inbox: asyncio.Queue = asyncio.Queue()
        await inbox.put({"type": "websocket.connect"})
        for _ in range(90):
            await inbox.put({"type": "websocket.receive", "text": "{"})
        await inbox.put({"type": "websocket.disconnect", "code": 1000})
        others = 0

        async def send(message) -> None:
            pass

        async def count() -> None:
            nonlocal others
            while True:
                await asyncio.sleep(0)
                others += 1

        counting = asyncio.create_task(count())
        await app.app(dict(SCOPE), inbox.get, send)
        counting.cancel()
        return others

    assert app.run(turns()) >= 80


def test_a_message_that_is_too_long(ws, monkeypatch):
    monkeypatch.setattr(door, "MAX_MESSAGE_BYTES", 1000)
    ws.send_raw("x" * 1001)
    assert ws.take()["status"] == 413
    assert text(ws.answer(prompt="好", max_tokens=1)) == "好"


def test_a_client_that_goes_frees_all_its_requests(ws, app):
    for i in range(5):
        ws.send(type="start", id=str(i), prompt="长", max_tokens=9000)
    assert wait_until(lambda: app.service.stats()["running"] == 5)
    ws.close()
    assert wait_until(lambda: app.service.stats()["running"] == 0)
    assert len(app.service.cancelled) == 5 and wait_until(lambda: app.calls.running == 0)


def test_a_client_that_vanishes_frees_its_requests_too(app):
    client = Client(app)
    client.send(type="start", id="a", prompt="长", max_tokens=9000)
    assert wait_until(lambda: app.service.stats()["running"] == 1)
    client._socket.socket.shutdown(socket.SHUT_RDWR)
    assert wait_until(lambda: app.service.stats()["running"] == 0)


async def _told(app, *sent: dict, wait_s: float = 0.0) -> list[dict]:
    """What comes of messages that arrive together, up to the first end, for a client that takes nothing for `wait_s`
    after its first message: no socket's buffers in between."""
    inbox: asyncio.Queue = asyncio.Queue()
    await inbox.put({"type": "websocket.connect"})
    for message in sent:
        await inbox.put({"type": "websocket.receive", "text": json.dumps(message)})
    found: list[dict] = []

    async def send(message) -> None:
        if message["type"] != "websocket.send":
            return
        found.append(json.loads(message["text"]))
        if len(found) == 1:
            await asyncio.sleep(wait_s)
        if found[-1]["type"] != "delta":
            await inbox.put({"type": "websocket.disconnect", "code": 1000})

    await asyncio.wait_for(app.app(dict(SCOPE), inbox.get, send), 10)
    return found


def test_a_request_that_is_cancelled_at_once_ends_like_any_other(app):
    """Both messages are there before the request has begun; its end is told all the same, and its id is free again."""
    found = app.run(_told(app, {"type": "start", "id": "a", "prompt": "长", "max_tokens": 9000},
                          {"type": "cancel", "id": "a"}))
    assert [one["type"] for one in found] == ["done"]
    assert found[0]["choices"] == [{"index": 0, "finish_reason": "cancelled"}]
    assert wait_until(lambda: app.service.stats()["running"] == 0 and app.calls.running == 0)


def test_a_slow_reader_gets_larger_messages_and_delays_nobody(app):
    # Five hundred tokens are drawn in well under the second that the reader sleeps through.
    found = app.run(_told(app, {"type": "start", "id": "a", "prompt": "慢", "max_tokens": 500}, wait_s=1.5))
    assert text(found) == "慢" * 500 and found[-1]["type"] == "done"
    assert len(found) < 30 and max(len(one.get("text", "")) for one in found) > 400
    assert app.service.stats()["running"] == 0


@pytest.fixture
def guarded(tmp_path):
    ring = Keyring(tmp_path)
    with running_app(guard=ring.guard()) as app:
        yield app, ring


@pytest.mark.parametrize("how", ["header", "x-api-key", "subprotocol", "first message"])
def test_a_key_is_taken_from_three_places(guarded, how):
    app, ring = guarded
    key = ring.add(tenant="网站")
    client = {"header": lambda: Client(app, additional_headers={"authorization": f"Bearer {key}"}),
              "x-api-key": lambda: Client(app, additional_headers={"x-api-key": key}),
              "subprotocol": lambda: Client(app, subprotocols=["llm-jax.v1", f"llm-jax.key.{key}"]),
              "first message": lambda: Client(app)}[how]()
    assert client.subprotocol == ("llm-jax.v1" if how == "subprotocol" else None), "a key is never sent back"
    if how == "first message":
        client.send(type="auth", key=key)
    assert text(client.answer(prompt="好", max_tokens=3)) == "好好好"
    client.close()
    assert wait_until(lambda: len(ring.audited()) == 2)
    assert {(one["interface"], one["key_id"], one["tenant"], one["status"]) for one in ring.audited()} == {
        ("websocket", "key-0", "网站", "ok")}
    assert key not in ring.audit_path.read_text()


def test_a_start_that_is_refused_is_audited_and_counts_against_the_keys_rate(guarded):
    app, ring = guarded
    client = Client(app, additional_headers={"x-api-key": ring.add(requests_per_minute=2)})
    refused = []
    for _ in range(3):
        client.send(type="start", id="a", stream=True)
        refused.append(client.take())
    assert [one["status"] for one in refused] == [400, 400, 429] and {one["id"] for one in refused} == {"a"}
    assert wait_until(lambda: len(ring.audited()) == 3)
    assert [(one["request_id"], one["status"]) for one in ring.audited()] == [
        (one["request_id"], status)
        for one, status in zip(refused, ("invalid", "invalid", "rate_limited"), strict=True)]
    client.close()


@pytest.mark.parametrize("first, says", [
    ({"type": "auth", "key": "wrong"}, "not valid"), ({"type": "auth"}, "is needed"), ("{", "is needed"),
    ({"type": "start", "id": "a", "prompt": "好"}, "is needed"),
])
def test_without_a_good_key_the_connection_is_closed(guarded, first, says):
    app, ring = guarded
    client = Client(app)
    client.send_raw(first if isinstance(first, str) else json.dumps(first))
    error = client.take()
    assert (error["status"], error["error"]["code"]) == (401, "invalid_api_key") and says in error["error"]["message"]
    with pytest.raises(ConnectionClosed) as closed:
        client.take()
    assert closed.value.rcvd.code == 1008 and not app.service.submitted


def test_a_client_that_never_says_who_it_is(guarded, monkeypatch):
    monkeypatch.setattr(door, "AUTH_S", 0.05)
    client = Client(guarded[0])
    assert client.take()["status"] == 401


def test_a_key_that_is_revoked_meanwhile_starts_nothing_more(guarded):
    app, ring = guarded
    key = ring.add()
    client = Client(app, additional_headers={"x-api-key": key})
    assert text(client.answer(prompt="好", max_tokens=1)) == "好"
    ring.change("key-0", revoked=NOW)
    assert wait_until(lambda: client.answer(prompt="好", max_tokens=1)[-1].get("status") == 401)


def test_another_sites_page_is_refused_where_no_key_is_asked_for():
    with running_app(guard=Guard.open()) as app:
        assert Client(app, origin="https://evil.example").take()["status"] == 403
        assert text(Client(app, origin=app.url).answer(prompt="好", max_tokens=1)) == "好"


def test_while_the_server_drains_running_requests_finish_and_new_ones_are_refused():
    with running_app(FakeService(step_s=0.002)) as app:
        client = Client(app)
        client.send(type="start", id="旧", prompt="旧", max_tokens=200)
        client.take()
        app.run(_call(app.calls.refuse_new))
        client.send(type="start", id="新", prompt="新", max_tokens=1)
        found = client.ends("旧", "新")
        assert found["新"][0]["status"] == 503 and found["旧"][-1]["choices"][0]["finish_reason"] == "length"
        with contextlib.suppress(ConnectionClosed):
            client.close()


def test_over_a_real_engine_all_doors_say_the_same_and_a_cancellation_frees_its_pages(service):
    app = RunningApp(service, MODEL, {}, {})
    try:
        client = Client(app)
        client.send(type="start", id="停", prompt="import ", max_tokens=400, ignore_eos=True)
        assert client.take()["id"] == "停"
        asked = {"prompt": "def main", "max_tokens": 24, "temperature": 0.9, "seed": 7, "n": 2}
        for i in range(2):
            client.send(type="start", id=str(i), **asked)
        found: dict[str, list[dict]] = {"停": [], "0": [], "1": []}
        while not all(found[name] and found[name][-1]["type"] == "done" for name in "01"):
            message = client.take()
            found[message["id"]].append(message)
        client.send(type="cancel", id="停")
        alone = httpx.post(f"{app.url}/v1/completions", json=asked, timeout=60).json()["choices"]
        assert [text(found["0"], i) for i in (0, 1)] == [one["text"] for one in alone]
        assert [text(found["1"], i) for i in (0, 1)] == [one["text"] for one in alone]
        client.close()
        assert wait_until(lambda: not any(service.stats()[name] for name in ("pages_used", "running", "waiting")))
    finally:
        app.stop()


async def _call(function) -> None:
    function()
