"""The HTTP door over a double of the engine: uvicorn in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from serving.calls import Calls
from serving.http.app import make_app
from serving.http.deps import ModelInfo
from serving.http.protocol import BoundedHttp
from serving.http.ws_protocol import BoundedWebSocket
from tests.serving.doubles import FakeService, wait_until

MODEL = "双语/model"


class RunningApp:
    """`make_app` served by uvicorn until `stop`.

    Attributes:
      service: the engine's double.
      calls: the pipeline, which lives in the server's loop: `run` reaches it.
      url: `http://127.0.0.1:port`.
    """

    def __init__(self, service: Any, name: str, parts: dict[str, Any], options: dict[str, Any]) -> None:
        self.service = service
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._make(name, parts, options))
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(), self._loop)
        assert wait_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def _make(self, name: str, parts: dict[str, Any], options: dict[str, Any]) -> None:
        self.calls = Calls(self.service, **parts)
        self.app = make_app(self.calls, ModelInfo.of(self.calls.front, name, created=1_700_000_000), **options)
        self._server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning",
                                                     http=BoundedHttp, ws=BoundedWebSocket,
                                                     timeout_graceful_shutdown=1))
        self._server.capture_signals = contextlib.nullcontext

    def run(self, coroutine):
        """Runs a coroutine in the server's loop and gives its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    def stop(self) -> None:
        """Ends the server and its loop."""
        self._server.should_exit = True
        self._serving.result(timeout=30)
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def running_app(service: Any = None, *, name: str = MODEL, options: dict[str, Any] | None = None,
                **parts: Any) -> Iterator[RunningApp]:
    """The app over `service` (a `FakeService` if none is given).

    Args:
      service: the engine's double; closed afterwards.
      name: of the model.
      options: other arguments of `make_app`.
      **parts: of `Calls`: guard, metrics, cache …
    """
    service = service or FakeService()
    running = RunningApp(service, name, parts, options or {})
    try:
        yield running
    finally:
        running.stop()
        service.close()


@pytest.fixture
def app():
    """The app over a `FakeService`."""
    with running_app() as running:
        yield running


@pytest.fixture
def http(app):
    """A plain client of it."""
    with httpx.Client(base_url=app.url, timeout=30, verify=False) as client:  # certificates take long to load
        yield client


@pytest.fixture
def client(app):
    """OpenAI's own client of it."""
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client
