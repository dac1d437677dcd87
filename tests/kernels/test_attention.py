"""Attention over whole rows, against float64 NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.kernels import attention as attention_module
from llm_jax.kernels.attention import BACKENDS, DenseContext, attention, choose
from llm_jax.kernels.attention_call import Call
from llm_jax.models.config import ATTENTION, Execution
from llm_jax.models.contexts import dense_context
from tests.kernels import attention_cases, reference
from tests.kernels.attention_cases import Case, assert_close, expected, through

G, K = 2, 8
SCALE = 0.5  # not K^-0.5: what is asked for must be what is used


def drawn(seed, *shapes):
    """Scores reach several units, so that a soft cap bends them and a wrong mask shows."""
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "value_dim"))
def run(q, k, v, context, **options):
    return attention(q, k, v, context, **options)


def dense(q, k, v, context=None, **options):
    context = context or DenseContext()
    return run(q[None], k[None], None if v is None else v[None], context, scale=SCALE, **options)[0][0]


class TestDense:
    @pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
    @pytest.mark.parametrize("soft_cap", [None, 2.0])
    def test_windows_and_soft_caps(self, window, soft_cap):
        q, k, v = drawn(0, (9, 4, K), (9, G, K), (9, G, K))
        expected = reference.attend(q, k, v, reference.causal(window), SCALE, soft_cap)
        np.testing.assert_allclose(dense(q, k, v, window=window, soft_cap=soft_cap), expected, atol=2e-6)

    @pytest.mark.parametrize("window", [None, 3])
    def test_packed_documents(self, window):
        q, k, v = drawn(1, (11, 4, K), (11, G, K), (11, G, 5))  # values narrower than keys
        segments = np.array([1] * 5 + [2] * 4 + [0] * 2)
        got = dense(q, k, v, DenseContext(jnp.asarray(segments)[None]), window=window)
        in_window = reference.causal(window)
        expected = reference.attend(q, k, v, lambda t, s: in_window(t, s) and segments[t] == segments[s], SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-6)

    def test_an_encoder_sees_both_ways_and_no_padding(self):
        q, k, v = drawn(2, (7, 4, K), (7, G, K), (7, G, K))
        segments = np.array([1, 1, 1, 1, 1, 0, 0])
        got = dense(q, k, v, DenseContext(jnp.asarray(segments)[None], causal=False))
        expected = reference.attend(q, k, v, lambda t, s: segments[t] == segments[s], SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        everything = reference.attend(q, k, v, lambda t, s: True, SCALE)
        np.testing.assert_allclose(dense(q, k, v, DenseContext(causal=False)), everything, atol=2e-6)

    def test_cross_attention(self):
        """More keys than queries; documents packed on both sides, or one document whose keys end in padding."""
        q, k, v = drawn(3, (4, 4, K), (9, G, K), (9, G, 3))
        queries, keys = np.array([1, 1, 2, 2]), np.array([1, 1, 1, 2, 2, 2, 2, 0, 0])
        got = dense(q, k, v, DenseContext(jnp.asarray(queries)[None], jnp.asarray(keys)[None], causal=False))
        expected = reference.attend(q, k, v, lambda t, s: queries[t] == keys[s], SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        got = dense(q, k, v, DenseContext(None, jnp.asarray(keys)[None], causal=False))
        np.testing.assert_allclose(got, reference.attend(q, k, v, lambda t, s: keys[s] != 0, SCALE), atol=2e-6)

    def test_a_bias_is_added_to_the_scores(self):
        q, k, v, bias = drawn(4, (6, 4, K), (6, G, K), (6, G, K), (4, 6, 6))
        for context, sees in ((DenseContext(), reference.causal()), (DenseContext(causal=False), lambda t, s: True)):
            np.testing.assert_allclose(dense(q, k, v, context, bias_HTS=bias),
                                       reference.attend(q, k, v, sees, SCALE, bias=bias), atol=2e-6)

    def test_values_within_keys(self):
        q, k = drawn(5, (6, 4, K), (6, 1, K))
        expected = reference.attend(q, k, k[..., :3], reference.causal(), SCALE)
        np.testing.assert_allclose(dense(q, k, None, value_dim=3), expected, atol=2e-6)

    def test_what_has_no_meaning_is_refused(self):
        q, k, v = drawn(6, (4, 4, K), (9, G, K), (9, G, K))
        with pytest.raises(ValueError, match="4 queries and 9 keys"):
            dense(q, k, v)
        with pytest.raises(ValueError, match="needs causal"):
            dense(q, q, q, DenseContext(causal=False), window=3)


class TestBackends:
    @pytest.mark.parametrize("case", [Case(segments="packed", window=9, soft_cap=2.0, V=5),
                                      Case(T=20, S=31, causal=False, segments="both")])
    def test_dense_and_its_gradients(self, case):
        assert_close(through(case, "dense"), case.expected(), 2e-6)

    @pytest.mark.parametrize("case", [
        Case(T=150, S=150, segments="packed", window=9, soft_cap=2.0, V=5), Case(T=70, S=70, G=4),
        Case(T=200, S=200, G=1, window=80), Case(T=11, S=11, segments="packed", H=2, G=1)])
    def test_strips_and_their_gradients(self, case):
        assert_close(through(case, "strips"), case.expected(), 2e-6)

    def test_strips_stay_bfloat16(self):
        case = Case(T=70, S=70, segments="packed", soft_cap=2.0)
        got = through(case, "strips", dtype=jnp.bfloat16)
        assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
        inputs = case.inputs(dtype=jnp.bfloat16)
        assert_close(got, expected(*inputs, case.allowed(), attention_cases.SCALE, case.soft_cap), 2e-2)

    def test_short_rows_are_dense_long_ones_in_blocks_and_those_between_in_strips(self):
        assert choose(Call(127, 127, 4, 2, 8, 8, "float32")) == "dense"
        assert choose(Call(20, 128, 4, 2, 8, 8, "float32", causal=False, other_keys=True)) == "chunked"
        assert choose(Call(4096, 4096, 4, 2, 8, 8, "float32", bias=True)) == "dense"
        for T, taken in ((150, "strips"), (513, "chunked"), (127, "dense")):
            case = Case(T=T, S=T, H=2, segments="packed")
            texts = {backend: str(jax.make_jaxpr(lambda *x, case=case, backend=backend: through(case, backend))())
                     for backend in ("auto", "dense", "chunked")}
            assert [other for other in ("dense", "chunked") if texts[other] == texts["auto"]] == [
                other for other in ("dense", "chunked") if other == taken]
            assert choose(Call(T, T, 4, 2, 8, 8, "float32", segments=True)) == taken

    def test_a_choice_that_can_not_be_kept_is_an_error_that_says_why(self):
        call = Call(64, 64, 4, 2, 8, 8, "float32")
        assert BACKENDS == ATTENTION and choose(call, "chunked") == "chunked"
        for backend, platform in (("splash", "tpu"), ("cudnn", "gpu"), ("triton", "gpu")):
            with pytest.raises(UserError, match=f"attention='{backend}' .* it is for {platform}, and this is cpu"):
                choose(call, backend)
        with pytest.raises(UserError, match="'chunked' .* bias"):
            choose(Call(64, 64, 4, 2, 8, 8, "float32", bias=True), "chunked")
        with pytest.raises(UserError, match="'strips' .* up to 512 tokens, not 513"):
            choose(Call(513, 513, 4, 2, 8, 8, "float32"), "strips")
        with pytest.raises(UserError, match="'strips' .* causal"):
            choose(Call(64, 64, 4, 2, 8, 8, "float32", causal=False), "strips")
        with pytest.raises(UserError, match="'flash' is not one of"):
            choose(call, "flash")
        with pytest.raises(UserError, match="'flash' is not one of"):
            Execution(attention="flash")

    def test_an_execution_chooses(self):
        assert dense_context(Execution(attention="chunked")).backend == "chunked"
        assert dense_context(Execution()).backend == "auto"

    def test_divided_over_devices(self):
        """Rows and heads on devices of their own, in blocks that fit them: the same values, and nothing exchanged."""
        case = Case(T=150, S=150, H=4, G=2, segments="packed")
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                             devices=jax.devices()[:4])
        by_head = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
        q, k, v, dout = (jax.device_put(x, by_head) for x in case.inputs())
        context = DenseContext(jnp.asarray(case.segment_ids()[0]), batch_axes=("data",), head_axes=("tensor",))

        def both(q, k, v, dout):
            run = functools.partial(attention_module.dense_attention, context=context, **case.options())
            out, transpose = jax.vjp(run, q, k, v)
            return out, *transpose(dout)

        with jax.set_mesh(mesh):
            program = jax.jit(both, out_shardings=by_head).lower(q, k, v, dout).compile()
        assert_close(program(q, k, v, dout), case.expected(), 2e-6)
        text = program.as_text()
        assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
