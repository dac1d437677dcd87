"""Penalties, biases, masks and log-probabilities against plain loops in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from llm_jax.inference import penalties
from llm_jax.inference.penalties import counted, enter, make_counts, no_extras, shaped, target_logprobs, top
from llm_jax.inference.sampling import SamplingBatch, row_key, sample

R, S, V, B, C = 5, 6, 77, 4, 40
change = jax.jit(shaped)
take_slot = jax.jit(enter, donate_argnums=0)
count = jax.jit(counted, donate_argnums=0)


@pytest.fixture(scope="module")
def logits_RV():
    return np.random.default_rng(0).normal(0, 3, (R, V)).astype(np.float32)


def padded(tokens):
    """Padding is what must not be counted, negative numbers among it."""
    return np.array([*tokens, *([-1, 3] * C)][:C], np.int32)


def words(allowed):
    """The mask that allows these tokens; of the bits beyond the vocabulary some are set."""
    bits = np.zeros(-(-V // 32) * 32, bool)
    bits[list(allowed)] = True
    bits[V:] = True
    return np.packbits(bits, bitorder="little").view("<u4")


def reference(logits, prompt, output, repetition=1.0, presence=0.0, frequency=0.0, bias=(), allowed=None):
    out = []
    for token, logit in enumerate(np.asarray(logits, np.float64)):
        if token in prompt or token in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        if token in output:
            logit -= presence + frequency * list(output).count(token)
        logit += sum(amount for biased, amount in bias if biased == token)
        out.append(logit if allowed is None or token in allowed else -np.inf)
    return np.array(out)


def test_hand_worked():
    """The rule of CTRL, then of the OpenAI API: (2 / 4 - 1 - 2 * 0.25) = -1, and so on."""
    counts = make_counts(0, 5)
    counts = take_slot(counts, 0, np.array([0, 1, 1, 3, 2, 2], np.int32), 1, 4)  # prompt [0], output [1, 1, 3]
    extras = no_extras(1, 1, 5)
    extras.repetition_R[:], extras.presence_R[:], extras.frequency_R[:] = 4.0, 1.0, 0.25
    np.testing.assert_array_equal(change(np.array([[2.0, 2.0, 2.0, -1.0, -1.0]], np.float32), extras, counts),
                                  [[0.5, -1.0, 2.0, -5.25, -1.0]])


def test_everything_at_once_against_a_loop(logits_RV):
    rng = np.random.default_rng(1)
    counts = make_counts(S, V)
    sequences = {}
    for slot in (2, 0, 5, 2, 3, 1):  # slot 2 is taken twice: the second sequence has it to itself
        prompt, output = rng.integers(0, V, rng.integers(1, 20)), rng.integers(0, V, rng.integers(0, 20))
        sequences[slot] = (prompt.tolist(), output.tolist())
        counts = take_slot(counts, slot, padded([*prompt, *output]), len(prompt), len(prompt) + len(output))
    slots = np.array([5, 2, 0, S, S], np.int32)  # two rows of padding
    for _ in range(6):
        tokens = rng.integers(0, V, R).astype(np.int32)
        counts = count(counts, slots, tokens)
        for slot, token in zip(slots[:3], tokens[:3], strict=True):
            sequences[slot][1].append(int(token))
    extras = no_extras(R, B, V)
    extras.slot_R[:] = [5, 2, 0, 3, 1]
    extras.repetition_R[:] = [1.0, 1.3, 0.7, 2.0, 1.0]
    extras.presence_R[:] = [0.0, 0.5, -1.0, 0.0, 0.2]
    extras.frequency_R[:] = [0.3, 0.0, 0.4, -0.5, 0.0]
    biases = [[(3, 1.5), (70, -2.0)], [(0, 100.0), (0, 1.0), (1, -np.inf), (76, -np.inf)], [], [(5, -100.0)], []]
    alloweds = [None, None, set(range(0, V, 3)), {5, 31, 32, 63, 64, 76}, {76}]
    for row in range(R):
        for i, (token, amount) in enumerate(biases[row]):
            extras.bias_id_RB[row, i], extras.bias_RB[row, i] = token, amount
        if alloweds[row] is not None:
            extras.mask_RW[row] = words(alloweds[row])
    out_RV = np.asarray(change(logits_RV, extras, counts))
    for row, slot in enumerate(extras.slot_R):
        wanted = reference(logits_RV[row], *sequences[slot], extras.repetition_R[row], extras.presence_R[row],
                           extras.frequency_R[row], biases[row], alloweds[row])
        np.testing.assert_allclose(out_RV[row], wanted, atol=1e-5, err_msg=f"row {row}")
    assert (counts.output_SV[4] == 0).all() and not counts.prompt_SV[4].any(), "a slot that nobody took"


def test_rows_that_ask_for_nothing_keep_their_logits_bit_for_bit(logits_RV):
    counts = take_slot(make_counts(S, V), 1, padded(range(30)), 15, 30)
    extras = no_extras(R, B, V, slot=1)
    np.testing.assert_array_equal(change(logits_RV, extras, counts), logits_RV)
    extras.repetition_R[2], extras.presence_R[3], extras.frequency_R[4] = 1.5, 1.0, 0.1
    out_RV = np.asarray(change(logits_RV, extras, counts))
    np.testing.assert_array_equal(out_RV[:2], logits_RV[:2])
    assert (out_RV[2:] != logits_RV[2:]).any(axis=-1).all()


def test_something_is_always_left(logits_RV):
    """The mask against the bias: the mask is kept; a mask of nothing is not; no other row is touched."""
    extras = no_extras(R, B, V, slot=S)
    extras.mask_RW[0] = words([7, 40])
    extras.bias_id_RB[0, :2], extras.bias_RB[0, :2] = [7, 40], -np.inf
    extras.mask_RW[1] = words([])
    extras.mask_RW[2] = words([7, 40])
    extras.bias_id_RB[2, :1], extras.bias_RB[2, :1] = [7], -np.inf
    out_RV = np.asarray(change(logits_RV, extras, make_counts(S, V)))
    assert np.flatnonzero(np.isfinite(out_RV[0])).tolist() == [7, 40]
    np.testing.assert_array_equal(out_RV[1], logits_RV[1])
    assert np.flatnonzero(np.isfinite(out_RV[2])).tolist() == [40]
    np.testing.assert_array_equal(out_RV[3:], logits_RV[3:])


def test_what_a_mask_or_an_infinite_bias_forbids_is_never_drawn(logits_RV):
    """Through the draw, with every cut on, and greedy; log-probabilities stay the model's."""
    rows, allowed = 400, (2, 33, 76)
    raw_RV = np.repeat(logits_RV[:1], rows, axis=0)
    extras = no_extras(rows, B, V, slot=S)
    extras.mask_RW[:] = words(allowed)
    extras.bias_id_RB[:, 0], extras.bias_RB[:, 0] = 33, -np.inf
    batch = SamplingBatch(np.full(rows, 5.0, np.float32), np.resize([0, 1, 2, 70], rows).astype(np.int32),
                          np.resize([1.0, 0.99, 0.6], rows).astype(np.float32),
                          np.resize([0.0, 1e-6, 0.0, 0.0, 0.5], rows).astype(np.float32),
                          np.array([row_key(0, 0, i) for i in range(rows)], np.uint32))
    batch.temperature_R[::5] = 0
    draw = jax.jit(lambda raw, extras, counts, batch: sample(shaped(raw, extras, counts), batch, raw))
    tokens, logprobs = map(np.asarray, draw(raw_RV, extras, make_counts(S, V), batch))
    assert set(tokens.tolist()) == {2, 76}
    best = max((2, 76), key=lambda t: logits_RV[0, t])
    assert (tokens[(batch.temperature_R == 0) | (batch.top_k_R == 1)] == best).all()
    exact_V = logits_RV[0] - np.log(np.exp(logits_RV[0].astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, exact_V[tokens], atol=1e-5)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("at_once", [{}, {"cpu": 3}], ids=["one top-k", "in several"])
def test_top_logprobs(logits_RV, monkeypatch, at_once):
    monkeypatch.setattr(penalties, "_AT_ONCE", at_once)
    rows = logits_RV.copy()
    rows[1] = np.round(rows[1]) + 0.0  # equals: the first ids first
    exact = log_softmax(rows)
    for number in (1, 8, 100):
        ids, logprobs = jax.jit(lambda x, n=number: top(x, n))(rows)
        order = np.argsort(-rows, axis=-1, kind="stable")[:, :number]
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_allclose(logprobs, np.take_along_axis(exact, order, axis=-1), atol=1e-5)


def test_logprobs_of_targets(logits_RV):
    targets = np.array([3, 0, 76, 11, 11], np.int32)
    for number in (0, 4):
        logprobs, ids, best = jax.jit(lambda x, t, n=number: target_logprobs(x, t, n))(logits_RV, targets)
        np.testing.assert_allclose(logprobs, log_softmax(logits_RV)[np.arange(R), targets], atol=1e-5)
        order = np.argsort(-logits_RV, axis=-1, kind="stable")[:, :number]
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_allclose(best, np.take_along_axis(log_softmax(logits_RV), order, axis=-1), atol=1e-5)


def test_counts_are_changed_in_place():
    counts = make_counts(S, V)
    for lowered in (count.lower(counts, np.zeros(R, np.int32), np.zeros(R, np.int32)),
                    take_slot.lower(counts, 0, padded([]), 0, 0)):
        reused = lowered.compile().memory_analysis().alias_size_in_bytes
        assert reused == counts.prompt_SV.nbytes + counts.output_SV.nbytes
