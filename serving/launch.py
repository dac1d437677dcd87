"""From a run directory to a server that answers: what `experiments/serve.py` runs. Cheap to import."""

from __future__ import annotations

import time
from typing import Any

from llm_jax.errors import UserError
from serving.loading import signals_end_the_process


def launch(
    run_dir: str,
    port: int = 9000,
    host: str = "127.0.0.1",
    grace_seconds: float = 30.0,
    max_rows: int | None = None,
    prefill_rows: int | None = None,
    max_queue: int | None = None,
    max_context: int | None = None,
    num_pages: int | None = None,
    page_size: int | None = None,
    chunk: int | None = None,
    dtype: str | None = None,
    decode_temperature: float | None = None,
    decode_top_k: int | None = None,
    decode_top_p: float | None = None,
) -> int:
    """Serves the model of a run directory over gRPC until SIGTERM or Ctrl-C; the engine's own defaults stand for None.

    Args:
      run_dir: run directory of the model; it may be read-only
      port: port to listen on; 0 takes a free one
      host: address to listen on; 0.0.0.0 or :: opens it to the network, and nobody is asked who they are
      grace_seconds: how long running requests may go on after SIGTERM
      max_rows: requests in one device step, at most
      prefill_rows: requests whose prompts advance in one step, at most
      max_queue: requests that may wait; more are refused
      max_context: prompt and completion together, in tokens, at most
      num_pages: pages of the key and value cache; by default from free memory
      page_size: tokens of a page
      chunk: prompt tokens of one request in one step, at most
      dtype: of weights and cache, float32 or bfloat16
      decode_temperature: how JetStream's Decode samples, whose requests don't say; 0 takes the likeliest token. By
        default as the model's generation_config.json says; without one, 0
      decode_top_k: likewise; 0 is off
      decode_top_p: likewise; 1 is off

    Returns:
      0, after a shutdown that was asked for.

    Raises:
      UserError: the port is in use, the run directory holds no model, or the model does not fit.
    """
    if not grace_seconds >= 0:
        raise UserError(f"grace_seconds={grace_seconds} must be 0 or more")
    with signals_end_the_process():  # until the server handles them
        from serving.server import check_port, serve  # here, so that --help needs neither gRPC nor JAX

        check_port(host, port)  # before the minutes that loading may take
        from llm_jax.inference.engine import EngineConfig
        from llm_jax.inference.generation_config import SamplingDefaults
        from llm_jax.inference.service import Service
        from serving.orchestrator import DecodeSampling

        decode_sampling = DecodeSampling(decode_temperature, decode_top_k, decode_top_p)
        # Raises if out of range.
        SamplingDefaults().params(temperature=decode_temperature, top_k=decode_top_k, top_p=decode_top_p)
        layout: dict[str, Any] = {"max_rows": max_rows, "prefill_rows": prefill_rows, "max_context": max_context,
                                  "num_pages": num_pages, "page_size": page_size, "chunk": chunk, "dtype": dtype}
        options = EngineConfig(**{name: value for name, value in layout.items() if value is not None})
        queue = {} if max_queue is None else {"max_queue": max_queue}

        def say(line: str) -> None:
            print(line, flush=True)  # a launcher waits for `ready:` at the other end of a pipe

        began = time.perf_counter()
        service = Service.from_run(run_dir, options, on_event=say, **queue)
        return serve(service, host=host, port=port, grace_seconds=grace_seconds, decode_sampling=decode_sampling,
                     on_event=say, note=f"after {time.perf_counter() - began:.1f} s of loading and compiling")
