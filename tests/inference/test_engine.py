"""The engine against the dense forward, and its compiled programs by their text."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.inference import memory
from llm_jax.inference.batch import StepShape, build, choose_shape
from llm_jax.inference.engine import Engine, leaf_dtype
from llm_jax.inference.engine_config import EngineConfig, step_shapes
from llm_jax.inference.scheduler import Chunk, Plan, Sequence
from llm_jax.kernels.paged import make_pool
from llm_jax.models import Decoder, ModelConfig, abstract_params
from llm_jax.models.facts import Experts, LatentAttention, RopeScaling
from tests.inference.conftest import OPTIONS


def test_paged_logits_equal_dense_at_every_position(engine, dense_logits, config):
    """Chunks and decodes of three sequences in shared steps, teacher-forced over random tokens."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, n).tolist() for n in (61, 7, 30)]
    g = engine.geometry
    scheduler = engine.make_scheduler(max_queue=9)
    prompts = (20, 3, 30)
    sequences = [Sequence(i, text[:n], n, 99) for i, (text, n) in enumerate(zip(texts, prompts, strict=True))]
    for s in sequences:
        scheduler.add(s)
    shape = StepShape(3, 12)

    @jax.jit
    def all_logits(params, pools, batch):
        x, pools = engine.model.apply({"params": params}, batch.token_N[None], batch.context.position_N[None],
                                      batch.context, pools, method="hidden")
        return engine.model.apply({"params": params}, x[0], method="logits"), pools

    pools = jax.tree.map(lambda pool: pool + np.nan, engine.pools)  # nothing unwritten may be read
    got = [np.full((len(t), config.vocab_size), np.nan) for t in texts]
    while plan := scheduler.schedule():
        logits_NV, pools = all_logits(engine.params, pools, build(plan, shape, g)[0])
        starts = [*range(len(plan.decode)), *(12 + 8 * i for i in range(len(plan.prefill)))]
        for c, at in zip(plan, starts, strict=True):
            got[c.sequence.id][c.start:c.start + c.count] = logits_NV[at:at + c.count]
        scheduler.dispatched(plan)
        scheduler.resolve(plan, {s.id: [(texts[s.id] + [0] * 2)[len(s.tokens) - 1]] for s in sequences})
        for s in list(scheduler.running):
            if s.computed == len(texts[s.id]):
                scheduler.remove(s)
    for text, mine in zip(texts, got, strict=True):
        np.testing.assert_allclose(mine, dense_logits(text), atol=1e-4)


# Sizes are primes (or twice one), so that a shape in the program's text can only be what it looks like.
PRIMES = {"vocab_size": 509, "num_layers": 2, "embed_dim": 58, "num_heads": 2, "num_kv_heads": 2, "head_dim": 14,
          "mlp_dim": 101, "max_context": 64}
UNLIKE = {
    "plain": {},
    "windows": {"attention_pattern": ("local", "global"), "sliding_window": 13, "attention_soft_cap": 3.0,
                "norm_placement": "sandwich", "qk_norm": True, "tie_embeddings": True},
    "latent and experts": {"head_dim": 34, "latent": LatentAttention(23, 37, 22, 12, 19), "mlp_pattern": ("experts",),
                           "rope_interleaved": True, "experts": Experts(7, 2, 29, shared_dim=31)},
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_no_step_copies_converts_or_transposes_a_weight_or_a_pool(kind):
    config = ModelConfig(**(PRIMES | UNLIKE[kind]))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract_params(Decoder(config)))
    engine = Engine(config, params, EngineConfig(max_rows=11, prefill_rows=2, chunk=7, page_size=5, num_pages=307,
                                                 dtype="float32"))

    def views(shape):
        """The shape, and what it is with two neighbouring axes as one."""
        return {shape} | {(*shape[:i], shape[i] * shape[i + 1], *shape[i + 2:]) for i in range(len(shape) - 1)}

    kept = {tuple(sorted(view)) for leaf in jax.tree.leaves((engine.params, engine.pools)) if leaf.ndim > 1
            for view in views(leaf.shape) if len(view) > 1}
    moved = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|convert|transpose|copy-start)\(")
    for shape in (StepShape(0, 1), StepShape(0, 8), StepShape(0, 11), StepShape(2, 11)):
        if kind != "plain" and shape.decode_rows < 11:
            continue
        text = engine.lower(shape).compile().as_text()
        found = [m[0] for m in moved.finditer(text) if tuple(sorted(int(n) for n in m[1].split(","))) in kept]
        assert not found, f"{shape}: {found}"
        assert not [line for line in text.splitlines() if " sort(" in line and "509" in line], f"{shape} sorts"
        aliased = len(re.findall(r"\{\d+\}: \(\d+, \{\}", text))
        assert "input_output_alias" in text and aliased >= len(jax.tree.leaves(engine.pools))


def test_the_smallest_shape_that_holds_a_plan_is_taken():
    shapes = step_shapes(EngineConfig(max_rows=32, prefill_rows=4))

    def plan(decode, prefill):
        chunk = Chunk(Sequence(0, [1], 1, 1), 0, 1)
        return Plan((chunk,) * decode, (chunk,) * prefill)

    for decode, prefill in [(1, 0), (2, 0), (9, 0), (32, 0), (0, 1), (30, 1), (0, 2), (28, 4)]:
        shape = choose_shape(plan(decode, prefill), shapes)
        assert shape.decode_rows >= decode and shape.prefill_rows >= prefill
    assert choose_shape(plan(1, 0), shapes) == StepShape(0, 1)
    assert choose_shape(plan(9, 0), shapes) == StepShape(0, 32)
    assert choose_shape(plan(3, 1), shapes) == StepShape(1, 8)


def test_stacked_weights_are_freed_as_they_are_taken_apart(config, params):
    mine = jax.tree.map(lambda leaf: leaf + 0, params)
    made = Engine(config, mine, EngineConfig(max_rows=1, num_pages=8, page_size=16, dtype="float32"), free_params=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(mine["layers"]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(made.params))


def test_what_the_device_cannot_hold_is_one_message(config, params, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("llm_jax.inference.engine.make_pools", exhausted)
    with pytest.raises(UserError, match="does not hold the cache of 8 pages"):
        Engine(config, params, EngineConfig(max_rows=1, num_pages=8, page_size=16))


def test_a_context_longer_than_the_model_is_refused(config, params):
    with pytest.raises(UserError, match="97 is more than the model's 96"):
        Engine(config, params, EngineConfig(max_context=97))
    for scaling, longest in ((RopeScaling("dynamic", factor=2.5), 240), (RopeScaling("yarn", 2.5, 64), 160),
                             (RopeScaling("yarn", 2.5, 32), 96), (RopeScaling("llama3", 2.5, 96), 96)):
        assert dataclasses.replace(config, rope_scaling=scaling).longest_context == longest


def test_weights_are_cast_once_and_routing_keeps_its_precision():
    config = ModelConfig(vocab_size=50, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8,
                         max_context=64, mlp_pattern=("dense", "experts"),
                         experts=Experts(4, 2, 6, selection_bias=True))
    fine = 1 + 2**-12  # bfloat16 would round it to 1
    params = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, fine), abstract_params(Decoder(config)))
    options = EngineConfig(max_rows=1, num_pages=8, page_size=16, dtype="bfloat16")
    made = Engine(config, params, options, free_params=True)
    experts = made.params["layers_1"]["experts"]
    for name in ("router", "selection_bias"):
        assert experts[name].dtype == "float32" and float(experts[name].ravel()[0]) == fine
    rest = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(made.params)
            if path[-1].key not in ("router", "selection_bias")]
    assert {leaf.dtype.name for leaf in rest} == {"bfloat16"}
    assert all(leaf.is_deleted() for path, leaf in jax.tree_util.tree_leaves_with_path(params)
               if leaf_dtype(path, "bfloat16") == "bfloat16")
    again = Engine(config, made.params, options)  # per layer, and of these dtypes: nothing is copied
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, again.params, made.params))


class TestMemory:
    CONFIG = ModelConfig(vocab_size=100, num_layers=3, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
                         max_context=64)
    PAGE = 2 * 3 * 1 * 4 * 16 * 4  # keys and values · layers · heads · width · tokens · bytes

    def plan(self, available, **changes):
        return memory.plan_pages(self.CONFIG, **{"page_size": 16, "dtype": "float32", "max_context": 64, "max_rows": 8,
                                                 "available": available, **changes})

    def test_pages_by_hand(self):
        assert memory.page_bytes(self.CONFIG, 16, "float32") == self.PAGE
        assert self.plan(10 * self.PAGE + 1) == 10
        assert self.plan(1000 * self.PAGE) == 32  # eight rows of four pages
        assert self.plan(1000 * self.PAGE, requested=500) == 500

    def test_latent_attention_keeps_one_entry_a_token(self):
        latent = LatentAttention(None, kv_rank=5, nope_dim=2, rope_dim=2, value_dim=3)
        config = dataclasses.replace(self.CONFIG, num_kv_heads=2, latent=latent)
        assert memory.page_bytes(config, 16, "float32") == 3 * 7 * 16 * 4  # layers · (latent + turned) · tokens · bytes
        assert [pool.shape for pool in make_pool(9, 16, config.cache_widths(), "float32")] == [(10, 1, 16, 7)]

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(UserError, match="does not fit: 4 pages"):
            self.plan(4 * self.PAGE - 1)
        with pytest.raises(UserError, match="num_pages=3"):
            self.plan(1000 * self.PAGE, requested=3)
        with pytest.raises(UserError, match="does not fit: 500 pages"):
            self.plan(400 * self.PAGE, requested=500)
        with pytest.raises(UserError, match="weights need"):
            memory.check_weights_fit(self.CONFIG, 4, 1000)

    def test_free_memory_is_known_here(self):
        assert 2**20 < memory.free_bytes() < 2**50

    def test_a_containers_limit_counts(self, tmp_path):
        assert memory._container_bytes(tmp_path) > 2**60
        (tmp_path / "memory.max").write_text("1000\n")
        (tmp_path / "memory.current").write_text("400\n")
        assert memory._container_bytes(tmp_path) == 600
        (tmp_path / "memory.max").write_text("max\n")
        assert memory._container_bytes(tmp_path) > 2**60


def test_options_are_checked():
    with pytest.raises(UserError, match="chunk"):
        EngineConfig(chunk=0)
    for dtype in ("bf16", "float64"):
        with pytest.raises(UserError, match=dtype):
            EngineConfig(dtype=dtype)
    assert OPTIONS.num_pages == 120
