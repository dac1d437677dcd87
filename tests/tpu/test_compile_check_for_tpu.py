"""`experiments.compile_check` for TPUs that are not there (make test-tpu): a tiny step that fits, one that can't."""

from __future__ import annotations

import json

import pytest

from experiments import compile_check
from llm_jax.errors import UserError

FLAGS = ("--gin_file=gin/runs/debug.gin", "--gin.MeshConfig.data=1", "--gin.MeshConfig.fsdp=2",
         "--gin.MeshConfig.tensor=2", "--gin.Execution.dtype='bfloat16'", "--gin.Execution.remat='full'", "--json")


def report(capsys, *flags):
    status = compile_check.main([*FLAGS, *flags])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_a_tiny_step_fits(topology, capsys):
    status, found = report(capsys, f"--topology={topology}", "--gin.BATCH_SIZE=64", "--gin.ROW_LENGTH=128",
                           "--gin.Execution.loss_chunk=512")
    assert status == 0 and found["fits"]
    assert found["attention"] == "splash" and found["uncounted"] == []
    memory, flops = found["memory"], found["flops"]
    assert 0 < memory["parameters"] < memory["optimizer"] < memory["peak"] < memory["limit"]
    assert flops["compiled"] == pytest.approx(flops["expected"], rel=0.1)
    assert all(loop["trips"] for loop in found["loops"])
    along = {axis for op in found["collectives"] for axis in op["axes"] or ()}
    assert along == {"fsdp", "tensor"}


def test_a_mesh_that_the_network_of_chips_can_t_hold():
    with pytest.raises(UserError, match="fsdp 8 × expert 8 can't be laid along the network of 64"):
        compile_check.main(["--gin_file=gin/runs/pretrain_mixtral.gin", "--topology=v5p:4x4x4"])


def test_the_compiler_s_refusal_is_does_not_fit(capsys):
    """Logits of 8.4 million tokens, a quarter of them on each chip."""
    status, found = report(capsys, "--topology=v5e:2x2", "--gin.BATCH_SIZE=65536", "--gin.ROW_LENGTH=128")
    assert status == 1 and not found["fits"]
    assert not found["memory"]["is_known"]
    assert found["memory"]["peak"] > 16 * 2**30 > found["memory"]["limit"] > 15 * 2**30


@pytest.mark.parametrize("topology, fsdp, tensor", [("v5e:16x16", 256, 1), ("v5p:4x4x4", 16, 4)])
def test_gradients_along_two_rings_are_reduce_scattered(topology, fsdp, tensor, capsys):
    """Left to itself, the compiler would sum each on every chip; see `parallel.rings`."""
    status, found = report(
        capsys, f"--topology={topology}", f"--gin.MeshConfig.fsdp={fsdp}", f"--gin.MeshConfig.tensor={tensor}",
        "--gin.ModelConfig.embed_dim=4096", "--gin.ModelConfig.mlp_dim=14336", "--gin.ModelConfig.num_heads=8",
        "--gin.ModelConfig.num_kv_heads=8", "--gin.ModelConfig.head_dim=128", "--gin.ModelConfig.vocab_size=16512",
        "--gin.BATCH_SIZE=256", "--gin.ROW_LENGTH=128", "--gin.Execution.loss_chunk=128")
    assert status == 0
    sent = {}
    for op in found["collectives"]:
        if "tensor" not in (op["axes"] or ()):
            sent[op["kind"]] = sent.get(op["kind"], 0) + op["bytes"]
    assert sent["reduce-scatter"] > 5 * sent["all-reduce"]
