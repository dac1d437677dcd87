"""The format against the reference library, and what damage is called."""

from __future__ import annotations

import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.errors import UserError
from llm_jax.interop.safetensors import DTYPES, INDEX, NAMES, SINGLE, Folder, Writer
from tests.interop.folders import contents, write


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {f"some.{name}": rng.integers(0, 2, (3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    return made | {"scalar": np.array(3.0, np.float32), "empty": np.zeros((0, 4), np.float16),
                   "f32": rng.normal(size=(7, 3, 2)).astype(np.float32),
                   "bf16": rng.normal(size=(9, 2)).astype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("shard_bytes", [10**9, 150])
def test_the_reference_library_reads_what_is_written(tmp_path, shard_bytes):
    """Dtype, shape and bytes of every dtype, in one file and in several."""
    expected = arrays()
    write(tmp_path, expected, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (tmp_path / INDEX).exists() == (shard_bytes == 150)
    found = {}
    for file in files:
        tensors = safetensors.deserialize(file.read_bytes())
        found |= dict(tensors)
        assert sum(len(entry["data"]) for _, entry in tensors) <= shard_bytes or len(tensors) == 1
        if len(files) > 1:
            listed = json.loads((tmp_path / INDEX).read_text())["weight_map"]
            assert {name for name, file_name in listed.items() if file_name == file.name} == {n for n, _ in tensors}
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name]["dtype"], found[name]["shape"]) == (NAMES[array.dtype], list(array.shape))
        assert bytes(found[name]["data"]) == array.tobytes()
    if shard_bytes == 150:
        total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(array.nbytes for array in expected.values())


def test_what_the_reference_library_writes_is_read(tmp_path):
    expected = {name: array for name, array in arrays().items() if "C64" not in name and "E8M0" not in name}
    safetensors.numpy.save_file(expected, tmp_path / SINGLE, metadata={"format": "pt"})
    with Folder(tmp_path) as folder:
        assert set(folder.tensors) == set(expected)
        for name, array in expected.items():
            got = folder.read(name)
            assert got.dtype == array.dtype and got.flags.writeable
            assert got.shape == array.shape and got.tobytes() == array.tobytes()
        np.testing.assert_array_equal(folder.read("f32", slice(2, 5)), expected["f32"][2:5])
        assert folder.read("f32", slice(6, 99)).shape == (1, 3, 2)


def test_the_same_tensors_make_the_same_bytes_in_any_order(tmp_path):
    expected = arrays()
    announced = [(name, NAMES[array.dtype], array.shape) for name, array in expected.items()]
    for directory, order in (("a", list(expected)), ("b", list(reversed(expected)))):
        with Writer(tmp_path / directory, announced, shard_bytes=150) as writer:
            for name in order:
                writer.write(name, expected[name])
        write(tmp_path / directory / "single", expected)
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*") if p.is_file()) for d in "ab"]
    assert files[0] == files[1] and not any("tmp" in str(p) for p in files[0])
    for path in files[0]:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert set(contents(tmp_path / "a")) == set(expected)
    assert all(info.offset % 8 == 0 for info in Folder(tmp_path / "a" / "single").tensors.values()
               if DTYPES[info.dtype].itemsize == 8)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    write(tmp_path, {"x": np.arange(4)})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="not written: b"):
        with Writer(tmp_path, [("a", "F32", (2,)), ("b", "F32", (2,))]) as writer:
            writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="announced"):
        with Writer(tmp_path, [("a", "F32", (2,))]) as writer:
            writer.write("a", np.zeros(2, np.float64))
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("content, said", [
    (b"", "cut off"),
    (b"\x01\x02", "cut off"),
    (raw({"a": entry()}, bytes(8), length=1 << 60), "its header should have 1152921504606846976"),
    (raw(b"not json"), "its header is not JSON"),
    (raw(b"\xff\xfe{}"), "its header is not JSON"),
    (raw(b"[" * 100_000), "its header is not JSON"),
    (raw([1, 2]), "its header must hold a JSON object"),
    (raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', bytes(8)), "'a' occurs twice"),
    (raw({"a": entry()}, bytes(7)), "cut off inside of tensor a"),
    (raw({"a": entry()}, bytes(9)), "goes on after tensor a"),
    (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "tensor b overlaps tensor a"),
    (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "tensor b leaves a gap after tensor a"),
    (raw({"a": entry(offsets=(8, 16))}, bytes(16)), "tensor a leaves a gap after the header"),
    (raw({"a": entry(shape=(3,))}, bytes(8)), r"tensor a of F32 \[3\] takes 12 bytes, its offsets span 8"),
    (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "offsets span -8"),
    (raw({"a": entry(dtype="Q4_K")}, bytes(8)), "tensor a has the unknown dtype 'Q4_K'"),
    (raw({"a": entry(shape=(-2, -1))}, bytes(8)), "tensor a has the impossible shape"),
    (raw({"a": entry(shape=(2.0,))}, bytes(8)), "tensor a has the impossible shape"),
    (raw({"a": entry(shape=(True, 2))}, bytes(8)), "tensor a has the impossible shape"),
    (raw({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)), "takes"),
    (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "impossible offsets"),
    (raw({"a": {"dtype": "F32"}}, bytes(8)), "tensor a lacks"),
    (raw({"a": 5}, bytes(8)), "tensor a lacks"),
])
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, content, said):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        Folder(tmp_path)
    assert str(tmp_path / SINGLE) in str(caught.value) and "\n" not in str(caught.value)


def damage_index(directory: pathlib.Path, **changes: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("damage, said", [
    (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors, which is not"),
    (lambda d: damage_index(d, c=None), "model-00002-of-00002.safetensors holds tensor c, which .* does not list"),
    (lambda d: damage_index(d, c=None, d=None), "model-00002-of-00002.safetensors, of which .* lists no tensor"),
    (lambda d: damage_index(d, more="model-00001-of-00002.safetensors"), "lacks tensor more"),
    (lambda d: damage_index(d, a="model-00002-of-00002.safetensors"), "holds tensor a, which .* lies in model-00002"),
    (lambda d: damage_index(d, b="../elsewhere"), "tensor b lies in '../elsewhere', which is no file name"),
    (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
    (lambda d: (d / INDEX).write_text("{"), "is not JSON"),
    (lambda d: (d / INDEX).unlink(), "holds neither"),
    (lambda d: write(d, {"old": np.zeros(2)}), f"holds {SINGLE} and model-00001-of-00002.safetensors, model-00002-of"),
    (lambda d: ((d / INDEX).unlink(), write(d, {"old": np.zeros(2)})), f"holds {SINGLE} and model-00001"),
    (lambda d: [write(d, {"old": np.zeros(2)}), *(f.unlink() for f in d.glob("model-*"))],
     f"holds {SINGLE}, and {INDEX} says that the model lies in model-00001-of-00002.safetensors, model-00002"),
    (lambda d: write_tensor_into(d / "model-00002-of-00002.safetensors"), "holds tensor a, which .* lies in model-0"),
])
def test_shards_and_index_that_disagree(tmp_path, damage, said):
    write(tmp_path, {name: np.zeros(2) for name in "abcd"}, shard_bytes=32)
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        Folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_other_weights_beside_a_checkpoint_are_left_alone(tmp_path):
    """As they lie on the hub: a second copy in the maker's own form, and an index that names one file alone."""
    write(tmp_path, {"x": np.zeros(2)})
    (tmp_path / "consolidated.safetensors").write_bytes(b"not looked at")
    (tmp_path / "consolidated-00001-of-00002.safetensors").write_bytes(b"not looked at")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"not looked at")
    assert set(contents(tmp_path)) == {"x"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": SINGLE}}))
    assert set(contents(tmp_path)) == {"x"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": SINGLE, "y": SINGLE}}))
    with pytest.raises(UserError, match=f"{SINGLE} lacks tensor y"):
        Folder(tmp_path)


def write_tensor_into(path: pathlib.Path) -> None:
    path.write_bytes(raw({"a": entry("F64", (2,), (0, 16))}, bytes(16)))


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="can run code"):
        Folder(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        Folder(tmp_path / "nowhere")


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    write(tmp_path, {"x": np.zeros(100)})
    folder = Folder(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-8])
    with pytest.raises(UserError, match="ends inside of tensor x"):
        folder.read("x")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("whole")
    write(directory, {name: np.arange(6.0).reshape(2, 3) for name in ("a.weight", "b.weight", "c")}, shard_bytes=60)
    return directory


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_truncation_and_no_flipped_bit_is_more_than_a_user_error(whole, tmp_path_factory, data):
    """Of headers and index; flipped bits of values are other values, which nothing in the format can tell."""
    directory = tmp_path_factory.mktemp("damaged", numbered=True)
    names = sorted(path.name for path in whole.iterdir())
    chosen = data.draw(st.sampled_from(names))
    for name in names:
        content = bytearray((whole / name).read_bytes())
        if name == chosen:
            # Of a shard, the header's length and its text; everything of the index.
            end = len(content) if name == INDEX else 8 + struct.unpack("<Q", content[:8])[0]
            if data.draw(st.booleans()):
                del content[data.draw(st.integers(0, len(content) - 1)):]
            else:
                for bit in data.draw(st.lists(st.integers(0, end * 8 - 1), min_size=1, max_size=3)):
                    content[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(content)
    try:
        with Folder(directory) as folder:
            for name, info in folder.tensors.items():
                assert folder.read(name).nbytes == info.nbytes
    except UserError as error:
        assert str(directory) in str(error)
