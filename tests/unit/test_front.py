"""What every request passes: keys, ids, deadlines, the access log, metrics and spans; over HTTP, in this process."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import pickle
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from raymodels.config import HttpConfig
from raymodels.serve import metrics
from raymodels.serve.access_log import LOGGER, JsonLines
from raymodels.serve.admission import Admission
from raymodels.serve.answers import Usage
from raymodels.serve.engine import Delta
from raymodels.serve.fair_queue import Room
from raymodels.serve.front import Door, Front, Visit, forbidden
from raymodels.serve.quotas import Quotas
from raymodels.serve.tenants import add_key

PROMPT = "the prompt that nobody may read in a log"


def build(front: Front, admission: Admission) -> FastAPI:
    """An app with a model that answers two tokens, behind the door; its routes do what the gateway's do."""
    app = FastAPI()
    app.add_middleware(Door, front=lambda: front)

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest())

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError(PROMPT)

    @app.post("/v1/{model}")
    async def answer(http: Request, model: str) -> Response:
        visit: Visit = http.state.visit
        body = await http.json()
        if not visit.tenant.allows(model):
            raise forbidden(visit.tenant, model)
        visit.model = model
        await visit.hold(admission.slot(visit.tenant, model, 100, 1, visit.deadline))
        visit.usage = Usage(7)
        if body.get("stream"):
            visit.status = 499
            return StreamingResponse(stream(visit, body))
        async for _ in stream(visit, body):
            pass
        return JSONResponse({"text": "ab"})

    async def stream(visit: Visit, body: Any) -> AsyncIterator[bytes]:
        assert visit.usage is not None
        for delta in (Delta(0, "a", 1), Delta(0, "b", 2, finish="stop")):
            await asyncio.sleep(body.get("pause", 0))
            visit.usage.add(delta)
            visit.got([delta])
            yield delta.text.encode()
        visit.status = 200

    return app


class Stage:
    """The app, its clients and its log."""

    def __init__(self, http: HttpConfig, admission: Admission | None = None) -> None:
        self.admission = admission or Admission(lambda _: Room(4, 100, 10**6), Quotas())
        self.front = Front(http)
        self.app = build(self.front, self.admission)
        self.written = io.StringIO()
        for handler in logging.getLogger(LOGGER).handlers:
            assert isinstance(handler, logging.StreamHandler)
            handler.setStream(self.written)

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)

    def ask(self, path: str = "/v1/m", key: str | None = None, **options: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            async with self.client(key) as client:
                method = options.pop("method", "POST")
                if method == "POST":
                    options.setdefault("json", {"prompt": PROMPT})
                return await client.request(method, path, **options)

        return asyncio.run(main())

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.written.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def closed_log() -> Iterator[None]:
    yield
    logging.getLogger(LOGGER).handlers = []


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.yaml")


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_every_route_but_the_probes_needs_a_key(keys_file: str) -> None:
    key = add_key(keys_file, "a")
    stage = Stage(HttpConfig(keys_file=keys_file))
    for method, path in (("POST", "/v1/m"), ("GET", "/metrics"), ("GET", "/nowhere"), ("GET", "/broken")):
        answer = stage.ask(path, method=method)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert stage.ask(path, key="wrong", method=method).status_code == 401
    assert stage.ask("/healthz", method="GET").status_code == 200
    assert stage.ask("/v1/m", key=key).json() == {"text": "ab"}
    assert stage.ask("/nowhere", key=key, method="GET").status_code == 404


def test_metrics_are_for_tenants_that_may_read_them(keys_file: str) -> None:
    """They show what all tenants use."""
    tenant, operator = add_key(keys_file, "a"), add_key(keys_file, "prometheus", models=["none"], metrics=True)
    stage = Stage(HttpConfig(keys_file=keys_file))
    answer = stage.ask("/metrics", key=tenant, method="GET")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "metrics_not_allowed")
    assert stage.ask("/metrics", key=operator, method="GET").status_code == 200
    assert stage.ask("/v1/m", key=operator).status_code == 403
    assert Stage(HttpConfig()).ask("/metrics", method="GET").status_code == 200  # without tenants


def test_metrics_may_be_open_while_the_rest_is_not(keys_file: str) -> None:
    add_key(keys_file, "a")
    stage = Stage(HttpConfig(keys_file=keys_file, metrics_open=True))
    assert stage.ask("/metrics", method="GET").status_code == 200
    assert stage.ask("/v1/m").status_code == 401


def test_a_model_that_a_key_may_not_call_is_403(keys_file: str) -> None:
    key = add_key(keys_file, "a", models=["m"])
    stage = Stage(HttpConfig(keys_file=keys_file))
    assert stage.ask("/v1/m", key=key).status_code == 200
    answer = stage.ask("/v1/other", key=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_allowed")


def test_over_quota_is_429_with_retry_after(keys_file: str) -> None:
    key = add_key(keys_file, "quota", requests_per_minute=2)
    stage = Stage(HttpConfig(keys_file=keys_file))
    labels = {"model": "", "tenant": "quota", "reason": "requests_per_minute_exceeded"}
    before = value("raymodels_serve_refused_total", **labels)
    answers = [stage.ask(key=key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
    assert value("raymodels_serve_refused_total", **labels) == before + 1


def test_a_line_of_the_access_log(keys_file: str) -> None:
    key = add_key(keys_file, "team")
    stage = Stage(HttpConfig(keys_file=keys_file))
    stage.ask(key=key, headers={"X-Request-Id": "abc-123"})
    stage.ask(key=key, json={"prompt": PROMPT, "stream": True, "pause": 0.02})
    stage.ask(key="wrong" + key)
    stage.ask("/healthz", method="GET")
    whole, streamed, refused = stage.log()
    times = {name: whole.pop(name) for name in ("queue_ms", "ttft_ms", "total_ms")}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00", whole.pop("time"))
    assert whole == {
        "request_id": "abc-123",
        "tenant": "team",
        "model": "m",
        "route": "answer",
        "status": 200,
        "tokens_in": 7,
        "tokens_out": 2,
        "finish": "stop",
    }
    assert 0 <= times["queue_ms"] <= times["ttft_ms"] <= times["total_ms"]
    assert streamed["status"] == 200
    assert streamed["total_ms"] - streamed["ttft_ms"] >= 19
    assert (refused["tenant"], refused["status"], refused["error"]) == ("unknown", 401, "invalid_api_key")
    everything = stage.written.getvalue() + generate_latest().decode()
    assert key not in everything
    assert PROMPT not in everything


def test_the_log_can_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(HttpConfig(access_log=False))
    stage.ask()
    assert stage.log() == []
    assert capsys.readouterr().out == ""


def test_every_line_is_one_line_of_json() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", None, None)
    record.fields = {"model": 'a\n"b"\u2028', "tokens_in": None}
    line = JsonLines().format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["model"] == 'a\n"b"\u2028'
    assert "tokens_in" not in json.loads(line)


@pytest.mark.parametrize("given", ["a b", "x" * 129, "a\tb", '"', "naïve".encode("latin-1")])
def test_a_request_id_that_is_no_name_is_replaced(given: Any) -> None:
    stage = Stage(HttpConfig())
    made = stage.ask(headers={"X-Request-Id": given}).headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert stage.log()[0]["request_id"] == made


def test_every_answer_has_a_request_id() -> None:
    stage = Stage(HttpConfig())
    for path in ("/healthz", "/nowhere", "/broken"):
        assert stage.ask(path, method="GET").headers["X-Request-Id"]
    assert stage.ask(headers={"X-Request-Timeout": "soon"}).headers["X-Request-Id"]


def test_a_failure_is_a_500_of_openais_shape_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(HttpConfig())
    answer = stage.ask("/broken", method="GET")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert PROMPT not in answer.text
    assert "ValueError" in caplog.text  # the operator's log has the cause
    assert stage.log()[0]["status"] == 500


@pytest.mark.parametrize("header", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_timeout_that_is_no_time_is_400(header: str) -> None:
    assert Stage(HttpConfig()).ask(headers={"X-Request-Timeout": header}).status_code == 400


@pytest.mark.parametrize(("http", "headers"), [({}, {"X-Request-Timeout": "0.05"}), ({"request_timeout_s": 0.05}, {})])
def test_a_deadline_holds_in_the_queue(http: dict[str, Any], headers: dict[str, str]) -> None:
    admission = Admission(lambda _: Room(1, 10, 1000), Quotas())
    stage = Stage(HttpConfig(**http), admission)

    async def main() -> httpx.Response:
        async with stage.client() as client, admission.slot(stage.front._tenants.of(None), "m", 1, 1, 1e12):
            return await client.post("/v1/m", json={}, headers=headers)

    answer = asyncio.run(main())
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_a_header_cannot_extend_the_servers_limit() -> None:
    admission = Admission(lambda _: Room(1, 10, 1000), Quotas())
    stage = Stage(HttpConfig(request_timeout_s=0.05), admission)

    async def main() -> httpx.Response:
        async with stage.client() as client, admission.slot(stage.front._tenants.of(None), "m", 1, 1, 1e12):
            return await client.post("/v1/m", json={}, headers={"X-Request-Timeout": "100"})

    assert asyncio.run(main()).status_code == 504


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_place_back_and_is_counted_as_left(stream: bool) -> None:
    stage = Stage(HttpConfig())
    queue = stage.admission.queue("m")
    before = value("raymodels_serve_requests_total", model="m", route="answer", tenant="anybody", status="499")

    async def main() -> None:
        async with stage.client() as client:
            asking = asyncio.create_task(client.post("/v1/m", json={"stream": stream, "pause": 60}))
            while not queue.running:
                await asyncio.sleep(0.001)
            asking.cancel()
            await asyncio.wait([asking])

    asyncio.run(main())
    assert (queue.running, queue.waiting) == (0, 0)
    assert stage.log()[0]["status"] == 499
    after = value("raymodels_serve_requests_total", model="m", route="answer", tenant="anybody", status="499")
    assert after == before + 1


def test_a_client_that_leaves_the_queue_is_dropped() -> None:
    admission = Admission(lambda _: Room(1, 10, 1000), Quotas())
    stage = Stage(HttpConfig(), admission)

    async def main() -> None:
        async with stage.client() as client, admission.slot(stage.front._tenants.of(None), "m", 1, 1, 1e12):
            asking = asyncio.create_task(client.post("/v1/m", json={}))
            while not admission.queue("m").waiting:
                await asyncio.sleep(0.001)
            asking.cancel()
            await asyncio.wait([asking])
            assert admission.queue("m").waiting == 0

    asyncio.run(main())
    assert stage.log()[0]["status"] == 499


def test_metrics_of_a_request(keys_file: str) -> None:
    key = add_key(keys_file, "metered")
    stage = Stage(HttpConfig(keys_file=keys_file))
    for _ in range(3):
        stage.ask("/v1/measured", key=key, json={"pause": 0.005})
    assert value(
        "raymodels_serve_requests_total", model="measured", route="answer", tenant="metered", status="200"
    ) == pytest.approx(3)
    assert value("raymodels_serve_tokens_in_total", model="measured", tenant="metered") == 21
    assert value("raymodels_serve_tokens_out_total", model="measured", tenant="metered") == 6
    assert value("raymodels_serve_finished_total", model="measured", reason="stop") == 3
    labels = {"model": "measured", "route": "answer"}
    assert value("raymodels_serve_time_to_first_token_seconds_count", **labels) == 3
    assert value("raymodels_serve_inter_token_latency_seconds_count", **labels) == 3
    assert value("raymodels_serve_inter_token_latency_seconds_sum", **labels) >= 0.014
    assert value("raymodels_serve_request_seconds_count", **labels) == 3
    assert value("raymodels_serve_queue_seconds_count", model="measured") == 3
    assert value("raymodels_serve_running_requests", model="measured") == 0


def test_dashboards_for_vllm_find_its_names() -> None:
    stage = Stage(HttpConfig())
    stage.ask("/v1/aliased")
    metrics.engine_stats("aliased", {"running": 3, "kv_usage": 0.25, "something": 1})
    page = stage.ask("/metrics", method="GET").text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for name, kind in {
        "vllm:num_requests_running": "gauge",
        "vllm:num_requests_waiting": "gauge",
        "vllm:kv_cache_usage_perc": "gauge",
        "vllm:gpu_cache_usage_perc": "gauge",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:inter_token_latency_seconds": "histogram",
        "vllm:time_per_output_token_seconds": "histogram",
        "vllm:e2e_request_latency_seconds": "histogram",
        "vllm:prompt_tokens": "counter",
        "vllm:generation_tokens": "counter",
        "vllm:request_success": "counter",
    }.items():
        own = [sample for sample in families[name].samples if sample.labels.get("model_name") == "aliased"]
        assert families[name].type == kind
        assert own, name
    tokens = [s for s in families["vllm:generation_tokens"].samples if s.labels["model_name"] == "aliased"]
    assert [(sample.name, sample.value) for sample in tokens if "created" not in sample.name] == [
        ("vllm:generation_tokens_total", 2)
    ]
    success = [s for s in families["vllm:request_success"].samples if s.labels["model_name"] == "aliased"]
    assert success[0].labels["finished_reason"] == "stop"
    usage = [s for s in families["vllm:kv_cache_usage_perc"].samples if s.labels["model_name"] == "aliased"]
    assert usage[0].value == 0.25


def test_a_page_has_the_figures_of_all_gateways() -> None:
    metrics.TOKENS_IN.labels("paged", "team").inc(3)
    own = metrics.own_figures()
    page = metrics.metrics_page({"a": own, "b": pickle.loads(pickle.dumps(own))}).decode()
    for gateway in "ab":
        assert f'raymodels_serve_tokens_in_total{{gateway="{gateway}",model="paged",tenant="team"}} 3.0\n' in page
        assert f'vllm:prompt_tokens_total{{gateway="{gateway}",model_name="paged",tenant="team"}} 3.0\n' in page
    families = [family.name for family in text_string_to_metric_families(page)]
    assert len(families) == len(set(families))


def test_replicas_and_why_they_changed() -> None:
    metrics.replicas_changed("scaled", 3, "UPSCALE_COMPLETED")
    assert value("raymodels_serve_replicas", model="scaled") == 3
    assert value("raymodels_serve_replica_changes_total", model="scaled", reason="UPSCALE_COMPLETED") == 1
