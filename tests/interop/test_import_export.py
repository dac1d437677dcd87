"""Checkpoint folders become run directories and come back as they were; what does not fit is refused beforehand."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import resource

import jax
import numpy as np
import pytest

from experiments import cli, export_hf, import_hf
from llm_jax import hf, runs
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.errors import UserError
from llm_jax.interop import placing, slices
from llm_jax.interop.exporting import export_run
from llm_jax.interop.importing import import_run
from llm_jax.interop.safetensors import DTYPES, INDEX
from llm_jax.models import abstract_params, build
from llm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop.folders import LLAMA, contents, make, tensors_of
from tests.interop.golden import GOLDEN

TIED = LLAMA | {"tie_word_embeddings": True}


def test_shards_copies_and_buffers_come_back(tmp_path):
    """A tied copy and buffers on disk, bfloat16, several shards in, several shards out."""
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors[buffer] = np.arange(4, dtype=np.float32)

    source = make(tmp_path / "hf", TIED, add, shard_bytes=20_000)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3],  "top_k": 5}')
    (source / "modeling_evil.py").write_text("raise SystemExit")
    import_run(source, tmp_path / "run")
    assert (tmp_path / "run" / "generation_config.json").read_text() == '{"eos_token_id": [2, 3],  "top_k": 5}'
    export_run(tmp_path / "run", tmp_path / "out", shard_bytes=30_000)
    assert contents(tmp_path / "out") == contents(source) and buffer in contents(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in contents(source).values())
    assert not list((tmp_path / "run").rglob("*.py")) and not list((tmp_path / "out").rglob("*.py"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_other_dtypes_on_the_way_in_and_out(tmp_path):
    source = make(tmp_path / "hf")
    import_run(source, tmp_path / "run", dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(runs.load(tmp_path / "run").params)} == {"float32"}
    export_run(tmp_path / "run", tmp_path / "same")
    assert contents(tmp_path / "same") == contents(source)  # in the dtypes that were imported
    export_run(tmp_path / "run", tmp_path / "half", dtype="float16")
    expected = {name: array.astype(np.float16).tobytes() for name, array in tensors_of(LLAMA).items()}
    assert {name: data for name, (_, _, data) in contents(tmp_path / "half").items()} == expected
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == LLAMA | {"torch_dtype": "float16"}
    with pytest.raises(UserError, match="not 'int8'"):
        import_run(source, tmp_path / "run2", dtype="int8")


def test_a_mesh_finds_its_shares_in_chunks_of_their_own(tmp_path, monkeypatch):
    import_run(make(tmp_path / "hf"), tmp_path / "run", MeshConfig(fsdp=4, tensor=2))
    text = (tmp_path / "run/checkpoints/0/params/array_metadatas/process_0").read_text()
    chunks = {entry["array_metadata"]["param_name"]: entry["array_metadata"]["chunk_shape"]
              for entry in json.loads(text)["array_metadatas"]}
    assert chunks["layers.attention.q"] == [1, 8, 2, 8] and chunks["embed.embedding"] == [160, 8]
    with pytest.raises(UserError, match="can't be divided among the 3 devices of mesh axis fsdp"):
        import_run(tmp_path / "hf", tmp_path / "other", MeshConfig(fsdp=3))
    assert not (tmp_path / "other").exists()


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, array):
    return lambda tensors: tensors.update({name: array})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("fields, change, said", [
    (LLAMA, drop(Q), f"1 tensor missing: {Q}"),
    (LLAMA, lambda t: [t.pop(name) for name in list(t) if "mlp" in name], "9 tensors missing: .* and 4 more"),
    (LLAMA, put("model.layers.7.q.weight", np.zeros(3, np.float32)), "no place for: model.layers.7.q.weight"),
    (LLAMA, put(Q + "_scale_inv", np.zeros(3, np.float32)), "no place for"),
    (LLAMA, put(Q, np.zeros((32, 31), DTYPES["BF16"])), rf"{Q} has shape \[32, 31\], expected \[32, 32\]"),
    (LLAMA, put(Q, np.zeros((32, 32), np.int32)), f"{Q} has dtype I32"),
    (LLAMA, put(Q, np.zeros((32, 32), DTYPES["F8_E4M3"])), "quantized checkpoints are not read"),
    (LLAMA, put(Q, np.zeros((32, 32))), f"{Q} has dtype F64, which is not kept"),
    (TIED, put("lm_head.weight", np.zeros((320, 32), DTYPES["BF16"])), "lm_head.weight should be a copy of"),
    (TIED, put("lm_head.weight", np.zeros((3, 32), DTYPES["BF16"])), r"lm_head.weight has shape \[3, 32\]"),
    (LLAMA | {"architectures": ["MambaForCausalLM"]}, None, "MambaForCausalLM"),
    (LLAMA | {"some_new_attention": True}, None, "some_new_attention"),
    (LLAMA | {"num_hidden_layers": 10**9}, None, "num_hidden_layers=1000000000 is more than the .* tensors beside it"),
    (LLAMA | {"rms_norm_eps": 10**400}, None, "rms_norm_eps"),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, fields, change, said):
    source = make(tmp_path / "hf", LLAMA if change is None else fields, change or (lambda tensors: None))
    (source / "config.json").write_text(json.dumps(fields))
    for read in (lambda: import_run(source, tmp_path / "run"), lambda: hf.load(source)):
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_a_place_that_is_taken_is_left_alone(tmp_path):
    source = make(tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        import_run(source, tmp_path / "run")
    (tmp_path / "run" / "mine").unlink()
    import_run(source, tmp_path / "run")  # an empty folder is no one's
    with pytest.raises(UserError, match="is there already"):
        export_run(tmp_path / "run", source)
    with pytest.raises(UserError, match="local disks"):
        import_run(source, "gs://bucket/run")


@pytest.mark.parametrize("where", ["import", "export"])
def test_a_full_disk_leaves_nothing_half_made(tmp_path, monkeypatch, where):
    source = make(tmp_path / "hf")
    if where == "export":
        import_run(source, tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slices.SliceWriter, "_commit", lambda self: full())
    monkeypatch.setattr(slices, "_TRANSACTION_BYTES", 1)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: full() or write(*a))
    with pytest.raises(UserError, match="No space left"):
        import_run(source, tmp_path / "run") if where == "import" else export_run(tmp_path / "run", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_disk_s_refusal_of_a_chunk_is_a_user_error(tmp_path, monkeypatch):
    source = make(tmp_path / "hf")
    commit = slices.SliceWriter._commit

    def on_a_full_disk(self):
        """What TensorStore says where files can't grow; the parameters are first written when they are committed."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            commit(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(slices.SliceWriter, "_commit", on_a_full_disk)
    with pytest.raises(UserError, match="can't write to .*run.*OUT_OF_RANGE"):
        import_run(source, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [source]


def test_a_damaged_run_is_not_exported(tmp_path):
    import_run(make(tmp_path / "hf"), tmp_path / "run")
    description = tmp_path / "run/huggingface/tensors.json"
    content = description.read_text()
    for damaged, said in (("{}", "tensors.json is damaged"), (content[:100], "tensors.json")):
        description.write_text(damaged)
        with pytest.raises(UserError, match=said):
            export_run(tmp_path / "run", tmp_path / "out")
    description.write_text(content)
    for path in (tmp_path / "run/checkpoints/0/params/d").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged or incomplete"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_parameters_as_they_were_trained_go_out_under_the_names_that_came_in(tmp_path):
    """A later checkpoint of an imported run: its values, in the dtypes and under the names of the import."""
    import_run(GOLDEN / "gpt2", tmp_path / "run")
    run = runs.load(tmp_path / "run")
    changed = jax.tree.map(lambda leaf: leaf * 2, run.params)
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.save(5, {"params": changed}, 0, force=True)
    export_run(tmp_path / "run", tmp_path / "out")
    before, after = contents(GOLDEN / "gpt2"), contents(tmp_path / "out")
    assert list(sorted(after)) == sorted(before)
    for name, (dtype, shape, data) in before.items():
        assert after[name][:2] == (dtype, shape)
        if ".attn.bias" not in name:  # a buffer
            doubled = np.frombuffer(data, DTYPES[dtype]) * 2
            np.testing.assert_array_equal(np.frombuffer(after[name][2], DTYPES[dtype]), doubled)
    export_run(tmp_path / "run", tmp_path / "first", step=0)
    assert contents(tmp_path / "first") == before


MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
                   "num_experts_per_tok": 2, "num_hidden_layers": 2}


def test_tensors_go_straight_to_their_shards(tmp_path, monkeypatch):
    """On a mesh whose axes cut layers' weights and experts, whether the host puts a leaf together or its devices do."""
    source = make(tmp_path / "hf", MIXTRAL)
    expected = hf.load(source)[1]
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    for on_host, where in ((1 << 30, mesh), (0, mesh), (0, None)):
        monkeypatch.setattr(placing, "ON_HOST_BYTES", on_host)
        params = hf.load(source, mesh=where)[1]
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        gate = params["layers"]["experts"]["gate"]
        shard = gate.addressable_shards[0].data.shape
        assert gate.shape == (2, 4, 32, 64) and shard == (gate.shape if where is None else (2, 2, 16, 32))


def test_loading_keeps_the_dtype_or_takes_another(tmp_path):
    source = make(tmp_path / "hf")
    model, params, config, tokenizer = hf.load(source)
    assert tokenizer is None and {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert model.apply({"params": params}, np.zeros((1, 4), np.int32)).dtype == np.float32
    wide = hf.load(source, dtype="float32")[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), wide, params)
    hf.save(tmp_path / "out", params, config)
    assert contents(tmp_path / "out") == contents(source)
    hf.save(tmp_path / "out", wide, config)  # over what is there
    assert {dtype for dtype, _, _ in contents(tmp_path / "out").values()} == {"F32"}
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == LLAMA["architectures"] and fields["dtype"] == "float32"
    assert hf.read_config(tmp_path / "out") == config


def test_what_is_saved_takes_the_place_of_a_checkpoint_and_of_nothing_else(tmp_path):
    """Shards and index go; an unsaved model or one cut off never lies under a config.json."""
    source = make(tmp_path / "hf")
    _, params, config, _ = hf.load(source)
    out = make(tmp_path / "out", LLAMA | {"rope_theta": 5.0}, shard_bytes=20_000)
    (out / "README.md").write_text("mine")
    hf.save(out, params, config)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert contents(out) == contents(source) and hf.read_config(out) == config


@pytest.mark.parametrize("fails", range(5))
def test_no_fault_leaves_weights_under_another_config(tmp_path, monkeypatch, fails):
    """Whichever file is the last that can be written or moved: the old checkpoint, the new one, or no config.json."""
    _, params, config, _ = hf.load(make(tmp_path / "hf"))
    out = make(tmp_path / "out", LLAMA | {"rope_theta": 5.0})
    before = contents(out), (out / "config.json").read_bytes()
    moved, replace = [], pathlib.Path.replace

    def limited(self, target):
        if len(moved) == fails:
            raise OSError(errno.EIO, "Input/output error")
        moved.append(target)
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", limited)
    if fails == 4:  # weights and config.json, each written and then moved
        hf.save(out, params, config)
        assert hf.read_config(out) == config
        return
    with pytest.raises(UserError, match="Input/output error"):
        hf.save(out, params, config)
    assert not any(path.name.endswith(".tmp") for path in out.iterdir())
    if fails < 2:
        assert (contents(out), (out / "config.json").read_bytes()) == before
    else:
        with pytest.raises(UserError, match="has no config.json"):
            hf.load(out)


def test_a_tokenizer_of_our_own_is_saved_as_it_is_exported(tmp_path):
    """With the tokenizer.json that transformers reads: of tokenizer.model alone it would make Llama's."""
    source = make(tmp_path / "hf", LLAMA | {"vocab_size": 512})
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n" * 20], 300)
    _, params, config, _ = hf.load(source)
    hf.save(tmp_path / "saved", params, config, tokenizer)
    found = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert found["model"]["type"] == "BPE" and len(found["model"]["vocab"]) == tokenizer.vocab_size
    text = "def f(x):\n    return  x"
    assert hf.load(tmp_path / "saved")[3].encode(text) == tokenizer.encode(text)


def test_parameters_of_another_model_are_not_saved(tmp_path):
    config = hf.read_config(make(tmp_path / "hf"))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(build(config)))
    other = params | {"more": np.zeros(2)}
    for wrong, said in ((params | {"final_norm": {"scale": np.zeros(3)}}, r"final_norm/scale has shape \(3,\)"),
                        (other, "more is no parameter"), ({"embed": params["embed"]}, "lacks final_norm/scale")):
        with pytest.raises(UserError, match=said):
            hf.save(tmp_path / "out", wrong, config)
    assert not (tmp_path / "out").exists()


def test_the_scripts(tmp_path, capsys):
    source, run, out = make(tmp_path / "hf"), tmp_path / "run", tmp_path / "out"
    assert import_hf.main([f"--hf_dir={source}", f"--run_dir={run}", "--fsdp=2", "--dtype=float32"]) == 0
    assert "llama" in capsys.readouterr().out
    assert export_hf.main([f"--run_dir={run}", f"--hf_dir={out}", "--dtype=float32"]) == 0
    assert {dtype for dtype, _, _ in contents(out).values()} == {"F32"}
    assert cli.run(lambda: import_hf.main([f"--hf_dir={tmp_path}", f"--run_dir={tmp_path / 'no'}"])) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"error: {tmp_path} is no checkpoint folder: it has no config.json"


def test_a_folder_that_may_only_be_read_can_be_imported(tmp_path):
    source = make(tmp_path / "hf")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in source.iterdir())
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    import_run(source, tmp_path / "run")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in source.iterdir()) == before
    assert pathlib.Path(tmp_path / "run" / "model.json").exists()
