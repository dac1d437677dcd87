"""Whose word is taken for where a request came from."""

from __future__ import annotations

import httpx
import pytest
from websockets.sync.client import connect

from llm_jax.errors import UserError
from serving.options import ServerOptions
from serving.parts import Parts
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import running_server, wait_until


@pytest.mark.parametrize(("trusted", "sent", "peer"), [
    ((), "203.0.113.9", "127.0.0.1"), (("127.0.0.1",), "203.0.113.9", "203.0.113.9"),
    (("127.0.0.0/8",), "203.0.113.9", "203.0.113.9"), (("10.0.0.1",), "203.0.113.9", "127.0.0.1"),
    (("127.0.0.1",), "1.2.3.4, 203.0.113.9", "203.0.113.9")])  # what the client itself wrote stands further left
def test_a_forwarded_address_is_believed_of_proxies_that_are_named(tmp_path, monkeypatch, trusted, sent, peer):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn's own, which asks nobody
    ring = Keyring(tmp_path)
    parts = Parts(ServerOptions(http_port=0, response_cache_entries=0, trusted_proxies=trusted))
    parts.guard = ring.guard()
    with running_server(parts=parts) as server:
        url, forwarded = server.server.http_address, {"x-forwarded-for": sent, "x-api-key": ring.add()}
        assert httpx.get(f"{url}/v1/models", headers=forwarded).status_code == 200
        connect(f"{url.replace('http', 'ws')}/v1/stream", proxy=None, additional_headers=forwarded).close()
        assert wait_until(lambda: len(ring.audited()) == 2)
        assert {line["peer"] for line in ring.audited()} == {peer}
    parts.close()


@pytest.mark.parametrize("wrong", ["*", "", "proxy.example", "10.0.0.1/8", "127.0.0.1,10.0.0.1"])
def test_proxies_are_addresses_or_networks(wrong):
    with pytest.raises(UserError, match="trusted_proxies must be addresses or networks"):
        ServerOptions(trusted_proxies=(wrong,))
