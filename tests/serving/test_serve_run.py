"""`experiments/serve.py` over a run directory, as a user runs it."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

import serving
from llm_jax import runs
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.models import Decoder, ModelConfig, init_params
from serving.client import Client, RequestFailed

ROOT = pathlib.Path(serving.__file__).parent.parent
SMALL = ("--max_rows=1", "--prefill_rows=1", "--chunk=16", "--page_size=8", "--dtype=float32")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory of a small model of random weights that nobody may write to."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = train_tokenizer(["def main():\n    return 你好\n", "import os, sys\n"] * 20, 320)
    tokenizer.save(folder)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1,
                         head_dim=8, mlp_dim=32, max_context=4096)
    directory = runs.create(folder / "tiny", config, folder / "tokenizer.model", "", {})
    with Checkpoints(directory / runs.CHECKPOINTS) as checkpoints:
        params = jax.jit(lambda key: init_params(Decoder(config), key))(jax.random.key(0))
        checkpoints.save(0, {"params": params, "step": jnp.zeros((), jnp.int32)}, 0, force=True)
    path = pathlib.Path(directory)
    for item in (path, *path.rglob("*")):
        item.chmod(0o555 if item.is_dir() else 0o444)
    yield path
    for item in (path, *path.rglob("*")):
        if item.is_dir():
            item.chmod(0o755)


def _command(run_dir, *flags):
    return [sys.executable, "experiments/serve.py", f"--run_dir={run_dir}", "--port=0", *flags]


def _listing(folder):
    return sorted((str(item), item.stat().st_mtime_ns) for item in folder.rglob("*"))


def test_serves_a_read_only_run_and_stops_in_order(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = _listing(run_dir)
    process = subprocess.Popen(_command(run_dir, "--max_queue=2", "--max_context=4000", *SMALL), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        lines = []
        while not (lines and lines[-1].startswith("ready: ")):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        assert lines[-1].endswith(" s of loading and compiling\n")
        address = lines[-1].split()[1]
        done = subprocess.run([sys.executable, "-m", "serving.client", f"--address={address}", "--prompt=def main(",
                               "--max_tokens=8", "--temperature=0", "--json"], cwd=ROOT, capture_output=True,
                              timeout=60, check=True)
        with Client(address) as client:
            assert client.model().max_context == 4000
            answer = list(client.generate("def main(", max_tokens=8))
            assert json.loads(done.stdout)["token_ids"] == [i for chunk in answer for i in chunk.token_ids]
            long = client.generate("def", max_tokens=3900, ignore_eos=True)
            next(long)
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline().startswith("stopping: 1 running")
            assert not client.health()
            with pytest.raises(RequestFailed, match="UNAVAILABLE"):
                list(client.generate("def", max_tokens=1))
            assert list(long)[-1].completion_tokens == 3900
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (0, "stopped\n") and "Traceback" not in err
    assert _listing(run_dir) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_compiles_ends_it_at_once(run_dir, tmp_path, monkeypatch, number):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # or there would be nothing to compile
    process = subprocess.Popen(_command(run_dir), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline().startswith("loaded ")
        began = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert time.monotonic() - began < 2
    assert process.returncode == 0 and "ready" not in out and "Traceback" not in err


@pytest.mark.parametrize(("damage", "flags", "said"), [
    (lambda run: shutil.rmtree(run), (), "is not a run directory"),
    (lambda run: (run / "tokenizer.model").unlink(), (), "no tokenizer"),
    (lambda run: (run / "tokenizer.model").write_bytes(b"\x00\x01garbage"), (), "not a SentencePiece model"),
    (lambda run: shutil.rmtree(run / runs.CHECKPOINTS), (), "no checkpoints"),
    (lambda run: (run / "model.json").write_text("{"), (), "model.json"),
    (lambda run: None, ("--num_pages=1",), "num_pages=1"),
    (lambda run: None, ("--decode_top_p=0",), "top_p must be"),
    (lambda run: None, ("--grace_seconds=-1",), "grace_seconds=-1"),
    (lambda run: None, ("--dtype=bf16",), "dtype must be float32 or bfloat16, not 'bf16'"),
    (lambda run: None, ("--dtype=float64",), "dtype must be float32 or bfloat16, not 'float64'"),
])
def test_what_cannot_be_served_is_one_message(run_dir, tmp_path, damage, flags, said):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, copy_function=shutil.copyfile)
    for folder in (copy, *(item for item in copy.rglob("*") if item.is_dir())):
        folder.chmod(0o755)
    damage(copy)
    done = subprocess.run(_command(copy, *SMALL, *flags), cwd=ROOT, text=True, capture_output=True, timeout=120,
                          check=False)
    assert done.returncode == 2, done.stderr
    *warnings, line = done.stderr.splitlines()  # reading a checkpoint may warn
    assert line.startswith("error: ") and said in line
    assert not any(warning.startswith(("error", "Traceback")) for warning in warnings)
    assert "ready" not in done.stdout
