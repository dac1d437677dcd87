"""What no request may see of another: freed pages, other tenants' pages; and pages that move to the host and back."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.inference.engine import Engine
from llm_jax.inference.generation import Completion, complete
from llm_jax.inference.request import SamplingParams
from llm_jax.kernels.quantized_cache import worst_like
from tests.inference.conftest import OPTIONS


class Poisoned(Engine):
    """Before each step, every page that nobody holds or may find in the prefix cache is filled with NaN."""

    service = None

    def prepare(self, *arguments, **more):
        # Now, as pages may be given back before the last step that reads them is sent.
        pool = self.service._scheduler.pool
        free = set(pool._free)
        self.free = np.array([page in free for page in range(pool.num_pages)] + [True])
        return super().prepare(*arguments, **more)

    def dispatch(self, step):
        self.pools = poison(self.pools, self.free)
        return super().dispatch(step)


@jax.jit
def poison(pools, free):
    return jax.tree.map(lambda pool: jnp.where(free[:, None, None, None], worst_like(pool), pool), pools)


def mixed(count):
    rng = np.random.default_rng(1)
    shared = rng.integers(4, 300, 22).tolist()
    prompts = [(shared[:int(rng.integers(0, 23))] + rng.integers(4, 300, int(rng.integers(1, 20))).tolist())
               for _ in range(count)]
    asked = [SamplingParams(max_tokens=int(rng.integers(1, 60)), ignore_eos=True, temperature=float(i % 3 > 1), seed=i)
             for i in range(count)]
    return prompts, asked


def test_no_output_changes_when_pages_of_nobody_are_poisoned(fresh, service):
    """With sharing, preemption and early ends; also the slots behind a sequence's last token are NaN at first."""
    prompts, asked = mixed(60)
    poisoned = fresh(Poisoned)
    poisoned.engine.service = poisoned
    got = complete(poisoned, prompts, asked)
    clean = complete(service, prompts, asked)
    for mine, other in zip(got, clean, strict=True):
        assert np.isfinite(mine.logprobs).all()
        np.testing.assert_allclose(mine.logprobs[:4], other.logprobs[:4], atol=1e-4)
    assert [c.token_ids for c in got] == [c.token_ids for c in clean]
    stats = poisoned.stats()
    assert stats["prefix_hits"] and stats["preemptions"]


def test_the_poison_is_deadly(fresh):
    """A request whose own pages are poisoned does change: the test above can fail."""
    victim = fresh()
    engine, dispatch = victim.engine, victim.engine.dispatch

    def poisoning(step):
        engine.pools = poison(engine.pools, np.ones(OPTIONS.num_pages + 1, bool))
        return dispatch(step)

    engine.dispatch = poisoning
    got = complete(victim, [[1, 2, 3, 4, 5, 6, 7]], [SamplingParams(max_tokens=4, ignore_eos=True)])[0]
    assert not np.isfinite(got.logprobs[1:]).any()


def wait_for(service, **asked):
    got = []
    service.submit(**asked, listener=got.append)
    until = time.monotonic() + 60
    while not (got and got[-1].finish_reason) and time.monotonic() < until:
        time.sleep(0.001)
    return Completion.of(got)


def test_pages_are_shared_within_a_tenant_alone(fresh):
    prompt = list(range(10, 33))
    for shared, expected in ((False, [0, 20, 0, 0, 20, 20]), (True, [0, 20, 20, 20, 20, 20])):
        service = fresh(engine_options={"shared_prefixes": shared})
        assert [wait_for(service, prompt_ids=prompt, params=SamplingParams(max_tokens=2), tenant=tenant).usage
                .cached_tokens for tenant in ("a", "a", "b", "", "b", "")] == expected


def test_swapped_requests_end_with_the_same_tokens(fresh, service):
    prompts = [np.random.default_rng(i).integers(4, 300, 20).tolist() for i in range(9)]
    asked = [SamplingParams(max_tokens=70, ignore_eos=True)] * 9
    swapping = fresh(engine_options={"swap_pages": 120, "prefix_cache": False})
    assert [c.token_ids for c in complete(swapping, prompts, asked)] == [
        c.token_ids for c in complete(service, prompts, asked)]
    stats = swapping.stats()
    assert stats["swaps_out"] and stats["swaps_in"] and stats["pages_used"] == 0
    assert stats["prompt_tokens"] < 9 * 28  # nothing was computed twice, but for a token of each
