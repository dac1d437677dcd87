from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import checksums
from llm_jax.checkpoints import Checkpoints
from llm_jax.errors import UserError
from llm_jax.parallel.mesh import MeshConfig, make_mesh

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(),
                        optax.scale_by_learning_rate(lambda _: 0.1))


def state(fill: float = 0.0) -> dict:
    params = {"layers": {"w": jnp.arange(32.0).reshape(8, 4) + fill}, "norm": {"scale": jnp.ones(4)}}
    return {"params": params, "opt_state": OPTIMIZER.init(params), "step": jnp.int32(3),
            "rng": jnp.arange(2, dtype=jnp.uint32)}


def shapes(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Checkpoints of steps 1 to 6, of which the last two and the multiples of 3 are kept."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, keep=2, keep_every=3) as checkpoints:
        for step in range(1, 7):
            assert checkpoints.save(step, state(step), step * 10, {"step": step})
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_everything_comes_back_as_it_was(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 5, 6] and checkpoints.latest_step() == 6
        restored, data_state, extra = checkpoints.restore(shapes(state()))
        assert (data_state, extra) == (60, {"step": 6})
        assert jax.tree.structure(restored) == jax.tree.structure(state())
        jax.tree.map(np.testing.assert_array_equal, restored, state(6))
        third, _, _ = checkpoints.restore(shapes(state()), step=3)
        np.testing.assert_array_equal(third["params"]["layers"]["w"], state(3)["params"]["layers"]["w"])


def test_saving_keeps_to_its_interval_and_never_saves_a_step_twice(tmp_path):
    with Checkpoints(tmp_path / "c", save_every=4) as checkpoints:
        assert [checkpoints.save(step, state(), step) for step in (3, 4, 4)] == [False, True, False]
        assert checkpoints.save(7, state(), 7, force=True)
        assert not checkpoints.save(7, state(), 7, force=True)
        checkpoints.wait()
        assert checkpoints.steps() == [4, 7]


def test_what_is_saved_is_the_state_when_save_was_called(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    now = state()["params"]
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"params": now}, 0)
        for _ in range(3):
            now = step(now)  # writes over the memory that is being saved
        checkpoints.wait()
        restored = checkpoints.restore_params()
    np.testing.assert_array_equal(restored["layers"]["w"], state()["params"]["layers"]["w"])


def test_parameters_alone_go_to_any_mesh_and_dtype(saved):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    target = {"layers": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(
        mesh, PartitionSpec("fsdp", "tensor")))}, "norm": {"scale": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}}
    with Checkpoints(saved, read_only=True) as checkpoints:
        params = checkpoints.restore_params(target)
        plain = checkpoints.restore_params()
    assert params["layers"]["w"].sharding.shard_shape((8, 4)) == (2, 2)
    assert params["norm"]["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["layers"]["w"], state(6)["params"]["layers"]["w"])
    assert plain["layers"]["w"].devices() == {jax.local_devices()[0]}


@contextlib.contextmanager
def as_nobody():
    """File permissions don't stop root; as another user they do."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_written_restores_and_is_left_as_it_was(saved):
    root = pathlib.Path(tempfile.mkdtemp())
    directory = root / "checkpoints"
    shutil.copytree(saved, directory)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with as_nobody():
            with pytest.raises(OSError):
                (root / "x").touch()
            with Checkpoints(directory, read_only=True) as checkpoints:
                params = checkpoints.restore_params()
            with pytest.raises(UserError, match="can't write checkpoints"):
                Checkpoints(root / "other")
        np.testing.assert_array_equal(params["layers"]["w"], state(6)["params"]["layers"]["w"])
        assert before == sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(root)


@pytest.mark.parametrize("change, message", [
    (lambda s: s["params"]["layers"].update(w=jnp.zeros((8, 5))),
     r"params/layers/w has shape \(8, 4\), expected \(8, 5\)"),
    (lambda s: s["params"].update(more=jnp.zeros(1)), r"params/more of shape \(1,\) is not in it"),
    (lambda s: s["params"].pop("norm"), r"params/norm/scale of shape \(4,\) is in it and has no place"),
    (lambda s: s.update(opt_state=optax.adafactor().init(state()["params"])), "state/opt_state/"),
])
def test_another_shape_is_named(saved, change, message):
    other = state()
    change(other)
    with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(shapes(other))


def test_missing_checkpoints(saved, tmp_path):
    with pytest.raises(UserError, match="no checkpoints at"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
    (tmp_path / "empty").mkdir()
    with Checkpoints(tmp_path / "empty", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(UserError, match="no complete checkpoint"):
            checkpoints.restore_params()
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"no checkpoint of step 4 .* \[3, 5, 6\]"):
            checkpoints.restore_params(step=4)


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "metadata"])
def test_a_damaged_checkpoint_is_named_with_what_to_go_back_to(copy, damage, has_checksums):
    if not has_checksums:  # Orbax notices these without
        (copy / "6" / "checksums.json").unlink()
    item = copy / "6" / "params"
    for path in [path for path in item.rglob("*") if path.is_file() and path.parent.name == "d"]:
        if damage == "truncate":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "flip":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
        elif damage == "remove":
            path.unlink()
    if damage == "metadata":
        (item / "_METADATA").write_text("{")
    with Checkpoints(copy, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"6 can't be read.*that of step 5"):
            checkpoints.restore_params(shapes(state()["params"]))


@pytest.mark.parametrize("error, reason", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (ValueError("OUT_OF_RANGE: Failed to write 9 bytes to file 4 [os_error_code='27']"), "File too large"),
])
def test_a_checkpoint_that_cannot_be_written_is_one_message(copy, monkeypatch, error, reason):
    """Whether it is noticed at once or, as usual, in the background; and it is raised once, not again on closing."""
    def fail(*_, **__):
        raise error

    for method in ("save", "wait_until_finished"):
        with pytest.raises(UserError, match=f"can't write a checkpoint to {copy}: {reason}; the last .* of step 6"):
            with Checkpoints(copy) as checkpoints, monkeypatch.context() as patch:
                patch.setattr(checkpoints._manager, method, fail)
                patch.setattr(checkpoints._manager, "close", fail)
                checkpoints.save(7, state(), 70)
                checkpoints.wait()


def test_a_checkpoint_cut_off_while_it_was_written_is_not_seen(copy):
    partial = copy / "7.orbax-checkpoint-tmp"
    shutil.copytree(copy / "6", partial)
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 6


def test_every_damaged_file_is_found_by_its_checksum(copy):
    """One flipped bit anywhere, also where nothing of it would be noticed in reading."""
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.has_checksums(6) and checkpoints.damage(6) is None
        files = [path for path in (copy / "6").rglob("*") if path.is_file()]
        for path in files:
            content = path.read_bytes()
            for damaged, difference in ((content[:-1], "bytes instead of"), (content[:-1] + bytes([content[-1] ^ 1]),
                                                                            "checksum differs"), (None, "is missing")):
                if damaged is None:
                    path.unlink()
                else:
                    path.write_bytes(damaged)
                found = checkpoints.damage(6)
                if path.name == "checksums.json":
                    assert (found is None) == (damaged is None)
                elif path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
                    assert found == f"{path.relative_to(copy / '6')} {found.split(' ', 1)[1]}" and difference in found
                path.write_bytes(content)
        assert checkpoints.damage(6) is None and len(files) > 8


def test_processes_share_the_reading_of_checksums(copy):
    path = next(path for path in sorted((copy / "6").rglob("d/*")))
    path.write_bytes(b"")
    found = [checksums.damage(epath.Path(copy / "6"), part, 3) for part in range(3)]
    assert len([one for one in found if one]) == 1


def test_a_checkpoint_without_its_checksums_is_never_complete(tmp_path, monkeypatch):
    """They are written before it gets its name, so a kill leaves it either with both or with neither."""
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "write", fail)
    with pytest.raises(UserError, match="No space left on device"), Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state(), 1)
    assert not (tmp_path / "c" / "1").exists()


def test_what_is_set_aside_is_kept_and_makes_room(copy):
    with Checkpoints(copy, keep=2) as checkpoints:
        assert checkpoints.set_aside(6).name == "damaged-6" and checkpoints.steps() == [3, 5]
        checkpoints.save(6, state(6), 60)
        checkpoints.wait()
        assert checkpoints.set_aside(6).name == "damaged-6-2" and checkpoints.latest_step() == 5
    with Checkpoints(copy) as checkpoints:
        for step in range(7, 12):
            checkpoints.save(step, state(step), step)
    assert {"damaged-6", "damaged-6-2"} <= {path.name for path in copy.iterdir()}
    assert (copy / "damaged-6" / "params").is_dir()
