"""TLS and mutual TLS, the same for gRPC and for HTTP: what the servers take, and who the client's certificate names.

The files are read once, at the start: a new certificate needs a restart, which is rolling where there are several
instances.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import grpc

from llm_jax.errors import UserError
from serving.http.protocol import BoundedHttp

if TYPE_CHECKING:
    from serving.options import ServerOptions

_STATE = "client_certificate"  # its place in the ASGI scope's `state`


@dataclasses.dataclass(frozen=True)
class Tls:
    """What the servers show and ask for; no less than TLS 1.2.

    Attributes:
      certificate: the server's, and those that lead to its authority, as PEM.
      key: its private key, as PEM.
      client_authorities: those that sign clients' certificates, as PEM; None asks for none. With them a connection
        without such a certificate fails in its handshake.
    """

    certificate: bytes
    key: bytes = dataclasses.field(repr=False)
    client_authorities: bytes | None
    _context: ssl.SSLContext = dataclasses.field(repr=False, compare=False)

    @staticmethod
    def from_options(options: ServerOptions) -> Tls | None:
        """What the command line asks for; None is plain text.

        Raises:
          UserError: a file can't be read or is wrong, or certificate and key don't belong together.
        """
        if options.tls_cert is None or options.tls_key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        certificate, key = _read(options.tls_cert, "tls_cert"), _read(options.tls_key, "tls_key")
        try:  # without a password of ours, OpenSSL would ask the terminal for one
            context.load_cert_chain(os.path.expanduser(options.tls_cert), os.path.expanduser(options.tls_key),
                                    password=lambda: b"")
        except (ssl.SSLError, ValueError) as error:
            raise UserError(f"tls_cert {options.tls_cert} and tls_key {options.tls_key} must be a certificate and its "
                            f"private key, as PEM without a password: {_told(error)}") from None
        if options.tls_client_ca is None:
            return Tls(certificate, key, None, context)
        authorities = _read(options.tls_client_ca, "tls_client_ca")
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cafile=os.path.expanduser(options.tls_client_ca))
        except ssl.SSLError as error:
            raise UserError(f"tls_client_ca {options.tls_client_ca} must hold certificates as PEM: "
                            f"{_told(error)}") from None
        return Tls(certificate, key, authorities, context)

    def grpc(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        return grpc.ssl_server_credentials([(self.key, self.certificate)], root_certificates=self.client_authorities,
                                           require_client_auth=self.client_authorities is not None)

    def uvicorn(self) -> dict[str, Any]:
        """Settings of `uvicorn.Config`."""
        return {"ssl_context_factory": lambda config, default: self._context, "http": NamingClients}


class NamingClients(BoundedHttp):
    """uvicorn's HTTP, which also tells the application whose certificate the connection showed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Keeps the name with each request's `state`; a WebSocket that the connection becomes inherits it."""
        super().connection_made(transport)
        name = _common_name(transport.get_extra_info("peercert"))
        if name is not None:
            self.app_state = {**self.app_state, _STATE: name}


def http_certificate(scope: Mapping[str, Any]) -> str | None:
    """Common name of the verified certificate behind an HTTP request or a WebSocket; None if there is none.

    Args:
      scope: ASGI's. No header counts: anybody can send one.
    """
    return (scope.get("state") or {}).get(_STATE)


def grpc_certificate(context: grpc.aio.ServicerContext) -> str | None:
    """Common name of the verified certificate behind a gRPC call; None if there is none."""
    found = context.auth_context()
    if [bytes(value) for value in found.get("transport_security_type", ())] != [b"ssl"]:
        return None
    return _only([value.decode("utf-8", "replace") for value in found.get("x509_common_name", ())])


def _common_name(certificate: Mapping[str, Any] | None) -> str | None:
    """Of `SSLSocket.getpeercert`'s form, which is empty unless the certificate was verified."""
    subject = (certificate or {}).get("subject", ())
    return _only([value for parts in subject for name, value in parts if name == "commonName"])


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None  # of several, each server would choose as it likes


def _read(path: str, flag: str) -> bytes:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"can't read {flag} {path}: {error.strerror or error}") from None


def _told(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error) or type(error).__name__
