"""The door's servers: one over a double of the engine, one over a real engine of random weights, compiled once."""

from __future__ import annotations

import logging

import grpc
import jax
import pytest

from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.service import Service
from llm_jax.models import Decoder, ModelConfig, init_params
from tests.serving.doubles import ForeignStub, RunningServer, running_server, wait_until

MAX_ROWS, MAX_QUEUE, MAX_CONTEXT = 4, 4, 512


@pytest.fixture(autouse=True)
def log_handlers():
    """A server that a test launches sends log lines where it likes: afterwards they go where they went."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def server():
    """A server over a `FakeService`; a file whose tests want the real engine has a fixture of this name itself."""
    with running_server() as running:
        yield running


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return ForeignStub(channel)


@pytest.fixture(scope="session")
def service():
    tokenizer = train_tokenizer(["def main():\n    return 你好\n", "import os, sys\n"] * 20, 320)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2,
                         head_dim=8, mlp_dim=64, max_context=MAX_CONTEXT)
    params = jax.jit(lambda key: init_params(Decoder(config), key))(jax.random.key(3))
    options = EngineConfig(max_rows=MAX_ROWS, prefill_rows=1, chunk=16, page_size=8, num_pages=256, dtype="float32")
    engine = Engine(config, params, options)
    engine.compile()
    service = Service(engine, tokenizer, max_queue=MAX_QUEUE)
    yield service
    service.close()


@pytest.fixture
def real_server(service):
    """A server over `service`; afterwards, nothing of what it was asked may be left in the engine."""
    running = RunningServer(service)
    yield running
    # Stop the door alone: draining would end the engine that the next test uses.
    service.begin_drain = lambda: None
    try:
        running.run(running.server.stop(0))
    finally:
        del service.begin_drain
        running.end()
    assert wait_until(lambda: not any(service.stats()[name] for name in ("pages_used", "running", "waiting")))
