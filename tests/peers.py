"""The environment of processes that find each other on this machine."""

from __future__ import annotations

import os
import socket


def environments(count: int) -> list[dict[str, str]]:
    """For each of `count` processes, os.environ with what `parallel.distributed` reads, and one device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
              "JAX_NUM_CPU_DEVICES": "1"}
    return [os.environ | shared | {"JAX_PROCESS_ID": str(index)} for index in range(count)]
