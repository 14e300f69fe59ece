"""A real endpoint with tenants: keys, quotas, the access log on the gateway's stdout, metrics, spans at a collector."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from raymodels.config import ServeConfig, validate
from raymodels.errors import ConfigError
from raymodels.registry import Registry
from raymodels.serve.deploy import Endpoint, deploy
from raymodels.serve.tenants import add_key, revoke
from tests.unit.test_tracing import Collector

PROMPT = "a prompt that no log holds"
NO_END = {"logit_bias": {"0": -100}}  # no end-of-text token: every answer is as long as was asked for


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = str(tmp_path_factory.mktemp("keys") / "keys.yaml")
    keys = {
        "file": file,
        "team": add_key(file, "team", metrics=True),
        "narrow": add_key(file, "narrow", models=["other"]),
    }
    return keys | {"slow": add_key(file, "slow", requests_per_minute=2), "leaver": add_key(file, "leaver")}


def config(tiny_model_dir: Path, place: Path, **http: Any) -> ServeConfig:
    registry = Registry(str(place))
    registry.publish("tiny", str(tiny_model_dir), {})
    engine = {"max_batch": 2, "max_queue": 4}
    models = [{"model": "tiny", "cpus": 0.5, "engine": engine}]
    return validate({"registry": str(place), "models": models, "http": {"port": 0, **http}}, ServeConfig)


@pytest.fixture(scope="module")
def endpoint(
    ray_cluster: Any,
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, str],
    collector: Collector,
) -> Iterator[Endpoint]:
    place = tmp_path_factory.mktemp("registry")
    with deploy(config(tiny_model_dir, place, keys_file=keys["file"], otlp_endpoint=collector.url)) as endpoint:
        yield endpoint


def ask(endpoint: Endpoint, key: str | None, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    given = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, **NO_END, **fields}
    return httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=given | (headers or {}), timeout=60)


def until(holds: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def logs(pattern: str) -> str:
    """What this Ray session has logged."""
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    return "".join(file.read_text("utf-8", "replace") for file in folder.rglob(pattern) if file.is_file())


def access_line(request_id: str) -> dict[str, Any]:
    """From the stdout of whichever worker is the gateway."""
    lines = [line for line in logs("worker-*.out").splitlines() if f'"request_id":"{request_id}"' in line]
    assert len(lines) <= 1
    return json.loads(lines[0]) if lines else {}


def test_keys(endpoint: Endpoint, keys: dict[str, str]) -> None:
    assert httpx.get(endpoint.url + "/healthz").status_code == 200
    until(lambda: httpx.get(endpoint.url + "/readyz").status_code == 200, seconds=2)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        answer = httpx.get(endpoint.url + path)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path
    assert ask(endpoint, None).status_code == ask(endpoint, "rm-wrong").status_code == 401
    assert ask(endpoint, keys["team"]).status_code == 200
    assert ask(endpoint, keys["narrow"]).status_code == 403
    own = {"Authorization": f"Bearer {keys['narrow']}"}
    assert httpx.get(endpoint.url + "/metrics", headers=own).status_code == 403


def test_the_openai_client_sees_its_own_errors(endpoint: Endpoint, keys: dict[str, str]) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0)

    with client("rm-wrong") as unknown, pytest.raises(openai.AuthenticationError):
        unknown.models.list()
    with client(keys["narrow"]) as narrow:
        assert narrow.models.list().data == []
        with pytest.raises(openai.PermissionDeniedError):
            narrow.completions.create(model="tiny", prompt="x")
    with client(keys["slow"]) as slow:
        for _ in range(2):
            slow.completions.create(model="tiny", prompt="x", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as limited:
            slow.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert int(limited.value.response.headers["Retry-After"]) >= 1


def test_a_key_comes_and_goes_without_a_restart(endpoint: Endpoint, keys: dict[str, str]) -> None:
    new = add_key(keys["file"], "newcomer")
    until(lambda: ask(endpoint, new).status_code == 200)
    revoke(keys["file"], "leaver")
    until(lambda: ask(endpoint, keys["leaver"]).status_code == 401)


def test_the_access_log_metrics_and_spans_of_a_request(
    endpoint: Endpoint, keys: dict[str, str], collector: Collector
) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"X-Request-Id": "seen-by-all", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    answer = ask(endpoint, keys["team"], headers, stream=True)
    assert answer.status_code == 200
    assert answer.headers["X-Request-Id"] == "seen-by-all"
    line = until(lambda: access_line("seen-by-all"))
    facts = (line["tenant"], line["model"], line["route"], line["status"], line["tokens_out"], line["trace_id"])
    assert facts == ("team", "tiny", "completions", 200, 4, trace)
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]

    def metrics() -> str:
        """Once the gateway has looked how many replicas there are."""
        text = httpx.get(endpoint.url + "/metrics", headers={"Authorization": f"Bearer {keys['team']}"}).text
        text = re.sub(r'gateway="\w+",', "", text)
        return text if 'raymodels_serve_replicas{model="tiny"} 1.0' in text else ""

    page = until(metrics)
    assert 'raymodels_serve_tokens_out_total{model="tiny",tenant="team"}' in page
    assert 'vllm:generation_tokens_total{model_name="tiny",tenant="team"}' in page

    spans = until(lambda: [span for span in collector.spans if span.trace_id.hex() == trace])
    assert {span.name for span in spans} == {"completions", "queue", "first token"}

    everything = logs("*") + page
    assert "GET /v1/models" in everything or "CALL" in everything  # Serve's own logs are among them
    assert PROMPT not in everything
    assert not [key for name, key in keys.items() if name != "file" and key in everything]


def test_a_client_that_leaves_the_queue_is_dropped_at_once(endpoint: Endpoint, keys: dict[str, str]) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 250, "logprobs": 20, **NO_END}
    own = {"Authorization": f"Bearer {keys['team']}"}

    async def main() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url, headers=own, timeout=60) as client:

            async def gauges() -> tuple[float, float]:
                page = (await client.get("/metrics")).text
                shown = r'^raymodels_serve_(\w+)_requests\{gateway="\w+",model="tiny"\} (\S+)$'
                found = dict(re.findall(shown, page, re.M))
                return float(found["running"]), float(found["queue"])

            async def become(*wanted: float) -> bool:
                """Whether it was seen before the two that hold the places had ended."""
                async with asyncio.timeout(20):
                    while await gauges() != wanted:
                        if tasks and all(task.done() for task in tasks):
                            return False
                        await asyncio.sleep(0.01)
                return True

            while True:  # on a busy machine they may end before they were seen to run
                tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]  # max_batch
                if await become(2, 0):
                    waiting = asyncio.create_task(client.post("/v1/completions", json=body))
                    queued = await become(2, 1)
                    waiting.cancel()
                    if queued and await become(2, 0):  # gone, although nobody's turn has ended
                        break
                await asyncio.gather(*tasks)
                tasks.clear()
                await become(0, 0)
            assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 2
            tasks.clear()
            await become(0, 0)

    asyncio.run(main())


def test_an_answer_has_one_request_id(endpoint: Endpoint, keys: dict[str, str]) -> None:
    made = ask(endpoint, keys["team"]).headers.get_list("X-Request-ID")
    assert len(made) == 1
    assert until(lambda: access_line(made[0]))["status"] == 200


def test_a_keys_file_that_cannot_be_used_is_refused_before_anything_starts(
    tiny_model_dir: Path, tmp_path: Path, ray_cluster: Any
) -> None:
    (tmp_path / "keys.yaml").write_text("tenants: [{name: a}]")
    with pytest.raises(ConfigError, match=r"tenants\.0\.keys: missing"):
        deploy(config(tiny_model_dir, tmp_path / "registry", keys_file=str(tmp_path / "keys.yaml")))
