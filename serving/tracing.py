"""OpenTelemetry spans, one for each request, where they are asked for; the extra `tracing` brings what they need.

Where they go is said by the environment, as everywhere (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` …). A span has the names of OpenTelemetry's conventions for generative AI, and no text.
"""

from __future__ import annotations

import time
from typing import Any

from llm_jax.errors import UserError
from llm_jax.inference.request import Usage
from serving.access.identity import Caller

OPERATIONS = {"generate": "text_completion", "embed": "embeddings"}


class Span:
    """What is told of one request; this one tells nobody."""

    def first_token(self) -> None:
        """The first token has come."""

    def used(self, usage: Usage) -> None:
        """A sample has finished; tokens of several are added up."""

    def end(self, status: str = "ok") -> None:
        """The request has ended: "ok", "cancelled" or the `code` of a `Reason`."""


class Traces:
    """Spans of one server.

    Args:
      model: name of the model that is served.
      exporter: receives the spans; None sends them over OTLP where the environment says.

    Raises:
      UserError: the packages are not installed.
    """

    def __init__(self, model: str, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise UserError(f"traces need packages that are not installed ({error.name}): "
                            "pip install 'llm_jax[tracing]'") from None
        self._model = model
        # The environment's OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before this name.
        self._provider = TracerProvider(resource=Resource({"service.name": "llm_jax"}).merge(_environment()))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))  # a thread of its own; full, it drops spans
        self._tracer = self._provider.get_tracer("llm_jax.serving")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, caller: Caller, action: str, traceparent: str = "") -> Span:
        """The span of a request that has arrived; `end` must follow.

        Args:
          caller: who asks; its credential stays out.
          action: see `access.identity.ACTIONS`.
          traceparent: the W3C header of the trace that this belongs to; one that is none is ignored.
        """
        from opentelemetry.trace import SpanKind

        if action == "metrics":  # asked every few seconds
            return Span()
        context = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        operation = OPERATIONS.get(action, action)
        return _Span(self._tracer.start_span(f"{operation} {self._model}", context, SpanKind.SERVER, {
            "gen_ai.operation.name": operation, "gen_ai.request.model": self._model, "gen_ai.system": "llm_jax",
            "llm_jax.interface": caller.interface, "llm_jax.method": caller.method,
            "llm_jax.request_id": caller.request_id}))

    def close(self) -> None:
        """Sends what is left, for a few seconds at most."""
        self._provider.force_flush(5000)
        self._provider.shutdown()


def _environment() -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector

    return OTELResourceDetector().detect()


class _Span(Span):
    def __init__(self, span: Any) -> None:
        self._span = span
        self._began = time.monotonic()
        self._first: float | None = None
        self._usage = Usage(0, 0)

    def first_token(self) -> None:
        if self._first is None:
            self._first = time.monotonic() - self._began
            self._span.add_event("first_token")
            self._span.set_attribute("gen_ai.server.time_to_first_token", self._first)

    def used(self, usage: Usage) -> None:
        before = self._usage
        self._usage = Usage(usage.prompt_tokens, before.completion_tokens + usage.completion_tokens,
                            max(before.cached_tokens, usage.cached_tokens),
                            max(before.queue_seconds, usage.queue_seconds))

    def end(self, status: str = "ok") -> None:
        from opentelemetry.trace import Status, StatusCode

        usage, span = self._usage, self._span
        if usage.prompt_tokens:
            span.set_attributes({"gen_ai.usage.input_tokens": usage.prompt_tokens,
                                 "gen_ai.usage.output_tokens": usage.completion_tokens,
                                 "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                                 "llm_jax.queue_seconds": usage.queue_seconds})
        span.set_attribute("llm_jax.status", status)
        if status not in ("ok", "cancelled"):
            span.set_attribute("error.type", status)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
