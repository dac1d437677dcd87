"""The whole command on a tiny model for this machine's virtual devices; for TPUs see tests/tpu."""

from __future__ import annotations

import json

import pytest

from experiments import compile_check
from llm_jax.errors import UserError
from llm_jax.training.assembly import Assembly

TINY = ("--gin_file=gin/runs/debug.gin", "--topology=cpu:4", "--gin.MeshConfig.data=2", "--gin.MeshConfig.fsdp=2",
        "--gin.train.gradient_accumulation=2", "--gin.Execution.remat='full'", "--gin.Execution.loss_chunk=32")


@pytest.fixture(scope="module")
def found():
    """A step that is compiled once: as JSON, then with a limit just above and just below what it needs."""
    compiled, compile_step = [], Assembly.compile_step

    def once(assembly):
        compiled[:] = compiled or [compile_step(assembly)]
        return compiled[0]

    with pytest.MonkeyPatch.context() as patch:
        lines, states = [], []
        patch.setattr(Assembly, "compile_step", once)
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        states.append(compile_check.main([*TINY, "--json"]))
        peak = json.loads(lines[0])["memory"]["peak"] / 2**30
        states.append(compile_check.main([*TINY, f"--hbm_gib={peak * 1.01}"]))
        states.append(compile_check.main([*TINY, f"--hbm_gib={peak * 0.99}"]))
    return states, json.loads(lines[0]), lines[1:]


def test_the_status_says_whether_it_fits(found):
    states, report, (fits, does_not) = found
    assert states == [0, 0, 1]
    assert report["fits"] and report["memory"]["limit"] is None
    assert ": fits" in fits and ": DOES NOT FIT" in does_not


def test_memory_is_what_the_shardings_give(found):
    _, report, _ = found
    memory, whole = report["memory"], report["parameters"] * 4
    # Half of every matrix on each of two devices; norms are whole on all.
    assert whole / 2 < memory["parameters"] < 0.51 * whole
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], abs=64)
    assert memory["peak"] == memory["parameters"] + memory["optimizer"] + memory["activations"]
    assert memory["activations"] > 0


def test_arithmetic_is_within_a_tenth_of_the_analytic(found):
    _, report, (table, _) = found
    flops = report["flops"]
    assert flops["compiled"] == pytest.approx(flops["expected"], rel=0.1)
    assert flops["expected"] == sum(flops[name] for name in ("model", "attention_beside", "recomputed", "slots"))
    assert flops["recomputed"] > 0
    # Two microbatches, and the layers of each forward and backward.
    loops = {(loop["trips"], loop["times"]) for loop in report["loops"]}
    assert {(2, 1), (2, 2)} <= loops
    assert "FLOPs of one step" in table and "recomputed by remat" in table


def test_collectives_are_told_by_kind_and_axis(found):
    _, report, (table, _) = found
    kinds = {(op["kind"], tuple(op["axes"] or ())) for op in report["collectives"]}
    assert ("all-gather", ("fsdp",)) in kinds
    assert any(kind == "all-reduce" and "data" in axes for kind, axes in kinds)
    assert "all-gather along fsdp" in table


def test_neither_data_nor_a_run_directory_is_needed(capsys):
    assert compile_check.main(["--gin_file=gin/runs/pretrain_8b.gin", "--print_config"]) == 0
    assert "RUN_DIR = 'unused'" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    ([], "--topology must be given"),
    (["--topology=v5e"], "not a topology"),
    (["--topology=cpu:4096"], "needs 4096 virtual devices"),
    (["--topology=h100:12"], "hosts of 8"),
    (["--topology=cpu:2", "--hbm_gib=much"], "not a number of GiB"),
    (["--topology=cpu:2", "--gin.MeshConfig.fsdp=3"], "does not fit 2 devices"),
    (["--topology=cpu:2", "--gin.NUM_STEPS='x'"], "takes int"),
    (["--topolgy=cpu:2"], "did you mean '--topology'?"),
])
def test_mistakes_are_told(flags, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        compile_check.main(flags)
