"""uvicorn in an event loop that is not its own: it neither takes the signals nor ends the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from llm_jax.errors import UserError
from serving.access.tls import Tls
from serving.http.protocol import BoundedHttp
from serving.http.ws_protocol import BoundedWebSocket

END_S = 2  # for answers that are still being sent when everything is over
KEEP_ALIVE_S = 75  # longer than a proxy keeps a connection that it may use again (nginx: 60)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpDoor:
    """An ASGI application on sockets of its own.

    Args:
      app: the application.
      sockets: bound, not listening yet; closed by `stop`.
      tls: None speaks plain text.
      trusted_proxies: addresses and networks of those whose `X-Forwarded-For` and `-Proto` are believed; nobody else's
        are, this machine's own included.
    """

    def __init__(self, app: Any, sockets: list[socket.socket], tls: Tls | None = None,
                 trusted_proxies: Sequence[str] = ()) -> None:
        self._sockets = sockets
        self._server = _Server(uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=END_S,
            # Without a list of its own uvicorn would ask the environment, and else believe everything on loopback.
            ws=BoundedWebSocket, proxy_headers=bool(trusted_proxies), forwarded_allow_ips=list(trusted_proxies),
            **(tls.uvicorn() if tls else {"http": BoundedHttp})))
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens; returns when requests are answered.

        Raises:
          UserError: the application does not start.
        """
        self._task = asyncio.create_task(self._run())
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise UserError("the HTTP server ended while it started")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Ends the connections: idle ones at once, others when their answer is sent or `END_S` have passed."""
        if self._task is not None:
            self._server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        try:
            await self._server.serve(self._sockets)
        except SystemExit as error:  # uvicorn's way to say that the application did not start
            raise UserError("the HTTP server could not start; what it said is above") from error
        finally:
            for one in self._sockets:
                one.close()
