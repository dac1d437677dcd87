"""Every family of decoders through the engine: chunked prompts, several rows, windows and pages that do not line up.

Weights are those of `tests/golden`, peaked enough that a wrong mask, position or expert changes the tokens.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from llm_jax import hf, models
from llm_jax.errors import UserError
from llm_jax.inference.batch import StepShape
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.scheduler import Sequence
from llm_jax.interop import families
from llm_jax.models import Decoder, Execution, ModelConfig
from llm_jax.models.facts import Head

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ["llama2", "llama3", "llama_rope/dynamic", "mistral", "qwen2/sliding", "qwen3", "gemma2", "gemma3",
            "phi3", "phi3_longrope", "gpt2", "glm4", "mixtral", "qwen3_moe", "deepseek_v3"]
CONTEXT = 48  # past the threshold of the rope scalings that have one
NEW = 12


@functools.cache
def loaded(name: str) -> tuple[ModelConfig, models.Params, dict[str, np.ndarray]]:
    """The model of a golden folder, or of another config ("folder/config") over its weights, and its reference."""
    folder, _, variant = name.partition("/")
    _, params, config, _ = hf.load(GOLDEN / folder)
    if variant:
        other = families.config_from_hf(json.loads((GOLDEN / folder / f"{variant}.json").read_text()))
        params, config = models.stack(models.unstack(params, config), other), other
    return config, params, dict(np.load(GOLDEN / folder / f"{variant or 'reference'}.npz"))


@functools.cache
def engine(name: str, max_context: int = CONTEXT) -> Engine:
    config, params, _ = loaded(name)
    made = Engine(config, params, EngineConfig(max_rows=3, prefill_rows=2, chunk=8, page_size=4, num_pages=40,
                                               max_context=max_context, dtype="float32"))
    made.shapes = (StepShape(2, 3),)  # one shape holds every step; it is the compiling that takes time here
    made.compile()
    return made


def prompts(name: str) -> dict[int, list[int]]:
    """The row whose continuation is known, and others; the fourth waits, and is read while the rest decode."""
    config, _, reference = loaded(name)
    others = [np.random.default_rng(i).integers(8, config.vocab_size, n).tolist() for i, n in enumerate((3, 21, 13))]
    return dict(enumerate([reference["tokens"][0, :reference["lengths"][0]].tolist(), *others]))


def generate(engine: Engine, prompts: dict[int, list[int]], new: int = NEW) -> dict[int, tuple[list, list]]:
    """Tokens and log-probabilities of the greedy continuations; whatever was not written before is NaN."""
    engine.pools = jax.tree.map(lambda pool: np.full_like(pool, np.nan), engine.pools)
    scheduler = engine.make_scheduler(max_queue=9)
    found = {i: ([], []) for i in prompts}
    for i, prompt in prompts.items():
        scheduler.add(Sequence(i, list(prompt), len(prompt), new))
    while plan := scheduler.schedule():
        step = engine.prepare(plan, {})
        scheduler.dispatched(plan)
        drawn = engine.execute(step).drawn
        scheduler.resolve(plan, {i: list(d.tokens) for i, d in drawn.items()})
        for i, d in drawn.items():
            found[i][0].extend(d.tokens)
            found[i][1].extend(d.logprobs)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_continues_as_the_dense_forward_does(name):
    config, params, _ = loaded(name)
    given, found = prompts(name), generate(engine(name), prompts(name))
    rows = np.zeros((len(given), max(map(len, given.values())) + NEW), np.int32)
    for i, prompt in given.items():
        rows[i, :len(prompt) + NEW] = prompt + found[i][0]
    model = Decoder(config, Execution(rope_context=CONTEXT))
    logprobs = np.asarray(jax.jit(lambda p, t: jax.nn.log_softmax(model.apply({"params": p}, t)))(params, rows))
    for i, prompt in given.items():
        dense = logprobs[i, len(prompt) - 1:len(prompt) - 1 + NEW]
        mine = dense[np.arange(NEW), found[i][0]]
        np.testing.assert_allclose(found[i][1], mine, atol=5e-4, err_msg=f"prompt {i}")
        np.testing.assert_allclose(mine, dense.max(-1), atol=5e-4, err_msg=f"prompt {i}")  # the best, but for ties


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama_rope/dynamic"])  # has no continuation
def test_the_engine_continues_as_transformers_does(name):
    """Not past the length at which a rope scaling switches: there `transformers` changes the frequencies midway."""
    config, _, reference = loaded(name)
    switches = config.rope_scaling is not None and config.rope_scaling.kind in ("dynamic", "longrope")
    expected = reference["greedy"].tolist()
    served = engine(name, config.rope_scaling.original_context) if switches else engine(name)
    assert generate(served, {0: prompts(name)[0]}, len(expected))[0][0] == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_neighbours_change_nothing(name):
    together = generate(engine(name), prompts(name))
    for i in (1, 2):
        tokens, logprobs = generate(engine(name), {i: prompts(name)[i]})[i]
        assert tokens == together[i][0]
        np.testing.assert_allclose(logprobs, together[i][1], atol=5e-5)


def test_no_family_is_left_out():
    assert {loaded(name)[0].family for name in FAMILIES} == set(families.all_families()) - {"bert", "t5"}


def test_what_does_not_generate_is_refused():
    sizes = dict(vocab_size=9, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
                 max_context=8)
    for changes, said in (({"architecture": "encoder"}, "architecture is 'encoder'"),
                          ({"architecture": "encoder_decoder", "encoder_layers": 1}, "is 'encoder_decoder'"),
                          ({"head": Head("reward")}, "reward head")):
        with pytest.raises(UserError, match=said):
            Engine(ModelConfig(**(sizes | changes)), {}, EngineConfig())
