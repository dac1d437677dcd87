"""TLS and mutual TLS over gRPC, HTTP and WebSocket: who gets in, and whose certificate the application is told of."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import ssl
import threading
import types

import grpc
import httpx
import pytest
import trustme
import uvicorn
from cryptography.hazmat.primitives import serialization
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from llm_jax.errors import UserError
from serving.access.tls import Tls, _common_name, grpc_certificate, http_certificate
from serving.client import Client, RequestFailed
from serving.options import ServerOptions
from tests.serving.doubles import running_server, wait_until


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """Paths of PEM files: the server's certificate and key, and the authority's certificate."""
    folder = tmp_path_factory.mktemp("tls")
    server = authority.issue_cert("localhost", "127.0.0.1")
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(folder / "cert.pem"), append=True)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return types.SimpleNamespace(cert=str(folder / "cert.pem"), key=str(folder / "key.pem"), ca=str(folder / "ca.pem"))


def tls_of(files, client_ca=None, **changed) -> Tls | None:
    return Tls.from_options(types.SimpleNamespace(
        **{"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": client_ca, **changed}))


async def application(scope, receive, send):
    """Answers with the name of the client's certificate."""
    name = json.dumps(http_certificate(scope))
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": name})
        await send({"type": "websocket.close"})
    elif scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": name.encode()})


@contextlib.contextmanager
def http_server(tls: Tls):
    """uvicorn over `application`; its port."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="critical", lifespan="off", **tls.uvicorn()))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert wait_until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def grpc_server(tls: Tls):
    """A gRPC server whose method `/who/Am` answers with the name of the client's certificate; its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def who(request, context):
        return json.dumps(grpc_certificate(context)).encode()

    async def start():
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
            "who", {"Am": grpc.unary_unary_rpc_method_handler(who)}),))
        port = server.add_secure_port("127.0.0.1:0", tls.grpc())
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def client_context(authority, certificate=None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if certificate is not None:
        certificate.configure_cert(context)
    return context


def ask_http(port: int, context: ssl.SSLContext, **options):
    with httpx.Client(verify=context, trust_env=False) as client:
        return client.get(f"https://127.0.0.1:{port}/", **options).json()


def ask_websocket(port: int, context: ssl.SSLContext):
    with connect(f"wss://127.0.0.1:{port}/", ssl=context, proxy=None) as socket:
        return json.loads(socket.recv(timeout=10))


def ask_grpc(port: int, authority, certificate=None):
    credentials = grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), certificate and certificate.private_key_pem.bytes(),
        certificate and certificate.cert_chain_pems[0].bytes())
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        return json.loads(channel.unary_unary("/who/Am")(b"", timeout=10))


def test_without_a_certificate_there_is_no_tls():
    assert Tls.from_options(types.SimpleNamespace(tls_cert=None, tls_key=None, tls_client_ca=None)) is None


def test_clients_that_trust_the_authority_are_served_and_others_not(authority, files):
    tls = tls_of(files)
    with http_server(tls) as port:
        context = client_context(authority)
        assert ask_http(port, context) is None and ask_websocket(port, context) is None
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            ask_http(port, ssl.create_default_context())
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)  # nothing is said in plain text
    with grpc_server(tls) as port:
        assert ask_grpc(port, authority) is None
        with pytest.raises(grpc.RpcError):
            ask_grpc(port, trustme.CA())


def test_old_versions_are_refused(authority, files):
    context = client_context(authority)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with http_server(tls_of(files)) as port, pytest.raises(httpx.ConnectError):
        ask_http(port, context)


def test_with_mutual_tls_each_door_knows_the_client_by_its_certificate(authority, files):
    tls = tls_of(files, files.ca)
    worker = authority.issue_cert("worker.example", common_name="工人-1")
    with http_server(tls) as port:
        context = client_context(authority, worker)
        assert ask_http(port, context) == "工人-1" == ask_websocket(port, context)
    with grpc_server(tls) as port:
        assert ask_grpc(port, authority, worker) == "工人-1"


@pytest.mark.parametrize("kind", ["none", "of another authority"])
def test_with_mutual_tls_nobody_else_gets_in(authority, files, kind):
    tls = tls_of(files, files.ca)
    certificate = None if kind == "none" else trustme.CA().issue_cert("worker.example", common_name="admin")
    context = client_context(authority, certificate)
    with http_server(tls) as port:
        with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
            ask_http(port, context)
        with pytest.raises((OSError, WebSocketException)):
            ask_websocket(port, context)
    with grpc_server(tls) as port, pytest.raises(grpc.RpcError):
        ask_grpc(port, authority, certificate)


def test_no_header_makes_a_certificate(authority, files):
    with http_server(tls_of(files)) as port:
        headers = {name: "admin" for name in ("client_certificate", "x-client-cert", "ssl-client-cn", "state")}
        assert ask_http(port, client_context(authority), headers=headers) is None


def test_a_certificate_of_two_names_is_nobody_s():
    assert _common_name({"subject": ((("commonName", "a"),), (("commonName", "b"),))}) is None
    assert _common_name({"subject": ((("organizationName", "x"),), (("commonName", "a"),))}) == "a"
    assert _common_name({}) is None and _common_name(None) is None


def test_files_that_are_wrong_are_told_at_the_start(authority, files, tmp_path):
    other = authority.issue_cert("localhost")
    other.private_key_pem.write_to_path(str(tmp_path / "other.pem"))
    (tmp_path / "nonsense.pem").write_text("nonsense")
    key = serialization.load_pem_private_key(pathlib.Path(files.key).read_bytes(), None)
    (tmp_path / "locked.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret")))
    for changed, said in (
        ({"tls_cert": str(tmp_path / "none.pem")}, "can't read tls_cert"),
        ({"tls_key": str(tmp_path / "other.pem")}, "and its private key"),
        ({"tls_key": str(tmp_path / "locked.pem")}, "without a password"),
        ({"tls_cert": str(tmp_path / "nonsense.pem")}, "as PEM"),
        ({"tls_client_ca": str(tmp_path / "nonsense.pem")}, "tls_client_ca .* must hold certificates"),
    ):
        with pytest.raises(UserError, match=said):
            tls_of(files, **changed)


def test_files_may_lie_in_the_home_folder(files, monkeypatch):
    monkeypatch.setenv("HOME", str(pathlib.Path(files.cert).parent))
    assert tls_of(files, tls_cert="~/cert.pem", tls_key="~/key.pem", client_ca="~/ca.pem").client_authorities


def test_the_private_key_is_in_no_repr(files):
    assert "PRIVATE" not in repr(tls_of(files))


def test_a_whole_server_over_mutual_tls(authority, files, keyring):
    """gRPC, HTTP and its metrics, with a certificate in place of a key, and with a key beside it."""
    keyring.add("developer", certificate="工人-1", tenant="网站")
    secret = keyring.add("read-only")
    worker = authority.issue_cert("worker.example", common_name="工人-1")
    stranger = authority.issue_cert("stranger.example", common_name="stranger")
    with worker.private_key_pem.tempfile() as key, worker.cert_chain_pems[0].tempfile() as certificate:
        with running_server(options=ServerOptions(
                http_port=0, keys_file=str(keyring.path), audit_file=str(keyring.audit_path), tls_cert=files.cert,
                tls_key=files.key, tls_client_ca=files.ca)) as server:
            with Client(server.address, tls_ca=files.ca, tls_cert=certificate, tls_key=key) as client:
                assert "".join(chunk.text for chunk in client.generate("你好", max_tokens=2)) == "你好"
            with Client(server.address, api_key=secret, tls_ca=files.ca, tls_cert=certificate, tls_key=key) as client:
                assert client.model().max_context
                with pytest.raises(RequestFailed, match="'read-only' may not do this"):
                    list(client.generate("你好", max_tokens=2))
            url = server.server.http_address
            assert url.startswith("https://")
            with httpx.Client(base_url=url, verify=client_context(authority, worker), trust_env=False) as http:
                body = {"prompt": "你好", "max_tokens": 2}
                assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "你好"
                assert "llm_jax_" in http.get("/metrics").text
            with httpx.Client(base_url=url, verify=client_context(authority, stranger), trust_env=False) as http:
                assert http.post("/v1/completions", json=body).status_code == 401
    assert [(line["status"], line["key_id"], line["tenant"]) for line in keyring.audited()
            if line["interface"] == "http" and "completions" in line["method"]] == [
        ("ok", "key-0", "网站"), ("unauthenticated", "", "")]
