"""The notebook, cell by cell, as a newcomer runs it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "experiments" / "colab.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALL = "NUM_STEPS, WIDTH, LAYERS = 30, 48, 1\n"  # what a test changes of the settings


def run(cells, tmp_path, said="", path=ROOT, **environment):
    """Runs cells one after another in one process, as a kernel does, without IPython."""
    script = tmp_path / "cells.py"
    script.write_text("".join(cell + "\n\n\n" for cell in cells))
    environment = os.environ | {"PYTHONPATH": str(path), "JAX_NUM_CPU_DEVICES": "1"} | environment
    return subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, input=said, text=True,
                          capture_output=True, timeout=300)


def test_its_form():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["cells"][0]["cell_type"] == "markdown"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in NOTEBOOK["cells"]
               if cell["cell_type"] == "code"), "it is kept without results"
    assert "NUM_STEPS" in CODE[0] and "WIDTH" in CODE[0] and "LAYERS" in CODE[0]


def test_from_text_to_a_chat(tmp_path):
    done = run([CODE[0], SMALL, *CODE[1:]], tmp_path, said="What is 2 + 3?\n三加四等于几？\n\n")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model:") == 2
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "runs/chat/manifest.json").read_text())["finished_steps"] == 30


@pytest.mark.parametrize("repository, says", [("", "set REPOSITORY"), ("a/project", "clone a/project, install [cuda]")])
def test_it_installs_what_is_missing(tmp_path, repository, says):
    """Where there is nothing it clones and installs; `git`, `pip` and `nvidia-smi` are stand-ins."""
    blind = ("import importlib.util, shutil, subprocess, sys, types\n"
             "find = importlib.util.find_spec\n"
             "importlib.util.find_spec = lambda name: None if name == 'llm_jax' else find(name)\n"
             "shutil.which = lambda name: name\n"
             "words = []\n"
             "subprocess.run = lambda command, check: words.append(\n"
             "    f'clone {command[3]}' if command[0] == 'git' else f'install {command[5][9:]}')\n"
             "sys.modules['jax'] = types.SimpleNamespace(devices=lambda: ', '.join(words))\n")
    done = run([CODE[0], f"REPOSITORY = {repository!r}", blind + CODE[1]], tmp_path)
    assert says in done.stdout + done.stderr
