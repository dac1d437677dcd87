"""The golden checkpoints in and out again, byte for byte, and their older configs (tests/golden)."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import struct

import jax
import numpy as np
import pytest

from llm_jax import hf, models, runs
from llm_jax.interop import families
from llm_jax.interop.exporting import export_run
from llm_jax.interop.importing import import_run
from tests.interop.golden import FOLDERS, GOLDEN, VARIANTS, loaded


def test_every_folder_is_tested_and_small():
    present = {path.parent.name for path in GOLDEN.glob("*/config.json")}
    assert present == set(FOLDERS)
    assert {(p.parent.name, p.stem) for p in GOLDEN.glob("*/*.npz") if p.stem != "reference"} == set(VARIANTS)
    for name in present:
        assert sum(path.stat().st_size for path in (GOLDEN / name).iterdir()) < 300_000, name


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/config_v4.json")), ids=lambda path: path.parent.name)
def test_configs_of_older_checkpoints_describe_the_same_model(path, tmp_path):
    os.symlink(path.parent / "model.safetensors", tmp_path / "model.safetensors")
    shutil.copy(path, tmp_path / "config.json")
    expected = hf.read_config(path.parent)
    if weight := json.loads(path.read_text()).get("aux_loss_alpha"):  # of training only; transformers 5 drops it
        expected = dataclasses.replace(expected, experts=dataclasses.replace(expected.experts, balance_weight=weight))
    assert hf.read_config(tmp_path) == expected


def contents(folder: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes), read by hand."""
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: (t["dtype"], tuple(t["shape"]), data[start + t["data_offsets"][0]:start + t["data_offsets"][1]])
            for name, t in header.items()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_parameters_are_as_many_as_the_files_numbers(folder):
    """What is no copy and not ignored, counted in the file, is what the model counts itself."""
    _, params, config = loaded(folder)
    family = families.by_name(config.family)
    sizes = {families.canonical(family, name): int(np.prod(shape)) for name, (_, shape, _) in contents(
        GOLDEN / folder).items()}
    own = {tensor.name for tensor in family.tensors(config)}
    assert config.num_params() == sum(size for name, size in sizes.items() if name in own)
    assert config.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert jax.tree.structure(params) == jax.tree.structure(models.abstract_params(models.build(config)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_import_exported_again_is_the_same_to_the_last_byte(folder, tmp_path):
    """Every tensor's name, dtype, shape and bytes, ignored and tied ones too, and config.json as it was."""
    config = import_run(GOLDEN / folder, tmp_path / "run")
    run = runs.load(tmp_path / "run")
    assert config == run.config == loaded(folder)[2]
    assert run.manifest["imported"]["from"] == str(GOLDEN / folder)
    if folder in ("llama2", "qwen3_moe", "t5"):
        jax.tree.map(np.testing.assert_array_equal, run.params, loaded(folder)[1])
    export_run(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    assert contents(tmp_path / "out") == contents(GOLDEN / folder)
    for name in ("config.json", "generation_config.json"):
        if (GOLDEN / folder / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (GOLDEN / folder / name).read_bytes()


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_saved_loads_again(folder, tmp_path):
    """`hf.save` knows nothing of the folder: canonical names, no copies and no buffers, a config.json of its own."""
    _, params, config = loaded(folder)
    hf.save(tmp_path, params, config)
    family = families.by_name(config.family)
    original = {families.canonical(family, name): t for name, t in contents(GOLDEN / folder).items()}
    saved = contents(tmp_path)
    assert saved == {name: original[name] for name in saved}
    assert set(saved) == {tensor.name for tensor in family.tensors(config)}
    again = hf.load(tmp_path)
    assert again[2] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], params)
