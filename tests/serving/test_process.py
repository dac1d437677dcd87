"""The server as a process: signals, ports and exit statuses."""

from __future__ import annotations

import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

import serving
from llm_jax.errors import UserError
from serving.client import Client, RequestFailed
from serving.server import check_port

ROOT = pathlib.Path(serving.__file__).parent.parent
PROGRAM = """
import sys
from serving.server import serve
from tests.serving.doubles import FakeService
service = FakeService()
status = serve(service, port=int(sys.argv[1]), grace_seconds=float(sys.argv[2]),
               on_event=lambda line: print(line, flush=True))
assert service.closed
sys.exit(status)
"""


@pytest.fixture
def start():
    """Starts a server process with that grace period; gives the process and its address once it is ready."""
    started = []

    def run(grace_seconds: float) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, "0", str(grace_seconds)], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        word, address = process.stdout.readline().split()
        assert word == "ready:"
        return process, address

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_exits_with_0(start, number):
    process, address = start(30)
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
    ("no.such.host.invalid", 9000, "can't listen on 'no.such.host.invalid'"),
])
def test_addresses_that_are_not_ours(host, port, said):
    with pytest.raises(UserError, match=said):
        check_port(host, port)


def test_help_is_quick_and_complete():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "experiments/serve.py", "--help"], cwd=ROOT, text=True, capture_output=True,
                          timeout=60, check=False)
    assert time.monotonic() - began < 2
    for flag in ("run_dir", "port", "host", "grace_seconds", "max_rows", "max_queue", "num_pages", "page_size", "chunk",
                 "dtype"):
        assert f"--{flag} " in done.stdout
