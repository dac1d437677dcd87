"""The server: gRPC's two services, health and reflection, and HTTP, from the first bind to a clean exit.

    with asyncio:  server = Server(service); await server.start(); …; await server.stop()
    as a process:  serve(service, port=9000)   # until SIGTERM or Ctrl-C
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llm_jax.errors import UserError
from serving import messages
from serving.asking import MAX_MESSAGE_BYTES
from serving.engine.front import front_of
from serving.inference import Inference
from serving.loading import SIGNALS
from serving.options import ServerOptions
from serving.orchestrator import DecodeSampling, Orchestrator
from serving.parts import Parts
from serving.ports import address, bound, check_port, check_reach
from serving.strangers import BytesChecked

HEALTH_PERIOD_S = 0.5

_OPTIONS = (
    # Without this a second server on the same port would silently share its connections.
    ("grpc.so_reuseport", 0),
    # A client whose machine vanished says no goodbye: find out within 40 s, so that its requests end.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class Server:
    """Every door over one engine; lives in one event loop.

    Args:
      service: a `Front`, or a `llm_jax.inference.service.Service`, ready; the caller closes it after `stop`.
      host: address to listen on; others than loopback only with API keys.
      port: for gRPC; 0 takes a free one.
      decode_sampling: how `Orchestrator.Decode` samples, whose requests don't say.
      options: of the doors; over HTTP only with an `http_port`.
      parts: made from the options already; the caller closes them. Else they are made and closed here.

    Attributes:
      calls: what every door calls.
    """

    def __init__(self, service: Any, *, host: str = "127.0.0.1", port: int = 9000,
                 decode_sampling: DecodeSampling = DecodeSampling(),  # noqa: B008 (frozen)
                 options: ServerOptions = ServerOptions(), parts: Parts | None = None) -> None:  # noqa: B008 (frozen)
        self.front = front_of(service)
        self._parts = parts or Parts(options)
        self._closes_parts = parts is None
        self._options = self._parts.options
        self.calls = self._parts.calls(self.front)
        self._host = host
        self._port = port
        self._http_port = self._options.http_port
        self._decode_sampling = decode_sampling
        self._health = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None
        self._http: Any = None
        self._watcher: asyncio.Task | None = None

    @property
    def address(self) -> str:
        """`host:port` of gRPC as a client would write it; the port is the real one once the server has started."""
        return address(self._host, self._port)

    @property
    def http_address(self) -> str | None:
        """The URL of HTTP, likewise; None without."""
        if self._http_port is None:
            return None
        return f"http{'s' if self._parts.tls else ''}://{address(self._host, self._http_port)}"

    async def start(self) -> None:
        """Listens and answers.

        Raises:
          UserError: a port is in use, or others than this machine could come in without a key.
        """
        check_reach(self._host, self._parts.guard.is_open)
        await self.front.start()
        await self._start_grpc()
        if self._http_port is not None:
            await self._start_http(self._http_port)
        self._watcher = asyncio.create_task(self._watch_health())

    async def _start_grpc(self) -> None:
        check_port(self._host, self._port)
        most = max(MAX_MESSAGE_BYTES, self.calls.max_message_bytes)
        server = grpc.aio.server(interceptors=(BytesChecked(),), options=(
            *_OPTIONS, ("grpc.max_receive_message_length", most)))
        server.add_generic_rpc_handlers((
            Orchestrator(self.calls, self._decode_sampling).handler(),
            Inference(self.calls).handler(),
        ))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (messages.ORCHESTRATOR, messages.INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME), server,
            pool=messages.POOL)
        tls = self._parts.tls
        try:
            port = (server.add_secure_port(self.address, tls.grpc()) if tls
                    else server.add_insecure_port(self.address))
        except RuntimeError:
            port = 0
        if port == 0:
            raise UserError(f"can't listen on {self.address}: the port is in use")
        self._port = port
        await self._publish_health()
        await server.start()
        self._grpc = server

    async def _start_http(self, port: int) -> None:
        from serving.http.app import make_app  # FastAPI takes a second to import
        from serving.http.deps import ModelInfo
        from serving.http.door import HttpDoor

        sockets = bound(self._host, port, "http_port")
        self._http_port = sockets[0].getsockname()[1]
        created = getattr(self.front, "created", None)
        info = ModelInfo.of(self.front, self._options.model_name, tool_format=self._options.tool_format,
                            **({"created": created} if created else {}))
        self._http = HttpDoor(make_app(self.calls, info, state=self._parts.state()), sockets, self._parts.tls,
                              self._options.trusted_proxies)
        await self._http.start()

    async def stop(self, grace_seconds: float = 0.0, hurry: asyncio.Event | None = None) -> bool:
        """Refuses new calls, lets the running ones finish, then stops listening.

        Args:
          grace_seconds: how long running calls may go on; what is left then ends with UNAVAILABLE.
          hurry: ends the grace period when set.

        Returns:
          Whether every call finished by itself.
        """
        self.calls.refuse_new()
        await self._publish_health()
        finished = asyncio.create_task(self.calls.finished(grace_seconds))
        hurried = asyncio.create_task((hurry or asyncio.Event()).wait())
        await asyncio.wait((finished, hurried), return_when=asyncio.FIRST_COMPLETED)
        clean = finished.done() and finished.result()
        finished.cancel()
        hurried.cancel()
        self.calls.cut()
        await self.calls.finished(1.0)
        if self._watcher:
            self._watcher.cancel()
        await asyncio.gather(*(door.stop(*grace) for door, grace in ((self._grpc, (0.5,)), (self._http, ())) if door))
        if self._closes_parts:
            self._parts.close()
        return clean

    async def _publish_health(self) -> None:
        # Once set, an equal status is not sent again to those who watch.
        status = (health_pb2.HealthCheckResponse.SERVING if self.calls.is_live
                  else health_pb2.HealthCheckResponse.NOT_SERVING)
        for name in ("", messages.ORCHESTRATOR, messages.INFERENCE):
            await self._health.set(name, status)

    async def _watch_health(self) -> None:
        """Tells those who watch grpc.health when the engine stops being live on its own."""
        was_live = self.calls.is_live
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            if self.calls.is_live != was_live:
                was_live = not was_live
                await self._publish_health()


def serve(service: Any, *, host: str = "127.0.0.1", port: int = 9000, grace_seconds: float = 30.0,
          decode_sampling: DecodeSampling = DecodeSampling(),  # noqa: B008 (frozen)
          options: ServerOptions = ServerOptions(), parts: Parts | None = None,  # noqa: B008 (frozen)
          on_event: Callable[[str], None] = print, note: str = "") -> int:
    """Serves until SIGTERM or SIGINT, then shuts down in order and closes `service`.

    The first signal starts the grace period; a second one ends it. An engine that is lost ends the server, too.

    Args:
      service: ready to answer; closed here in any case.
      host, port, decode_sampling, options, parts: as for `Server`.
      grace_seconds: how long requests that run at the first signal may go on.
      on_event: gets one line for each thing that happens, the first beginning `ready: `, the address and, where there
        is one, that of HTTP.
      note: put behind the addresses in that line.

    Returns:
      0; 1 if the engine was lost.

    Raises:
      UserError: a port is in use, or others than this machine could come in without a key.
    """
    try:
        server = Server(service, host=host, port=port, decode_sampling=decode_sampling, options=options, parts=parts)
        return asyncio.run(_serve(server, grace_seconds, on_event, note))
    finally:
        service.close()


async def _serve(server: Server, grace_seconds: float, on_event: Callable[[str], None], note: str) -> int:
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    await server.start()
    on_event(" ".join(filter(None, ("ready:", server.address, server.http_address, note))))
    told, lost = asyncio.create_task(first.wait()), asyncio.create_task(server.front.lost())
    await asyncio.wait((told, lost), return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        await server.stop(1.0)  # its calls have ended: their answers are on the way
        on_event(f"stopped: {lost.result()}")
        return 1
    on_event(f"stopping: {server.calls.running} running, up to {grace_seconds:g} s to finish "
             "(signal again to stop at once)")
    clean = await server.stop(grace_seconds, hurry=second)
    if lost.done():
        on_event(f"stopped: {lost.result()}")
        return 1
    lost.cancel()
    on_event("stopped" if clean else "stopped: requests were cut short")
    return 0
