"""Several instances of the server behind nginx, on this machine's loopback, as serving/deploy configures them."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import serving
from serving.deploy import swap

DEPLOY = pathlib.Path(serving.__file__).parent / "deploy"
ROOT = DEPLOY.parents[1]
READY_S = 120.0
# Of conversations and tools, for a model whose training has seen neither: short, as its context is.
TEMPLATE = ("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
            "{% if tools %}{{ tools | length }} <tool_call>{% endif %}assistant: ")
Command = Callable[[int, int, int], Sequence[str]]  # instance number, gRPC port, HTTP port


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Fleet:
    """Instances behind nginx with the configuration of serving/deploy, on this machine's loopback.

    Args:
      folder: empty; receives nginx's configuration and everyone's logs.
      command: how an instance is started; may be changed before one is started again.
      count: instances.
    """

    def __init__(self, folder: pathlib.Path, command: Command, count: int = 3) -> None:
        self.folder = folder
        self.command = command
        self.http_port, self.grpc_port, *ports = free_ports(2 + 2 * count)
        self._ports = list(zip(ports[:count], ports[count:], strict=True))
        self.processes: list[subprocess.Popen | None] = [None] * count
        self._nginx: dict[str, subprocess.Popen] = {}
        self._logs = contextlib.ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def numbers(self) -> range:
        return range(1, len(self._ports) + 1)

    def http_address(self, n: int) -> str:
        """Of instance n, from 1."""
        return f"127.0.0.1:{self._ports[n - 1][1]}"

    def __enter__(self) -> Fleet:
        try:
            for n in self.numbers:
                self.start(n)
            for n in self.numbers:
                self.wait_ready(n)
            self._start_nginx()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in (*self._nginx.values(), *self.processes):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (*self._nginx.values(), *self.processes):
            if process is not None:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._logs.close()

    def start(self, n: int) -> None:
        """Starts instance n; it is not ready yet."""
        log = self._logs.enter_context((self.folder / f"instance_{n}.log").open("ab"))
        self.processes[n - 1] = subprocess.Popen(self.command(n, *self._ports[n - 1]), cwd=ROOT, stdout=log, stderr=log)

    def wait_ready(self, n: int) -> None:
        """Until instance n takes requests.

        Raises:
          SystemExit: it ended, or took too long.
        """
        deadline = time.monotonic() + READY_S
        while not swap.is_ready(f"http://{self.http_address(n)}/readyz"):
            process = self.processes[n - 1]
            if process is None or process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"instance {n} did not start:\n{(self.folder / f'instance_{n}.log').read_text()}")
            time.sleep(0.05)

    def kill(self, n: int) -> None:
        """SIGKILL."""
        process = self.processes[n - 1]
        assert process is not None
        process.kill()
        process.wait()

    def drain(self, n: int) -> int:
        """SIGTERM, and waits; the exit status."""
        process = self.processes[n - 1]
        assert process is not None
        process.send_signal(signal.SIGTERM)
        return process.wait(60)

    def restart(self, n: int) -> None:
        """Drains instance n and starts it anew; it is not ready yet."""
        self.drain(n)
        self.start(n)

    def reload(self) -> None:
        """Has gRPC's nginx read its list again."""
        self._nginx["grpc"].send_signal(signal.SIGHUP)

    def tries(self, n: int) -> list[tuple[float, str]]:
        """(seconds since the epoch, outcome) of each time that nginx gave an HTTP request to instance n."""
        found = []
        for line in (self.folder / "tries_http.log").read_text().splitlines():
            at, addresses, outcomes, took = line.split("|")
            for address, outcome, seconds in zip(addresses.split(", "), outcomes.split(", "), took.split(", "),
                                                 strict=False):
                if address == self.http_address(n):
                    found.append((float(at) - float(seconds.replace("-", "0") or 0), outcome))
        return found

    def _start_nginx(self) -> None:
        nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
        if nginx is None:
            raise SystemExit("there is no nginx: apt-get install nginx-light")
        temporary = "".join(f"  {name}_temp_path {name};\n" for name in (
            "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        changes = (("listen 8000;", f"listen 127.0.0.1:{self.http_port};"),
                   ("listen 9000 http2;", f"listen 127.0.0.1:{self.grpc_port} http2;"),
                   ("\nhttp {\n", "\nhttp {\n" + temporary))
        tries = "log_format tries '$msec|$upstream_addr|$upstream_status|$upstream_response_time'; access_log {} tries;"
        for door in ("http", "grpc"):
            conf = (DEPLOY / f"nginx_{door}.conf").read_text()
            for old, new in (*changes, ("access_log off;", tries.format(f"tries_{door}.log"))):
                conf = conf.replace(old, new)
            (self.folder / f"nginx_{door}.conf").write_text(conf)
            for path in DEPLOY.glob("instances_*.conf"):
                line = iter(self._ports)
                which = path.name != swap.GRPC_LIST
                (self.folder / path.name).write_text(re.sub(
                    r"server \S+?:\d+", lambda _: f"server 127.0.0.1:{next(line)[which]}", path.read_text()))  # noqa: B023
            log = self._logs.enter_context((self.folder / f"nginx_{door}.log").open("ab"))
            command = [nginx, "-p", f"{self.folder}/", "-c", f"nginx_{door}.conf", "-g", "daemon off;"]
            self._nginx[door] = subprocess.Popen(command, stdout=log, stderr=log)
        for door, port in (("http", self.http_port), ("grpc", self.grpc_port)):
            deadline = time.monotonic() + 10
            while not _listens(port):
                if self._nginx[door].poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"nginx did not start:\n{(self.folder / f'nginx_{door}.log').read_text()}")
                time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def make_run(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """A run directory of a tiny model of random weights, in a process of its own: this one stays without JAX."""
    code = (
        "import sys, pathlib, jax, jax.numpy as jnp\n"
        "from llm_jax import runs\n"
        "from llm_jax.checkpoints import Checkpoints\n"
        "from llm_jax.data.tokenizer_training import train_tokenizer\n"
        "from llm_jax.models import Decoder, ModelConfig, init_params\n"
        "folder, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
        "folder.parent.mkdir(parents=True, exist_ok=True)\n"
        "tokenizer = train_tokenizer(['def main():\\n    return 你好\\n', 'import os, sys\\n'] * 20, 320)\n"
        "tokenizer.save(folder.parent)\n"
        "(folder.parent / 'chat_template.jinja').write_text(sys.argv[3])\n"
        "config = ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=2, embed_dim=64, num_heads=4,\n"
        "                     num_kv_heads=2, head_dim=16, mlp_dim=128, max_context=512)\n"
        "directory = runs.create(folder, config, folder.parent / 'tokenizer.model', '', {})\n"
        "with Checkpoints(directory / runs.CHECKPOINTS) as checkpoints:\n"
        "    params = jax.jit(lambda key: init_params(Decoder(config), key))(jax.random.key(seed))\n"
        "    checkpoints.save(0, {'params': params, 'step': jnp.zeros((), jnp.int32)}, 0, force=True)\n")
    subprocess.run([sys.executable, "-c", code, str(folder), str(seed), TEMPLATE], cwd=ROOT, check=True)
    return folder


def serve_command(run_dir: pathlib.Path, *flags: str) -> Command:
    """`experiments.serve` of a run directory, few rows and shapes: it starts in seconds."""
    return lambda n, port, http_port: [
        sys.executable, "-m", "experiments.serve", f"--run_dir={run_dir}", f"--port={port}", f"--http_port={http_port}",
        "--served_model_name=model", "--max_rows=8", "--prefill_rows=1", "--chunk=32", "--page_size=16",
        "--dtype=float32", "--stats_seconds=0", "--response_cache_entries=0", *flags]
