"""From a run directory to a server that answers: what `experiments/serve.py` runs. Cheap to import."""

from __future__ import annotations

import os
import pathlib
import signal
import time
from typing import TYPE_CHECKING

from llm_jax.errors import UserError
from serving.loading import SIGNALS, signals_end_the_process
from serving.options import ServerOptions

if TYPE_CHECKING:
    from serving.engine.child import EngineProcess

_PEERS = ("JAX_COORDINATOR_ADDRESS", "LLM_JAX_DISTRIBUTED")  # by which a process knows that it is one of several


def launch(
    run_dir: str | None = None,
    hf_dir: str | None = None,
    port: int = 9000,
    http_port: int | None = None,
    host: str = "127.0.0.1",
    served_model_name: str | None = None,
    keys_file: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    tls_client_ca: str | None = None,
    state_dir: str | None = None,
    audit_file: str | None = None,
    filters: tuple[str, ...] = (),
    interactions_file: str | None = None,
    response_cache_entries: int = ServerOptions.response_cache_entries,
    response_cache_seconds: float = ServerOptions.response_cache_seconds,
    tool_format: str | None = None,
    trusted_proxies: tuple[str, ...] = (),
    traces: bool = False,
    log_format: str = "text",
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
    """Serves a model over gRPC and HTTP until SIGTERM or Ctrl-C; the engine's own defaults stand for None.

    The engine runs in a process of its own, which ends with this one; if it is lost, this one ends too.

    Where the environment says that this is one of several processes (`parallel.distributed`), they serve the model
    together: process 0 listens, the others take part in its steps until it ends.

    Args:
      run_dir: run directory of the model; it may be read-only
      hf_dir: instead of it, a Hugging Face folder; it is imported into the user's cache directory, once
      port: port to listen on for gRPC; 0 takes a free one
      http_port: port for HTTP and WebSocket; 0 takes a free one; by default there is none
      host: address to listen on; 0.0.0.0 or :: opens it to the network, which needs keys_file
      served_model_name: what clients call the model; by default the folder's name
      keys_file: API keys (experiments/keys.py); without it nobody is asked who they are
      tls_cert: PEM file of the server's certificate and its chain; with it every port speaks TLS alone
      tls_key: PEM file of its private key
      tls_client_ca: PEM file of the authorities of clients' certificates; with it a client must show one
      state_dir: folder for what survives a restart: files, batches, quotas, the audit log
      audit_file: receives a JSON line for each request, without its content; - is standard error
      filters: content filter, as module:attribute; may be repeated
      interactions_file: receives requests and answers, with personal data masked; by default nothing is kept
      response_cache_entries: answers of deterministic requests that are kept, at most; 0 is none
      response_cache_seconds: how long each is kept
      tool_format: how the model writes calls of tools; by default as its chat template says
      trusted_proxies: address or network of a proxy whose X-Forwarded-For is believed; may be repeated. By default none
      traces: send OpenTelemetry spans, to where OTEL_EXPORTER_OTLP_ENDPOINT says
      log_format: of the log lines, text or json
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
      0, after a shutdown that was asked for; 1 if the engine was lost, and in a process that followed another and lost
      it.

    Raises:
      UserError: a port is in use, a file is wrong, the run directory holds no model, or the model does not fit.
    """
    folder = run_dir if hf_dir is None else hf_dir
    if folder is None or None not in (run_dir, hf_dir):
        raise UserError("give the model to serve: either run_dir or hf_dir")
    for name, value in (("grace_seconds", grace_seconds), ("stats_seconds", stats_seconds)):
        if not value >= 0:
            raise UserError(f"{name}={value} must be 0 or more")
    for name, limit in (("max_wait_seconds", max_wait_seconds), ("ageing_seconds", ageing_seconds)):
        if limit is not None and not limit > 0:
            raise UserError(f"{name}={limit} must be more than 0")
    if http_port == port != 0:
        raise UserError(f"port and http_port are both {port}; gRPC and HTTP need one each")
    options = ServerOptions(
        model_name=served_model_name or pathlib.PurePath(os.path.abspath(folder)).name or "model", http_port=http_port,
        keys_file=keys_file, audit_file=audit_file, tls_cert=tls_cert, tls_key=tls_key, tls_client_ca=tls_client_ca,
        state_dir=state_dir, response_cache_entries=response_cache_entries,
        response_cache_seconds=response_cache_seconds,
        filters=filters, interactions_file=interactions_file, traces=traces, log_format=log_format,
        tool_format=tool_format, trusted_proxies=trusted_proxies)
    layout = {"max_rows": max_rows, "prefill_rows": prefill_rows, "max_context": max_context, "num_pages": num_pages,
              "page_size": page_size, "chunk": chunk, "dtype": dtype, "cache_dtype": cache_dtype, "tensor": tensor,
              "prefix_cache": prefix_cache, "shared_prefixes": shared_prefixes, "swap_pages": swap_pages,
              "deterministic": deterministic, "max_proposed": max_proposed}
    more = {"max_queue": max_queue, "max_wait_s": max_wait_seconds, "ageing_s": ageing_seconds,
            "draft_run_dir": draft_run_dir, "step": step}
    engine: EngineProcess | None = None

    def end_engine() -> None:
        if engine is not None:
            engine.kill()

    with signals_end_the_process(first=end_engine):  # until the server handles them
        # All that can be wrong is said before the minutes that loading may take, what is quickly found out first.
        from serving.ports import check_port, check_reach

        check_reach(host, keys_file is None)
        if not any(os.environ.get(name, "") not in ("", "0") for name in _PEERS):  # else this may not be who listens
            check_port(host, port)
            if http_port is not None:
                check_port(host, http_port, "http_port")

        from llm_jax.inference.generation_config import SamplingDefaults  # here, as all of these, for a quick --help
        from serving import logs
        from serving.engine.child import EngineProcess
        from serving.engine.process import Spec
        from serving.orchestrator import DecodeSampling
        from serving.parts import Parts
        from serving.server import serve

        logs.set_up(log_format)
        decode_sampling = DecodeSampling(decode_temperature, decode_top_k, decode_top_p)
        # Raises if out of range.
        SamplingDefaults().params(temperature=decode_temperature, top_k=decode_top_k, top_p=decode_top_p)
        parts = Parts(options)
        try:
            began = time.perf_counter()
            engine = EngineProcess(Spec("serving.engine.making:make", {
                "run_dir": run_dir, "hf_dir": hf_dir, "layout": layout, "options": more}, stats_seconds, log_format))
            if http_port is not None:
                import serving.http.app  # noqa: F401 - takes a second, while the engine loads
            facts = engine.ready()
            if facts is None:
                return _follow(engine)
            return serve(engine.front(facts), host=host, port=port, grace_seconds=grace_seconds,
                         decode_sampling=decode_sampling, parts=parts, on_event=_say,
                         note=f"after {time.perf_counter() - began:.1f} s of loading and compiling")
        finally:
            parts.close()


def _follow(engine: EngineProcess) -> int:
    """Waits for an engine that takes part in another process's steps; signals are that process's business."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return engine.wait()


def _say(line: str) -> None:
    print(line, flush=True)  # a launcher waits for `ready:` at the other end of a pipe
