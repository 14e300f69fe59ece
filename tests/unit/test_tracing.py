"""Spans as a collector receives them: a real OTLP/HTTP receiver in this process."""

from __future__ import annotations

import gzip
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from raymodels.errors import ServeError
from raymodels.serve.tracing import Stage, start_tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
START = 1_700_000_000_000_000_000


class Collector:
    """Keeps the spans that are posted to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.receive(self.path, ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def receive(self, path: str, request: ExportTraceServiceRequest) -> None:
        self.paths.add(path)
        for resource in request.resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def record(endpoint: str | None, headers: dict[str, str], error: str | None = None) -> str:
    tracing = start_tracing(endpoint)
    assert tracing is not None
    stages = [Stage("queue", 0.25, 0.5), Stage("first token", 0.5, 1.0)]
    attributes = {"http.response.status_code": 200, "gen_ai.request.model": None}
    trace = tracing.record("completions", headers, START, 2.0, stages, attributes, error)
    tracing.close()
    return trace


def test_a_request_is_one_span_with_its_stages_inside(collector: Collector) -> None:
    trace = record(collector.url, {})
    assert (collector.paths, collector.services) == ({"/v1/traces"}, {"raymodels-gateway"})
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"completions", "queue", "first token"}
    request = spans["completions"]
    assert {span.trace_id.hex() for span in collector.spans} == {trace}
    assert (request.kind, request.parent_span_id) == (Span.SPAN_KIND_SERVER, b"")
    assert {spans[name].parent_span_id for name in ("queue", "first token")} == {request.span_id}
    times = {name: (s.start_time_unix_nano - START, s.end_time_unix_nano - START) for name, s in spans.items()}
    assert times == {
        "completions": (0, 2_000_000_000),
        "queue": (250_000_000, 500_000_000),
        "first token": (500_000_000, 1_000_000_000),
    }
    assert [(a.key, a.value.int_value) for a in request.attributes] == [("http.response.status_code", 200)]


def test_a_traceparent_is_continued(collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    assert record(collector.url + "/", headers) == TRACE
    request = next(span for span in collector.spans if span.name == "completions")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.trace_state == "vendor=1"


def test_a_trace_that_is_not_sampled_is_not_sent(collector: Collector) -> None:
    assert record(collector.url, {"traceparent": f"00-{TRACE}-{PARENT}-00"}) == TRACE
    assert collector.spans == []


@pytest.mark.parametrize("header", ["", "00-zz-yy-01", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_broken_traceparent_starts_a_trace_of_its_own(collector: Collector, header: str) -> None:
    assert record(collector.url, {"traceparent": header}) not in (TRACE, "0" * 32)
    assert len(collector.spans) == 3


def test_a_failure_is_marked(collector: Collector) -> None:
    record(collector.url, {}, error="the server failed")
    request = next(span for span in collector.spans if span.name == "completions")
    assert (request.status.code, request.status.message) == (2, "the server failed")


def test_opentelemetrys_own_variables_are_enough(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_tracing(None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    record(None, {})
    assert (collector.paths, collector.services) == ({"/v1/traces"}, {"mine"})


def test_a_collector_that_is_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    gone = Collector()
    gone.close()
    tracing = start_tracing(gone.url)
    assert tracing is not None
    start = time.perf_counter()
    for _ in range(100):
        tracing.record("completions", {}, START, 2.0, [], {}, None)
    assert time.perf_counter() - start < 5  # if each waited for the collector, it would be 10
    tracing.close()


def test_without_the_exporter_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ServeError, match=r"pip install 'raymodels\[otel\]'"):
        start_tracing("http://127.0.0.1:4318")
