"""What the doors count and time, as Prometheus reads it: the names are the field's (vLLM's, after `llm_jax_`).

Nothing here names a caller: no key, no tenant, no text. Labels take few values, whatever clients send.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "llm_jax"
MAX_METHODS = 100  # paths and method names told apart; what comes later is "other"

_FIRST_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_GAP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 960)

# What the engine's `stats` are called outside; those that only ever grow are counters.
_GAUGES = {
    "running": ("num_requests_running", "Requests that take part in the engine's steps"),
    "waiting": ("num_requests_waiting", "Requests that wait for a row or for pages"),
    "pages_used": ("kv_cache_pages_used", "Pages of the key and value cache held by requests"),
    "pages_total": ("kv_cache_pages_total", "Pages of the key and value cache"),
}
_COUNTERS = {
    "steps": ("engine_steps", "Device steps"),
    "tokens": ("engine_tokens", "Tokens drawn and kept"),
    "prompt_tokens": ("engine_prompt_tokens", "Prompt tokens computed, those of preempted requests again"),
    "preemptions": ("num_preemptions", "Times that a running request lost its place"),
    "swaps_out": ("swaps_out", "Times that a request's pages were copied to host memory"),
    "swaps_in": ("swaps_in", "Times that a request's pages were copied back"),
    "prefix_lookups": ("prefix_cache_queries", "Prompt tokens looked for in the prefix cache"),
    "prefix_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "expired": ("requests_expired", "Requests given up for their deadline or their wait"),
    "proposed": ("spec_decode_num_draft_tokens", "Tokens proposed (speculative decoding)"),
    "accepted": ("spec_decode_num_accepted_tokens", "Proposed tokens that were right"),
}


class Metrics:
    """The counts of one server, in a registry of its own; every method may be called from any thread.

    Requests are counted by `interface` (one of `access.identity.INTERFACES`), `method` ("POST" and the route's
    template, or the gRPC method's full name) and `status` ("ok", "cancelled" or the `code` of a `Reason`).
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each counter, which nobody reads
        self.registry = CollectorRegistry()
        self._methods: set[str] = set()
        self._lock = threading.Lock()
        self._running = self._made(Gauge, "requests_in_progress", "Requests being answered", ("interface",))
        self._requests = self._made(Counter, "requests", "Requests answered, by how they ended",
                                    ("interface", "method", "status"))
        self._seconds = self._made(Histogram, "request_duration_seconds", "From a request's arrival to its end, "
                                   "however it ended", ("interface", "method"), buckets=_WHOLE_S)
        self._rejections = self._made(Counter, "rejections", "Requests refused or failed, by reason", ("reason",))
        self._first_token = self._made(Histogram, "time_to_first_token_seconds", "From a request's arrival to its "
                                       "first token", buckets=_FIRST_TOKEN_S)
        self._token_gap = _Weighted(f"{PREFIX}_time_per_output_token_seconds", "Between two tokens of a completion",
                                    _TOKEN_GAP_S)
        self.registry.register(self._token_gap)
        self._end_to_end = self._made(Histogram, "e2e_request_latency_seconds", "From the arrival to the last token, "
                                      "of requests that were answered", buckets=_WHOLE_S)
        self._queue_time = self._made(Histogram, "request_queue_time_seconds", "From the arrival at the engine to the "
                                      "first step that a request took part in", buckets=_FIRST_TOKEN_S)
        self._prompt_tokens = self._made(Counter, "prompt_tokens", "Tokens of answered requests' prompts")
        self._cached_tokens = self._made(Counter, "prompt_tokens_cached", "Those found in the prefix cache")
        self._tokens = self._made(Counter, "generation_tokens", "Tokens generated for answered requests")
        self._lookups = self._made(Counter, "response_cache_queries", "Deterministic requests looked for in the "
                                   "response cache")
        self._hits = self._made(Counter, "response_cache_hits", "Those answered from it")
        self._engine = _Engine()
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)

    def started(self, interface: str, method: str) -> None:
        """A request has arrived; `finished` follows in any case."""
        self._known(method)
        self._running.labels(interface).inc()

    def finished(self, interface: str, method: str, status: str, seconds: float) -> None:
        """It has ended, after so long."""
        method = self._known(method)
        self._running.labels(interface).dec()
        self._requests.labels(interface, method, status).inc()
        self._seconds.labels(interface, method).observe(seconds)

    def rejected(self, reason: Any) -> None:
        """A request was refused or failed; `reason` is a `serving.errors.Reason` or its name."""
        self._rejections.labels(str(getattr(reason, "name", reason)).lower()).inc()

    def first_token(self, seconds: float) -> None:
        """A completion has its first token, so long after its request arrived."""
        self._first_token.observe(seconds)

    def token_gap(self, seconds: float, count: int = 1) -> None:
        """`count` more tokens of a completion have come together, so long after the one before them."""
        if count > 0:
            self._token_gap.observe(seconds / count, count)

    def end_to_end(self, seconds: float) -> None:
        """A request was answered, so long after it arrived."""
        self._end_to_end.observe(seconds)

    def queue_time(self, seconds: float) -> None:
        """A request waited so long for its first step (`Usage.queue_seconds`)."""
        self._queue_time.observe(seconds)

    def tokens(self, prompt: int, cached: int, completion: int) -> None:
        """Tokens of an answered request; `cached` of its prompt were in the prefix cache."""
        self._prompt_tokens.inc(prompt)
        self._cached_tokens.inc(cached)
        self._tokens.inc(completion)

    def cache(self, hit: bool) -> None:
        """A request was looked for in the response cache."""
        self._lookups.inc()
        if hit:
            self._hits.inc()

    def render(self, stats: Mapping[str, Any] | None = None, *, live: bool = True) -> bytes:
        """Everything, in Prometheus' text format; `content_type` says which.

        Args:
          stats: what the engine counts (`Front.stats`); None where it can't be asked, and its metrics are left out.
          live: whether a request that came now would be taken.
        """
        with self._lock:
            self._engine.now(stats or {}, live)
            return generate_latest(self.registry)

    def _made(self, kind: type, name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Any:
        return kind(f"{PREFIX}_{name}", text, labels, registry=self.registry, **more)

    def _known(self, method: str) -> str:
        if method in self._methods:
            return method
        if len(self._methods) >= MAX_METHODS:
            return "other"
        self._methods.add(method)
        return method


class _Weighted(Collector):
    """A histogram that takes a value many times at once: a reader that lags gets hundreds of tokens in a message."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, count: int) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += count
            self._sum += value * count

    def describe(self) -> Iterable[Metric]:
        return [HistogramMetricFamily(self._name, self._text)]

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        buckets, seen = [], 0
        for bound, count in zip((*map(float, self._bounds), "+Inf"), counts, strict=True):
            seen += count
            buckets.append((str(bound), float(seen)))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=total)


class _Engine(Collector):
    """The engine's own counts as of the last `now`, and those of its process where it has one of its own."""

    def __init__(self) -> None:
        self._stats: Mapping[str, Any] = {}
        self._live = True
        self._process = ProcessCollector(namespace=f"{PREFIX}_engine", pid=lambda: self._stats["pid"], registry=None)

    def now(self, stats: Mapping[str, Any], live: bool) -> None:
        self._stats, self._live = stats, live

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield GaugeMetricFamily(f"{PREFIX}_ready", "1 while requests are taken, 0 while draining and when the engine "
                                "is gone", value=float(self._live))
        for key, (name, text) in _GAUGES.items():
            if key in stats:
                yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=stats[key])
        for key, (name, text) in _COUNTERS.items():
            if key in stats:
                yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=stats[key])
        if stats.get("pages_total"):
            yield GaugeMetricFamily(f"{PREFIX}_kv_cache_usage_perc", "Share of the pages that requests hold; 1 is all",
                                    value=stats["pages_used"] / stats["pages_total"])
        if "pid" in stats:
            yield from self._process.collect()
