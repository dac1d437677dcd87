"""Starts a run on GKE: fills in a JobSet of this folder and hands it to kubectl, or a workload to xpk.

    python -m experiments.launch.gke --name=run8b --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=16x16 \\
        --hosts=64 --chips_per_host=4 --dry_run -- --gin_file=gin/runs/pretrain_8b.gin --gin.RUN_DIR="'gs://b/8b'"

What follows -- goes to experiments.train as it is. The image holds this repository as its working directory, with what
requirements.txt and the backend's extra install, and its `python` runs it.
"""

from __future__ import annotations

import json
import pathlib
import shlex
import string
import subprocess
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from experiments import cli  # noqa: E402
from experiments.launch import common  # noqa: E402
from llm_jax.errors import UserError  # noqa: E402

_FOLDER = pathlib.Path(__file__).resolve().parent
EXAMPLES = (
    "python -m experiments.launch.gke --name=run8b --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=16x16 "
    "--hosts=64 --chips_per_host=4 --dry_run -- --gin_file=gin/runs/pretrain_8b.gin",
    "python -m experiments.launch.gke --name=run8b --image=IMAGE --accelerator=nvidia-h100-80gb --hosts=4 "
    "--chips_per_host=8 --dry_run -- --gin_file=gin/runs/pretrain_8b.gin",
    "python -m experiments.launch.gke --name=run8b --image=IMAGE --xpk_cluster=CLUSTER --accelerator=v5litepod-256 "
    "--dry_run -- --gin_file=gin/runs/pretrain_8b.gin",
)


def launch(name: str, image: str, accelerator: str, hosts: int = 1, chips_per_host: int = 4, topology: str = "",
           max_restarts: int = 20, xpk_cluster: str = "", dry_run: bool = False, train: tuple[str, ...] = ()) -> int:
    """Starts it, or prints what would be started.

    Args:
      name: of the JobSet, or of xpk's workload.
      image: the container image.
      accelerator: as the nodes' label has it (nvidia-h100-80gb, tpu-v5-lite-podslice), or for xpk the TPU type.
      hosts: pods, and processes.
      chips_per_host: GPUs or TPU chips of each.
      topology: of a TPU slice, as 16x16; empty for GPUs.
      max_restarts: how often all pods are started again after a failure.
      xpk_cluster: hand it to xpk for this cluster; xpk knows hosts, chips and topology itself.
      dry_run: print the manifest, or xpk's command, and do nothing.
      train: an argument of experiments.train; what follows -- is added.

    Returns:
      The exit status.

    Raises:
      UserError: a size makes no sense, or the tool that starts it is not installed.
    """
    if min(hosts, chips_per_host) < 1 or max_restarts < 0:
        raise UserError(f"hosts={hosts} and chips_per_host={chips_per_host} must be at least 1, max_restarts="
                        f"{max_restarts} at least 0")
    command = ["python", "-m", "experiments.train", *train]
    if xpk_cluster:
        words = ["xpk", "workload", "create", f"--cluster={xpk_cluster}", f"--workload={name}",
                 f"--docker-image={image}", f"--tpu-type={accelerator}", f"--max-restarts={max_restarts}",
                 "--restart-on-exit-codes=1,75",  # beside 127–255, on which xpk restarts anyway
                 f"--command=LLM_JAX_DISTRIBUTED=1 {shlex.join(command)}"]
        return _run(words, None, dry_run, shlex.join(words) + "\n")
    manifest = render(name=name, image=image, accelerator=accelerator, hosts=hosts, chips_per_host=chips_per_host,
                      topology=topology, max_restarts=max_restarts, command=command)
    return _run(["kubectl", "apply", "-f", "-"], manifest, dry_run, manifest)


def render(*, topology: str, command: list[str], **fields: object) -> str:
    """The JobSet's YAML; with a topology that of TPUs."""
    template = string.Template((_FOLDER / ("gke_tpu.yaml" if topology else "gke_gpu.yaml")).read_text())
    # A list in JSON is one in YAML too, whatever is in its strings; but Kubernetes would replace $(NAME) in them.
    words = json.dumps([word.replace("$(", "$$(") for word in command])
    return template.substitute(fields, topology=topology, command=words)


def _run(words: list[str], content: str | None, dry_run: bool, shown: str) -> int:
    if dry_run:
        print(shown, end="")
        return 0
    try:
        return subprocess.run(words, input=content, text=True).returncode
    except FileNotFoundError as error:
        raise UserError(f"{words[0]} is not installed; --dry_run prints what it would be given") from error


def main(argv: list[str] | None = None) -> int:
    """Runs `launch` with what the command line says."""
    return common.main("experiments.launch.gke:launch", argv, __doc__ or "", EXAMPLES)


if __name__ == "__main__":
    sys.exit(cli.run(main))
