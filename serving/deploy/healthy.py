"""Whether the server of this container answers, wherever its flags have it listen: for the image's HEALTHCHECK.

    python -m serving.deploy.healthy        exit status 0 if it does; else 1, and a line that says why not

With `--http_port` it is /healthz, over TLS with `--tls_cert`, and with `--tls_client_ca` the handshake, for which no
certificate is at hand; without, whether the gRPC port takes connections. Flags are read from the server's own command
line in /proc (those in a Gin file are not seen). Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence

TIMEOUT_S = 2.0
_SERVER = ("experiments.serve", "experiments/serve.py")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}  # noqa: S104 - what a server is told


class Unhealthy(Exception):
    """Why the server does not answer."""


def flags(proc: pathlib.Path = pathlib.Path("/proc")) -> list[str]:
    """The flags of the server that runs.

    Raises:
      Unhealthy: none does.
    """
    for process in sorted(proc.glob("[0-9]*/cmdline"), key=lambda path: int(path.parent.name)):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = process.read_text(errors="replace").rstrip("\0").split("\0")
            for i, word in enumerate(words):
                if word.endswith(_SERVER) and "python" in pathlib.PurePath(words[0]).name:
                    return words[i + 1:]
    raise Unhealthy("no server runs")


def check(given: Sequence[str]) -> None:
    """Asks a server that was started with these flags.

    Raises:
      Unhealthy: it does not answer as it should.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--http_port", type=int)
    parser.add_argument("--tls_cert")
    parser.add_argument("--tls_client_ca")
    known, _ = parser.parse_known_args(given)
    host = _EVERYWHERE.get(known.host, known.host).strip("[]")
    port = known.port if known.http_port is None else known.http_port
    try:
        with _connected(host, port, bool(known.tls_cert) and known.http_port is not None) as connection:
            if known.http_port is None or known.tls_client_ca:
                return  # without a client's certificate nothing but the handshake is answered
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            status = connection.recv(64).split(b"\r\n")[0].decode(errors="replace")
    except OSError as error:
        raise Unhealthy(f"{host}:{port} does not answer: {error.strerror or error}") from None
    if " 200 " not in f"{status} ":
        raise Unhealthy(f"{host}:{port} answers /healthz with {status!r}")


@contextlib.contextmanager
def _connected(host: str, port: int, tls: bool) -> Iterator[socket.socket]:
    with socket.create_connection((host, port), TIMEOUT_S) as connection:
        if not tls:
            yield connection
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # this machine's own port, by its number
        with context.wrap_socket(connection) as wrapped:
            yield wrapped


def main() -> int:
    """The command."""
    try:
        check(flags())
    except Unhealthy as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
