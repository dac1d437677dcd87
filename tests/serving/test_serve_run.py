"""`experiments/serve.py` over a run directory, as a user runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import serving
from experiments import serve
from llm_jax import hf, runs
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.service import Service
from llm_jax.models import Decoder, ModelConfig, init_params
from serving import parts
from serving.client import Client, RequestFailed
from serving.engine import child, making
from serving.options import ServerOptions
from serving.reporting import reporting
from tests import peers
from tests.serving.doubles import FakeService, wait_until

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
    process = subprocess.Popen(_command(run_dir, "--http_port=0", "--max_queue=2", "--max_context=4000",
                                        "--stats_seconds=0.1", *SMALL),
                               cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
            with httpx.Client(base_url=lines[-1].split()[2]) as web:
                model, = web.get("/v1/models").json()["data"]
                assert (model["id"], model["created"]) == ("tiny", int((run_dir / "model.json").stat().st_mtime))
                found = web.post("/v1/completions", timeout=60, json={"model": "tiny", "prompt": "def main(",
                                                                      "max_tokens": 8, "temperature": 0}).json()
                assert found["choices"][0]["text"] == "".join(chunk.text for chunk in answer)
                metrics = web.get("/metrics").text
                assert re.search(r"^llm_jax_engine_steps_total [1-9]", metrics, re.M)
                assert "llm_jax_engine_process_resident_memory_bytes" in metrics
            long = client.generate("def", max_tokens=3900, ignore_eos=True)
            next(long)
            process.send_signal(signal.SIGTERM)
            said = []
            while not (said and said[-1].startswith("stopping: ")):
                said.append(process.stdout.readline())
                assert said[-1], process.stderr.read()
            assert said[-1].startswith("stopping: 1 running")
            assert not client.health()
            with pytest.raises(RequestFailed, match="UNAVAILABLE"):
                list(client.generate("def", max_tokens=1))
            assert list(long)[-1].completion_tokens == 3900
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    last = [line for line in out.splitlines() if " running, " not in line][-1]  # not of statistics
    assert (process.returncode, last) == (0, "stopped") and "Traceback" not in err
    # While something happened, a line of statistics now and then.
    lines = said[:-1] + out.splitlines()[:-1]
    assert lines and all(" running, 0 waiting, " in line and "% used" in line for line in lines)
    assert _listing(run_dir) == before


@contextlib.contextmanager
def _two_processes(run_dir):
    """Both, and the address of the first once it is ready."""
    lead, other = [subprocess.Popen(
        _command(run_dir, "--max_context=64", "--num_pages=32", *SMALL), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment) for environment in peers.environments(2)]
    try:
        while not (line := lead.stdout.readline()).startswith("ready: "):
            assert line, lead.stderr.read()
        yield lead, other, line.split()[1]
    finally:
        for process in (lead, other):
            process.kill()
            process.communicate()


def test_two_processes_serve_one_model(run_dir):
    with _two_processes(run_dir) as (lead, other, address):
        with Client(address) as client:
            joint = [i for chunk in client.generate("def main(", max_tokens=8, temperature=0) for i in chunk.token_ids]
        for process in (other, lead):  # a launcher tells all; the other goes on until process 0 has ended
            process.send_signal(signal.SIGTERM)
        assert lead.wait(30) == 0 and other.wait(30) == 0
        assert other.stdout.read().splitlines()[-2:] == ["following: process 0 takes the requests", "stopped"]
    run = runs.load(run_dir)
    prompt = run.tokenizer.prompt_ids("def main(")
    tokens = jnp.array([[*prompt, *joint]])
    likeliest = jnp.argmax(run.model.apply({"params": run.params}, tokens), axis=-1)[0]
    assert joint == likeliest[len(prompt) - 1:-1].tolist()


def test_a_killed_process_ends_the_service_of_all(run_dir):
    """Of the one that follows nobody hears any more: calls end in an error, and the launcher is told by the status."""
    with _two_processes(run_dir) as (lead, other, address), Client(address) as client:
        stream = client.generate("def main(", max_tokens=50, ignore_eos=True)
        next(stream)
        other.kill()
        with pytest.raises(RequestFailed, match="UNAVAILABLE"):
            while True:  # what was on its way may still be told in full
                list(stream)
                stream = client.generate("def main(", max_tokens=50, ignore_eos=True)
        out, _ = lead.communicate(timeout=30)
        assert lead.returncode == 1 and out.splitlines()[-1].startswith("stopped: ")


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


def _damaged(run_dir, tmp_path, damage):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, copy_function=shutil.copyfile)
    for folder in (copy, *(item for item in copy.rglob("*") if item.is_dir())):
        folder.chmod(0o755)
    damage(copy)
    return copy


@pytest.mark.parametrize(("damage", "flags", "said"), [
    (lambda run: (run / "tokenizer.model").write_bytes(b"\x00\x01garbage"), (), "not a SentencePiece model"),
    (lambda run: None, ("--num_pages=1",), "num_pages=1"),
    (lambda run: None, ("--decode_top_p=0",), "top_p must be"),
    (lambda run: None, ("--grace_seconds=-1",), "grace_seconds=-1"),
])
def test_what_cannot_be_served_is_one_message(run_dir, tmp_path, damage, flags, said):
    """In whichever process it is found."""
    done = subprocess.run(_command(_damaged(run_dir, tmp_path, damage), *SMALL, *flags), cwd=ROOT, text=True,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    *warnings, line = done.stderr.splitlines()  # reading a checkpoint may warn
    assert line.startswith("error: ") and said in line
    assert not any(warning.startswith(("error", "Traceback")) for warning in warnings)
    assert "ready" not in done.stdout


@pytest.mark.parametrize(("damage", "layout", "said"), [
    (lambda run: shutil.rmtree(run), {}, "is not a run directory"),
    (lambda run: (run / "tokenizer.model").unlink(), {}, "no tokenizer"),
    (lambda run: shutil.rmtree(run / runs.CHECKPOINTS), {}, "no checkpoints"),
    (lambda run: (run / "model.json").write_text("{"), {}, "model.json"),
    (lambda run: None, {"tensor": 64}, "tensor=64"),
])
def test_an_engine_that_can_not_be_made_says_why(run_dir, tmp_path, damage, layout, said):
    with pytest.raises(UserError, match=said):
        making.make(str(_damaged(run_dir, tmp_path, damage)), None, layout, {}, print)


def test_a_hugging_face_folder_is_imported_once_and_served(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "小模型"
    with runs.load(run_dir) as run:
        hf.save(folder, run.params, run.config, run.tokenizer)
        expected = run.params
    made, said = [], []
    monkeypatch.setattr(Service, "from_run", lambda run_dir, *args, **more: made.append(run_dir) or FakeService())
    for _ in range(2):
        making.make(None, str(folder), {}, {}, said.append).service.close()
    imported, again = made
    assert imported == again and len(said) == 1 and said[0].startswith(f"imported {folder} into {tmp_path / 'cache'}")
    with runs.load(imported) as run:
        jax.tree.map(np.testing.assert_array_equal, run.params, expected)
        assert run.tokenizer.encode("你好") == runs.load(run_dir).tokenizer.encode("你好")
    os.utime(folder / "config.json", (1, 1))  # another model, as far as anybody can tell
    making.make(None, str(folder), {}, {}, said.append).service.close()
    assert made[-1] != imported and len(said) == 2
    with pytest.raises(UserError, match="nowhere"):
        making.make(None, str(tmp_path / "nowhere"), {}, {}, said.append)


class Asked(Exception):
    """Says that what came next would have been done."""


@pytest.fixture
def made(monkeypatch):
    """What `Service.from_run` is called with for a command line, whichever process calls it."""
    specs, calls = [], []

    def start(spec):
        specs.append(spec)
        raise Asked

    monkeypatch.setattr(child, "EngineProcess", start)
    monkeypatch.setattr(Service, "from_run", lambda *args, **more: calls.append((args, more)) or FakeService())

    def run(*flags):
        with pytest.raises(Asked):
            serve.main(["--port=0", *flags])
        spec = specs.pop()
        assert spec.make == "serving.engine.making:make"
        making.make(**spec.arguments, say=print).service.close()
        (args, more) = calls.pop()
        assert more.pop("on_event") is print
        return spec, args, more

    return run


def test_every_flag_reaches_the_engine(made):
    """Their names are those of the settings; what is not given is left to the engine."""
    settings = {"max_rows": 3, "prefill_rows": 2, "chunk": 5, "page_size": 4, "num_pages": 9, "max_context": 20,
                "dtype": "bfloat16", "cache_dtype": "int8", "tensor": 2, "prefix_cache": False, "shared_prefixes": True,
                "swap_pages": 6, "max_proposed": 2, "deterministic": False}
    assert set(settings) == {field.name for field in dataclasses.fields(EngineConfig)}
    spec, *asked = made("--run_dir=here")
    assert asked == [("here", EngineConfig()), {}] and (spec.stats_seconds, spec.log_format) == (10.0, "text")
    spec, *asked = made("--run_dir=here", "--max_queue=7", "--max_wait_seconds=1.5", "--ageing_seconds=2",
                        "--draft_run_dir=there", "--stats_seconds=3", "--log_format=json",
                        *(f"--{name}={value}" for name, value in settings.items()))
    assert asked == [("here", EngineConfig(**settings)), {"max_queue": 7, "max_wait_s": 1.5, "ageing_s": 2,
                                                          "draft_run_dir": "there"}]
    assert (spec.stats_seconds, spec.log_format) == (3, "json")
    assert made("--run_dir=here", "--draft_run_dir=there", "--max_rows=1")[1][1] == EngineConfig(max_rows=1,
                                                                                                max_proposed=4)
    assert made("--run_dir=here", "--deterministic")[1][1] == EngineConfig(deterministic=True)


def test_every_flag_reaches_the_doors(monkeypatch, tmp_path):
    """Options have their flags' names, but for the model's."""
    given = {"http_port": 0, "keys_file": "keys.json", "audit_file": "audit", "tls_cert": "cert", "tls_key": "key",
             "tls_client_ca": "ca", "state_dir": "state", "response_cache_entries": 3, "response_cache_seconds": 4.5,
             "filters": ("a:b", "c:d"), "interactions_file": "said", "traces": True, "log_format": "json",
             "tool_format": "hermes", "trusted_proxies": ("10.0.0.0/8", "::1")}
    assert {"model_name", *given} == {field.name for field in dataclasses.fields(ServerOptions)}
    flags = [f"--{name}={one}" for name, value in given.items()
             for one in (value if isinstance(value, tuple) else [value])]

    found = []

    def make(options):
        found.append(options)
        raise Asked

    monkeypatch.setattr(parts, "Parts", make)
    for more, name in (([], "tiny"), (["--served_model_name=小模型"], "小模型")):
        with pytest.raises(Asked):
            serve.main(["--run_dir=runs/tiny/", "--port=0", *flags, *more])
        assert found.pop() == ServerOptions(model_name=name, **given)


@pytest.mark.parametrize(("flags", "said"), [
    (["--stats_seconds=-1"], "stats_seconds=-1"), (["--max_wait_seconds=0"], "max_wait_seconds=0"),
    (["--ageing_seconds=0"], "ageing_seconds=0"), (["--cache_dtype=int4"], "cache_dtype must be one of"),
    (["--dtype=float64"], "dtype must be one of float32, bfloat16, not 'float64'"),
    (["--deterministic", "--max_proposed=2"], "max_proposed=0"), (["--prefix_cache=2"], "prefix_cache"),
])
def test_flags_out_of_range_are_named(made, flags, said):
    with pytest.raises(UserError, match=said):
        made("--run_dir=/nowhere", *flags)


class Counting:
    """As much of a service as a report reads."""

    def __init__(self):
        self.now = {"steps": 0, "running": 0, "waiting": 0}
        self.asked = 0
        self.statistics = types.SimpleNamespace(line=lambda now: f"{now['steps']} steps")

    def stats(self):
        self.asked += 1
        return dict(self.now)


def test_statistics_are_said_while_something_happens(monkeypatch):
    service, said = Counting(), []
    reader, writer = os.pipe()
    with open(writer, "w") as pipe, reporting(service, 0.005, said.append):
        monkeypatch.setattr(sys, "stdout", pipe)

        def rounds(count):
            until = service.asked + count
            assert wait_until(lambda: service.asked >= until)
            return len(said)

        assert rounds(3) == 0
        service.now["steps"] = 7
        rounds(3)
        assert said == ["7 steps"]
        service.now["waiting"] = 1  # nothing runs, but somebody waits for it
        assert rounds(4) >= 2
        service.now["waiting"] = 0
        rounds(2)
        # A launcher that has stopped reading holds nobody up.
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        before = len(said)
        service.now["steps"] = 8
        assert rounds(3) == before
    os.close(reader)
    asked = service.asked
    with reporting(service, 0, said.append):
        assert service.asked == asked
