"""The client as a command."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import grpc
import pytest
import trustme

import serving
from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint, QueueFull, SamplingParams
from serving import client
from serving.client_command import API_KEY
from serving.options import ServerOptions
from tests.serving.access.keyring import Keyring
from tests.serving.doubles import Left, running_server

ROOT = pathlib.Path(serving.__file__).parent.parent


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


def _run(*args: str, stdin: bytes = b"", env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "serving.client", *args], cwd=ROOT, input=stdin, capture_output=True,
                          env=env, timeout=60, check=False)


def test_streams_text_then_one_line_of_numbers(server):
    # A terminal without a Unicode locale must not break Chinese either.
    done = _run(f"--address={server.address}", "--prompt=你好", "--max_tokens=5", "--temperature=0",
                env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "你好你好你\n"
    line, = done.stderr.decode().splitlines()
    assert line.startswith("[length; 5 tokens; first after ") and line.endswith(" tokens/s]")


def test_json_is_one_object(server):
    done = _run(f"--address={server.address}", "--prompt=-", "--max_tokens=4", "--json", stdin="é\n".encode())
    answer = json.loads(done.stdout)
    assert answer.pop("time_to_first_token_s") > 0 and answer.pop("tokens_per_second") > 0
    assert answer == {"text": "é\né\n", "token_ids": [236, 13, 236, 13], "logprobs": [-0.5] * 4,
                      "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 2}
    assert done.stderr == b""


def test_jetstream_flag(server, capfd):
    assert client.main([f"--address={server.address}", "--prompt=ab", "--max_tokens=4", "--jetstream"]) == 0
    out, err = capfd.readouterr()
    assert out == "abab\n" and err.startswith("[end of stream; 4 tokens;")
    assert client.main([f"--address={server.address}", "--prompt=ab", "--jetstream", "--top_k=5"]) == 2
    assert "no field for --top_k" in capfd.readouterr().err


def test_every_flag_arrives(server, tmp_path, capfd):
    (tmp_path / "schema").write_text('{"enum": ["你"]}', encoding="utf-8")
    service = server.service
    before = len(service.submitted), len(service.terms)
    assert client.main([
        f"--address={server.address}", "--prompt=ab", "--max_tokens=2", "--temperature=0.5", "--top_k=3", "--top_p=0.9",
        "--min_p=0.1", "--repetition_penalty=1.2", "--presence_penalty=0.3", "--frequency_penalty=0.4", "--seed=5",
        "--stop=x", "--stop_id=7", "--stop_id=8", "--logit_bias=9=-2.5", "--min_tokens=1", "--ignore_eos",
        "--top_logprobs=2", "--prompt_logprobs=1", f"--json_schema={tmp_path / 'schema'}", "--num_samples=2",
        "--best_of=3", "--priority=4", "--tenant=me", "--deadline_seconds=60", "--json"]) == 0
    expected = SamplingParams(
        max_tokens=2, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, seed=5, stop=("x",), stop_ids=(7, 8), logit_bias=((9, -2.5),), min_tokens=1,
        ignore_eos=True, logprobs=2, prompt_logprobs=1, constraint=Constraint("json_schema", '{"enum": ["你"]}'))
    assert service.submitted[before[0]:][0][1:] == (expected, 4) and len(service.submitted) - before[0] == 3
    assert service.terms[before[1]:] == [("me", Left(60.0))]
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [a["text"] for a in answers] == ["ab", "ab"]
    assert answers[0]["top_logprobs"] == [[[0, 0.0], [1, -1.0]]] * 2
    assert answers[0]["prompt_logprobs"][1] == {"token_id": 2, "logprob": -0.5, "top": [[0, 0.0]]}
    assert client.main([f"--address={server.address}", "--prompt=ab", "--max_tokens=3", "--num_samples=2"]) == 0
    out, err = capfd.readouterr()
    assert out == "--- 1 of 2\naba\n--- 2 of 2\naba\n" and err.startswith("[length; 6 tokens;")


def test_embeddings_are_a_line_each(server, capfd):
    assert client.main([f"--address={server.address}", "--prompt=ab", "--prompt=c", "--embed=mean"]) == 0
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [
        {"embedding": [1.0, 100.0, 101.0]}, {"embedding": [1.0, 102.0]}]


@pytest.mark.parametrize(("args", "said"), [
    (["--prompt=x", "--prompt=y"], "one --prompt at a time"),
    (["--prompt=x", "--regex=a", "--grammar=b"], "exclude each other"),
    (["--prompt=x", "--grammar=/nowhere"], "cannot read /nowhere"),
    (["--prompt=x", "--logit_bias=5"], "--logit_bias must be ID=AMOUNT"),
    (["--prompt=x", "--logit_bias=5=1000"], "logit_bias must be"),
    (["--address=127.0.0.1:1", "--prompt=x"], "error: no server at 127.0.0.1:1"),
    (["--prompt=x", "--temperature=-1"], "temperature must be"),
    (["--prompt=x", "--seed=-1"], "can't be sent"),
    (["--prompt=x", "--max_tokens=9000", "--timeout=0.2"], "DEADLINE_EXCEEDED"),
])
def test_errors_are_one_line(server, args, said, monkeypatch, capfd):
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.3)
    assert client.main([f"--address={server.address}", *args]) == 2
    line, = capfd.readouterr().err.splitlines()
    assert said in line


def test_standard_input_that_is_not_utf8(server):
    done = _run(f"--address={server.address}", "--prompt=-", stdin=b"ab\xff")
    assert (done.returncode, done.stderr) == (2, b"error: standard input is not UTF-8 (byte 2)\n")


def test_a_reader_that_closes_the_pipe_is_no_error(server):
    command = f"{sys.executable} -m serving.client --address={server.address} --prompt=ab --max_tokens=3000 | head -c 3"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, timeout=60,
                          check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"aba", b"")


def test_the_client_needs_no_jax():
    program = "import sys, serving.client; assert not {'jax', 'flax', 'numpy'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_key_comes_from_the_environment_and_is_never_told(tmp_path, monkeypatch, capfd):
    keyring = Keyring(tmp_path)
    good, lesser = keyring.add("user"), keyring.add("read-only")
    with running_server(options=ServerOptions(keys_file=str(keyring.path))) as running:
        command = [f"--address={running.address}", "--prompt=ab", "--max_tokens=2"]
        monkeypatch.delenv(API_KEY, raising=False)
        assert client.main(command) == 2
        assert "UNAUTHENTICATED: an API key is needed" in capfd.readouterr().err
        monkeypatch.setenv(API_KEY, lesser)
        assert client.main(command) == 2
        err = capfd.readouterr().err
        assert "PERMISSION_DENIED" in err and lesser not in err
        monkeypatch.setenv(API_KEY, good)
        assert client.main(command) == 0
        out, err = capfd.readouterr()
        assert out == "ab\n" and good not in err
        with client.Client(running.address, api_key=good) as connection:
            assert "".join(c.text for c in connection.generate("你好", max_tokens=2)) == "你好"
            assert connection.embed(["a"]) and connection.model().max_context
            with connection.session() as session:
                assert "".join(c.text for c in session.start("你好", max_tokens=2)) == "你好"
            with pytest.raises(client.RequestFailed) as caught:
                list(connection.generate("ab", top_p=2.0))
            assert caught.value.request_id.startswith("req-")
        for key in ("", " x", "你", "a\nb"):
            with pytest.raises(UserError, match="the API key must be"):
                client.Client(running.address, api_key=key)


def test_tls_and_a_certificate_instead_of_a_key(tmp_path, capfd):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, issued in (("server", authority.issue_cert("127.0.0.1")),
                         ("client", authority.issue_cert("who@example.org", common_name="网站"))):
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        (tmp_path / f"{name}.pem").write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))
    keyring = Keyring(tmp_path)
    keyring.add("user", certificate="网站", tenant="甲")
    options = ServerOptions(keys_file=str(keyring.path), tls_cert=str(tmp_path / "server.pem"),
                            tls_key=str(tmp_path / "server.key"), tls_client_ca=str(tmp_path / "ca.pem"))
    with running_server(options=options) as running:
        command = [f"--address={running.address}", "--prompt=ab", "--max_tokens=2"]
        assert client.main([*command, f"--tls_ca={tmp_path}/ca.pem", f"--tls_cert={tmp_path}/client.pem",
                            f"--tls_key={tmp_path}/client.key"]) == 0
        assert capfd.readouterr().out == "ab\n" and running.service.terms == [("甲", None)]
        with pytest.raises(UserError, match="no server at .* with TLS .* an authority that this system trusts"):
            client.Client(running.address, tls=True, connect_timeout_s=0.5)
        with pytest.raises(UserError, match="no server at .* without TLS"):
            client.Client(running.address, connect_timeout_s=0.5)
    assert client.main([*command, "--tls_ca=/nowhere"]) == 2
    assert "cannot read /nowhere" in capfd.readouterr().err


def test_each_call_has_an_id_and_says_when_to_come_back(server):
    method = "/llm_jax.serving.v1.Inference/Generate"
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(method)(b"", metadata=[("x-request-id", "mine-1")], timeout=10)
        assert dict(call.initial_metadata())["x-request-id"] == "mine-1"
        call = channel.unary_stream(method)(b"", metadata=[("x-request-id", "not a good id")], timeout=10)
        assert dict(call.initial_metadata())["x-request-id"].startswith("req-")
        assert call.code() == grpc.StatusCode.INVALID_ARGUMENT and not call.trailing_metadata()
        server.service.faults["voll"] = QueueFull("too many requests are waiting")
        request = client.generate_request("voll", {})
        call = channel.unary_stream(method, type(request).SerializeToString)(request, timeout=10)
        assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(call.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
