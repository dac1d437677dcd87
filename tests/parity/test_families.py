"""Each family against live transformers, on shapes drawn afresh: logits, gradients, and the way back."""

from __future__ import annotations

import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax import hf, models
from llm_jax.interop import families
from llm_jax.interop.exporting import export_run
from llm_jax.interop.importing import import_run
from llm_jax.interop.mapping import to_theirs
from llm_jax.objectives.next_token import token_losses
from tests.parity import torch_side
from tests.parity.drawn import FAMILIES, HEADS, Case, Draw
from tests.parity.report import Result

DRAWS = int(os.environ.get("PARITY_DRAWS") or 3)
LOGITS, GRADIENT = 2e-4, 1e-3  # of the largest logit, of a tensor's largest entry
ROUNDING = 1e-5  # of the model's largest gradient: a tensor that has no larger one has none in exact arithmetic
_BUFFER = "e_score_correction_bias"  # no parameter in transformers; where gradients are written it has its value


def apply(case: Case, model, params, data):
    """(logits [B, T, V] or [B, labels], next-sentence logits or None) of the padded batch."""
    def mask(name):
        tokens, lengths = data[name + "tokens"], data[name + "lengths"]
        return jnp.asarray(np.arange(tokens.shape[1]) < lengths[:, None], jnp.int32)

    tokens = jnp.asarray(data["tokens"])
    if case.kind == "t5":
        return model.apply({"params": params}, tokens, jnp.asarray(data["decoder_tokens"]), mask(""),
                           mask("decoder_")), None
    if case.kind == "bert":
        out = model.apply({"params": params}, tokens, mask(""), jnp.asarray(data["token_types"]))
        return out["logits"], out["nsp"]
    logits = model.apply({"params": params}, tokens, mask(""))
    return logits[..., None] if case.config.num_labels == 1 and case.kind == "sequence" else logits, None


def loss(case: Case, model, params, data):
    logits, nsp = apply(case, model, params, data)
    counts = jnp.asarray(data["counts"], jnp.float32)
    if case.kind == "sequence" and logits.shape[-1] == 1:
        return jnp.mean(jnp.square(logits - 1)), (logits, nsp)
    total = jnp.sum(token_losses(logits, jnp.asarray(data["labels"], jnp.int32))[0] * counts) / jnp.sum(counts)
    if nsp is not None:
        total += jnp.mean(token_losses(nsp, jnp.asarray(data["nsp_labels"], jnp.int32))[0])
    return total, (logits, nsp)


def kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Mean KL(theirs || ours) in nats, of logits [N, V]."""
    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(theirs), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def by_name(params, config) -> dict[str, np.ndarray]:
    """A tree like the parameters as the tensors of a checkpoint."""
    layers = jax.tree.map(np.asarray, models.unstack(params, config))

    def read(part):
        leaf = layers
        for name in part.path:
            leaf = leaf[name]
        return leaf[part.index]

    return {t.name: to_theirs(t, read) for t in families.by_name(config.family).tensors(config)}


def gradient_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The worst tensor's largest difference, relative to its largest entry; see docs/families.md."""
    assert set(ours) == set(theirs)
    largest = max(np.abs(g).max() for name, g in theirs.items() if not name.endswith(_BUFFER))
    worst = {}
    for name, g in ours.items():
        if name.endswith(_BUFFER):
            assert not g.any(), f"{name} has a gradient"
        elif np.abs(theirs[name]).max() < ROUNDING * largest:
            assert np.abs(g).max() < 2 * ROUNDING * largest, f"{name} has a gradient, and none in transformers"
        else:
            worst[name] = np.abs(g - theirs[name]).max() / np.abs(theirs[name]).max()
    name = max(worst, key=worst.__getitem__)
    assert worst[name] < GRADIENT, f"gradient of {name} differs by {worst[name]:.1e} of its largest entry"
    return float(worst[name])


def logit_difference(case: Case, ours, rows) -> Result:
    found = Result()
    for i, (theirs, nsp) in enumerate(rows):
        theirs = theirs.detach().numpy()
        mine = np.asarray(ours[0][i])[:len(theirs)] if theirs.ndim > 1 else np.asarray(ours[0][i])
        off = float(np.abs(mine - theirs).max())
        found.add(Result(absolute=off, relative=off / float(np.abs(theirs).max()),
                         kl=kl(np.atleast_2d(theirs), np.atleast_2d(mine))))
        if nsp is not None:
            np.testing.assert_allclose(ours[1][i], nsp.detach(), atol=LOGITS * float(nsp.detach().abs().max()))
    assert found.relative < LOGITS, f"logits differ by {found.relative:.1e} of the largest"
    return found


def packed_difference(case: Case, model, params, data, rows) -> Result:
    """Two rows as documents of one: what the trainer feeds, against the library's forward of each by itself."""
    lengths = data["lengths"][:2]
    tokens = np.concatenate([data["tokens"][i][:n] for i, n in enumerate(lengths)])[None]
    segments = np.repeat([1, 2], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    logits = np.asarray(jax.jit(lambda p: model.apply({"params": p}, tokens, segments, positions))(params))[0]
    return logit_difference(case, (np.split(logits, lengths[:1]), None), rows[:2])


def compare(name: str, draw, seed: int, tmp_path, through_a_run: bool = False) -> Result:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    case = draw(Draw(rng))
    theirs = torch_side.make(case, tmp_path / "theirs", int(rng.integers(1 << 31)))
    data = torch_side.inputs(case, rng)
    model, params, config, _ = hf.load(tmp_path / "theirs")
    described = f"{name}, seed {seed}: {config}"

    (value, outputs), gradient = jax.jit(jax.value_and_grad(
        lambda p: loss(case, model, p, data), has_aux=True))(params)
    rows = torch_side.forward(case, theirs, data)
    try:
        found = logit_difference(case, outputs, rows)
        if case.kind == "decoder":
            found.add(packed_difference(case, model, params, data, rows))
        their_value, their_gradient = torch_side.gradients(case, theirs, data, tmp_path / "gradients")
        assert float(value) == pytest.approx(their_value, rel=1e-5)
        found.gradient = gradient_difference(by_name(gradient, config), their_gradient)

        found.parameters = config.num_params()
        assert found.parameters == sum(p.numel() for p in theirs.parameters()) + sum(
            b.numel() for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias"))

        if through_a_run:
            import_run(tmp_path / "theirs", tmp_path / "run")
            export_run(tmp_path / "run", tmp_path / "ours")
        else:
            hf.save(tmp_path / "ours", params, config)
        before, after = load_file(tmp_path / "theirs" / torch_side.FILE), load_file(tmp_path / "ours" / torch_side.FILE)
        assert set(before) == set(after) and all(np.array_equal(before[k], after[k]) for k in before)
        again = torch_side.forward(case, torch_side.load(case, tmp_path / "ours"), data)
        for (was, _), (now, _) in zip(rows, again, strict=True):
            was, now = was.detach().numpy(), now.detach().numpy()  # torch's own last bits change with alignment
            np.testing.assert_allclose(now, was, rtol=0, atol=1e-5 * float(np.abs(was).max()))
    except AssertionError as error:
        raise AssertionError(f"{described}\n{error}") from error
    found.draws = 1
    return found


@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, draw, seed, keep, tmp_path):
    keep(name, compare(name, FAMILIES[name], seed + draw, tmp_path, through_a_run=draw == 0))


@pytest.mark.parametrize("name", HEADS)
def test_head(name, seed, tmp_path):
    compare(name, HEADS[name], seed, tmp_path)
