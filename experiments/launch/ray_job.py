"""Starts a run on a Ray cluster: one process a node, and all of them again after a failure that a restart mends.

    python experiments/launch/ray_job.py --nodes=4 --gpus_per_node=8 --dry_run -- --gin_file=gin/runs/pretrain_8b.gin
    ray job submit --working-dir . -- python experiments/launch/ray_job.py --nodes=4 --gpus_per_node=8 -- --gin_file=...

What follows -- goes to experiments.train as it is. Ray finds the nodes and carries statuses; the processes are those of
JAX's own runtime, on which Ray has no part. It needs `ray`, which requirements.txt does not have.
"""

from __future__ import annotations

import importlib
import pathlib
import shlex
import socket
import subprocess
import sys
import time
from typing import Any

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

from experiments import cli  # noqa: E402
from experiments.launch import common  # noqa: E402
from llm_jax.errors import UserError  # noqa: E402

_FINAL = (2, 130)  # an error that a person has to put right, Ctrl-C; see statuses.sh
_WAIT_S = 10
EXAMPLES = ("python experiments/launch/ray_job.py --nodes=4 --gpus_per_node=8 --dry_run -- "
            "--gin_file=gin/runs/pretrain_8b.gin",)


def launch(nodes: int, gpus_per_node: int = 0, cpus_per_node: int = 1, tpus_per_node: int = 0, port: int = 8476,
           max_restarts: int = 20, dry_run: bool = False, train: tuple[str, ...] = ()) -> int:
    """Starts it, or prints what each node would be given.

    Args:
      nodes: processes, each on a node of its own.
      gpus_per_node: GPUs that each asks Ray for.
      cpus_per_node: CPUs that each asks Ray for.
      tpus_per_node: TPU chips that each asks Ray for.
      port: of the coordinator, on the first node.
      max_restarts: how often all are started again.
      dry_run: print resources, environment and command of each process, and do nothing.
      train: an argument of experiments.train; what follows -- is added.

    Returns:
      The exit status: 0 if every process completed the run.

    Raises:
      UserError: Ray is not installed, or `nodes` makes no sense.
    """
    if nodes < 1:
        raise UserError(f"nodes={nodes}: at least 1")
    resources = {"CPU": cpus_per_node, "GPU": gpus_per_node, "TPU": tpus_per_node}
    bundle = {name: count for name, count in resources.items() if count}
    command = [sys.executable, "-m", "experiments.train", *train]
    if dry_run:
        for index in range(nodes):
            env = environment("FIRST_NODE", port, nodes, index)
            print(f"{bundle} {shlex.join(['env', *(f'{name}={value}' for name, value in env.items()), *command])}")
        return 0
    try:
        ray = importlib.import_module("ray")  # not among what this project needs
    except ImportError as error:
        raise UserError("Ray is not installed here: pip install ray, or --dry_run to see what it would be "
                        "given") from error
    ray.init(ignore_reinit_error=True)
    statuses: list[int] = []
    for attempt in range(max_restarts + 1):
        statuses = _attempt(ray, command, bundle, nodes, port)
        print(f"attempt {attempt}: statuses {' '.join(map(str, statuses))}", file=sys.stderr, flush=True)
        if not any(statuses) or any(status in _FINAL for status in statuses):
            break
        time.sleep(_WAIT_S)
    return max(statuses)


def environment(coordinator: str, port: int, nodes: int, index: int) -> dict[str, str]:
    """What tells process `index` of its peers (see `llm_jax.parallel.distributed`)."""
    return {"JAX_COORDINATOR_ADDRESS": f"{coordinator}:{port}", "JAX_NUM_PROCESSES": str(nodes),
            "JAX_PROCESS_ID": str(index)}


def _attempt(ray: Any, command: list[str], bundle: dict[str, int], nodes: int, port: int) -> list[int]:
    """Runs every process once; a node that Ray lost counts as status 137."""
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    group = ray.util.placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on(index: int, function: Any) -> Any:
        place = strategies.PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        return ray.remote(function).options(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), max_retries=0,
                                            resources={"TPU": bundle["TPU"]} if "TPU" in bundle else None,
                                            scheduling_strategy=place)

    try:
        coordinator = ray.get(on(0, _address).remote())
        pending = [on(index, _run).remote(command, environment(coordinator, port, nodes, index))
                   for index in range(nodes)]
        statuses = []
        for each in pending:
            try:
                statuses.append(ray.get(each))
            except ray.exceptions.RayError:
                statuses.append(137)
        return statuses
    finally:
        ray.util.remove_placement_group(group)


def _address() -> str:
    return socket.gethostbyname(socket.gethostname())


def _run(command: list[str], env: dict[str, str]) -> int:
    """On a node: one process of the run, to its end. A signal's status is the shell's, 128 + its number."""
    import os

    status = subprocess.run(command, env=os.environ | env).returncode
    return status if status >= 0 else 128 - status


def main(argv: list[str] | None = None) -> int:
    """Runs `launch` with what the command line says."""
    return common.main("experiments.launch.ray_job:launch", argv, __doc__ or "", EXAMPLES)


if __name__ == "__main__":
    sys.exit(cli.run(main))
