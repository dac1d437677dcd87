"""A run directory: written, read back without Gin, refused when it is damaged."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import models, runs
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import complete
from llm_jax.inference.request import SamplingParams
from llm_jax.inference.service import Service
from llm_jax.inference.speculation import Policy
from llm_jax.kernels.attention import DenseContext
from llm_jax.models import Decoder, ModelConfig

ROOT = pathlib.Path(runs.__file__).parents[1]
TEXT = "def main():\n    return 你好，世界\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="module")
def params(tokenizer):
    return jax.jit(lambda key: models.init_params(Decoder(make_config(tokenizer)), key))(jax.random.key(1))


def make_config(tokenizer, **changes):
    return ModelConfig(**{"vocab_size": tokenizer.vocab_size, "num_layers": 1, "embed_dim": 16, "num_heads": 2,
                          "num_kv_heads": 1, "head_dim": 8, "mlp_dim": 24, "max_context": 64, **changes})


@pytest.fixture(scope="module")
def run_dir(tokenizer, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer.save(folder)
    directory = runs.create(folder / "r", make_config(tokenizer), folder / "tokenizer.model", "# gin\n", {"seed": 3})
    with Checkpoints(directory / runs.CHECKPOINTS) as checkpoints:
        checkpoints.save(0, {"params": params, "step": jnp.zeros((), jnp.int32)}, 0, force=True)
    return pathlib.Path(directory)


def copy(run_dir, tmp_path):
    """The run with everything but checkpoints copied, to be damaged."""
    target = tmp_path / "copy"
    target.mkdir()
    for item in run_dir.iterdir():
        if item.is_file():
            (target / item.name).write_bytes(item.read_bytes())
    (target / runs.CHECKPOINTS).symlink_to(run_dir / runs.CHECKPOINTS)
    return target


def test_what_was_written_is_read(run_dir, params, tokenizer):
    run = runs.load(run_dir)
    assert run.config == make_config(tokenizer)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(params), strict=True))
    assert run.tokenizer.decode(run.tokenizer.encode(TEXT)) == TEXT
    assert run.manifest["seed"] == 3 and "jax" in run.manifest["packages"]
    tokens_BT = np.array([run.tokenizer.encode("def main")[:4]])
    logits = run.model.apply({"params": run.params}, tokens_BT)
    assert logits.dtype == jnp.float32 and logits.shape == (*tokens_BT.shape, run.config.vocab_size)


def test_generate_is_greedy_decoding_of_the_module(run_dir):
    run = runs.load(run_dir)
    tokens = [run.tokenizer.bos_id, *run.tokenizer.encode("def 你")]
    count = len(tokens)
    apply = jax.jit(lambda t: run.model.apply({"params": run.params}, t))
    for _ in range(10):
        padded = np.zeros((1, 64), np.int32)
        padded[0, :len(tokens)] = tokens
        tokens.append(int(apply(padded)[0, len(tokens) - 1].argmax()))
    expected = run.tokenizer.decode(tokens[count:])
    assert run.generate("def 你", max_tokens=10, ignore_eos=True) == expected
    sampled = [run.generate("def", max_tokens=10, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_list_is_what_each_prompt_gives_alone(run_dir):
    """A lone prompt has an engine of one row; a list makes a larger one, which serves lone prompts as well then."""
    prompts = ["def 你", "", "return", "main():", "世界" * 9]
    asked = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    with runs.load(run_dir) as run:
        alone = [run.generate(prompt, **asked) for prompt in prompts]
        assert run._offline.service(1).engine.options.max_rows == 1
        assert run.generate(prompts, **asked) == alone
        service = run._offline.service(1)
        assert service.engine.options.max_rows == 8 and service.stats()["most_rows"] > 1
        assert run.generate(prompts[0], **asked) == alone[0] and run._offline.service(8) is service
        assert run.generate([], **asked) == []
        samples = run.complete(prompts[:2], n=3, **asked)
        assert [len(each) for each in samples] == [3, 3] and samples[1][0].text == alone[1]
        ranked = sorted(samples[0], key=lambda c: -np.mean(c.logprobs))
        assert [c.text for c in run.complete(prompts[0], n=2, best_of=3, **asked)] == [c.text for c in ranked[:2]]
        assert run.generate(prompts[0], best_of=3, **asked) == ranked[0].text
        with pytest.raises(UserError, match="best_of=2"):
            run.complete("a", n=3, best_of=2)
    assert run._offline._service is None


def test_embeddings(run_dir):
    run = runs.load(run_dir)
    texts = ["def 你", "main():\n    return"]
    for pooling in ("mean", "last"):
        found = run.embed(texts, pooling)
        assert found.dtype == np.float32 and found.shape == (2, run.config.embed_dim)
        for text, got in zip(texts, found, strict=True):
            tokens_BT = np.array([run.tokenizer.prompt_ids(text)])
            x_TD = np.asarray(run.model.apply({"params": run.params}, tokens_BT, np.arange(tokens_BT.size)[None],
                                              DenseContext(), method="hidden")[0][0], np.float64)
            np.testing.assert_allclose(got, x_TD.mean(0) if pooling == "mean" else x_TD[-1], atol=1e-5)
    np.testing.assert_allclose(run.embed(texts[0], "last"), run.embed(texts, "last")[0], atol=1e-6)
    run.close()


def test_a_draft_run_directory(run_dir, tokenizer, tmp_path):
    """Its weights count in the memory check, its tokens must be the same, and it changes nothing that comes out."""
    run = runs.load(run_dir)
    options = EngineConfig(max_rows=1, prefill_rows=1, max_proposed=2, page_size=8, dtype="float32")
    draft = copy(run_dir, tmp_path)
    fields = {"add_bos_token": False}  # not what tokens mean: the draft is given tokens
    (draft / "tokenizer_config.json").write_text(json.dumps(fields))
    engine, _ = run.engine(options, draft)
    assert engine.draft is not None and str(engine.draft.params["embed"]["embedding"].dtype) == "float32"
    engine.compile()
    engine.policy = Policy(2, prior=0.9)  # whether it pays here does not matter
    service = Service(engine, tokenizer)
    try:
        expected = run.complete("def", max_tokens=12, ignore_eos=True)
        got, = complete(service, [service.encode("def")], [SamplingParams(max_tokens=12, ignore_eos=True)])
        assert got.token_ids == expected.token_ids
        assert service.stats()["accepted"] > 0
    finally:
        service.close()
        run.close()
    one = run.config.num_params() * 4
    with pytest.raises(UserError, match=f"the draft model {draft}: the model does not fit"):
        run.engine(options, draft, available_bytes=2 * one - 1)
    with pytest.raises(UserError, match="the cache does not fit"):
        run.engine(options, draft, available_bytes=2 * one)
    with pytest.raises(UserError, match="max_proposed=0"):
        run.engine(EngineConfig(), draft)
    train_tokenizer([TEXT + "import sys"], 300).save(draft)
    with pytest.raises(UserError, match="has another tokenizer"):
        run.engine(options, draft)


def test_loading_needs_neither_gin_nor_the_launch_scripts(run_dir):
    code = (f"import sys\nfrom llm_jax import runs\nrun = runs.load({str(run_dir)!r})\nrun.params, run.tokenizer\n"
            "assert not {'gin', 'experiments', 'serving', 'torch', 'tensorflow'} & set(sys.modules), sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_folder_of_tokenizer_files_is_taken_whole_and_obeyed(run_dir, tokenizer, tmp_path, caplog):
    """As an import has them: other end tokens, no BOS in front, sampling unless the caller says otherwise."""
    source, target = tmp_path / "hf", copy(run_dir, tmp_path)
    tokenizer.save(source)
    for name, fields in (("tokenizer_config.json", {"add_bos_token": False, "chat_template": "x"}),
                         ("generation_config.json", {"eos_token_id": [5, 2], "do_sample": True, "temperature": 9.0,
                                                     "no_repeat_ngram_size": 3, "max_new_tokens": 12})):
        (source / name).write_text(json.dumps(fields))
    (source / "model.safetensors").write_bytes(b"not the tokenizer's")
    (target / "x.tiktoken").write_text("of another tokenizer")
    runs.create(target, make_config(tokenizer), source, "", {})
    assert not (target / "x.tiktoken").exists() and not (target / "model.safetensors").exists()
    with runs.load(target) as run:
        assert run.tokenizer.end_ids == (5, 2) and run.tokenizer.chat_template == "x"
        drawn = {run.complete("def", seed=seed, ignore_eos=True).token_ids for seed in range(3)}
        greedy = {run.complete("def", seed=seed, ignore_eos=True, temperature=0.0).token_ids for seed in range(3)}
        usage = run.complete("def", ignore_eos=True).usage
        tokens = next(iter(greedy))
        run.tokenizer.end_ids = (tokens[2], 2)
        ended = run.complete("def", temperature=0.0)
    assert (len(drawn), len(greedy)) == (3, 1)
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokenizer.encode("def")), 12)
    assert ended.finish_reason == "stop" and ended.token_ids == tokens[:tokens.index(tokens[2])]
    assert [r.message.count("no_repeat_ngram_size=3") for r in caplog.records] == [1]


@pytest.mark.parametrize("damage, named", [
    (lambda d: (d / "model.json").unlink(), "not a run directory"),
    (lambda d: (d / "model.json").write_text("{"), "model.json cannot be read"),
    (lambda d: (d / "model.json").write_text('{"vocab_size": 3}'), "missing"),
    (lambda d: (d / "tokenizer.model").unlink(), "no tokenizer"),
    (lambda d: (d / "tokenizer.model").write_bytes(b"\x00" * 50), "tokenizer.model"),
    (lambda d: (d / runs.CHECKPOINTS).unlink(), "no checkpoints"),
])
def test_damage_is_named(run_dir, tmp_path, damage, named):
    target = copy(run_dir, tmp_path)
    damage(target)
    with pytest.raises(UserError, match=named):
        run = runs.load(target)
        assert run.tokenizer and run.params


def test_a_checkpoint_of_another_shape_is_refused(run_dir, tokenizer, tmp_path):
    target = copy(run_dir, tmp_path)
    (target / "model.json").write_text(json.dumps(make_config(tokenizer, mlp_dim=32).to_dict()))
    with pytest.raises(UserError, match="mlp"):
        runs.load(target).load_params()


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(run_dir):
    run = runs.load(run_dir)
    with pytest.raises(UserError, match="does not fit"):
        run.engine(EngineConfig(), available_bytes=1000)
    assert "params" not in vars(run)


def test_a_tokenizer_of_another_run_is_refused(run_dir, tokenizer, tmp_path):
    target = copy(run_dir, tmp_path)
    (target / "model.json").write_text(json.dumps(make_config(tokenizer, vocab_size=280).to_dict()))
    with pytest.raises(UserError, match="not of one run"):
        runs.load(target).engine(EngineConfig())


def test_manifest_updates_are_whole(run_dir, tmp_path):
    target = copy(run_dir, tmp_path)
    runs.update_manifest(target, metrics={"loss": 1.5}, seed=4)
    manifest = runs.load(target).manifest
    assert manifest["metrics"] == {"loss": 1.5} and manifest["seed"] == 4 and "packages" in manifest
    assert not [p for p in target.iterdir() if p.name.startswith(".")]


def script(name, *flags):
    return subprocess.run([sys.executable, f"experiments/{name}.py", *flags], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)


def test_generate_script(run_dir):
    got = script("generate", f"--run_dir={run_dir}", "--prompt=def 你", "--max_tokens=5", "--temperature=0", "--json",
                 "--ignore_eos")
    assert got.returncode == 0, got.stderr
    answer = json.loads(got.stdout)
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == answer["completion_tokens"] == 5
    assert answer["finish_reason"] == "length"
    assert answer["text"] == runs.load(run_dir).generate("def 你", max_tokens=5, ignore_eos=True)


def test_generate_script_with_many_prompts(run_dir, tmp_path):
    (tmp_path / "prompts").write_text('def\n"a\\nb"\n', encoding="utf-8")
    (tmp_path / "schema.json").write_text('{"enum": ["世界", 7]}', encoding="utf-8")
    got = script("generate", f"--run_dir={run_dir}", f"--prompts_file={tmp_path / 'prompts'}", "--n=2", "--json",
                 "--temperature=1", "--min_p=0.01", "--logit_bias={7: -5}", "--logprobs=2", "--prompt_logprobs=0",
                 f"--json_schema={tmp_path / 'schema.json'}")
    assert got.returncode == 0, got.stderr
    answers = [json.loads(line) for line in got.stdout.splitlines()]
    assert [a["prompt_tokens"] for a in answers] == [
        n for text in ("def", "a\nb") for n in [len(runs.load(run_dir).tokenizer.prompt_ids(text))] * 2]
    for answer in answers:
        assert json.loads(answer["text"]) in ("世界", 7)
        assert [len(top) for top in answer["top_logprobs"]] == [2] * len(answer["token_ids"])
        assert len(answer["prompt_logprobs"]) == answer["prompt_tokens"] - 1


def test_evaluate_script_on_a_text(run_dir, tmp_path):
    """bits_per_byte against the dense logits, summed by hand."""
    text = "def main():\n    return 你好\n" * 30
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    got = script("evaluate", f"--run_dir={run_dir}", f"--text={tmp_path / 't.txt'}", "--row_length=64")
    assert got.returncode == 0, got.stderr
    measured = json.loads(got.stdout)
    run = runs.load(run_dir)
    tokens = np.array([run.tokenizer.bos_id, *run.tokenizer.encode(text), run.tokenizer.eos_id])
    nats = 0.0
    for start in range(0, len(tokens) - 1, 64):
        window = tokens[start:start + 65]
        logits = np.asarray(run.model.apply({"params": run.params}, window[None, :-1])[0], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= logp[np.arange(len(window) - 1), window[1:]].sum()
    assert measured["tokens"] == len(tokens) - 1 and measured["bytes"] == len(text.encode())
    assert measured["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    # With the context of an open model: rows are no longer than the text, or attention would take terabytes.
    fields = json.loads((run_dir / "model.json").read_text())
    shutil.copytree(run_dir, tmp_path / "long")
    (tmp_path / "long" / "model.json").write_text(json.dumps(fields | {"max_context": 131072}))
    got = script("evaluate", f"--run_dir={tmp_path / 'long'}", f"--text={tmp_path / 't.txt'}", "--row_length=131072")
    assert got.returncode == 0 and json.loads(got.stdout)["tokens"] == len(tokens) - 1, got.stderr
    assert measured["perplexity"] == pytest.approx(np.exp(measured["loss"]), rel=1e-6)
    assert measured["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("name, flags, said", [
    ("evaluate", ["--run_dir=/nowhere"], "not a run directory"),
    ("generate", ["--run_dir=/nowhere", "--prompt=a"], "not a run directory"),
    ("generate", ["--prompt=a"], "run_dir"),
    ("generate", ["--run_dir={run}"], "--prompt or a --prompts_file"),
    ("generate", ["--run_dir={run}", "--prompt=a", "--regex=a", "--grammar=b"], "exclude each other"),
    ("generate", ["--run_dir={run}", "--prompt=a", "--json_schema=/nowhere"], "cannot read /nowhere"),
    ("generate", ["--run_dir={run}", "--prompt=a", "--n=3", "--best_of=2"], "best_of=2"),
    ("generate", ["--run_dir={run}", "--prompt=a", "--temperature=-1"], "temperature"),
    ("generate", ["--run_dir={run}", "--prompt=" + "a b " * 100], "at most 63"),
    ("evaluate", ["--run_dir={run}", "--text=/nowhere/t.txt"], "cannot read /nowhere/t.txt"),
    ("evaluate", ["--run_dir={run}"], "--data_dir or --text"),
])
def test_bad_input_is_one_message(run_dir, name, flags, said):
    got = script(name, *[f.replace("{run}", str(run_dir)) for f in flags])
    assert got.returncode == 2 and said in got.stderr and "Traceback" not in got.stderr
    assert got.stderr.startswith("error: ") and got.stderr.count("\n") == 1, got.stderr
