"""Contenders 1 and 2: this engine behind its gRPC server, with continuous or static batching.

    python -m benchmarks.serve_trace.engine --run_dir=runs/mine --batching=static
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.serve_trace.static import StaticScheduler
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.scheduler import Scheduler
from llm_jax.inference.service import Service
from serving.options import ServerOptions
from serving.server import serve

MAX_QUEUE = 100_000


SCHEDULERS = {"continuous": Scheduler, "static": StaticScheduler}


def main() -> int:
    """Serves until SIGTERM; says `ready: ADDRESS`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--batching", choices=SCHEDULERS, default="continuous")
    parser.add_argument("--options", default="{}", help="fields of EngineConfig, as JSON")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    service = Service.from_run(arguments.run_dir, EngineConfig(**json.loads(arguments.options)), max_queue=MAX_QUEUE,
                               scheduler=SCHEDULERS[arguments.batching], on_event=say)
    return serve(service, port=0, grace_seconds=0, options=ServerOptions(response_cache_entries=0), on_event=say)


if __name__ == "__main__":
    sys.exit(main())
