"""The server as a process: signals, ports and exit statuses."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

import serving
from experiments import serve
from llm_jax.errors import UserError
from serving.client import Client, RequestFailed
from serving.ports import check_port, check_reach

ROOT = pathlib.Path(serving.__file__).parent.parent
PROGRAM = """
import sys
from serving.options import ServerOptions
from serving.server import serve
from tests.serving.doubles import FakeService
options = ServerOptions(http_port=0) if "http" in sys.argv else ServerOptions()
if "apart" in sys.argv:
    from serving.engine.child import EngineProcess
    from serving.engine.process import Spec
    from tests.serving.doubles import CharacterTokenizer
    service = EngineProcess.start(Spec("tests.serving.engine.fakes:make"), CharacterTokenizer())
    print("engine:", service.process.pid, flush=True)
else:
    service = FakeService()
status = serve(service, port=int(sys.argv[1]), grace_seconds=float(sys.argv[2]), options=options,
               on_event=lambda line: print(line, flush=True))
assert service.closed
sys.exit(status)
"""


@pytest.fixture
def start():
    """Starts a server process with that grace period; gives the process and its address once it is ready."""
    started = []

    def run(grace_seconds: float, *how: str) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, "0", str(grace_seconds), *how], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        process.said = []
        while not (line := process.stdout.readline()).startswith("ready: "):
            assert line, process.stderr.read()
            process.said.append(line)
        process.said.append(line)
        return process, line.split()[1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "how"), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, ("apart",))])
def test_a_signal_lets_requests_finish_and_exits_with_0(start, number, how):
    process, address = start(30, *how)
    with Client(address) as client:
        stream = client.generate("ab", max_tokens=2000)
        text = next(stream).text
        process.send_signal(number)
        assert process.stdout.readline() == ("stopping: 1 running, up to 30 s to finish (signal again to stop at once)"
                                             "\n")
        assert not client.health()
        with pytest.raises(RequestFailed, match="UNAVAILABLE: the server is shutting down"):
            list(client.generate("ab", max_tokens=5))
        text += "".join(chunk.text for chunk in stream)
    assert text == "ab" * 1000
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.parametrize(("grace_seconds", "signals"), [(0.3, 1), (60, 2)])
def test_what_does_not_finish_in_time_is_cut(start, grace_seconds, signals):
    process, address = start(grace_seconds)
    with Client(address) as client:
        stream = client.generate("ab", max_tokens=9000)
        next(stream)
        began = time.monotonic()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        with pytest.raises(RequestFailed, match="UNAVAILABLE: the server shut down before"):
            list(stream)
        out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 8
    assert process.returncode == 0 and err == ""
    assert out.endswith("stopped: requests were cut short\n")


def test_a_killed_engine_takes_the_server_with_it(start):
    """Clients are told at once that they may try again, and a launcher by the exit status that it has to."""
    process, address = start(60, "apart", "http")
    engine = int(next(line for line in process.said if line.startswith("engine: ")).split()[1])
    http = process.said[-1].split()[2]
    with Client(address) as client, httpx.Client(base_url=http) as web:
        assert web.get("/readyz").status_code == 200
        stream = client.generate("ab", max_tokens=100_000)
        next(stream)
        began = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(RequestFailed, match="UNAVAILABLE: the engine has ended"):
            list(stream)
        out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 1 and err == ""
    assert out == "stopped: the engine's process was killed by SIGKILL, perhaps for want of memory\n"


def test_a_draining_server_is_alive_and_not_ready(start):
    """Over HTTP: what runs goes on to its end, probes are told, new requests are refused."""
    process, _ = start(30, "apart", "http")
    words = process.said[-1].split()
    assert words[0] == "ready:" and words[2].startswith("http://127.0.0.1:")
    body = {"model": "model", "prompt": "ab", "stream": True}
    with httpx.Client(base_url=words[2]) as web, web.stream("POST", "/v1/completions",
                                                            json=body | {"max_tokens": 3000}) as running:
        lines = running.iter_lines()
        next(lines)
        assert [web.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("stopping: 1 running")
        assert [web.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 503]
        refused = web.post("/v1/completions", json=body)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "stopped\n", "")


def test_an_http_stream_is_cut_when_the_time_is_up(start):
    process, _ = start(0.3, "http")
    with httpx.stream("POST", process.said[-1].split()[2] + "/v1/completions", timeout=20,
                      json={"model": "model", "prompt": "ab", "stream": True, "max_tokens": 9000}) as running:
        lines = running.iter_lines()
        next(lines)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = [line for line in lines if line.startswith("data: ")]
        assert "server shut down before" in said[-1] or "server shut down before" in said[-2]
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 8 and err == ""
    assert process.returncode == 0 and out.endswith("stopped: requests were cut short\n")


def test_an_idle_server_stops_at_once(start):
    process, _ = start(60)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_in_use_is_one_message(family, tmp_path):
    if family == socket.AF_INET6 and not _has_ipv6():
        host = "127.0.0.1"
    else:
        host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        port = taken.getsockname()[1]
        began = time.monotonic()
        done = subprocess.run([sys.executable, "experiments/serve.py", f"--run_dir={tmp_path}", f"--host={host}",
                               f"--port={port}"], cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert line.startswith(f"error: can't listen on {'[::1]' if ':' in host else host}:{port}: Address already in use")
    assert done.stdout == ""
    assert time.monotonic() - began < 5


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_two_servers_never_share_a_port(start):
    _, address = start(1)
    done = subprocess.run([sys.executable, "-c", PROGRAM, address.rpartition(":")[2], "1"], cwd=ROOT, text=True,
                          capture_output=True, timeout=60, check=False)
    assert done.returncode != 0 and "Address already in use" in done.stderr and "ready" not in done.stdout


@pytest.mark.parametrize(("host", "port", "said"), [
    ("127.0.0.1", 70_000, "not between"),
    ("192.0.2.1", 9000, "can't listen on 192.0.2.1:9000: Cannot assign"),
    ("", 9000, "can't listen on ''"),
    ("no.such.host.invalid", 9000, "can't listen on 'no.such.host.invalid'"),
])
def test_addresses_that_are_not_ours(host, port, said):
    with pytest.raises(UserError, match=said):
        check_port(host, port)


@pytest.mark.parametrize(("host", "may"), [
    ("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
    ("0.0.0.0", False), ("::", False), ("192.0.2.1", False),
])
def test_without_keys_only_this_machine_is_let_in(host, may):
    check_reach(host, is_open=False)
    if may:
        check_reach(host, is_open=True)
    else:
        with pytest.raises(UserError, match="no API keys are set"):
            check_reach(host, is_open=True)


@pytest.mark.parametrize(("flags", "said"), [
    (["--host=0.0.0.0"], "no API keys are set"),
    (["--http_port=70000"], "http_port=70000"),
    (["--tls_cert=there.pem"], "tls_cert and tls_key go together"),
    (["--tls_cert=/nowhere.pem", "--tls_key=/nowhere.key"], "can't read tls_cert /nowhere.pem"),
    (["--keys_file=/nowhere.json"], "/nowhere.json"),
    (["--filters=nowhere:filter"], "nowhere"),
    (["--tool_format=smoke"], "tool_format must be one of"),
    (["--log_format=xml"], "log_format must be one of text, json"),
    (["--response_cache_entries=-1"], "response_cache_entries=-1"),
    (["--response_cache_seconds=0"], "response_cache_seconds=0"),
    (["--port=9000", "--http_port=9000"], "both 9000"),
    (["--hf_dir=/elsewhere"], "either run_dir or hf_dir"),
])
def test_what_is_wrong_with_the_doors_is_said_before_anything_is_loaded(flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        serve.main(["--run_dir=/nowhere", "--port=0", *flags])


def test_help_is_quick_and_complete():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "experiments/serve.py", "--help"], cwd=ROOT, text=True, capture_output=True,
                          timeout=60, check=False)
    assert time.monotonic() - began < 2
    for flag in ("run_dir", "port", "host", "grace_seconds", "max_rows", "max_queue", "num_pages", "page_size", "chunk",
                 "dtype"):
        assert f"--{flag} " in done.stdout
