"""Reference outputs by transformers: one forward for each row and segment, unpadded, in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from tests.golden.spec import Spec

LENGTHS = (28, 25, 13)
SEGMENTS = (12, 9, 5)  # of the packed row, which has two tokens of padding after them
_FIRST_PLAIN = 8  # ids below are special


def rows(rng: np.random.Generator, vocab: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens [B, T] with zeros past int32 lengths [B]."""
    tokens = rng.integers(_FIRST_PLAIN, vocab, (len(lengths), max(lengths))).astype(np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = 0
    return tokens, np.asarray(lengths, np.int32)


def packed_row(rng: np.random.Generator, vocab: int) -> dict[str, np.ndarray]:
    """packed_tokens, packed_segments (from 1; 0 is padding) and packed_positions, each int32 [1, T]."""
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(SEGMENTS)] + [np.zeros(2, int)])
    positions = np.concatenate([np.arange(n) for n in SEGMENTS] + [np.zeros(2, int)])
    tokens = np.where(segments > 0, rng.integers(_FIRST_PLAIN, vocab, len(segments)), 0)
    return {f"packed_{k}": v[None].astype(np.int32)
            for k, v in (("tokens", tokens), ("segments", segments), ("positions", positions))}


def run(model: torch.nn.Module, **inputs: Any) -> Any:
    """Outputs of one unpadded row. A copy of the model runs: some rope scalings remember the longest row they saw."""
    fresh = copy.deepcopy(model) if getattr(model, "stateful_rope", False) else model
    with torch.no_grad():
        return fresh(**{k: torch.from_numpy(np.asarray(v)[None]).long() for k, v in inputs.items()})


def _f32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()


def _rowwise(forward: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    outs = [forward(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    out = np.zeros((*tokens.shape, outs[0].shape[-1]), np.float32)
    for i, (n, value) in enumerate(zip(lengths, outs, strict=True)):
        out[i, :n] = value
    return out


def _packed(forward: Callable[[np.ndarray], np.ndarray], packed: dict[str, np.ndarray]) -> np.ndarray:
    tokens, segments = packed["packed_tokens"][0], packed["packed_segments"][0]
    outs = [forward(tokens[segments == i]) for i in range(1, len(SEGMENTS) + 1)]
    out = np.zeros((1, len(tokens), outs[0].shape[-1]), np.float32)
    out[0, :sum(SEGMENTS)] = np.concatenate(outs)
    return out


def loss(logits: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.float64:
    """Mean cross-entropy in nats of every next token that is not padding."""
    total, count = 0.0, 0
    for row, target, n in zip(logits.astype(np.float64), tokens, lengths, strict=True):
        top = row[:n - 1].max(-1, keepdims=True)
        norm = np.log(np.exp(row[:n - 1] - top).sum(-1)) + top[:, 0]
        total += float((norm - row[np.arange(n - 1), target[1:n]]).sum())
        count += int(n) - 1
    return np.float64(total / count)


def greedy(model: torch.nn.Module, tokens: np.ndarray, count: int) -> np.ndarray:
    """The continuation by transformers' own generate, without its cache and past any end id; no near ties in it."""
    prompt = torch.from_numpy(tokens[None]).long()
    model.generation_config = transformers.GenerationConfig()  # not the folder's: it may have penalties and end ids
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=False,
                             max_new_tokens=count, pad_token_id=0)
        best = model(out[:, :-1]).logits[0, len(tokens) - 1:].topk(2).values
    gap = (best[:, 0] - best[:, 1]).min().item()
    assert gap > 0.01, f"greedy continuation has a near tie ({gap:.1e}): change the seed"
    return out[0, len(tokens):].numpy().astype(np.int32)


def decoder(model: Any, rng: np.random.Generator, spec: Spec) -> dict[str, np.ndarray]:
    vocab = model.config.vocab_size
    tokens, lengths = rows(rng, vocab, spec.lengths)
    packed = packed_row(rng, vocab)

    def forward(row: np.ndarray) -> np.ndarray:
        return _f32(run(model, input_ids=row).logits[0])

    out = {"tokens": tokens, "lengths": lengths, "logits": _rowwise(forward, tokens, lengths)}
    if len(lengths) > 1:
        out |= packed | {"packed_logits": _packed(forward, packed)}
    out["loss"] = loss(out["logits"], tokens, lengths)
    if spec.greedy:
        out["greedy"] = greedy(copy.deepcopy(model), tokens[0], spec.greedy)
    if spec.long_row:
        out["long_tokens"] = rows(rng, vocab, (spec.long_row,))[0]
        out["long_logits"] = forward(out["long_tokens"][0])[None]
    return out


def bert(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tokens, lengths = rows(rng, model.config.vocab_size)
    types = np.stack([(np.arange(tokens.shape[1]) >= n // 2) & (np.arange(tokens.shape[1]) < n)
                      for n in lengths]).astype(np.int32)
    packed = packed_row(rng, model.config.vocab_size)
    hidden, pooled, nsp = [], [], []

    def forward(row: np.ndarray, row_types: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": row, "token_type_ids": row_types}
        body, heads = run(model.bert, **inputs), run(model, **inputs)
        hidden.append(_f32(body.last_hidden_state[0]))
        pooled.append(_f32(body.pooler_output[0]))
        nsp.append(_f32(heads.seq_relationship_logits[0]))
        return _f32(heads.prediction_logits[0])

    logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    for i, n in enumerate(lengths):
        logits[i, :n] = forward(tokens[i, :n], types[i, :n])
    out = {"tokens": tokens, "lengths": lengths, "token_types": types, "logits": logits, "nsp": np.stack(nsp),
           "pooled": np.stack(pooled), "mean": np.stack([h.mean(0) for h in hidden])}
    out["packed_logits"] = _packed(lambda row: forward(row, np.zeros_like(row)), packed)
    return out | packed


def sequence(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tokens, lengths = rows(rng, model.config.vocab_size)
    out = [_f32(run(model, input_ids=row[:n]).logits[0]) for row, n in zip(tokens, lengths, strict=True)]
    mask = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int64)
    with torch.no_grad():
        padded = model(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)).logits
    np.testing.assert_allclose(_f32(padded), np.stack(out), atol=1e-4)
    return {"tokens": tokens, "lengths": lengths, "logits": np.stack(out)}


def per_token(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tokens, lengths = rows(rng, model.config.vocab_size)
    return {"tokens": tokens, "lengths": lengths, "logits": _rowwise(
        lambda row: _f32(run(model, input_ids=row).logits[0]), tokens, lengths)}


def t5(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    vocab = model.config.vocab_size
    tokens, lengths = rows(rng, vocab)
    decoder_tokens, decoder_lengths = rows(rng, vocab, (25, 28, 9))
    decoder_tokens[:, 0] = model.config.decoder_start_token_id
    logits = np.zeros((*decoder_tokens.shape, vocab), np.float32)
    for i, (n, m) in enumerate(zip(lengths, decoder_lengths, strict=True)):
        logits[i, :m] = _f32(run(model, input_ids=tokens[i, :n], decoder_input_ids=decoder_tokens[i, :m]).logits[0])
    return {"tokens": tokens, "lengths": lengths, "decoder_tokens": decoder_tokens,
            "decoder_lengths": decoder_lengths, "logits": logits, "loss": loss(logits, decoder_tokens,
                                                                               decoder_lengths)}
