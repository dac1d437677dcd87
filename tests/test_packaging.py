"""What is declared is what is used, and `make` builds the environment on machines that lack this or that."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Modules whose distribution has another name.
DISTRIBUTIONS = {"absl": "absl-py", "gin": "gin-config", "google": "protobuf", "grpc": "grpcio",
                 "grpc_health": "grpcio-health-checking", "grpc_reflection": "grpcio-reflection",
                 "PIL": "pillow", "orbax": "orbax-checkpoint", "casbin": "pycasbin", "stdnum": "python-stdnum",
                 "jetstream": "google-jetstream", "opentelemetry": "opentelemetry-sdk", "pydantic_core": "pydantic",
                 "starlette": "fastapi"}  # which is made of it, and gives it as its own


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*files: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for file in files for line in (ROOT / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_requirements_are_pinned_and_hold_neither_tensorflow_nor_torch():
    for requirement in requirements("requirements.txt", "requirements-dev.txt"):
        assert re.fullmatch(r"==[\d.]+", str(requirement.specifier)), requirement
        assert not re.search("tensorflow|torch|seqio|jetstream", requirement.name)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pins_lie_within_the_ranges(python):
    pins = {normal(r.name): str(r.specifier).removeprefix("==") for r in requirements("requirements.txt")
            if r.marker is None or r.marker.evaluate({"python_version": python})}
    for text in PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[normal(requirement.name)]), text
    tools = {normal(r.name): str(r.specifier).removeprefix("==") for r in requirements("requirements-dev.txt")}
    for text in PROJECT["project"]["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(tools[normal(requirement.name)]), text


def test_the_environment_is_the_pinned_one():
    for requirement in requirements("requirements.txt", "requirements-dev.txt"):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement


def test_every_import_is_declared():
    declared = {normal(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    declared.add("matplotlib")  # of the extra `dev`: plot_run alone draws, and says what to install
    for extra in ("jetstream", "tracing"):  # imported where they are asked for alone
        declared |= {normal(Requirement(text).name) for text in PROJECT["project"]["optional-dependencies"][extra]}
    ours = {"llm_jax", "serving", "experiments"}
    for path in (p for folder in ours for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in (n.split(".")[0] for n in names):
                if name not in sys.stdlib_module_names and name not in ours:
                    assert normal(DISTRIBUTIONS.get(name, name)) in declared, f"{path}: {name}"


def test_backends_agree_with_the_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"cuda", "tpu", "jetstream", "dev"} <= extras.keys()
    script = (ROOT / "tools" / "venv.sh").read_text()
    for backend in ("cuda", "tpu"):
        assert f"{backend}) extra='{extras[backend][0]}'" in script
        extra = Requirement(extras[backend][0]).extras
        assert extra <= set(importlib.metadata.metadata("jax").get_all("Provides-Extra") or [])


def test_the_folder_of_gin_files_does_not_shadow_gin():
    assert not list((ROOT / "gin").rglob("*.py"))
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert not any(pattern.startswith("gin") for pattern in packages)
    code = "import gin; print(gin.get_configurable)"
    for environment in ({}, {"PYTHONPATH": str(ROOT)}):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, **environment},
                       stdout=subprocess.DEVNULL)


def test_importing_the_library_is_quick_and_silent():
    code = ("import time; start = time.perf_counter(); import llm_jax; seconds = time.perf_counter() - start\n"
            "import sys; assert seconds < 2, seconds; assert 'gin' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_license():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text) > 11_000


def test_ci_makes_its_own_environment_and_runs_what_developers_run():
    path = ROOT / ".ci" / "run"
    lines = path.read_text().splitlines()
    assert os.access(path, os.X_OK) and lines[-2:] == ["make test", "make test-ops"]
    assert any("mktemp" in line for line in lines)


# A machine in small: a folder for PATH with the ordinary commands, and Pythons made up for the occasion.

FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
  "--version") echo "Python {version}" ;;
  "-c import sys"*) exit {is_old} ;;
  "-m pip --version") test ! -e "$(dirname "$0")/no-pip" ;;
  "-m venv "*) {venv} ;;
  "-m pip install"*) echo "$*" >> "{log}"; test ! -e "{log}.fail" ;;
  *) exit 9 ;;
esac
"""
FAKE_UV = """\
#!/bin/sh
echo "uv $*" >> "{log}"
case "$1" in
  venv) for folder; do :; done; mkdir -p "$folder/bin"; touch "$folder/pyvenv.cfg" "$folder/bin/no-pip"
        cp "$(dirname "$0")/python3" "$folder/bin/python" ;;
esac
"""
GOOD_VENV = 'mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python"'
NO_ENSUREPIP = 'mkdir -p "$3/bin"; echo "The virtual environment was not created: ensurepip is not available."; exit 1'


class Machine:
    def __init__(self, path: pathlib.Path, version: str = "3.11.4", venv: str = GOOD_VENV, has_uv: bool = False):
        self.repository, self.bin, self.log = path / "checkout", path / "bin", path / "log"
        (self.repository / "tools").mkdir(parents=True)
        self.bin.mkdir()
        for file in ("tools/venv.sh", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / file, self.repository / file)
        for command in ("sh", "cat", "cksum", "rm", "mv", "cp", "date", "head", "dirname", "ls", "mkdir", "touch"):
            (self.bin / command).symlink_to(shutil.which(command) or command)
        is_old = int(tuple(map(int, version.split(".")[:2])) < (3, 11))
        self._write("python3", FAKE_PYTHON.format(version=version, is_old=is_old, venv=venv, log=self.log))
        if has_uv:
            self._write("uv", FAKE_UV.format(log=self.log))

    def _write(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def make(self, group: str = "run", **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(self.bin / "sh"), "tools/venv.sh", group], cwd=self.repository, text=True,
                              check=False, capture_output=True, env={"PATH": str(self.bin), **environment})

    @property
    def installs(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if "pip install" in line]


def test_an_environment_is_made_once(tmp_path):
    machine = Machine(tmp_path)
    first = machine.make()
    assert first.returncode == 0 and "making .venv with Python 3.11.4" in first.stdout, first.stderr
    assert len(machine.installs) == 1 and machine.installs[0].endswith("-r requirements.txt")
    second = machine.make()
    assert (second.returncode, second.stdout, len(machine.installs)) == (0, "", 1)


def test_tools_are_installed_beside_it_and_cover_it(tmp_path):
    machine = Machine(tmp_path)
    machine.make("dev")
    assert machine.installs[-1].endswith("-r requirements.txt -r requirements-dev.txt")
    machine.make("run")
    machine.make("dev")
    assert len(machine.installs) == 1


def test_changed_requirements_install_again(tmp_path):
    machine = Machine(tmp_path)
    machine.make()
    with (machine.repository / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert machine.make().returncode == 0
    assert len(machine.installs) == 2


def test_an_interrupted_install_starts_again(tmp_path):
    machine = Machine(tmp_path)
    failing = pathlib.Path(f"{machine.log}.fail")
    failing.touch()
    failed = machine.make()
    assert failed.returncode == 1 and "the install did not finish" in failed.stderr
    failing.unlink()
    assert machine.make().returncode == 0
    assert len(machine.installs) == 2


def test_a_half_made_environment_is_made_anew(tmp_path):
    machine = Machine(tmp_path)
    (machine.repository / ".venv" / "bin").mkdir(parents=True)
    (machine.repository / ".venv" / "pyvenv.cfg").touch()
    done = machine.make()
    assert done.returncode == 0 and "making .venv" in done.stdout


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    machine = Machine(tmp_path)
    (machine.repository / ".venv").mkdir()
    (machine.repository / ".venv" / "letter.txt").touch()
    done = machine.make()
    assert done.returncode == 1 and "is not a Python environment" in done.stderr
    assert (machine.repository / ".venv" / "letter.txt").exists()


def test_backends(tmp_path):
    machine = Machine(tmp_path)
    machine.make(BACKEND="cuda")
    assert machine.installs[-1].endswith("-r requirements.txt jax[cuda13]")
    machine.make()  # the backend that is there stays
    machine.make("dev")
    assert len(machine.installs) == 2 and machine.installs[-1].endswith("jax[cuda13]")
    machine.make(BACKEND="tpu")
    assert machine.installs[-1].endswith("jax[tpu]")
    assert "is not one of cpu, tpu, cuda" in machine.make(BACKEND="gpu").stderr


def test_a_python_that_is_too_old_is_named(tmp_path):
    done = Machine(tmp_path, version="3.10.2").make()
    assert done.returncode == 1 and "python3 is Python 3.10.2, and 3.11 or newer is needed" in done.stderr


def test_no_python_at_all(tmp_path):
    machine = Machine(tmp_path)
    (machine.bin / "python3").rename(machine.bin / "python9")
    assert "there is no python3" in machine.make().stderr
    assert machine.make(PYTHON="python9").returncode == 0


def test_another_python_is_found(tmp_path):
    machine = Machine(tmp_path)
    (machine.bin / "python3").rename(machine.bin / "python3.12")
    assert machine.make().returncode == 0


def test_without_ensurepip_it_says_what_to_do(tmp_path):
    machine = Machine(tmp_path, venv=NO_ENSUREPIP)
    done = machine.make()
    assert done.returncode == 1 and "apt install python3-venv" in done.stderr and "uv" in done.stderr
    assert not (machine.repository / ".venv").exists()


def test_without_ensurepip_uv_is_used(tmp_path):
    machine = Machine(tmp_path, venv=NO_ENSUREPIP, has_uv=True)
    done = machine.make()
    assert done.returncode == 0 and "using uv" in done.stdout, done.stderr
    assert machine.log.read_text().splitlines() == [
        "uv venv --quiet --python python3 .venv",
        "uv pip install --quiet --python .venv/bin/python -r requirements.txt"]
    assert machine.make().stdout == ""


def test_make_passes_settings_on():
    done = subprocess.run(["make", "-n", "quickstart", "CORPUS=/a b/c", "NUM_STEPS=3"], cwd=ROOT, text=True, check=True,
                          capture_output=True)
    assert "'--corpus=/a b/c'" in done.stdout and "'--num_steps=3'" in done.stdout
    assert "--run_dir" not in done.stdout
    targets = subprocess.run(["make"], cwd=ROOT, text=True, check=True, capture_output=True).stdout
    assert all(f"  {name} — " in targets for name in ("quickstart", "test", "lint", "typecheck", "clean", "help"))
