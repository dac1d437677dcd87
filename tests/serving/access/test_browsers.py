"""Pages of other sites can't use a server without keys through its operator's browser."""

from __future__ import annotations

import httpx
import pytest

from serving.access.browsers import foreign_page
from serving.access.guard import Guard
from serving.errors import Reason, Rejected
from serving.options import ServerOptions
from tests.serving.doubles import running_server

OWN = [
    {"host": "127.0.0.1:8000"}, {"host": "[::1]:8000"}, {"host": "localhost"}, {"host": "LOCALHOST:8000"}, {},
    {"host": "10.0.0.7:8000"}, {"host": "engine-1:8000"}, {"host": "llm.localhost:8000"},
    {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"},
    {"host": "localhost:8000", "origin": "http://127.0.0.1:3000"}, {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
    {"host": "engine-1", "origin": "https://engine-1"},
]
FOREIGN = [
    ({"host": "evil.example:8000"}, "evil.example"), ({"host": "evil.example."}, "evil.example"),
    ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, "evil.example"),
    ({"host": "127.0.0.1.evil.example"}, "127.0.0.1.evil.example"),
    ({"host": "127.0.0.1:8000", "origin": "https://evil.example"}, "https://evil.example"),
    ({"host": "127.0.0.1:8000", "origin": "null"}, "null"), ({"host": "127.0.0.1:8000", "origin": ""}, "null"),
    ({"host": "127.0.0.1:8000", "origin": "http://[::1"}, "http://[::1"),
    ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1.evil.example"}, "http://127.0.0.1.evil.example"),
    ({"host": "127.0.0.1:8000", "origin": "http://localhost.evil.example"}, "http://localhost.evil.example"),
    ({"host": "localhost:8000", "origin": "http://127.0.0.1@evil.example"}, "http://127.0.0.1@evil.example"),
]


@pytest.mark.parametrize("headers", OWN)
def test_own_pages_and_what_is_no_browser(headers):
    assert foreign_page(headers) == ""


@pytest.mark.parametrize("headers, page", FOREIGN)
def test_pages_of_others(headers, page):
    assert foreign_page(headers) == page


def test_with_keys_a_page_that_sends_one_may(keyring):
    secret = keyring.add()
    assert keyring.guard().identify(secret, None, "https://chat.example").key_id == "key-0"
    with pytest.raises(Rejected) as refused:
        Guard.open().identify(secret, None, "https://chat.example")
    assert refused.value.reason is Reason.FORBIDDEN and "--keys_file" in refused.value.message


def test_over_http():
    with running_server(options=ServerOptions(http_port=0)) as server:
        url = server.server.http_address
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
            for headers, status in (({}, 200), ({"origin": url}, 200), ({"origin": "https://evil.example"}, 403),
                                    ({"host": "evil.example"}, 403)):
                for path, body in (("/v1/completions", {"prompt": "你好", "max_tokens": 1}),
                                   ("/v1/embeddings", {"input": "你好"})):
                    assert http.post(path, json=body, headers=headers).status_code == status
                assert http.get("/v1/models", headers=headers).status_code == status
                assert http.get("/healthz", headers=headers).status_code == 200
