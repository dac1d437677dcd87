"""How completions are compared: what a near-tie is, and what is a different draw."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.cache_error import compare
from benchmarks.speculation import difference, repeated
from llm_jax.inference import sampling
from llm_jax.inference.generation import Completion
from llm_jax.inference.request import SamplingParams, Usage

GREEDY = SamplingParams(max_tokens=3)


def completion(tokens, logprobs):
    return Completion("", tuple(tokens), tuple(logprobs), "length", Usage(4, len(tokens)))


def test_greedy_completions():
    plain = completion([5, 6, 7], [-1.0, -2.0, -3.0])
    assert difference(plain, completion([5, 6, 7], [-1.0, -2.1, -3.0]), GREEDY, 4) is None
    # Only the first token that differs had the same text before it.
    assert difference(plain, completion([5, 9, 1], [-1.0, -2.25, -9.0]), GREEDY, 4) == 0.25
    assert difference(plain, completion([5, 6], [-1.0, -2.0]), GREEDY, 4) == math.inf


def test_sampled_completions():
    """Two tokens tie where logit / temperature + noise of the one is that of the other, and only at that position."""
    params = SamplingParams(max_tokens=3, temperature=0.5, seed=11, sample=2)
    noise_V = np.asarray(sampling.gumbel(np.array([sampling.row_key(11, 2, 4 + 1)], np.uint32), 300))[0]
    one, other = 17, 202
    tied = -2.0 + 0.5 * float(noise_V[one] - noise_V[other])  # (−2 + tie) / 0.5 makes up for the noise
    plain = completion([5, one], [-1.0, -2.0])
    assert difference(plain, completion([5, other], [-1.0, tied]), params, 4) == pytest.approx(0, abs=1e-5)
    assert difference(plain, completion([5, other], [-1.0, tied - 0.1]), params, 4) == pytest.approx(0.2, abs=1e-5)
    assert difference(plain, completion([5, other], [-1.0, tied]), params, 5) > 1e-3


def test_prompts_that_repeat():
    assert repeated([[1, 2, 3, 4, 5]], 6, 2) == [[1, 2, 3, 2, 3, 2, 3]]


def test_log_probabilities_compared_by_hand():
    found = compare(np.array([-1.0, -2.5]), np.array([-1.25, -2.0]))
    assert (found["mean"], found["max"]) == (0.375, 0.5)
    assert found["perplexity"] == pytest.approx(math.exp(1.75))
    assert found["perplexity_change"] == pytest.approx(math.exp(1.75) / math.exp(1.625) - 1)
