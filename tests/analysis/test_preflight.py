"""Runs that can't fit are refused before anything is written, with advice; those that fit say what they will need."""

from __future__ import annotations

import dataclasses
import pathlib
import types

import jax
import pytest

from llm_jax.analysis import memory, preflight
from llm_jax.data.loader import DataConfig
from llm_jax.errors import UserError
from llm_jax.models import Execution
from llm_jax.parallel.mesh import MeshConfig
from llm_jax.training.assembly import Assembly
from llm_jax.training.loop import train
from llm_jax.training.optimizer import OptimizerConfig
from tests.training.common import LENGTH, MODEL, ROWS, prepare_tiny, settings

GIB = 2**30
# As a compiler for TPU and an allocator on a GPU say it.
ON_TPU = ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 33.09G of "
          "15.75G hbm. Exceeded hbm capacity by 17.34G.\n\nTotal hbm usage >= 33.59G:")
ALSO_ON_TPU = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.15G) "
               "exceeds available HBM (15.75G).")
ON_GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 51539607552 bytes."
IN_VMEM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130.00M of 128.00M vmem."


def assembly(execution=None, mesh=None, rows=ROWS, **options):
    return Assembly(MODEL, execution or Execution(), DataConfig("unused", LENGTH, rows), OptimizerConfig(),
                    mesh or MeshConfig(), num_steps=200, **options)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_tiny(tmp_path_factory.mktemp("corpus"))


def test_a_run_that_is_refused_leaves_nothing_in_the_way(data_dir, tmp_path, monkeypatch, capfd):
    """Then the same command trains, with the one program that was compiled to look at its memory."""
    run = settings(tmp_path / "run", data_dir, num_steps=5)
    monkeypatch.setenv(preflight.LIMIT, "0.001")
    with pytest.raises(UserError, match=r"a step does not fit: it needs [\d.]+ MiB on each of 1 devices \(parameters "
                                        r"[\d.]+ KiB, .*, and there are 1.0 MiB. What would help: .*remat='full'"):
        train(**run)
    assert not list((tmp_path / "run").rglob("manifest.json"))
    monkeypatch.setenv(preflight.LIMIT, "0")
    steps = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **facts: steps.append(facts.get("fun_name")) if "backend_compile" in event else None)
    train(**run)
    said = capfd.readouterr().err
    assert "memory: " in said and "per device: parameters " in said
    assert [name for name in steps if name and "train_step" in name] == ["jit(train_step)"]


def test_what_fits_is_said_in_a_line(monkeypatch):
    run = assembly(mesh=MeshConfig(fsdp=4))
    held = memory.of_state(run.abstract_state())
    # The state is given away, so that it counts once; the batch and scratch space come beside it.
    stats = types.SimpleNamespace(argument_size_in_bytes=held.peak + 1024, output_size_in_bytes=held.peak + 64,
                                  alias_size_in_bytes=held.peak, temp_size_in_bytes=3 * 2**20)
    monkeypatch.setattr(run, "compile_step", lambda: types.SimpleNamespace(memory_analysis=lambda: stats))
    monkeypatch.setattr(preflight, "host_memory", lambda: 4 * GIB)
    whole = held.peak + 1024 + 64 + 3 * 2**20
    assert preflight.check(run).startswith(
        f"memory: {memory.gib(whole)} of 1.0 GiB per device: parameters {memory.gib(held.parameters)}, optimizer "
        f"{memory.gib(held.optimizer)}, activations and gradients {memory.gib(whole - held.peak)}")
    stats.peak_memory_in_bytes = GIB + 1  # as compilers for TPU tell it
    with pytest.raises(UserError, match="does not fit: it needs 1.0 GiB on each of 4 devices"):
        preflight.check(run)


@pytest.mark.parametrize(("text", "words"), [
    (ON_TPU, r"it needs 33.1 GiB .* and there are 15.8 GiB"),
    (ALSO_ON_TPU, r"it needs 21.1 GiB .* and there are 15.8 GiB"), (ON_GPU, "it needs 48.0 GiB"),
])
def test_a_compiler_that_gives_up_is_heard(text, words, monkeypatch):
    run = assembly()

    def refuse():
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(run, "compile_step", refuse)
    with pytest.raises(UserError, match=words):
        preflight.check(run)


@pytest.mark.parametrize("text", [IN_VMEM, "INTERNAL: something else"])
def test_other_errors_of_the_compiler_stay_what_they_are(text, monkeypatch):
    run = assembly()

    def fail():
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(run, "compile_step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match=text[:20]):
        preflight.check(run)


def test_advice_names_only_what_is_not_done_yet():
    held = memory.StepMemory(parameters=GIB, optimizer=2 * GIB, activations=9 * GIB, peak=12 * GIB)

    def words(execution, limit=8 * GIB, **options):
        return "; ".join(preflight.advice(assembly(execution, **options), held, limit))

    all_open = words(Execution(attention="dense", loss_chunk=None), rows=256)
    for knob in ("remat='full'", "gradient_accumulation=256", "loss_chunk=1024", "attention='auto'", "dtype='bfloat16'",
                 "batch_size"):
        assert knob in all_open
    assert "MeshConfig.fsdp" not in all_open  # parameters are not what is too large
    assert "MeshConfig.fsdp=1" in words(Execution(), limit=3 * GIB)
    done = words(Execution(dtype="bfloat16", remat="full", loss_chunk=64), accumulation=ROWS)
    assert not any(knob in done for knob in ("remat", "gradient_accumulation", "loss_chunk", "dtype"))
    assert "MeshConfig.sequence" in done


def test_the_limit_of_a_device(monkeypatch):
    mesh = assembly(mesh=MeshConfig(data=8)).mesh
    monkeypatch.setattr(preflight, "host_memory", lambda: 8 * GIB)
    assert preflight.device_limit(mesh) == GIB
    monkeypatch.setenv(preflight.LIMIT, "1.5")
    assert preflight.device_limit(mesh) == 1.5 * GIB
    monkeypatch.setenv(preflight.LIMIT, "lots")
    with pytest.raises(UserError, match="'lots' is not a number of GiB"):
        preflight.device_limit(mesh)


def test_a_container_may_have_less_than_its_machine(tmp_path, monkeypatch):
    for name, value in (("memory.max", 5 * GIB), ("memory.current", 3 * GIB)):
        (tmp_path / name).write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\ninactive_file {GIB}\n")
    assert preflight._cgroup(str(tmp_path / "memory.max"), str(tmp_path / "memory.current")) == (5 * GIB, 2 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight._cgroup(str(tmp_path / "memory.max"), str(tmp_path / "memory.current")) == (0, 0)
    assert pathlib.Path("/proc").exists() is False or preflight.host_memory() > 0


def test_the_memory_of_a_state_is_what_its_shards_hold():
    run = assembly(mesh=MeshConfig(data=2, fsdp=4))
    held = memory.of_state(run.abstract_state())
    whole = MODEL.num_params() * 4
    norms = (2 * MODEL.num_layers + 1) * MODEL.embed_dim * 4  # whole on every device
    assert held.parameters == (whole - norms) / 4 + norms
    assert held.peak == held.parameters + held.optimizer
    assert dataclasses.asdict(held)["activations"] == 0
