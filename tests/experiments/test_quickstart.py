"""The quickstart: its settings reach the right script, and the whole road works on a small text of one's own."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import cli, quickstart
from llm_jax import runs
from llm_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def route(*flags: str):
    return quickstart.route(cli.parse(flags, shorthand=True))


def test_defaults_need_no_flags():
    prepare, train, values = route()
    assert (prepare, train) == ([], [])
    assert (values["RUN_DIR"], values["DATA_DIR"]) == ("runs/quickstart", "data/quickstart")


def test_settings_go_where_they_belong():
    prepare, train, values = route("--num_steps=5", "--gin.VOCAB_SIZE=300", "--gin.DATA_DIR='d'",
                                   "--gin.OptimizerConfig.b1=0.8")
    assert prepare == ["--gin.VOCAB_SIZE=300", "--gin.DATA_DIR='d'"]
    assert train == ["--gin.NUM_STEPS=5", "--gin.DATA_DIR='d'", "--gin.OptimizerConfig.b1=0.8"]
    assert values["DATA_DIR"] == "d"


def test_files_go_where_they_belong():
    prepare, train, values = route("--gin_file=gin/runs/debug.gin")
    assert (prepare, train) == ([], ["--gin_file=gin/runs/debug.gin"])
    assert values["RUN_DIR"] == "runs/debug"


@pytest.mark.parametrize("flag", ["--corpus=/my/old books.d", "--gin.CORPUS='/my/old books.d'"])
def test_another_corpus_is_another_run(flag):
    _, _, values = route(flag)
    assert (values["DATA_DIR"], values["RUN_DIR"]) == ("data/old-books", "runs/old-books")
    _, _, values = route(flag, "--run_dir=mine")
    assert (values["DATA_DIR"], values["RUN_DIR"]) == ("data/old-books", "mine")


@pytest.mark.parametrize(("flag", "words"), [
    ("--corpsu=x", "did you mean '--corpus'?"), ("--gin.CROPUS=x", "did you mean 'CORPUS'?"),
    ("--gin.Optimiser.b1=1", "neither"), ("--run_dir=7", "RUN_DIR must be a string"),
])
def test_what_no_script_has(flag, words):
    with pytest.raises(UserError) as raised:
        route(flag)
    assert words in str(raised.value)


def test_learning_is_judged(capsys):
    quick = quickstart.Quickstart([], [], {"RUN_DIR": "runs/a b", "DATA_DIR": "d"})
    assert quick._conclude({"bits_per_byte": 1.5, "unigram_bits_per_byte": 2.0}, "a b\n") == 0
    out = capsys.readouterr().out
    tried = quickstart.Quickstart(["--gin.CORPUS=/mine"], [], {"RUN_DIR": "r", "DATA_DIR": "d"})
    assert tried._conclude({"bits_per_byte": 1.6, "unigram_bits_per_byte": 2.0}, "x") == 0  # advice, not a failure
    assert "--num_steps" in capsys.readouterr().out
    assert "1.500" in out and "2.000" in out and "0.750" in out and "--run_dir='runs/a b'" in out
    assert quick._conclude({"bits_per_byte": 1.51, "unigram_bits_per_byte": 2.0}, "a b\n") == 1


def test_a_stop_that_fails_ends_it(monkeypatch, capsys):
    quick = quickstart.Quickstart(["--gin.NO_SUCH=1"], [], {"RUN_DIR": "r", "DATA_DIR": "d"})
    with pytest.raises(UserError, match="experiments.prepare ended with status 2"):
        quick.run()


def check_that_a_second_evaluation_is_spared(folder, result):
    quick = quickstart.Quickstart([], [], {"RUN_DIR": str(folder / "run"), "DATA_DIR": str(folder / "data")})
    called = []
    quick._call = lambda *args, **options: called.append(args) or '{"loss": 1.0}'
    assert quick._evaluate() == result and not called
    runs.update_manifest(folder / "run", finished_steps=61)
    assert quick._evaluate() == {"loss": 1.0} and len(called) == 1
    assert quick._evaluate() == {"loss": 1.0} and len(called) == 1
    runs.update_manifest(folder / "run", finished_steps=60)


def test_from_a_folder_of_chinese_to_a_served_model(tmp_path):
    """Everything `make quickstart` does after the install, on a text that is learnt at once, from another folder."""
    corpus = tmp_path / "诗"
    corpus.mkdir()
    for i in range(40):
        lines = [f"床前明月光,疑是地上霜。举头望明月,低头思故乡。第{i}页第{j}行。" for j in range(40)]
        (corpus / f"{i}.txt").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), f"--corpus={corpus}",
               "--gin_file=gin/runs/debug.gin", "--run_dir=run", "--data_dir=data", "--num_steps=60",
               "--gin.OptimizerConfig.warmup_steps=5", "--gin.LEARNING_RATE=0.02", "--gin.VOCAB_SIZE=400"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, text=True, encoding="utf-8", capture_output=True, check=False,
                          timeout=400, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    stops = re.findall(r"^== \d\. (.*)$", done.stdout, re.M)
    assert stops == ["prepare the text", "train", "evaluate on held-out text", "start the server", "ask it",
                     "stop the server"]
    assert done.stdout.count("first token after") == 4 and "tokens/s" in done.stdout
    result = json.loads(re.search(r'^\{.*"bits_per_byte".*\}$', done.stdout, re.M)[0])
    assert result["bits_per_byte"] <= 0.75 * result["unigram_bits_per_byte"]
    check_that_a_second_evaluation_is_spared(tmp_path, result)
    assert (tmp_path / "run" / "config.gin").is_file() and (tmp_path / "run" / "model.json").is_file()
    replay = subprocess.run([sys.executable, str(ROOT / "experiments" / "train.py"), "--gin_file", "run/config.gin"],
                            cwd=tmp_path, text=True, encoding="utf-8", capture_output=True, check=False,
                            env=environment)
    assert replay.returncode == 0, replay.stderr  # the run is finished, so the same settings find nothing to do
