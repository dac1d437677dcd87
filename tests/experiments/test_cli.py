"""The launcher: what Gin binds arrives, and what is wrong is said in one line before anything starts."""

from __future__ import annotations

import json
import pathlib

import pytest

from experiments import cli, gin_checks
from llm_jax.errors import UserError

IMPORTS = "from __gin__ import dynamic_registration\nfrom tests.experiments import toy\n"
TOY = IMPORTS + """
RUN_DIR = %gin.REQUIRED  # where it goes
NUM_STEPS = 7            # how long
RATE = 1e-3
BASE = %RATE

toy.train:
  run_dir = %RUN_DIR
  optimizer = @toy.Optimizer()
  data = @toy.Data()   # a comment
  num_steps = %NUM_STEPS

toy.Optimizer.peak_learning_rate = %BASE
toy.Data.data_dir = '/x'
"""


@pytest.fixture
def toy_file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "toy.gin"
    path.write_text(TOY)
    return str(path)


def run(capsys, file: str, *flags: str) -> dict:
    assert cli.gin_main("tests.experiments.toy:train", [file], list(flags)) == 0
    return json.loads(capsys.readouterr().out)


def failure(file: str, *flags: str) -> str:
    with pytest.raises(UserError) as raised:
        cli.gin_main("tests.experiments.toy:train", [file], list(flags))
    message = str(raised.value).split("\n  In call to configurable")[0]
    assert "\n" not in message
    return message


def test_values_arrive(capsys, toy_file):
    got = run(capsys, toy_file, "--gin.RUN_DIR='/a'", "--gin.NUM_STEPS", "9", "--gin.Optimizer.clip=None")
    assert got["run_dir"] == "/a" and got["num_steps"] == 9
    assert got["optimizer"] == {"peak_learning_rate": 1e-3, "warmup_steps": 10, "betas": [0.9, 0.95],
                                "schedule": "cosine", "clip": None}
    assert got["data"] == {"data_dir": "/x", "shuffle": True, "sizes": [1, 2]}


@pytest.mark.parametrize(("typed", "meant"), [
    ("'/a b'", "/a b"), ('"x"', "x"), ("/a b/c", "/a b/c"), ("runs/mine", "runs/mine"), ("gs://bucket/x", "gs://bucket/x"),
    ("2024/data", "2024/data"), ("书", "书"), ("~/x", "~/x"), ("a=b", "a=b"),
])
def test_strings_from_the_shell(capsys, toy_file, typed, meant):
    assert run(capsys, toy_file, f"--gin.RUN_DIR={typed}")["run_dir"] == meant


def test_short_form_of_a_macro(capsys, toy_file):
    assert run(capsys, toy_file, "--run-dir=/a", "--num_steps=2")["num_steps"] == 2


def test_later_settings_win(capsys, toy_file, tmp_path):
    more = tmp_path / "more.gin"
    more.write_text("NUM_STEPS = 1\nRUN_DIR = 'more'\n")
    flags = [f"--gin_file={toy_file}", "--gin_file", str(more), "--gin.RATE=1", "--gin.RATE=2"]
    got = run(capsys, "unused", *flags, "--gin.Optimizer.clip=3", "--gin.toy.Optimizer.clip=4.0")
    assert got["optimizer"]["clip"] == 4
    assert (got["num_steps"], got["run_dir"], got["optimizer"]["peak_learning_rate"]) == (1, "more", 2)


def test_the_written_configuration_replays(capsys, toy_file, tmp_path):
    first = run(capsys, toy_file, "--gin.RUN_DIR=a's \"run\"", "--gin.Optimizer.betas=(0.5, 0.6)")
    written = tmp_path / "config.gin"
    written.write_text(first["text"])
    again = run(capsys, str(written))
    assert again == first
    assert run(capsys, str(written), "--gin.NUM_STEPS=1")["num_steps"] == 1


def test_print_config_shows_everything_and_runs_nothing(capsys, toy_file):
    assert cli.gin_main("tests.experiments.toy:train", [toy_file], ["--print_config", "--gin.RUN_DIR=/a"]) == 0
    out = capsys.readouterr().out
    for line in ("RUN_DIR = '/a'", "  num_steps = %NUM_STEPS", "  warmup_steps = 10", "  optimizer = @toy.Optimizer()",
                 "  # extra: Plain(rate=0.1) by default"):
        assert line in out.splitlines()
    assert "{" not in out


def test_help_lists_macros_without_importing_the_root(capsys, toy_file):
    assert cli.gin_main("no.such.module:train", [toy_file], ["--help"], description="Trains.\n\nMore.") == 0
    out = capsys.readouterr().out
    assert "RUN_DIR = (required)" in out and "where it goes" in out and "NUM_STEPS = 7" in out and "Trains.\n" in out
    assert "examples:" in out


@pytest.mark.parametrize(("flags", "words"), [
    ([], ["RUN_DIR must be given", "--gin.RUN_DIR="]),
    (["--gin.RUN_DRI=x"], ["RUN_DRI", "did you mean 'RUN_DIR'?"]),
    (["--gin.num_step=3"], ["num_step", "did you mean 'NUM_STEPS'?"]),
    (["--run_dir=x", "--gin.Optimizer.peak_lerning_rate=1"],
     ["no parameter 'peak_lerning_rate'", "did you mean 'peak_learning_rate'?"]),
    (["--run_dir=x", "--gin.Optimiser.clip=1"], ["'Optimiser'", "did you mean 'Optimizer'?"]),
    (["--run_dir=x", "--gin.NUM_STEPS=ten"], ["--gin.NUM_STEPS=ten", "train.num_steps takes int, not 'ten'"]),
    (["--run_dir=x", "--gin.NUM_STEPS=1.5"], ["takes int, not 1.5"]),
    (["--run_dir=x", "--gin.NUM_STEPS=True"], ["takes int, not True (bool)"]),
    (["--run_dir=x", "--gin.NUM_STEPS=None"], ["takes int, not None"]),
    (["--run_dir=x", "--gin.RATE=fast"], ["--gin.RATE=fast", "Optimizer.peak_learning_rate takes float"]),
    (["--run_dir=12"], ["RUN_DIR=12", "takes str, not 12", "a string is written \"'12'\""]),
    (["--run_dir=x", "--gin.Optimizer.schedule=cosin"], ["Literal['cosine', 'constant']", "'cosin'"]),
    (["--run_dir=x", "--gin.Optimizer.betas=(1, True)"], ["tuple[float, float]"]),
    (["--run_dir=x", "--gin.Optimizer.betas=[1, 2]"], ["did you mean (1, 2)?"]),
    (["--run_dir=x", "--gin.train.data=@Optimizer()"], ["train.data takes Data | None, not @Optimizer()"]),
    (["--run_dir=x", "--gin.train.data=@Data"], ["did you mean @Data()?"]),
    (["--run_dir=x", "--gin.train.num_steps=4", "--gin.NUM_STEPS=3"], ["--gin.NUM_STEPS=3", "nothing would read it"]),
    (["--run_dir=x", "--gin.train.data=None", "--gin.Data.shuffle=False"], ["--gin.Data.shuffle", "nothing would"]),
    (["--run_dir=x", "--gin.eval/Optimizer.clip=2.0"], ["never used in scope 'eval'"]),
    (["--run_dir=x", "--gin.Optimizer.peak_learning_rate=-1"], ["peak_learning_rate=-1 is negative"]),
    (["--run_dir=x", "--gin.train.config_text='x'"], ["set by the launcher"]),
    (["--run_dir=x", "--gin.RATE=%RAT"], ["%RAT is read but never defined", "did you mean 'RATE'?"]),
    (["--run_dir=x", "--gin.RATE=%BASE"], ["reads itself"]),
    (["--run_dir=x", "--gin.RATE='1"], ["not a Gin value"]),
    (["--run_dir=x", "--gin.RATE="], ["not a Gin value"]),
    (["--run_dir=x", "--gin.RA-TE=1"], ["'RA-TE' is not a macro"]),
    (["--gin.RATE"], ["needs a value"]),
    (["--gin_fil=x"], ["unknown flag '--gin_fil'", "did you mean '--gin_file'?"]),
    (["--run_dri=x"], ["unknown flag '--run_dri'", "did you mean '--run_dir'?"]),
    (["--bogus"], ["unknown flag '--bogus'"]),
    (["stray"], ["'stray' is not a flag"]),
    (["--gin_file=gin/runs/quikstart.gin"], ["there is no file", "did you mean 'gin/runs/quickstart.gin'?"]),
    (["--gin_file=pretrain_8.gin"], ["did you mean 'gin/runs/pretrain_8b.gin'?"]),
])
def test_mistakes_on_the_command_line(toy_file, flags, words):
    message = failure(toy_file, *flags)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("old", "new", "words"), [
    ("toy.Optimizer.peak_learning_rate", "toy.Optimizer.peak_lerning_rate",
     [":15:", "did you mean 'peak_learning_rate'?"]),
    ("@toy.Optimizer()", "@toy.Optimiser()", [":11:", "has no 'Optimiser'", "did you mean 'Optimizer'?"]),
    ("import toy", "import toi", [":2:", "no module 'tests.experiments.toi'", "did you mean 'toy'?"]),
    ("import toy", "import toy as other", ["'toy' in", "is not imported", "known: other"]),
    ("from tests.experiments import toy", "import no_such_place", [":2:", "no module 'no_such_place'"]),
    ("from __gin__ import dynamic_registration\n", "", ["dynamic_registration"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.data_dir = 5", [":16:", "Data.data_dir takes str, not 5", "'5'"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.shuffle = True", ["Data.data_dir must be given"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.data_dir = '/x'\ntoy.Plain.rate = 1.0",
     [":17:", "nothing would read it", "@Plain"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.data_dir = '/x'\nCROPUS = 1", [":17:", "nothing would read it", "%CROPUS"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.data_dir = '/x", [":16:"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.data_dir = (", [":1"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.data_dir = %gin.REQUIRD", ["gin.REQUIRED"]),
    ("toy.Data.data_dir = '/x'", "toy.Data.data_dir = %gin.REQUIRED", ["Data.data_dir must be given"]),
    ("toy.Data.data_dir = '/x'", "include 'nowhere.gin'", [":16:", "there is no file 'nowhere.gin'"]),
    ("toy.Data.data_dir = '/x'", "include 'toy.gin'", [":16:", "includes itself"]),
    ("@toy.Data()", "@toy.PLAIN()", ["PLAIN"]),
    ("toy.train:", "toy.trian:", [":10:", "has no 'trian'", "did you mean 'train'?"]),
    ("toy.train:", "toy.measure:", ["not for this script"]),
])
def test_mistakes_in_a_file(tmp_path, old, new, words):
    assert old in TOY
    path = tmp_path / "toy.gin"
    path.write_text(TOY.replace(old, new).replace("%gin.REQUIRED  # where", "'x'  # where"))
    message = failure(str(path))
    assert all(word in message for word in words), message


def test_a_file_for_another_script(tmp_path):
    path = tmp_path / "other.gin"
    path.write_text(IMPORTS + "toy.measure.rows = 3\n")
    assert "not for this script" in failure(str(path))


def test_what_a_replaced_reader_read_is_no_mistake(capsys, toy_file):
    got = run(capsys, toy_file, "--run_dir=x", "--gin.train.num_steps=4", "--gin.train.data=None")
    assert got["num_steps"] == 4 and got["data"] is None


def test_scopes_and_functions_as_values(capsys, tmp_path, toy_file):
    path = tmp_path / "more.gin"
    path.write_text(IMPORTS + "include 'toy.gin'\nRUN_DIR = 'x'\n"
                    "toy.train.extra = @slow/toy.Plain()\nslow/toy.Plain.rate = 0.5\n"
                    "toy.train.data = @toy.make_data()\ntoy.make_data.data_dir = '/y'\n"
                    "toy.train.after = @toy.nothing\n")
    got = run(capsys, str(path))
    assert got["rate"] == 0.5 and got["data"]["data_dir"] == "/y" and got["after"] == "nothing"
    written = tmp_path / "config.gin"
    written.write_text(got["text"])
    assert run(capsys, str(written)) == got


def test_includes_do_not_depend_on_the_working_directory(tmp_path, toy_file, capsys, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "outer.gin").write_text("include '../toy.gin'\nRUN_DIR = 'x'\n")
    monkeypatch.chdir("/")
    assert run(capsys, str(tmp_path / "sub" / "outer.gin"))["num_steps"] == 7


def test_flags_of_a_root(capsys, tmp_path):
    def measure(*flags):
        return cli.gin_main("tests.experiments.toy:measure", argv=list(flags), flags=True)
    assert measure("--run_dir=12", "--text", "a b", "--rows=3", "--json_lines") == 3
    assert json.loads(capsys.readouterr().out) == ["12", "a b", 3, True]
    assert measure("--run_dir=x", "--gin.measure.rows=5", "--json_lines=False") == 3
    assert json.loads(capsys.readouterr().out) == ["x", None, 5, False]
    strange = "a\n'b\" \\ %X @y() # \x00\u2028\r书\ud800"
    assert measure("--run_dir=x", f"--text={strange}", "--stop=%a", "--stop", "'b'") == 3
    assert json.loads(capsys.readouterr().out) == ["x", strange, 8, False, "%a", "'b'"]
    assert measure("--run_dir=x", "--stop=('c', 'd')") == 3
    assert json.loads(capsys.readouterr().out) == ["x", None, 8, False, "c", "d"]
    path = tmp_path / "measure.gin"
    path.write_text(IMPORTS + "toy.measure.rows = 6\n")
    assert measure("--run_dir=x", "--gin_file", str(path)) == 3
    assert json.loads(capsys.readouterr().out) == ["x", None, 6, False]
    assert measure("--help") == 0
    out = capsys.readouterr().out
    assert "--run_dir" in out and "the run to measure" in out and "[8]" in out
    for flags, word in ((["--rowz=3", "--run_dir=x"], "did you mean '--rows'"), ([], "measure.run_dir must be given"),
                        (["--rows=a", "--run_dir=x"], "takes int")):
        with pytest.raises(UserError, match=word):
            measure(*flags)


def test_a_root_without_settings_runs(capsys):
    assert cli.gin_main("tests.experiments.toy:nothing", argv=[]) == 0
    assert capsys.readouterr().out == "ran\n"


def test_run_prints_one_line(capsys):
    def main():
        raise UserError("it is broken\n  In call to configurable 'x'")
    assert cli.run(main) == 2
    assert capsys.readouterr().err == "error: it is broken\n"

    def stopped():
        raise KeyboardInterrupt
    assert cli.run(stopped) == 130
    assert cli.run(lambda: None) == 0 and cli.run(lambda: 4) == 4


@pytest.mark.parametrize(("value", "annotation", "good"), [
    (1, float, True), (True, float, False), (True, int, False), (True, bool, True), (1, bool, False),
    (None, int | None, True), ("a", int | None, False), (object(), "unknowable", True), ((1, 2), tuple[int, ...], True),
    ((1, "a"), tuple[int, ...], False), ({"a": True}, dict[str, int], False),
])
def test_fits(value, annotation, good):
    assert gin_checks.fits(value, annotation) is good
