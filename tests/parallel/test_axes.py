"""Each axis of the mesh, and products of axes: one device's numbers, the promised bytes, the expected traffic."""

from __future__ import annotations

import math

import jax
import pytest

from llm_jax import models
from llm_jax.analysis.hlo import summary
from llm_jax.parallel.mesh import make_mesh
from llm_jax.parallel.rules import ShardingRules
from llm_jax.training.state import num_bytes_per_device
from tests.parallel import cases, volumes

# Logical axes of parameters → devices that share them; a second table where the moments are shared otherwise.
SHARED = {
    "data": ({},), "fsdp": ({"embed": 4},), "zero1": ({}, {"embed": 4}), "sequence": ({},),
    "tensor": (dict.fromkeys(("vocab", "mlp", "heads", "kv_heads"), 2),), "expert": ({"experts": 4},),
    "data × fsdp × tensor": ({"embed": 2, "vocab": 2, "mlp": 2, "heads": 2, "kv_heads": 2},),
    "fsdp × sequence × tensor": ({"embed": 4, "vocab": 2, "mlp": 2, "heads": 2, "kv_heads": 2},),
    "expert × sequence × tensor": ({"experts": 2, "vocab": 2, "mlp": 2, "heads": 2, "kv_heads": 2},),
    "pipeline × zero1 × sequence": ({"layers": 2}, {"layers": 2, "embed": 2}),
}
# Most temporary memory of a step, as a share of one device's: an even share, and what can't be shared. A share of rows
# or tokens comes with weights that are gathered, one of heads and widths with a residual stream that is whole.
ACTIVATIONS = {"data": 0.35, "fsdp": 0.35, "zero1": 0.35, "sequence": 0.35, "sequence, gathered": 0.35, "tensor": 0.7,
               "expert": 0.45, "data × fsdp × tensor": 0.3, "fsdp × sequence × tensor": 0.3,
               "expert × sequence × tensor": 0.4, "pipeline × zero1 × sequence": 0.2, "sequence, local": 0.35}
# Collectives that are written, and not the compiler's choice.
WRITTEN = {"sequence": "collective-permute", "sequence, gathered": "all-gather", "expert": "reduce-scatter",
           "expert, capacity": "all-to-all", "pipeline × zero1 × sequence": "collective-permute", "fsdp": "all-to-all"}


def expected_bytes(config, shared):
    """Of parameters, by hand: each array's size, divided as its logical axes are."""
    model = models.Decoder(config)
    sizes = jax.tree.leaves(jax.tree.map(lambda leaf: math.prod(leaf.shape), models.abstract_params(model)))
    axes = jax.tree.leaves(models.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    return sum(4 * size // math.prod(shared.get(name, 1) for name in names)
               for size, names in zip(sizes, axes, strict=True))


def check_held(state, config, parameters, moments=None):
    assert num_bytes_per_device(state.params) == expected_bytes(config, parameters)
    for moment in cases.moments(state):
        assert num_bytes_per_device(moment) == expected_bytes(config, parameters if moments is None else moments)


def check_activations(ran, single, most):
    assert ran.compiled.memory_analysis().temp_size_in_bytes <= most * single.compiled.memory_analysis(
    ).temp_size_in_bytes


@pytest.mark.parametrize("name", cases.CASES)
def test_loss_and_every_gradient_are_those_of_one_device(name):
    one, many = cases.single(name), cases.ran(name)
    assert many.mesh.size > 1
    cases.assert_same_gradients(one, many)


@pytest.mark.parametrize("name", SHARED)
def test_each_device_holds_its_share(name):
    check_held(cases.ran(name).after, cases.CASES[name].config, *SHARED[name])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_device_keeps_its_share_of_the_activations(name):
    check_activations(cases.ran(name), cases.single(name), ACTIVATIONS[name])


def test_a_table_that_does_nothing_is_found_out():
    case = cases.CASES["fsdp"]
    nothing = ShardingRules(dict.fromkeys(ShardingRules().parameters), None,
                            dict.fromkeys(ShardingRules().activations))
    ran = cases.run(case, nothing)
    with pytest.raises(AssertionError):
        check_held(ran.after, case.config, *SHARED["fsdp"])
    with pytest.raises(AssertionError):
        check_activations(ran, cases.single("fsdp"), ACTIVATIONS["fsdp"])


@pytest.mark.parametrize("name", volumes.NUMBERS)
def test_what_is_sent_is_what_arithmetic_says(name):
    ran = cases.ran(name)
    found = summary(ran.compiled.as_text(), dict(ran.mesh.shape)).collectives
    expected = {kind: numbers * volumes.BYTES for kind, numbers in volumes.NUMBERS[name].items()}
    assert found.keys() == expected.keys()
    for kind, (_, num_bytes) in found.items():
        assert num_bytes == pytest.approx(expected[kind], rel=0.1), kind


@pytest.mark.parametrize("name", WRITTEN)
def test_written_collectives_are_in_the_program(name):
    ran = cases.ran(name)
    axes = {"fsdp": "fsdp", "expert": "expert", "expert, capacity": "expert"}.get(name, "sequence")
    assert WRITTEN[name] in summary(ran.compiled.as_text(), dict(ran.mesh.shape)).along(axes).collectives


def test_every_axis_has_a_case():
    sizes = {axis for case in cases.CASES.values() for axis, size in vars(case.mesh).items() if size > 1}
    assert sizes == set(make_mesh(cases.CASES["data"].mesh).axis_names)
