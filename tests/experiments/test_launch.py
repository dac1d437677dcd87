"""What the launchers would start, read back; and what they do with the statuses of what they started."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest
import yaml

from experiments import cli, train
from experiments.launch import gke, ray_job
from llm_jax.errors import UserError
from llm_jax.parallel import distributed

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"
RUN = ["--gin_file=gin/runs/pretrain_8b.gin", "--gin.RUN_DIR='/shared/my runs/$HOME'", "--gin.DATA_DIR='gs://b/d'",
       "--gin.WatchConfig.timeout_s=900"]
FAKES = {
    # Runs what it is given as the far machine would, and takes the place of srun and gcloud as well.
    "ssh": '[ "$1" = -tt ]; shift 2; exec bash -c "$1"',
    "srun": 'shift 2; export LLM_JAX_DISTRIBUTED=1; exec "$@"',
    "scontrol": 'echo "scontrol $*"',
    "gcloud": 'for last; do :; done; exec bash -c "${last#--command=}"',
    # A trainer that notes what it was told, and ends with the next of the statuses planned for it.
    "python": 'i=${JAX_PROCESS_ID:-0}; echo "$i ${JAX_COORDINATOR_ADDRESS:-} ${JAX_NUM_PROCESSES:-} $*" >> $NOTES.$i\n'
              'plan=($PLAN); n=$(wc -l < $NOTES.$i); exit $(echo ${plan[$((n - 1))]} | cut -d, -f$((i + 1)))',
}


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(LAUNCH / script), *arguments], cwd=ROOT, env=os.environ | environment, text=True,
                          capture_output=True, timeout=60)


@pytest.fixture
def fakes(tmp_path) -> pathlib.Path:
    for name, content in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def peers(monkeypatch, environment: dict[str, str]) -> tuple:
    """What `distributed.initialize` hands to JAX in an environment: coordinator, number, index."""
    asked = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: asked.append(args))
    with monkeypatch.context() as patch:
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "LLM_JAX_DISTRIBUTED"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        distributed.initialize()
    return asked[0]


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The environment and the arguments of the training command at the end of `words`."""
    at = words.index("experiments.train")
    assert words[at - 1] == "-m"
    environment = dict(word.split("=", 1) for word in words[:at] if re.match(r"(JAX|LLM_JAX)_\w+=", word))
    return environment, words[at + 1:]


def test_the_command_that_they_are_given_here_is_one(capsys):
    assert train.main([*RUN, "--print_config"]) == 0
    assert "timeout_s = 900" in capsys.readouterr().out
    assert cli.parse(RUN).files == ["gin/runs/pretrain_8b.gin"]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)]).returncode == 0


def test_ssh_tells_each_host_its_place(monkeypatch):
    said = bash("ssh.sh", "--hosts=me@a,b,c", "--dir=/srv/my repo", "--dry_run", "--", *RUN)
    lines = [shlex.split(line) for line in said.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["ssh", "-tt", host] for host in ("me@a", "b", "c")]
    for index, (*_, remote) in enumerate(lines):
        words = shlex.split(remote)
        assert words[:3] == ["cd", "/srv/my repo", "&&"]
        environment, arguments = split(words)
        assert arguments == RUN and peers(monkeypatch, environment) == ("a:8476", 3, index)
    assert bash("ssh.sh", "--", *RUN).returncode == 2 and bash("ssh.sh", "--host=a").returncode == 2


def test_slurm_leaves_peers_to_jax(monkeypatch):
    said = bash("slurm.sbatch", "--dry_run", *RUN)
    words = shlex.split(said.stdout)
    assert words[0] == "srun" and split(words)[1] == RUN
    exported = next(word for word in words if word.startswith("--export=ALL,")).split(",")[1:]
    assert peers(monkeypatch, dict(each.split("=") for each in exported)) == (None, None, None)
    head = (LAUNCH / "slurm.sbatch").read_text()
    gpus, tasks = (re.search(rf"^#SBATCH --{name}=(\d+)$", head, re.MULTILINE)[1]
                   for name in ("gpus-per-node", "ntasks-per-node"))
    assert gpus == tasks, "JAX gives each of Slurm's processes the one GPU of its number"


def test_tpu_vm_runs_on_all_workers(monkeypatch):
    said = bash("tpu_vm.sh", "--name=t", "--zone=z", "--project=p", "--dry_run", "--", *RUN)
    words = shlex.split(said.stdout)
    assert words[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t", "--zone=z", "--project=p"]
    assert words[8] == "--worker=all"
    remote = shlex.split(words[9].removeprefix("--command="), comments=False)
    environment, arguments = split(remote)
    assert arguments[:len(RUN) - 1] == RUN[:-1] and peers(monkeypatch, environment) == (None, None, None)


@pytest.mark.parametrize("topology, accelerator, chips", [("", "nvidia-h100-80gb", "nvidia.com/gpu"),
                                                          ("4x4", "tpu-v5-lite-podslice", "google.com/tpu")])
def test_gke_gets_a_jobset(monkeypatch, capsys, topology, accelerator, chips):
    assert gke.main(["--name=r", "--image=i", f"--accelerator={accelerator}", f"--topology={topology}", "--hosts=4",
                     "--chips_per_host=8", "--max_restarts=5", "--dry_run", "--", *RUN]) == 0
    jobset = yaml.safe_load(capsys.readouterr().out)
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "r"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    container, = pod["containers"]
    assert container["command"] == ["python", "-m", "experiments.train", *RUN]
    assert container["resources"]["limits"] == {chips: 8} and accelerator in pod["nodeSelector"].values()
    environment = {each["name"]: each.get("value") for each in container["env"]}
    if topology:
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
        assert peers(monkeypatch, environment) == (None, None, None)
    else:
        assert environment.pop("JAX_PROCESS_ID") is None, "which each pod has from its index"
        assert peers(monkeypatch, environment | {"JAX_PROCESS_ID": "3"}) == ("r-train-0-0.r:8476", 4, 3)


def test_xpk_and_ray_get_the_command(monkeypatch, capsys):
    gke.main(["--name=r", "--image=i", "--accelerator=v5litepod-256", "--xpk_cluster=c", "--dry_run", "--", *RUN])
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["xpk", "workload", "create"] and "--workload=r" in words
    environment, arguments = split(shlex.split(words[-1].removeprefix("--command=")))
    assert arguments == RUN and peers(monkeypatch, environment) == (None, None, None)

    ray_job.main(["--nodes=3", "--gpus_per_node=8", "--dry_run", "--", *RUN])
    for index, line in enumerate(capsys.readouterr().out.splitlines()):
        resources, _, command = line.partition("} ")
        assert resources == "{'CPU': 1, 'GPU': 8"
        environment, arguments = split(shlex.split(command))
        assert arguments == RUN and peers(monkeypatch, environment) == ("FIRST_NODE:8476", 3, index)
    with pytest.raises(UserError, match="Ray is not installed"):
        monkeypatch.setitem(sys.modules, "ray", None)
        ray_job.launch(1)


@pytest.mark.parametrize("plan, attempts, status", [
    ("0,0", 1, 0),
    ("75,137 134,1 0,0", 3, 0),  # a lost process, then a lost coordinator
    ("75,2 0,0", 1, 2),          # what a person has to put right
    ("75,75 75,75 75,75", 3, 75),
])
def test_ssh_starts_again_what_a_restart_mends(fakes, plan, attempts, status):
    said = bash("ssh.sh", "--hosts=a,b", f"--dir={fakes}", "--python=./python", "--max_restarts=2", "--wait_s=0", "--",
                *RUN, PATH=f"{fakes}:{os.environ['PATH']}", NOTES=str(fakes / "notes"), PLAN=plan)
    assert said.returncode == status, said.stderr
    for index in range(2):
        notes = (fakes / f"notes.{index}").read_text().splitlines()
        assert notes == [f"{index} a:8476 2 -m experiments.train {' '.join(RUN)}"] * attempts


@pytest.mark.parametrize("plan, restarts, requeues, status", [("0", "0", 0, 0), ("2", "0", 0, 2), ("75", "0", 1, 0),
                                                              ("143", "3", 1, 0), ("75", "20", 0, 75)])
def test_slurm_queues_again_what_a_restart_mends(fakes, plan, restarts, requeues, status):
    said = bash("slurm.sbatch", *RUN, PATH=f"{fakes}:{os.environ['PATH']}", NOTES=str(fakes / "notes"), PLAN=plan,
                PYTHON=str(fakes / "python"), SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="12",
                SLURM_RESTART_COUNT=restarts)
    assert (said.returncode, said.stdout.count("scontrol requeue 12")) == (status, requeues), said.stderr


def test_tpu_vm_starts_again_what_a_restart_mends(fakes):
    for plan, attempts, status in (("75 0", 2, 0), ("2 0", 1, 2)):
        (fakes / "notes.0").unlink(missing_ok=True)
        said = bash("tpu_vm.sh", "--name=t", "--zone=z", f"--dir={fakes}", "--python=./python", "--wait_s=0", "--",
                    *RUN, PATH=f"{fakes}:{os.environ['PATH']}", NOTES=str(fakes / "notes"), PLAN=plan)
        assert said.returncode == status, said.stderr
        assert len((fakes / "notes.0").read_text().splitlines()) == attempts
