"""From a run directory to a server that answers: what `experiments/serve.py` runs. Cheap to import."""

from __future__ import annotations

import time
from typing import Any

from llm_jax.errors import UserError
from serving.loading import signals_end_the_process
from serving.reporting import reporting

MAX_PROPOSED = 4  # where there is a draft model, and nobody says


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
    cache_dtype: str | None = None,
    tensor: int | None = None,
    prefix_cache: bool = True,
    shared_prefixes: bool = False,
    swap_pages: int | None = None,
    deterministic: bool = False,
    max_proposed: int | None = None,
    draft_run_dir: str | None = None,
    max_wait_seconds: float | None = None,
    ageing_seconds: float | None = None,
    stats_seconds: float = 10.0,
    decode_temperature: float | None = None,
    decode_top_k: int | None = None,
    decode_top_p: float | None = None,
    step: str | None = None,
) -> int:
    """Serves the model of a run directory over gRPC until SIGTERM or Ctrl-C; the engine's own defaults stand for None.

    Where the environment says that this is one of several processes (`parallel.distributed`), they serve the model
    together: process 0 listens, the others take part in its steps until it ends.

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
      cache_dtype: of the cache alone, float32, bfloat16, int8 or float8_e4m3fn
      tensor: devices that share each matrix product and the heads of the cache; by default 1, and where several
        processes serve together (see docs/serving.md) all of theirs
      prefix_cache: use pages of prompts that are computed already again, within a tenant
      shared_prefixes: and across tenants, who can then tell from response times what others have asked
      swap_pages: pages of host memory to which requests that give way are copied; 0 computes them again
      deterministic: bit-identical logits whatever else is in the batch; slow
      max_proposed: tokens proposed and checked in one step (speculative decoding), at most; 0 is none. By default 4
        with a draft model, else 0
      draft_run_dir: run directory of a smaller model, of the same tokenizer, that proposes; without one they are looked
        up in the request's own text
      max_wait_seconds: longest that a request may wait for its first step; by default for ever
      ageing_seconds: a waiting request's priority grows by 1 in so many seconds
      stats_seconds: time between two lines of statistics, which are left out while nothing happens; 0 is none at all
      decode_temperature: how JetStream's Decode samples, whose requests don't say; 0 takes the likeliest token. By
        default as the model's generation_config.json says; without one, 0
      decode_top_k: likewise; 0 is off
      decode_top_p: likewise; 1 is off
      step: checkpoint to serve: a step, best (of the evaluations) or good (passed the gate); by default the latest

    Returns:
      0, after a shutdown that was asked for; 1 in a process that followed another and lost it.

    Raises:
      UserError: the port is in use, the run directory holds no model, or the model does not fit.
    """
    for name, value in (("grace_seconds", grace_seconds), ("stats_seconds", stats_seconds)):
        if not value >= 0:
            raise UserError(f"{name}={value} must be 0 or more")
    for name, limit in (("max_wait_seconds", max_wait_seconds), ("ageing_seconds", ageing_seconds)):
        if limit is not None and not limit > 0:
            raise UserError(f"{name}={limit} must be more than 0")
    with signals_end_the_process():  # until the server handles them
        import jax  # here, as all of these, so that --help needs neither gRPC nor JAX

        from llm_jax.inference.engine_config import EngineConfig
        from llm_jax.inference.generation_config import SamplingDefaults
        from llm_jax.inference.joint import JointService
        from llm_jax.inference.service import Service
        from llm_jax.parallel import distributed
        from serving.following import follow
        from serving.orchestrator import DecodeSampling
        from serving.server import check_port, serve

        is_joint = distributed.initialize()
        if distributed.is_lead():
            check_port(host, port)  # before the minutes that loading may take
        if is_joint:
            tensor = tensor or len(jax.devices())

        decode_sampling = DecodeSampling(decode_temperature, decode_top_k, decode_top_p)
        # Raises if out of range.
        SamplingDefaults().params(temperature=decode_temperature, top_k=decode_top_k, top_p=decode_top_p)
        layout: dict[str, Any] = {"max_rows": max_rows, "prefill_rows": prefill_rows, "max_context": max_context,
                                  "num_pages": num_pages, "page_size": page_size, "chunk": chunk, "dtype": dtype,
                                  "cache_dtype": cache_dtype, "tensor": tensor, "prefix_cache": prefix_cache,
                                  "shared_prefixes": shared_prefixes, "swap_pages": swap_pages,
                                  "deterministic": deterministic, "max_proposed": max_proposed}
        if draft_run_dir is not None and max_proposed is None:
            layout["max_proposed"] = MAX_PROPOSED
        options = EngineConfig(**{name: value for name, value in layout.items() if value is not None})
        more: dict[str, Any] = {"max_queue": max_queue, "max_wait_s": max_wait_seconds, "ageing_s": ageing_seconds,
                                "draft_run_dir": draft_run_dir, "step": step}

        def say(line: str) -> None:
            print(line, flush=True)  # a launcher waits for `ready:` at the other end of a pipe

        began = time.perf_counter()
        kind = JointService if is_joint else Service
        service = kind.from_run(run_dir, options, on_event=say,
                                **{name: value for name, value in more.items() if value is not None})
        if isinstance(service, JointService) and not distributed.is_lead():
            return follow(service, say)
        with reporting(service, stats_seconds, say):
            return serve(service, host=host, port=port, grace_seconds=grace_seconds, decode_sampling=decode_sampling,
                         on_event=say, note=f"after {time.perf_counter() - began:.1f} s of loading and compiling")
