"""The HTTP surface under what nobody should send: no 5xx, no answer that the OpenAPI document does not describe.

FUZZ_SECONDS=600 asks for a longer run, of other values each time: see the last test.
"""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import time

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis import checks

from llm_jax.inference.request import InvalidRequest
from serving.access.identity import ROLES
from serving.metrics import Metrics
from serving.state import State
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import wait_until
from tests.serving.http.chat_doubles import PLAIN, ChatService
from tests.serving.http.conftest import MODEL, RunningApp, running_app
from tests.serving.http.test_app import COMPLETIONS, complete, error_of, request_bytes

EXAMPLES = 8  # of each operation
BODIES = 400  # broken ones
SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))


class ShortService(ChatService):
    """Says three tokens at most, whatever is asked for, and like the engine takes no tokens that there are not."""

    def _known(self, prompt_ids):
        if any(i >= self.tokenizer.vocab_size for i in prompt_ids):
            raise InvalidRequest("a token is outside the vocabulary", "prompt")
        return prompt_ids

    def submit_samples(self, prompt_ids, params, listeners, priority=0, **more):
        return super().submit_samples(self._known(prompt_ids), params, listeners, priority, **more)

    def embed(self, prompt_ids, *args):
        return super().embed(self._known(prompt_ids), *args)

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


def in_time(response) -> bool:
    """Whether a request did not end by the deadline that it had itself, which may be no time at all."""
    return response.status_code != 504 or response.json()["error"]["code"] != "deadline_exceeded"


def not_a_fault(context, response, case):
    """`not_a_server_error`, for requests that had time."""
    return checks.not_a_server_error(context, response, case) if in_time(response) else None


CHECKS = [not_a_fault, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance, checks.negative_data_rejection]


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


def fuzz(app, mode, *, key: str = "", examples: int = EXAMPLES, seed: int | None = None) -> set[str]:
    """Asks every operation, which answers as the document says; the operations that were asked.

    Args:
      mode: whether what is sent is right or wrong.
      key: sent with each request.
      examples: of each operation.
      seed: chooses them; None takes the same each time.
    """
    document = schemathesis.openapi.from_url(f"{app.url}/openapi.json")
    headers = {"x-api-key": key} if key else {}
    tried = set()
    for operation in (found.ok() for found in document.get_all_operations()):
        if mode is NEGATIVE and not (operation.body or operation.query):
            continue  # nothing can be wrong with GET /healthz

        @hypothesis.settings(max_examples=examples, deadline=None, derandomize=seed is None, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def answers(case):
            tried.add(case.operation.label)
            case.call_and_validate(headers=headers, checks=CHECKS)

        (answers if seed is None else hypothesis.seed(seed)(answers))()
    return tried


@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE])
def test_every_operation_answers_as_the_document_says(fuzzed, mode):
    assert {f"POST {COMPLETIONS}", "POST /v1/embeddings", "POST /tokenize"} <= fuzz(fuzzed, mode)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    ring, state = Keyring(folder), State(folder / "state")
    with running_app(ShortService(step_s=0), options={"state": state}, metrics=Metrics(), guard=ring.guard()) as app:
        yield app, ring
    state.close()


@pytest.mark.parametrize("role", ROLES)
def test_with_a_key_of_each_role_what_is_wrong_is_refused_and_written_down(guarded, role):
    app, ring = guarded
    before = len(ring.audited())
    tried = fuzz(app, NEGATIVE, key=ring.add(role), examples=2)
    assert {f"POST {COMPLETIONS}", "POST /v1/batches", "GET /v1/files"} <= tried
    lines = ring.audited()[before:]
    assert len(lines) >= len(tried) and {line["role"] for line in lines} == {role}
    if role == "read-only":  # whatever is in them
        assert {line["status"] for line in lines if line["method"] == f"POST {COMPLETIONS}"} == {"forbidden"}
    else:
        assert "forbidden" not in {line["status"] for line in lines if line["method"] == f"POST {COMPLETIONS}"}


PATHS = {COMPLETIONS: {"prompt": "ab"}, "/v1/embeddings": {"input": "ab"}, "/tokenize": {"prompt": "ab"},
         "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]}}
EDGES = (None, True, "", "a", "你\x00", 0, -1, 2**31, 2**63, 2**64, 2**70, 1e-9, -0.5, 1.5, 1e308, [], [[]], [None],
         [-1], [2**31], ["a"] * 20, [[1, 2], "a"], {}, {"a": 1}, {"5": 1e9}, {"type": "object"}, "a" * 3000, "(" * 50,
         {"include_usage": True}, [{"role": "user"}], {"$ref": "#/x"}, "start: start", list(range(3000)))


def any_values(app, seed: int, count: int, timeout_s: float = 30) -> set[int]:
    """Asks with any values in any fields: a fault is told by its field. The statuses of the answers."""
    document = httpx.get(f"{app.url}/openapi.json").json()
    chosen = random.Random(seed)
    statuses: set[int] = set()
    with httpx.Client(base_url=app.url, timeout=timeout_s) as http:
        for path, right in PATHS.items():
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            fields = sorted(document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"])
            for _ in range(count // len(PATHS)):
                sent = right | {name: chosen.choice(EDGES) for name in chosen.sample(fields, chosen.choice((1, 1, 2)))}
                answer = http.post(path, json=sent)
                statuses.add(answer.status_code)
                assert answer.status_code < 500 or not in_time(answer), (path, sent, answer.text)
                if answer.status_code == 400:
                    where = error_of(answer)["param"]
                    assert where.partition(".")[0].partition("[")[0] in fields, (path, sent, answer.text)
    return statuses


def test_any_field_may_have_any_value(fuzzed):
    """A fault is told by its field, and the answer to what happens to be right is one."""
    assert any_values(fuzzed, 6, BODIES) == {200, 400, 404}


def no_http(app, seed: int, count: int) -> None:
    """Sends bytes that are nearly a request, or not at all."""
    chosen = random.Random(seed)
    right = request_bytes(b'{"prompt": "ab"}')
    for _ in range(count):
        broken = bytearray(right)
        for _ in range(chosen.randint(1, 8)):
            broken[chosen.randrange(len(broken))] = chosen.randrange(256)
        with socket.create_connection(("127.0.0.1", app.port), timeout=10) as connection:
            connection.sendall(chosen.randbytes(200) if chosen.random() < 0.3 else bytes(broken))
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1 << 16)
        assert not answer or answer.startswith(b"HTTP/1.1 ") and int(answer.split()[1]) < 500, bytes(broken)


def test_bytes_that_are_no_http_end_their_own_connection_alone(fuzzed):
    no_http(fuzzed, 7, 60)


@pytest.fixture
def engine(service, tmp_path):
    """A real engine with a chat template, and doors that let everybody in."""
    state = State(tmp_path / "state")
    service.tokenizer.files.contents["chat_template.jinja"] = PLAIN.encode()
    running = RunningApp(service, MODEL, {"metrics": Metrics()}, {"state": state})
    try:
        yield running
    finally:
        running.stop()
        state.close()
        del service.tokenizer.files.contents["chat_template.jinja"]
    assert wait_until(lambda: not any(service.stats()[name] for name in ("pages_used", "running", "waiting")), 60)


if SECONDS:
    @pytest.mark.parametrize("over", ["a double", "a real engine"])
    def test_for_as_long_as_is_asked_for(over, request):
        """The same with other values each time, half of the time over the double with keys, half over a real engine:

            FUZZ_SECONDS=600 make test PYTEST_ARGS='tests/serving/http/test_schema_fuzz.py -k as_long -s'

        The seed that is printed last is that of a failure; FUZZ_SEED=n begins with it.
        """
        keys: list[str] = [""]
        if over == "a double":
            app, ring = request.getfixturevalue("guarded")
            keys = [ring.add(role) for role in ROLES]
        else:
            app = request.getfixturevalue("engine")
        ends = time.monotonic() + SECONDS / 2
        seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**31)))
        while time.monotonic() < ends:
            print(f"FUZZ_SEED={seed} over {over}", flush=True)
            for mode in (NEGATIVE, POSITIVE):
                fuzz(app, mode, key=keys[seed % len(keys)], examples=25, seed=seed)
            if over == "a real engine":
                any_values(app, seed, BODIES, timeout_s=120)
            no_http(app, seed, 100)
            seed += 1
