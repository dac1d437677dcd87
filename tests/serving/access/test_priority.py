"""How urgent each role's requests may be: within the same limits, and refused in the same words, at every door."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
from websockets.sync.client import connect

from serving.access.identity import ROLES, Identity
from serving.access.policy import MIN_PRIORITY, max_priority
from serving.client import Client, RequestFailed
from serving.options import ServerOptions
from serving.parts import Parts
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import running_server

LIMITS = {"admin": 100, "developer": 10, "user": 0}


class Doors:
    """One server, and for each door what it says to a request of some priority: its status, None if it was served."""

    def __init__(self, server: Any, role: str, secret: str) -> None:
        self.role = role
        self._client = Client(server.address, api_key=secret)
        self._url = server.server.http_address
        self._secret = secret
        self.service = server.service

    @contextlib.contextmanager
    def open(self) -> Iterator[Doors]:
        with self._client, httpx.Client(base_url=self._url, headers={"x-api-key": self._secret}, verify=False) as web:
            self._web = web
            yield self

    def generate(self, priority: int) -> tuple[Any, str]:
        return self._told(lambda: list(self._client.generate("ab", max_tokens=1, priority=priority)))

    def decode(self, priority: int) -> tuple[Any, str]:
        return self._told(lambda: list(self._client.decode("ab", max_tokens=1, priority=priority)))

    def embed(self, priority: int) -> tuple[Any, str]:
        return self._told(lambda: self._client.embed(["ab"], priority=priority))

    def session(self, priority: int) -> tuple[Any, str]:
        with self._client.session() as session:
            return self._told(lambda: list(session.start("ab", max_tokens=1, priority=priority)))

    def completions(self, priority: int) -> tuple[Any, str]:
        return self._post("/v1/completions", {"prompt": "ab", "max_tokens": 1, "priority": priority})

    def completions_stream(self, priority: int) -> tuple[Any, str]:
        return self._post("/v1/completions", {"prompt": ["ab", "cd"], "max_tokens": 1, "priority": priority,
                                              "stream": True})

    def embeddings(self, priority: int) -> tuple[Any, str]:
        return self._post("/v1/embeddings", {"input": "ab", "priority": priority})

    def websocket(self, priority: int) -> tuple[Any, str]:
        with connect(self._url.replace("http", "ws") + "/v1/stream", proxy=None,
                     additional_headers={"x-api-key": self._secret}) as socket:
            socket.send(json.dumps({"type": "start", "id": "a", "prompt": "ab", "max_tokens": 1, "priority": priority}))
            while (told := json.loads(socket.recv(timeout=10)))["type"] == "delta":
                pass
            return self._error(told["status"], told["error"]) if told["type"] == "error" else (None, "")

    def _post(self, path: str, body: dict[str, Any]) -> tuple[Any, str]:
        answer = self._web.post(path, json=body)
        return (None, "") if answer.status_code == 200 else self._error(answer.status_code, answer.json()["error"])

    @staticmethod
    def _error(status: int, error: dict[str, Any]) -> tuple[Any, str]:
        assert (error["param"], error["code"], error["type"]) == ("priority", "invalid_value", "invalid_request_error")
        return status, error["message"]

    @staticmethod
    def _told(call: Callable[[], Any]) -> tuple[Any, str]:
        try:
            call()
        except RequestFailed as error:
            return error.code, str(error).split(": ", 1)[-1]
        return None, ""


GRPC = (Doors.generate, Doors.decode, Doors.embed, Doors.session)
HTTP = (Doors.completions, Doors.completions_stream, Doors.embeddings, Doors.websocket)


@pytest.fixture(scope="module", params=LIMITS)
def doors(request, tmp_path_factory):
    keyring = Keyring(tmp_path_factory.mktemp("access"))
    parts = Parts(ServerOptions(http_port=0, response_cache_entries=0))
    parts.guard = keyring.guard()
    role = request.param
    with running_server(parts=parts) as server, Doors(server, role, keyring.add(role)).open() as doors:
        yield doors
    parts.close()


@pytest.mark.parametrize("door", [*GRPC, *HTTP], ids=lambda door: door.__name__)
def test_a_role_has_its_limits_at_every_door(doors, door):
    most = LIMITS[doors.role]
    for good in (MIN_PRIORITY, -1, 0, most):
        assert door(doors, good) == (None, "")
        assert doors.service.submitted[-1][2] == good
    count = len(doors.service.submitted)
    for wrong in (most + 1, 2**31 - 1, MIN_PRIORITY - 1, -(2**31)):
        status, said = door(doors, wrong)
        assert status == (grpc.StatusCode.INVALID_ARGUMENT if door in GRPC else 400)
        assert said == f"priority={wrong} must lie between -1000 and {most} for the role {doors.role!r}"
    assert len(doors.service.submitted) == count


def test_only_who_runs_the_server_may_push_in_front():
    assert {role: max_priority(role) for role in ROLES} == LIMITS | {"read-only": 0}
    assert Identity().role == "admin"  # without keys: whoever reaches the server is at its machine
