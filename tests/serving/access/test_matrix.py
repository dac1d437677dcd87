"""Every way not to be let in, at every door: the status that fits, the same message, an audit line, no key in a log."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import openai
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serving import messages
from serving.access import keys
from serving.errors import Reason
from serving.logs import TextFormatter
from serving.options import ServerOptions
from serving.parts import Parts
from tests.serving.access.keyring import NOW, Keyring
from tests.serving.doubles import ForeignStub, running_server, wait_until
from tests.serving.http.chat_doubles import ChatService

Ending = tuple[Any, str]  # status and message
_COMPLETION = {"prompt": "你好", "max_tokens": 2}
_MESSAGES = [{"role": "user", "content": "你好"}]


class Doors:
    """A server with every door open, its keys, and a client for each door."""

    def __init__(self, server: Any, keyring: Keyring, channel: grpc.Channel) -> None:
        self.keyring = keyring
        self.url = server.server.http_address
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=10)
        self.guard = server.server.calls.guard
        self.channel = channel
        self._stub = ForeignStub(channel)
        self.keys = {name: keyring.add(role, **fields) for name, (role, fields) in {
            "good": ("user", {}),
            "developer": ("developer", {}),
            "of a lesser role": ("read-only", {}),
            "expired": ("admin", {"expires": NOW - datetime.timedelta(minutes=30)}),
            "revoked": ("admin", {"revoked": NOW}),
            "over quota": ("user", {"tokens_per_day": 10}),
            "of a tenant over quota": ("user", {"tenant": "网站"}),
            "too often": ("user", {"requests_per_minute": 1}),
            "too many at once": ("user", {"concurrent": 1}),
        }.items()}
        keyring.quota("网站", tokens_per_month=5)
        self.keys |= {"none": None, "wrong": keys.new_secret(), "cut short": self.keys["good"][:-1]}
        self.ids = {name: f"key-{i}" for i, name in enumerate(list(self.keys)[:9])}

    def generate(self, key: str | None) -> Ending:
        return self._unary_stream("Inference/Generate", messages.GenerateRequest(
            text="你好", sampling={"max_tokens": 2}), messages.GenerateResponse, key)

    def embed(self, key: str | None) -> Ending:
        request = messages.EmbedRequest()
        request.inputs.add(text="你好")
        call = self.channel.unary_unary("/llm_jax.serving.v1.Inference/Embed", messages.EmbedRequest.SerializeToString,
                                         messages.EmbedResponse.FromString)
        return _ended(lambda: call(request, metadata=_metadata(key), timeout=10))

    def session(self, key: str | None) -> Ending:
        call = self.channel.stream_stream(
            "/llm_jax.serving.v1.Inference/Session", messages.SessionRequest.SerializeToString,
            messages.SessionResponse.FromString)
        start = messages.SessionRequest(id="a", start={"text": "你好", "sampling": {"max_tokens": 2}})
        last: list[Any] = []

        def run() -> None:
            last.extend(call(iter([start]), metadata=_metadata(key), timeout=10))

        status, message = _ended(run)
        if status is not grpc.StatusCode.OK or last[-1].WhichOneof("kind") == "done":
            return status, message
        failure = last[-1].failure
        return next(code for code in grpc.StatusCode if code.value[0] == failure.code), failure.message

    def decode(self, key: str | None) -> Ending:
        return _ended(lambda: list(self._stub.Decode(
            self._stub.text_request("你好", max_tokens=2), metadata=_metadata(key), timeout=10)))

    def completions(self, key: str | None) -> Ending:
        return self._post("/v1/completions", _COMPLETION, key)

    def completions_stream(self, key: str | None) -> Ending:
        return self._post("/v1/completions", _COMPLETION | {"stream": True}, key)

    def chat(self, key: str | None) -> Ending:
        return self._post("/v1/chat/completions", {"messages": _MESSAGES, "max_tokens": 2}, key)

    def responses(self, key: str | None) -> Ending:
        return self._post("/v1/responses", {"input": "你好", "max_output_tokens": 2}, key)

    def embeddings(self, key: str | None) -> Ending:
        return self._post("/v1/embeddings", {"input": "你好"}, key)

    def websocket(self, key: str | None) -> Ending:
        return self._websocket(key, additional_headers={"authorization": f"Bearer {key}"} if key else None)

    def websocket_by_message(self, key: str | None) -> Ending:
        return self._websocket(key, first={"type": "auth", "key": key} if key else {"type": "auth"})

    def websocket_by_subprotocol(self, key: str | None) -> Ending:
        return self._websocket(key, subprotocols=["llm-jax.v1", *([f"llm-jax.key.{key}"] if key else [])])

    def _unary_stream(self, method: str, request: Any, response: Any, key: str | None) -> Ending:
        call = self.channel.unary_stream(f"/llm_jax.serving.v1.{method}", type(request).SerializeToString,
                                          response.FromString)
        return _ended(lambda: list(call(request, metadata=_metadata(key), timeout=10)))

    def _post(self, path: str, body: dict[str, Any], key: str | None) -> Ending:
        answer = self.http.post(path, json=body, headers={"authorization": f"Bearer {key}"} if key else {})
        if answer.status_code == 200:
            return 200, ""
        assert answer.headers["x-request-id"]
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
        return answer.status_code, answer.json()["error"]["message"]

    def _websocket(self, key: str | None, first: dict[str, Any] | None = None, **options: Any) -> Ending:
        with connect(self.url.replace("http", "ws") + "/v1/stream", proxy=None, **options) as socket:
            if first is not None or key is None:
                socket.send(json.dumps(first or {"type": "auth"}))
            with contextlib.suppress(ConnectionClosed):  # it was refused without waiting for this
                socket.send(json.dumps(_COMPLETION | {"type": "start", "id": "a"}))
            while True:
                told = json.loads(socket.recv(timeout=10))
                if told["type"] == "done":
                    return 200, ""
                if told["type"] == "error":
                    return told["status"], told["error"]["message"]


def _metadata(key: str | None) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")] if key else []


def _ended(call: Callable[[], Any]) -> Ending:
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


# Each door, and how the audit line calls it.
DOORS = {
    Doors.generate: ("grpc", "/llm_jax.serving.v1.Inference/Generate"),
    Doors.embed: ("grpc", "/llm_jax.serving.v1.Inference/Embed"),
    Doors.session: ("grpc", "/llm_jax.serving.v1.Inference/Session"),
    Doors.decode: ("grpc", "/jetstream_proto.Orchestrator/Decode"),
    Doors.completions: ("http", "POST /v1/completions"),
    Doors.completions_stream: ("http", "POST /v1/completions"),
    Doors.chat: ("http", "POST /v1/chat/completions"),
    Doors.responses: ("http", "POST /v1/responses"),
    Doors.embeddings: ("http", "POST /v1/embeddings"),
    Doors.websocket: ("websocket", "/v1/stream"),
    Doors.websocket_by_message: ("websocket", "/v1/stream"),
    Doors.websocket_by_subprotocol: ("websocket", "/v1/stream"),
}
CASES = {
    "none": (Reason.UNAUTHENTICATED, "an API key is needed: send it as 'authorization: Bearer KEY'"),
    "wrong": (Reason.UNAUTHENTICATED, "the API key is not valid"),
    "cut short": (Reason.UNAUTHENTICATED, "the API key is not valid"),
    "revoked": (Reason.UNAUTHENTICATED, "the API key is not valid"),
    "expired": (Reason.UNAUTHENTICATED, "the API key expired on 2026-11-23 22:00 UTC"),
    "of a lesser role": (Reason.FORBIDDEN, "the role 'read-only' may not do this ('{action}'); these may: "
                         "admin, developer, user"),
    "over quota": (Reason.OVER_QUOTA, "this key has a quota of 10 tokens a day, renewed at 2026-11-24 00:00 UTC: all "
                   "are used"),
    "of a tenant over quota": (Reason.OVER_QUOTA, "the tenant '网站' has a quota of 5 tokens a month, renewed at "
                               "2026-12-01 00:00 UTC: all are used"),
    "too often": (Reason.RATE_LIMITED, "this key may make 1 requests a minute"),
    "too many at once": (Reason.RATE_LIMITED, "this key may have 1 requests at once"),
}
NAMES = {door: door.__name__ for door in DOORS}


@pytest.fixture(scope="module")
def log():
    """What is logged of every level, by the clients too, as the server would print it."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(self.format(record))

    handler, root = Handler(), logging.getLogger()
    handler.setFormatter(TextFormatter())
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield found
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="module")
def doors(tmp_path_factory, log):
    keyring = Keyring(tmp_path_factory.mktemp("access"))
    parts = Parts(ServerOptions(http_port=0, response_cache_entries=0))
    parts.guard = keyring.guard()
    with running_server(ChatService(), parts=parts) as server, grpc.insecure_channel(server.address) as channel:
        found = Doors(server, keyring, channel)
        with contextlib.ExitStack() as held:
            for name, tokens in (("over quota", 10), ("of a tenant over quota", 5), ("too often", 0)):
                with found.guard.enter(found.guard.resume(found.ids[name])) as place:
                    place.charge(tokens)
            held.enter_context(found.guard.enter(found.guard.resume(found.ids["too many at once"])))
            with found.http:
                yield found
    parts.close()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("door", DOORS, ids=NAMES.get)
def test_the_same_refusal_at_every_door(doors, door, case):
    interface, method = DOORS[door]
    reason, message = CASES[case]
    before = len(doors.keyring.audited())
    status, said = door(doors, doors.keys[case])
    assert status == (reason.value.grpc if interface == "grpc" else reason.value.http)
    assert said == message.format(action="embed" if "mbed" in method else "generate")

    assert wait_until(lambda: any(line["status"] == reason.name.lower() for line in doors.keyring.audited()[before:]))
    line = next(line for line in doors.keyring.audited()[before:] if line["status"] == reason.name.lower())
    assert (line["interface"], line["key_id"]) == (interface, doors.ids.get(case, "") if case != "revoked" else "")
    assert line["request_id"] and line["peer"] == "127.0.0.1" and line["tokens"] == 0
    if "stream" not in method and "Session" not in method:  # their requests have lines of their own
        assert line["method"] == method and len(doors.keyring.audited()) == before + 1


@pytest.mark.parametrize("door", DOORS, ids=NAMES.get)
def test_a_good_key_is_served_and_its_tokens_are_written_down(doors, door):
    interface, method = DOORS[door]
    before = len(doors.keyring.audited())
    status, said = door(doors, doors.keys["good"])
    assert (status, said) == (grpc.StatusCode.OK if interface == "grpc" else 200, "")
    assert wait_until(lambda: any(line["tokens"] for line in doors.keyring.audited()[before:]))
    line = next(line for line in doors.keyring.audited()[before:] if line["tokens"])
    assert (line["status"], line["interface"], line["key_id"], line["tenant"], line["role"]) == (
        "ok", interface, "key-0", "default", "user")
    if "mbed" not in method:
        assert line["tokens"] >= 5 and line["completion_tokens"] == 2


@pytest.mark.parametrize("path, role", [("/v1/models", "of a lesser role"), ("/metrics", "developer"),
                                        ("/v1/files", "developer"), ("/v1/batches", "developer")])
def test_each_role_has_its_paths(doors, path, role):
    def get(name: str) -> httpx.Response:
        return doors.http.get(path, headers={"x-api-key": doors.keys[name]})

    assert get(role).status_code == 200
    if path != "/v1/models":
        answer = get("good")
        assert answer.status_code == 403 and "these may: admin, developer" in answer.json()["error"]["message"]


OPEN = {"/healthz", "/readyz"}


def test_every_path_and_method_asks_for_a_key_but_probes(doors):
    document = doors.http.get("/openapi.json").json()
    asked = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    assert len(asked) > 15
    for method, path in asked:
        status = doors.http.request(method, path.replace("{", "").replace("}", "")).status_code
        assert status == (200 if path in OPEN else 401), (method, path)


@pytest.mark.parametrize("service", [messages.INFERENCE, messages.ORCHESTRATOR])
def test_every_grpc_method_asks_for_a_key_but_the_probe(doors, service):
    methods = messages.POOL.FindServiceByName(service).methods
    assert methods
    for method in methods:
        kind = doors.channel.stream_stream if method.client_streaming else doors.channel.unary_stream
        call = kind(f"/{service}/{method.name}")
        sent = iter([b""]) if method.client_streaming else b""
        status, _ = _ended(lambda call=call, sent=sent: list(call(sent, timeout=10)))
        expected = grpc.StatusCode.OK if method.name == "HealthCheck" else grpc.StatusCode.UNAUTHENTICATED
        assert status is expected, method.name


def test_a_refused_body_is_not_read_and_a_bad_one_counts(doors):
    def post(name: str, content: bytes) -> int:
        return doors.http.post("/v1/completions", content=content, headers={
            "x-api-key": doors.keys[name], "content-type": "application/json"}).status_code

    assert post("wrong", b"{" * 10_000) == 401
    assert post("good", b"{" * 10_000) == 400
    assert post("too often", b"{}") == 429


def test_a_revoked_key_is_refused_on_a_connection_that_is_open(doors):
    secret = doors.keyring.add(id="key-late")
    assert doors.http.get("/v1/models", headers={"x-api-key": secret}).status_code == 200
    doors.keyring.change("key-late", revoked=NOW)
    assert doors.http.get("/v1/models", headers={"x-api-key": secret}).status_code == 401


def test_openai_s_client_raises_its_own_errors(doors):
    kinds = {"wrong": openai.AuthenticationError, "expired": openai.AuthenticationError,
             "of a lesser role": openai.PermissionDeniedError, "too often": openai.RateLimitError,
             "over quota": openai.RateLimitError}
    for case, kind in kinds.items():
        with openai.OpenAI(base_url=f"{doors.url}/v1", api_key=doors.keys[case], max_retries=0) as client:
            with pytest.raises(kind) as refused:
                client.completions.create(model="model", prompt="你好", max_tokens=2)
        assert refused.value.body["message"] == CASES[case][1].format(action="generate")
        assert refused.value.code == CASES[case][0].value.code
        assert (refused.value.response.headers.get("retry-after") is None) == (case not in ("too often", "over quota"))


def test_lines_of_a_batch_run_as_their_key_s_and_behind_its_limits(doors):
    secret = doors.keyring.add("developer", id="key-batch", tenant="批", requests_per_minute=2)
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions",
              "body": {"model": "model", "prompt": "你好", "max_tokens": 2}} for i in range(5)]
    with openai.OpenAI(base_url=f"{doors.url}/v1", api_key=secret, max_retries=0) as client:
        file = client.files.create(file=("a.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.RateLimitError):  # the key's two requests of this minute are made
            client.batches.list()

    def answered() -> list[dict[str, Any]]:
        return [line for line in doors.keyring.audited() if line["interface"] == "batch"]

    assert wait_until(lambda: len(answered()) == 5)
    for line in answered():
        assert (line["status"], line["key_id"], line["tenant"], line["role"], line["tokens"]) == (
            "ok", "key-batch", "批", "developer", 5)


def test_zz_no_key_is_in_any_log_line_audit_line_metric_or_error(doors, log):
    """Last: after all of the above."""
    metrics = doors.http.get("/metrics", headers={"x-api-key": doors.keys["developer"]}).text
    told = "\n".join((*log, doors.keyring.audit_path.read_text(), metrics, repr(doors.guard), repr(vars(doors.guard))))
    assert len(log) > 20 and "key-0" in told
    for secret in filter(None, doors.keys.values()):
        assert secret not in told and secret.removeprefix(keys.PREFIX) not in told
        assert keys.hashed(secret) not in told
