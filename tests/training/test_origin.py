"""A checkpoint of another's making: imported, measured, asked, trained further, exported."""

from __future__ import annotations

import json
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from etils import epath

from experiments import evaluate, generate
from llm_jax import hf, runs
from llm_jax.data.loader import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.interop.exporting import export_run
from llm_jax.interop.importing import import_run
from llm_jax.parallel.mesh import MeshConfig
from llm_jax.training import origin
from llm_jax.training.loop import train
from llm_jax.training.optimizer import OptimizerConfig
from tests.interop.folders import LLAMA, contents, make
from tests.training.common import LENGTH, MODEL, ROWS, prepare_tiny, settings

OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1, decay_steps=10)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Prepared text; a bfloat16 Llama folder with the same tokenizer; the run directory imported from it."""
    root = tmp_path_factory.mktemp("origin")
    data = pathlib.Path(prepare_tiny(root))
    source = make(root / "hf", shard_bytes=40_000)
    Tokenizer.load(data).save(source)
    import_run(source, root / "imported")
    return {"root": root, "data": data, "hf": source, "imported": root / "imported"}


def further(places, run_dir, **changes):
    """Arguments of `train` for three steps from the imported run."""
    return settings(run_dir, str(places["data"]), model=None, init_from=str(places["imported"]), num_steps=3,
                    checkpoint_every=2, optimizer=OPTIMIZER) | changes


def test_from_a_folder_to_a_folder_with_training_between(places, tmp_path, capsys):
    assert evaluate.main([f"--run_dir={places['imported']}", f"--data_dir={places['data']}",
                          f"--row_length={LENGTH}", f"--batch_size={ROWS}"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert generate.main([f"--run_dir={places['imported']}", "--prompt=def ", "--max_tokens=3", "--json"]) == 0
    assert 0 < len(json.loads(capsys.readouterr().out)["token_ids"]) <= 3

    metrics = train(**further(places, tmp_path / "run", mesh=MeshConfig(fsdp=2, tensor=2), eval_batches=0))
    # What training begins with is what was imported, and it is measured alike; then it gets better.
    assert metrics["start"]["tokens"] == measured["tokens"]
    np.testing.assert_allclose(metrics["start"]["loss"], measured["loss"], rtol=1e-5)
    assert metrics["end"]["loss"] < metrics["start"]["loss"]
    run = runs.load(tmp_path / "run")
    assert run.config == runs.load(places["imported"]).config
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(run.params)} == {"float32"}
    assert run.manifest["settings"]["init_from"] == str(places["imported"])

    export_run(tmp_path / "run", tmp_path / "out")
    before, after = contents(places["hf"]), contents(tmp_path / "out")
    assert {n: facts[:2] for n, facts in after.items()} == {n: facts[:2] for n, facts in before.items()}
    assert all(after[name][2] != data for name, (_, _, data) in before.items() if "norm" not in name)
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (places["hf"] / name).read_bytes()
    _, exported, _, tokenizer = hf.load(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(a.dtype)), exported, run.params)
    assert tokenizer.encode("for x in y:") == run.tokenizer.encode("for x in y:")


def test_a_run_that_began_with_another_goes_on_where_it_was_stopped(places, tmp_path):
    """Without the run it began with, once there is a checkpoint."""
    shutil.copytree(places["imported"], tmp_path / "first")
    longer = further(places, tmp_path / "run", init_from=str(tmp_path / "first"))
    train(**longer)
    shutil.rmtree(tmp_path / "first")
    train(**longer | {"num_steps": 4})
    assert runs.load(tmp_path / "run").manifest["finished_steps"] == 4
    with pytest.raises(UserError, match="init_from was"):
        train(**longer | {"init_from": str(places["imported"]), "num_steps": 5})


@pytest.mark.parametrize("changes, said", [
    ({"model": MODEL}, "num_layers is 3 there and 2 here"),
    ({"init_from": None}, "nothing says what the model is"),
    ({"run_dir": "imported"}, "INIT_FROM"),
    ({"run_dir": "imported", "init_from": None}, "holds an imported model, which stays as it is"),
    ({"init_from": "nowhere"}, "is not a run directory"),
])
def test_what_cannot_be_begun_is_said_at_once(places, tmp_path, changes, said):
    arguments = further(places, tmp_path / "run")
    named = {name: str(places.get(value, places["root"] / value)) if isinstance(value, str) else value
             for name, value in changes.items()}
    before = sorted((str(p), p.stat().st_mtime_ns) for p in places["imported"].rglob("*"))
    with pytest.raises(UserError, match=said):
        train(**arguments | named)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in places["imported"].rglob("*")) == before


def test_text_of_another_tokenizer_is_refused(places, tmp_path):
    other = str(tmp_path / "data")
    prepare(other, corpus=str(pathlib.Path(json.__file__).parent), vocab_size=300, max_document_chars=2000,
            num_workers=1, verbose=False)
    with pytest.raises(UserError, match=f"TOKENIZER={places['imported']}"):
        train(**further(places, tmp_path / "run", data=DataConfig(other, LENGTH, ROWS)))
    assert not (tmp_path / "run" / runs.MODEL).exists()
    prepare(other, corpus=str(pathlib.Path(json.__file__).parent), tokenizer=str(places["imported"]),
            max_document_chars=2000, num_workers=1, verbose=False, force=True)
    train(**further(places, tmp_path / "run", data=DataConfig(other, LENGTH, ROWS), num_steps=1, eval_batches=1))


def test_a_run_born_here_exports_a_folder_of_its_own(places, tmp_path):
    """Of a seed, not an import: names and config.json of its family, float32, the tokenizer in files of both kinds."""
    train(**settings(tmp_path / "run", str(places["data"]), num_steps=1, eval_batches=1, optimizer=OPTIMIZER))
    export_run(tmp_path / "run", tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == LLAMA["architectures"]
    assert (fields["dtype"], fields["bos_token_id"], fields["eos_token_id"]) == ("float32", 1, 2)
    _, params, config, tokenizer = hf.load(tmp_path / "out")
    run = runs.load(tmp_path / "run")
    assert config == run.config
    jax.tree.map(np.testing.assert_array_equal, params, run.params)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "run" / "tokenizer.model").read_bytes()
    assert tokenizer.files.name == "tokenizer.json"  # it goes before the other, as in transformers
    for text in ("def main(argv=None):\n    return  0\n", "中文 text, émigré 🙂\t\r\n  ", "0123456789" * 3, ""):
        assert tokenizer.encode(text) == run.tokenizer.encode(text)
        assert tokenizer.prompt_ids(text) == run.tokenizer.prompt_ids(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_an_import_kept_is_handed_on_in_blocks(tmp_path):
    """Tensors that the model has no use for may be as large as any; files may lie in folders."""
    kept = tmp_path / "imported" / runs.ORIGIN
    (kept / "templates").mkdir(parents=True)
    (kept / "templates" / "tools.jinja").write_text("x")
    (kept / "ignored.safetensors").write_bytes(bytes(32 << 20))
    tracemalloc.start()
    origin.keep(tmp_path / "imported", epath.Path(tmp_path / "run"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    found = tmp_path / "run" / runs.ORIGIN
    assert (found / "templates" / "tools.jinja").read_text() == "x"
    assert (found / "ignored.safetensors").read_bytes() == bytes(32 << 20)
