"""A server process over the double of the engine, for what needs several of them: no model, no JAX, ready in a second.

    python -m tests.ops.instance PORT HTTP_PORT [ENTRIES_OF_THE_RESPONSE_CACHE]
"""

from __future__ import annotations

import sys

from serving.options import ServerOptions
from serving.server import serve
from tests.serving.doubles import FakeService

if __name__ == "__main__":
    grpc_port, http_port, entries = map(int, (*sys.argv[1:], 0)[:3])
    options = ServerOptions(http_port=http_port, response_cache_entries=entries)
    sys.exit(serve(FakeService(step_s=0.005), port=grpc_port, grace_seconds=20.0, options=options,
                   on_event=lambda line: print(line, flush=True)))
