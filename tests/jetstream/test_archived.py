"""The archived project beside this one: its stubs and load tester against our server, our engine under its server.

`make test-jetstream` has google-jetstream 0.2.2 in a folder of its own; what it pulls in besides, TensorFlow first of
all, is stood for in `absent` as far as it is named. The clients import nothing of this project.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.fleet import free_ports, make_run
from serving.client import Client

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ARCHIVED = ROOT / ".venv-jetstream"
MAX_TOKENS = 24
BOS = 1  # of the tokenizer that `make_run` trains; JetStream puts it in front of token prompts
PROMPTS = [{"text": "def main("}, {"text": "从前有一座山"}, {"token_ids": [5, 6, 7, 8]}, {"text": "import os, sys"},
           {"token_ids": [9] * 40}, {"text": "return " * 20}]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ARCHIVED}{os.pathsep}{HERE / 'absent'}", "JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def running(*command, env=None):
    """A server that says `ready: ` when it is."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        lines = []
        while not (lines and lines[-1].startswith("ready: ")):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        yield
    finally:
        process.kill()
        process.wait()


def ask(address, prompts):
    """What the archived stubs get; they know neither this project nor its packages."""
    done = subprocess.run([sys.executable, HERE / "ask.py", address, str(MAX_TOKENS)], env=environment(), cwd=HERE,
                          input=json.dumps(prompts), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", 0)


@pytest.fixture(scope="module")
def ours(run_dir):
    """The address of this project's server."""
    (port,) = free_ports(1)
    with running("-m", "experiments.serve", f"--run_dir={run_dir}", f"--port={port}", "--max_rows=4",
                 "--prefill_rows=1", "--stats_seconds=0"):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def known(ours):
    """What our own client gets for `PROMPTS`."""
    with Client(ours) as client:
        prompts = [prompt.get("text") or [BOS, *prompt["token_ids"]] for prompt in PROMPTS]
        return [[token for chunk in client.generate(prompt, max_tokens=MAX_TOKENS) for token in chunk.token_ids]
                for prompt in prompts]


def test_its_own_stubs(ours, known):
    found = ask(ours, PROMPTS)
    assert found["is_live"]
    assert [answer["token_ids"] for answer in found["answers"]] == known
    for prompt, answer in zip(PROMPTS, found["answers"], strict=True):
        assert bool(answer["text"]) == ("text" in prompt)
        if "token_ids" in prompt:
            assert answer["first"] == 1  # by which its tools time the first token


def test_its_load_tester(ours, run_dir, tmp_path):
    """As published, over a data set of the kind that it reads; it tokenizes itself."""
    conversations = [{"conversations": [{"from": "human", "value": f"def main{i}(self): 你好"},
                                        {"from": "gpt", "value": "return 你好 " * (i % 5 + 2)}]} for i in range(24)]
    (tmp_path / "data.json").write_text(json.dumps(conversations))
    host, port = ours.split(":")
    done = subprocess.run(
        [sys.executable, ARCHIVED / "benchmarks" / "benchmark_serving.py", f"--server={host}", f"--port={port}",
         f"--tokenizer={run_dir / 'tokenizer.model'}", "--dataset=sharegpt", f"--dataset-path={tmp_path / 'data.json'}",
         "--num-prompts=20", "--max-output-length=12", "--request-rate=20", "--disable-tqdm", "--save-request-outputs",
         f"--request-outputs-file-path={tmp_path / 'out.json'}"],
        env=environment(), cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outputs = json.loads((tmp_path / "out.json").read_text())
    assert len(outputs) == 20 and all(one["success"] for one in outputs), done.stdout
    completed = int(re.search(r"Successful requests: (\d+)", done.stdout)[1])
    assert completed >= 15  # those that are not answered with the end token at once, which it does not count
    assert completed <= int(re.search(r"Total generated tokens: (\d+)", done.stdout)[1]) <= 20 * 12
    assert float(re.search(r"Median TTFT: ([\d.]+) ms", done.stdout)[1]) > 0


def test_our_engine_under_its_server(run_dir, known):
    """More requests than it has slots, at once and again: the tokens of our own server, from slots used before."""
    (port,) = free_ports(1)
    with running("-m", "serving.jetstream_adapter", f"--run_dir={run_dir}", f"--port={port}", "--max_rows=2",
                 env=environment()):
        (listens,) = [one.laddr.ip for one in psutil.net_connections("tcp")
                      if one.status == psutil.CONN_LISTEN and one.laddr.port == port]
        assert listens.removeprefix("::ffff:") == "127.0.0.1"  # it asks for no key
        for _ in range(2):
            found = ask(f"127.0.0.1:{port}", PROMPTS)
            assert [answer["token_ids"] for answer in found["answers"]] == known
            time.sleep(0.1)
    texts = [answer["text"] for prompt, answer in zip(PROMPTS, found["answers"], strict=True) if "text" in prompt]
    assert all(texts)
