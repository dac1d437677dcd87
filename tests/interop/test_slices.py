"""Parameters written and read in slices are Orbax's own, on any mesh and in any dtype."""

from __future__ import annotations

import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import checkpoints as checkpoints_lib
from llm_jax.checkpoints import Checkpoints
from llm_jax.errors import UserError
from llm_jax.interop.slices import SliceReader, SliceWriter, chunk_shape, contiguous, flat, nested, regions
from llm_jax.parallel.mesh import MeshConfig, make_mesh

SHAPES = {("layers", "w"): ((4, 64, 96), np.dtype(ml_dtypes.bfloat16)),
          ("layers", "experts", "gate"): ((4, 3, 8, 10), np.dtype(np.float32)),
          ("norm", "scale"): ((7,), np.dtype(np.float16)), ("embed",): ((57, 33), np.dtype(np.float32))}
UNITS = {("layers", "w"): 1, ("layers", "experts", "gate"): 2}


def values() -> dict:
    rng = np.random.default_rng(0)
    made = {path: rng.normal(size=shape).astype(dtype) for path, (shape, dtype) in SHAPES.items()}
    made["layers", "w"][2] = 0  # a chunk of zeros has to be there too
    return made


def write(directory, made: dict, most_bytes: int = 3000) -> None:
    chunks = {path: chunk_shape(shape, dtype.itemsize, UNITS.get(path, 0), most_bytes=most_bytes)
              for path, (shape, dtype) in SHAPES.items()}
    with SliceWriter(directory, SHAPES, chunks, {"some": "fact"}) as writer:
        for path, array in made.items():
            for index in np.ndindex(array.shape[:UNITS.get(path, 0)]):
                piece = array[index]
                writer.write(path, index, np.asfortranarray(piece))


def test_orbax_restores_what_was_written_in_slices(tmp_path):
    """Through `Checkpoints`, as every tool does: whole, on a mesh, in another dtype; names, shapes, dtypes as saved."""
    made = values()
    write(tmp_path / "c", made)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    target = {path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(
        *((None, "fsdp", "tensor") if path[-1] == "w" else ())))) for path, (shape, _) in SHAPES.items()}
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == [0]
        plain, sharded = checkpoints.restore_params(), checkpoints.restore_params(nested(target))
    assert jax.tree.structure(plain) == jax.tree.structure(nested(made))
    for path, array in made.items():
        got = flat(plain)[path]
        assert got.dtype == array.dtype and np.asarray(got).tobytes() == array.tobytes()
        np.testing.assert_array_equal(flat(sharded)[path], array.astype(np.float32))
    assert flat(sharded)["layers", "w"].sharding.shard_shape((4, 64, 96)) == (4, 16, 48)


def test_slices_are_read_of_what_either_wrote(tmp_path):
    made = values()
    write(tmp_path / "ours", made)
    with Checkpoints(tmp_path / "orbax") as checkpoints:
        checkpoints.save(7, {"params": jax.tree.map(jnp.asarray, nested(made))}, 0)
    for name, step in (("ours", 0), ("orbax", 7)):
        reader = SliceReader(tmp_path / name)
        assert reader.step == step
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in reader.shapes.items()} == SHAPES
        for path, index in ((("layers", "experts", "gate"), (3, 1)), (("embed",), ()), (("layers", "w"), (1,))):
            whole = made[path][index]
            out = np.empty(whole.shape, whole.dtype)
            reader.read_into(path, index, out)
            assert out.tobytes() == whole.tobytes()


def test_what_orbax_saves_lies_in_layers_too(tmp_path, monkeypatch):
    """So that exporting one layer does not read all: large leaves are cut by layer, and by expert."""
    monkeypatch.setattr(checkpoints_lib, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(checkpoints_lib, "_LEAST_UNIT_BYTES", 300)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"params": {"stack": jnp.zeros((4, 40, 8)), "experts": jnp.zeros((4, 16, 8, 10)),
                                        "embed": jnp.zeros((1000, 8)), "small": jnp.zeros((4, 3))}}, 0)
    text = (tmp_path / "c" / "1" / "params" / "array_metadatas" / "process_0").read_text()
    chunks = {entry["array_metadata"]["param_name"]: entry["array_metadata"]["chunk_shape"]
              for entry in json.loads(text)["array_metadatas"]}
    assert chunks["stack"] == [1, 40, 8] and chunks["experts"] == [1, 1, 8, 10] and chunks["small"] == [4, 3]
    assert chunks["embed"] == [125, 8]


def test_a_slice_that_was_never_written_is_damage(tmp_path):
    made = values()
    missing = made.pop(("norm", "scale"))
    write(tmp_path / "c", made)
    with pytest.raises(UserError, match="damaged or incomplete"):
        SliceReader(tmp_path / "c").read_into(("norm", "scale"), (), np.empty(7, np.float16))
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints, pytest.raises(UserError, match="can't be read"):
        checkpoints.restore_params()
    assert missing.shape == (7,)


lengths = st.integers(1, 12)


@settings(max_examples=100, deadline=None)
@given(shape=st.lists(lengths, min_size=1, max_size=4), unit=st.integers(0, 2), parts=st.lists(st.integers(1, 4)),
       most=st.integers(8, 1000), data=st.data())
def test_chunks_cover_a_leaf_and_cross_no_border_of_a_device(shape, unit, parts, most, data):
    unit = min(unit, len(shape) - 1)
    parts = [1] * unit + (parts + [1] * 4)[:len(shape) - unit]
    whole = tuple(length * count for length, count in zip(shape, parts, strict=True))
    chunk = chunk_shape(whole, 4, unit, tuple(shape), most)
    assert chunk[:unit] == (1,) * unit and all(1 <= c <= s for c, s in zip(chunk, shape, strict=True))
    covered = np.zeros(whole, int)
    for region in regions(whole, chunk):
        covered[region] += 1
        for part, length, count in zip(region, shape, parts, strict=True):
            assert count == 1 or part.start // length == (part.stop - 1) // length
    assert (covered == 1).all()
    if parts == [1] * len(parts):
        assert math.prod(chunk) * 4 <= most or chunk[unit:] == (1,) * (len(shape) - unit)


@pytest.mark.parametrize("shape, order", [((1000, 700), (1, 0)), ((600, 4, 80), (2, 0, 1)), ((7, 5, 3), (1, 2, 0)),
                                          ((0, 3), (1, 0)), ((20,), (0,))])
def test_a_view_copied_in_tiles_is_the_view(shape, order):
    view = np.random.default_rng(0).normal(size=shape).transpose(order)
    for dtype in (np.float64, np.float32, ml_dtypes.bfloat16):
        copy = contiguous(view, dtype)
        assert copy.flags.c_contiguous and copy.dtype == dtype
        np.testing.assert_array_equal(copy, view.astype(dtype))


def test_a_copy_in_another_dtype_is_the_only_one():
    stored = np.ones((2000, 1000), ml_dtypes.bfloat16)
    assert contiguous(stored, stored.dtype) is stored
    for values in (stored, stored.T):
        tracemalloc.start()
        copy = contiguous(values, np.float32)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < copy.nbytes * 1.1
