"""What a server is told when it starts, apart from its model."""

from __future__ import annotations

import dataclasses
import ipaddress

from llm_jax.errors import UserError
from serving import logs


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Settings of the doors; what is None or empty is off.

    Attributes:
      model_name: what the model is called over HTTP and in metrics.
      http_port: port for HTTP and WebSocket; 0 takes a free one.
      keys_file: API keys, as `experiments/keys.py` makes them; without it nobody is asked for one.
      audit_file: receives a JSON line for each request, without its content.
      tls_cert: PEM file of the server's certificate and its chain; with it every port speaks TLS alone.
      tls_key: PEM file of the certificate's private key.
      tls_client_ca: PEM file of the authorities that sign clients' certificates; with it a client must show one.
      state_dir: folder for what survives a restart: files, batches, quotas.
      response_cache_entries: answers of deterministic requests that are kept, at most; 0 keeps none.
      response_cache_seconds: how long each is kept.
      filters: content filters as "module:attribute", in the order in which they are asked.
      interactions_file: receives a JSON line for each interaction, with personal data masked.
      traces: whether spans are sent by OpenTelemetry, to where its own environment variables say.
      log_format: of what the server says of itself, one of `logs.FORMATS`.
      tool_format: how the model writes calls of tools; None finds it out from its chat template.
      trusted_proxies: addresses and networks of proxies whose word is taken, over HTTP, for where a request came from.
    """

    model_name: str = "model"
    http_port: int | None = None
    keys_file: str | None = None
    audit_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    state_dir: str | None = None
    response_cache_entries: int = 1024
    response_cache_seconds: float = 300.0
    filters: tuple[str, ...] = ()
    interactions_file: str | None = None
    traces: bool = False
    log_format: str = "text"
    tool_format: str | None = None
    trusted_proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model_name:
            raise UserError("model_name must not be empty")
        if self.http_port is not None and not 0 <= self.http_port <= 65535:
            raise UserError(f"http_port={self.http_port} is not between 0 and 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UserError("tls_cert and tls_key go together: give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise UserError("tls_client_ca needs tls_cert and tls_key: clients show certificates over TLS alone")
        if self.response_cache_entries < 0:
            raise UserError(f"response_cache_entries={self.response_cache_entries} must be 0 (none) or more")
        if not self.response_cache_seconds > 0:
            raise UserError(f"response_cache_seconds={self.response_cache_seconds} must be more than 0")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise UserError(f"trusted_proxies must be addresses or networks (10.0.0.9, 10.0.0.0/8, ::1), not "
                                f"{proxy!r}") from None
        logs.check_format(self.log_format)
