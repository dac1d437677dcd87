"""The server in one event loop: both doors on their ports, and what is left when it stops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pathlib
import socket
import threading

import httpx
import pytest

from llm_jax.errors import UserError
from serving.client import Client
from serving.http.door import HttpDoor
from serving.options import ServerOptions
from serving.parts import Parts
from serving.ports import bound
from serving.server import Server
from tests.serving.doubles import FakeService, running_server, wait_until


def test_both_doors_give_the_same_text():
    with running_server(options=ServerOptions(http_port=0, model_name="小模型")) as running:
        with Client(running.address) as client:
            text = "".join(chunk.text for chunk in client.generate("你好", max_tokens=9))
        with httpx.Client(base_url=running.server.http_address) as web:
            answer = web.post("/v1/completions", json={"model": "小模型", "prompt": "你好", "max_tokens": 9}).json()
            assert web.get("/healthz").status_code == web.get("/readyz").status_code == 200
    assert text == answer["choices"][0]["text"] == "你好你好你好你好你"


class Held(FakeService):
    """Answers nobody before its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def _start(self, prompt_ids, params, answers, listeners, priority) -> list[int]:
        return super()._start(prompt_ids, params, [self._held(one) for one in answers], listeners, priority)

    def _held(self, answer):
        self.gate.wait(60)
        yield from answer


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", {"prompt": ["ab"] * 130, "max_tokens": 20}), ("/v1/embeddings", {"input": ["ab"] * 130})])
def test_stopping_lets_a_request_of_several_parts_finish(path, body):
    """More than the engine takes at once: its later parts are asked for when the server drains already."""
    with running_server(Held(), options=ServerOptions(http_port=0)) as running, \
            httpx.Client(base_url=running.server.http_address, timeout=60, verify=False) as web, \
            concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(web.post, path, json=body)
        assert wait_until(lambda: running.service.submitted)
        stopping = running.start_stopping(60)
        assert wait_until(lambda: not running.server.calls.accepting)
        refused = httpx.post(f"{running.server.http_address}{path}", json=body, verify=False)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        running.service.gate.set()
        answer = asked.result()
        assert answer.status_code == 200 and len(answer.json().get("choices") or answer.json()["data"]) == 130
        assert stopping.result(timeout=10) is True and not running.service.is_live


def test_two_requests_for_all_the_queues_places_are_not_refused_midway():
    with running_server(Held(), options=ServerOptions(http_port=0)) as running, \
            concurrent.futures.ThreadPoolExecutor(2) as pool:
        def ask(count: int) -> httpx.Response:
            return httpx.post(f"{running.server.http_address}/v1/completions", timeout=60, verify=False,
                              json={"prompt": ["ab"] * count, "max_tokens": 30})

        first = pool.submit(ask, 63)
        assert wait_until(lambda: len(running.service.submitted) == 63)
        second = pool.submit(ask, 64)
        assert wait_until(lambda: len(running.service.submitted) >= 64)
        refused = ask(3)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        running.service.gate.set()
        assert [len(one.result().json()["choices"]) for one in (first, second)] == [63, 64]
        assert len(running.service.submitted) == 127 and not running.service.cancelled


def test_without_a_port_there_is_no_http(server):
    assert server.server.http_address is None


def test_http_has_a_port_of_its_own():
    async def run(port):
        server = Server(FakeService(), port=0, options=ServerOptions(http_port=port))
        try:
            with pytest.raises(UserError, match=f"127.0.0.1:{port}.*in use.*--http_port"):
                await server.start()
        finally:
            await server.stop()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(run(taken.getsockname()[1]))


def test_every_address_of_a_host_gets_the_same_port():
    sockets = bound("localhost", 0)
    assert len({one.getsockname()[1] for one in sockets}) == 1
    for one in sockets:
        one.close()


def test_an_open_server_starts_for_this_machine_alone():
    async def run():
        server = Server(FakeService(), host="0.0.0.0", port=0)
        with pytest.raises(UserError, match="no API keys are set"):
            await server.start()

    asyncio.run(run())


def test_state_without_a_folder_is_forgotten(tmp_path):
    parts = Parts(ServerOptions(http_port=0))
    folder = parts.state().path
    assert folder.is_dir() and parts.state().path == folder
    parts.close()
    assert not folder.exists()
    parts = Parts(ServerOptions(http_port=0, state_dir=str(tmp_path / "state")))
    assert parts.state().path == tmp_path / "state"
    parts.close()
    assert pathlib.Path(tmp_path / "state").is_dir()


def test_an_application_that_does_not_start_ends_nothing_else():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    async def run():
        sockets = bound("127.0.0.1", 0)
        with pytest.raises(UserError, match="could not start"):
            await HttpDoor(app, sockets).start()
        assert sockets[0].fileno() == -1

    asyncio.run(run())


@pytest.mark.parametrize(("fields", "said"), [
    ({"model_name": ""}, "model_name"), ({"http_port": -1}, "http_port=-1"), ({"tls_key": "k"}, "go together"),
    ({"tls_client_ca": "ca"}, "needs tls_cert"), ({"response_cache_entries": -1}, "response_cache_entries=-1"),
    ({"response_cache_seconds": 0.0}, "response_cache_seconds=0.0"), ({"log_format": "xml"}, "text, json"),
])
def test_options_out_of_range_are_named(fields, said):
    with pytest.raises(UserError, match=said):
        ServerOptions(**fields)
