"""Tensor parallelism: several devices give the tokens of one, each holds its part, and only activations go round."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from llm_jax import models
from llm_jax.errors import UserError
from llm_jax.inference.batch import StepShape
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import complete
from llm_jax.inference.placement import Placement
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.service import Service
from llm_jax.models import Decoder, ModelConfig
from llm_jax.models.facts import Experts, LatentAttention

SHAPE = StepShape(2, 3)  # holds every step here; it is the compiling that takes time
OPTIONS = EngineConfig(max_rows=3, prefill_rows=2, chunk=8, page_size=4, num_pages=24, dtype="float32")
GROUPED = ModelConfig(vocab_size=384, num_layers=2, embed_dim=32, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=48,
                      max_context=96)
MODELS = {
    "grouped": GROUPED,
    "latent": dataclasses.replace(GROUPED, num_layers=1, num_kv_heads=8, head_dim=12, latent=LatentAttention(
        query_rank=None, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8)),
    "experts": dataclasses.replace(GROUPED, num_layers=1, mlp_pattern=("experts",),
                                   experts=Experts(8, 2, 16, shared_dim=16)),
}
CASES = [("grouped", 2), ("grouped", 8), ("latent", 4), ("experts", 2)]
each_case = pytest.mark.parametrize(("name", "tensor"), CASES)


@functools.cache
def weights(name: str):
    made = jax.jit(lambda key: models.init_params(Decoder(MODELS[name]), key))(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 2.0, made)  # attention that is not uniform


@functools.cache
def engine(name: str, tensor: int) -> Engine:
    made = Engine(MODELS[name], weights(name), dataclasses.replace(OPTIONS, tensor=tensor))
    made.shapes = (SHAPE,)
    return made


def ask(seed: int = 0):
    """More than fit at once; some share a beginning, and there are pages for no more than three."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(4, 360, 14).tolist()
    prompts = [shared[:14 * (i % 2)] + rng.integers(4, 360, 3 + 5 * i).tolist() for i in range(6)]
    params = [SamplingParams(max_tokens=24, ignore_eos=True, seed=i, temperature=0.8 * (i > 1),
                             top_p=1 - 0.2 * (i == 3), top_k=40 * (i == 4)) for i in range(6)]
    return prompts, params


@functools.cache
def completions(name: str, tensor: int, tokenizer):
    service = Service(engine(name, tensor), tokenizer)
    try:
        return complete(service, *ask()), service.stats()
    finally:
        service.close()


@each_case
def test_a_mesh_gives_the_tokens_of_one_device(name, tensor, tokenizer):
    (mine, stats), (one, _) = completions(name, tensor, tokenizer), completions(name, 1, tokenizer)
    assert [c.token_ids for c in mine] == [c.token_ids for c in one]
    assert all(len(c.token_ids) == 24 for c in mine) and len({c.token_ids for c in mine}) == len(mine)
    for a, b in zip(mine, one, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert stats["most_rows"] == 3 and stats["preemptions"] and stats["prefix_hits"]


def device_bytes(tree) -> set[int]:
    """The bytes that each device holds."""
    held: collections.Counter = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(held) == len(leaf.sharding.device_set)
    return set(held.values())


@each_case
def test_each_device_holds_its_part_of_weights_and_pools(name, tensor):
    """After steps as before them."""
    config, made = MODELS[name], engine(name, tensor)
    heads, *widths = config.cache_widths()
    parts = tensor if heads % tensor == 0 else 1
    page = 4 * config.num_layers * OPTIONS.page_size * heads * sum(widths)
    assert device_bytes(made.pools) == {(OPTIONS.num_pages + 1) * page // parts}
    # What has no head, inner width or token to be cut along: norms, routers, the latent projection and keys and values
    # whose heads do not divide.
    shared = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(made.params):
        own = {key.key for key in path} & ({"scale", "router", "kv_a"} | ({"k", "v"} if parts == 1 else set()))
        shared += leaf.nbytes if own else 0
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(made.params))
    assert 0 < shared < total / 4
    assert device_bytes(made.params) == {shared + (total - shared) // tensor}


def collectives(text: str) -> collections.Counter:
    """What a compiled program sends: (operation, shape without ones) → how often."""
    found = re.findall(r"= (\(.*?\)|\S+) (all-\w+|collective-\w+|reduce-scatter|ragged-all-to-all)(?:-start)?\(", text)
    return collections.Counter((kind, tuple(int(n) for n in dims.split(",") if n not in ("", "1")))
                               for result, kind in found for dims in re.findall(r"\w\[([\d,]*)\]", result))


@each_case
def test_no_weight_and_no_page_is_ever_sent(name, tensor):
    config, made = MODELS[name], engine(name, tensor)
    sent = collectives(made.lower(SHAPE).compile().as_text())
    tokens, rows = SHAPE.decode_rows + SHAPE.prefill_rows * OPTIONS.chunk, SHAPE.rows
    activations = ("all-reduce", (tokens, config.embed_dim))
    # After the table of embeddings, after attention and after the feed-forward layer; experts and the layer that all
    # tokens pass are summed apart.
    assert sent.pop(activations) == 1 + config.num_layers * (2 + (name == "experts"))
    assert sent.pop(("all-gather", (rows, config.vocab_size))) == 1
    assert sent.pop(("all-reduce", (rows,)))  # the likeliest token and its probability
    if config.cache_widths()[0] % tensor == 0:
        assert not sent
    # Else queries, and what is written of keys and values, are computed in parts and put together.
    held = {tuple(sorted(n for n in leaf.shape if n > 1)) for leaf in jax.tree.leaves((made.params, made.pools))}
    for kind, shape in sent:
        assert kind == "all-gather" and tuple(sorted(shape)) not in held
        assert math.prod(shape) <= tokens * config.num_heads * sum(config.cache_widths()[1:])


def test_everything_that_may_be_asked_works_on_a_mesh(tokenizer):
    """Penalties, likeliest tokens, scores of the prompt, proposals, and pages swapped to the host."""
    prompts, params = ask(1)
    params = [dataclasses.replace(p, logprobs=2, repetition_penalty=1.3 if i % 2 else 1.0, logit_bias=((7, 1.0),),
                                  prompt_logprobs=3 if i == 2 else None) for i, p in enumerate(params)]
    got = []
    for tensor in (1, 2):
        made = Engine(GROUPED, weights("grouped"), dataclasses.replace(OPTIONS, tensor=tensor, swap_pages=16))
        made.shapes = (SHAPE,)
        made._programs["forward"] = engine("grouped", tensor)._programs["forward"]
        service = Service(made, tokenizer)
        try:
            got.append(complete(service, prompts, params))
            stats = service.stats()
            assert made.pools[0][0].sharding == engine("grouped", tensor).pools[0][0].sharding
        finally:
            service.close()
        assert stats["swaps_in"]
    one, mine = got
    assert [c.token_ids for c in mine] == [c.token_ids for c in one]
    for a, b in zip(mine, one, strict=True):
        np.testing.assert_allclose([[p for _, p in top] for top in a.top_logprobs],
                                   [[p for _, p in top] for top in b.top_logprobs], atol=1e-4)
    assert len(mine[2].prompt_logprobs) == len(prompts[2]) - 1
    np.testing.assert_allclose([p.logprob for p in mine[2].prompt_logprobs],
                               [p.logprob for p in one[2].prompt_logprobs], atol=1e-4)


def test_what_does_not_divide():
    """A vocabulary that the devices do not divide is on all of them; heads that they do not divide are an error."""
    def placed(config, tensor):
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), models.abstract_params(Decoder(config)))
        return Placement(config, tensor).params(models.unstack(zeros, config))

    held = placed(dataclasses.replace(GROUPED, vocab_size=383), 2)
    assert held["embed"]["embedding"].addressable_shards[0].data.shape == (383, 32)
    assert held["layers_0"]["mlp"]["up"].addressable_shards[0].data.shape == (32, 24)
    with pytest.raises(UserError, match="attention/o .* its axis 'heads' of length 8 can't be divided among the 3"):
        placed(GROUPED, 3)
    with pytest.raises(UserError, match="tensor=16 needs as many devices; there are 8"):
        Placement(GROUPED, 16)
