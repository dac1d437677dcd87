"""The HTTP surface under what nobody should send: no 5xx, no answer that the OpenAPI document does not describe."""

from __future__ import annotations

import dataclasses
import random
import socket

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis import checks

from serving.metrics import Metrics
from serving.state import State
from tests.serving.doubles import wait_until
from tests.serving.http.chat_doubles import ChatService
from tests.serving.http.conftest import running_app
from tests.serving.http.test_app import COMPLETIONS, complete, error_of, request_bytes

EXAMPLES = 8  # of each operation
BODIES = 400  # broken ones


class ShortService(ChatService):
    """Says three tokens at most, whatever is asked for."""

    def _answer(self, text, num_prompt, params):
        return super()._answer(text, num_prompt, dataclasses.replace(params, max_tokens=min(3, params.max_tokens),
                                                                     min_tokens=0))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    state = State(tmp_path_factory.mktemp("state"))
    with running_app(ShortService(step_s=0), options={"state": state}, metrics=Metrics()) as app:
        yield app
        assert wait_until(lambda: app.calls.running == 0 and not app.service._running)
        with httpx.Client(base_url=app.url) as http:  # and it works as ever
            assert complete(http).json()["choices"][0]["text"] == "你好"
    state.close()


CHECKS = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance, checks.negative_data_rejection]


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_every_operation_answers_as_the_document_says(fuzzed, mode):
    document = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    tried = set()
    for operation in (found.ok() for found in document.get_all_operations()):
        if mode is schemathesis.GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing can be wrong with GET /healthz

        @hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def answers(case):
            tried.add(case.operation.label)
            case.call_and_validate(checks=CHECKS)

        answers()
    assert {f"POST {COMPLETIONS}", "POST /v1/embeddings", "POST /tokenize"} <= tried


PATHS = {COMPLETIONS: {"prompt": "ab"}, "/v1/embeddings": {"input": "ab"}, "/tokenize": {"prompt": "ab"},
         "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]}}
EDGES = (None, True, "", "a", "你\x00", 0, -1, 2**31, 2**63, 2**64, 2**70, 1e-9, -0.5, 1.5, 1e308, [], [[]], [None],
         [-1], [2**31], ["a"] * 20, [[1, 2], "a"], {}, {"a": 1}, {"5": 1e9}, {"type": "object"}, "a" * 3000, "(" * 50,
         {"include_usage": True}, [{"role": "user"}], {"$ref": "#/x"}, "start: start", list(range(3000)))


def test_any_field_may_have_any_value(fuzzed):
    """A fault is told by its field, and the answer to what happens to be right is one."""
    document = httpx.get(f"{fuzzed.url}/openapi.json").json()
    chosen = random.Random(6)
    statuses: set[int] = set()
    with httpx.Client(base_url=fuzzed.url, timeout=30) as http:
        for path, right in PATHS.items():
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            fields = sorted(document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"])
            for _ in range(BODIES // len(PATHS)):
                sent = right | {name: chosen.choice(EDGES) for name in chosen.sample(fields, chosen.choice((1, 1, 2)))}
                answer = http.post(path, json=sent)
                statuses.add(answer.status_code)
                assert answer.status_code < 500, (path, sent, answer.text)
                if answer.status_code == 400:
                    where = error_of(answer)["param"]
                    assert where.partition(".")[0].partition("[")[0] in fields, (path, sent, answer.text)
    assert statuses == {200, 400, 404}


def test_bytes_that_are_no_http_end_their_own_connection_alone(fuzzed):
    chosen = random.Random(7)
    right = request_bytes(b'{"prompt": "ab"}')
    for _ in range(60):
        broken = bytearray(right)
        for _ in range(chosen.randint(1, 8)):
            broken[chosen.randrange(len(broken))] = chosen.randrange(256)
        with socket.create_connection(("127.0.0.1", fuzzed.port), timeout=10) as connection:
            connection.sendall(chosen.randbytes(200) if chosen.random() < 0.3 else bytes(broken))
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1 << 16)
        assert not answer or answer.startswith(b"HTTP/1.1 ") and int(answer.split()[1]) < 500, bytes(broken)
