"""The gRPC server: both services, health and reflection, from the first bind to a clean exit.

    with asyncio:  server = Server(service); await server.start(); …; await server.stop()
    as a process:  serve(service, port=9000)   # until SIGTERM or Ctrl-C
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llm_jax.errors import UserError
from serving import messages
from serving.calls import MAX_MESSAGE_BYTES, Calls
from serving.inference import Inference
from serving.orchestrator import DecodeSampling, Orchestrator
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


def check_port(host: str, port: int) -> None:
    """Fails at once if `host`:`port` can't be listened on, before a model is loaded for nothing.

    Raises:
      UserError: the port is in use, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} is not between 0 and 65535")
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"can't listen on {host!r}: {error.strerror or error}") from None
    for family, kind, protocol, _, address in addresses[:1] if port == 0 else addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise UserError(f"can't listen on {_address(host, port)}: {error.strerror}; choose another --port "
                                "(0 takes a free one)") from None


def _address(host: str, port: int) -> str:
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


class Server:
    """One gRPC server over one `Service`; lives in one event loop.

    Args:
      service: `llm_jax.inference.service.Service`, ready; the caller closes it after `stop`.
      host: address to listen on; loopback unless told otherwise, because nothing here asks who is calling.
      port: 0 takes a free one.
      decode_sampling: how `Orchestrator.Decode` samples, whose requests don't say.
    """

    def __init__(self, service, *, host: str = "127.0.0.1", port: int = 9000,
                 decode_sampling: DecodeSampling = DecodeSampling()) -> None:  # noqa: B008 (frozen)
        self.calls = Calls(service)
        self._host = host
        self._port = port
        self._decode_sampling = decode_sampling
        self._health = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None
        self._watcher: asyncio.Task | None = None

    @property
    def address(self) -> str:
        """`host:port` as a client would write it; the port is the real one once the server has started."""
        return _address(self._host, self._port)

    async def start(self) -> None:
        """Listens and answers.

        Raises:
          UserError: the port is in use.
        """
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
        try:
            port = server.add_insecure_port(self.address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise UserError(f"can't listen on {self.address}: the port is in use")
        self._port = port
        await self._publish_health()
        await server.start()
        self._grpc = server
        self._watcher = asyncio.create_task(self._watch_health())

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
        if self._grpc:
            await self._grpc.stop(grace=0.5)
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


def serve(service, *, host: str = "127.0.0.1", port: int = 9000, grace_seconds: float = 30.0,
          decode_sampling: DecodeSampling = DecodeSampling(),  # noqa: B008 (frozen)
          on_event: Callable[[str], None] = print, note: str = "") -> int:
    """Serves until SIGTERM or SIGINT, then shuts down in order and closes `service`.

    The first signal starts the grace period; a second one ends it.

    Args:
      service: ready to answer; closed here in any case.
      host, port, decode_sampling: as for `Server`.
      grace_seconds: how long requests that run at the first signal may go on.
      on_event: gets one line for each thing that happens, the first beginning `ready: ` and the address.
      note: put behind the address in that line.

    Returns:
      0.

    Raises:
      UserError: the port is in use.
    """
    try:
        return asyncio.run(_serve(Server(service, host=host, port=port, decode_sampling=decode_sampling),
                                  grace_seconds, on_event, note))
    finally:
        service.close()


async def _serve(server: Server, grace_seconds: float, on_event: Callable[[str], None], note: str) -> int:
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await server.start()
    on_event(f"ready: {server.address}{' ' + note if note else ''}")
    await first.wait()
    on_event(f"stopping: {server.calls.running} running, up to {grace_seconds:g} s to finish "
             "(signal again to stop at once)")
    clean = await server.stop(grace_seconds, hurry=second)
    on_event("stopped" if clean else "stopped: requests were cut short")
    return 0
