"""OpenTelemetry: a span for each request, and in it one for its wait in the queue and one for its first token.

The spans are made when the request has ended, from the times that were taken anyway, so tracing is not in its way. A
``traceparent`` header (W3C Trace Context) decides what a request belongs to and whether it is traced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymodels.errors import ServeError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE = "raymodels-gateway"


@dataclass(frozen=True)
class Stage:
    """A part of a request: seconds from its arrival to the part's beginning and end."""

    name: str
    begin_s: float
    end_s: float


class Tracing:
    """Sends spans to a collector over OTLP/HTTP, in the background.

    Args:
        endpoint: the collector, http://HOST:4318; none takes OpenTelemetry's own environment variables.

    Raises:
        ServeError: OpenTelemetry's exporter is not installed.
    """

    def __init__(self, endpoint: str | None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ServeError(
                f"http.otlp_endpoint: {error.name} is missing; pip install 'raymodels[otel]', or leave it unset"
            ) from error
        traces = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE)}
        self._provider = TracerProvider(resource=Resource.create(service))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=traces)))
        self._tracer = self._provider.get_tracer("raymodels")
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        name: str,
        headers: Mapping[str, str],
        start_unix_ns: int,
        total_s: float,
        stages: list[Stage],
        attributes: Mapping[str, Any],
        error: str | None,
    ) -> str:
        """Make the spans of a request that has ended; returns its trace id, 32 hex digits."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        def at(seconds: float) -> int:
            return start_unix_ns + int(seconds * 1e9)

        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        known = {key: value for key, value in attributes.items() if value is not None}
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, known, start_time=start_unix_ns)
        inside = set_span_in_context(span)
        for stage in stages:
            self._tracer.start_span(stage.name, inside, start_time=at(stage.begin_s)).end(at(stage.end_s))
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(at(total_s))
        return format(span.get_span_context().trace_id, "032x")

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def start_tracing(endpoint: str | None) -> Tracing | None:
    """Tracing, if there is an endpoint: this one, or one in OpenTelemetry's environment variables."""
    return Tracing(endpoint) if endpoint or any(os.environ.get(name) for name in ENDPOINTS) else None
