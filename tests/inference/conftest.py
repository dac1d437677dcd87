"""One small model, its engine and its service, for all tests of this folder."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import ALONE
from llm_jax.inference.service import Service
from llm_jax.models import Decoder, ModelConfig

OPTIONS = EngineConfig(max_rows=12, prefill_rows=3, chunk=8, page_size=4, num_pages=120, dtype="float32")


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["for i in range(10):\n    print(i)\n" * 5, "满纸荒唐言，一把辛酸泪。\n" * 5], 360)


@pytest.fixture(scope="session")
def config(tokenizer):
    return ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
                       head_dim=8, mlp_dim=48, max_context=96)


@pytest.fixture(scope="session")
def params(config):
    made = jax.jit(lambda key: models.init_params(Decoder(config), key))(jax.random.key(0))
    # Larger than at initialisation: attention that is nearly uniform would hide a wrong position.
    # On a device of their own choice, as those of a checkpoint are: programs are compiled again for others.
    return jax.device_put(jax.tree.map(lambda leaf: leaf * 2.0, made), jax.local_devices()[0])


@pytest.fixture(scope="session")
def engine(config, params):
    made = Engine(config, params, OPTIONS)
    made.compile()
    return made


def sibling(engine, kind=Engine, **options):
    """Another engine over the same weights and compiled programs, with pools of its own: each service needs one."""
    made = kind(engine.config, engine.params, dataclasses.replace(engine.options, **options))
    made._programs = engine._programs
    return made


@pytest.fixture
def fresh(engine, tokenizer):
    """Makes services of their own: (options of the service) → service; `engine_options` change the engine's."""
    with contextlib.ExitStack() as stack:
        def make(kind=Engine, engine_options=None, **options):
            made = Service(sibling(engine, kind, **(engine_options or {})), tokenizer, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="session")
def service(engine, tokenizer):
    made = Service(engine, tokenizer, max_queue=64)
    yield made
    made.close()


@pytest.fixture(scope="session")
def lone_service(config, params, tokenizer):
    """The layout of `Run.generate`."""
    engine = Engine(config, params, ALONE)
    engine.compile()
    made = Service(engine, tokenizer)
    yield made
    made.close()


@pytest.fixture(scope="session")
def dense_logits(config, params):
    """tokens → float32 logits [T, V] of the dense forward, padded to one compiled length."""
    apply = jax.jit(lambda t: Decoder(config).apply({"params": params}, t))

    def logits(tokens):
        padded = np.zeros((1, config.max_context), np.int32)
        padded[0, :len(tokens)] = tokens
        return np.asarray(apply(padded))[0, :len(tokens)]

    return logits
