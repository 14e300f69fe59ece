"""Names of models come and go under load: what runs ends, and nothing waits for what is gone."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from ray import serve

from raymodels.config import EngineConfig, HttpConfig
from raymodels.errors import ConfigError
from raymodels.serve.capacity import Replicas
from raymodels.serve.engine import Delta, EngineStats
from raymodels.serve.gateway import Gateway, app
from raymodels.serve.replica import Accepted, Description, Embedded
from raymodels.serve.routing import Route
from raymodels.serve.schema import Request
from tests.unit.endpoint import LocalHandle, serve_status

APPLICATIONS = ["one", "two", "three"]
ENGINE = {"max_batch": 1, "max_queue": 50}
GAUGES = ("replicas", "running_requests", "queue_requests", "queue_tokens", "engine_running")


described: list[str] = []
"""Who was asked what it is."""


class Application:
    """Answers with its name, and the adapter that was asked for, twice with a pause between."""

    def __init__(self, name: str, pause: float) -> None:
        self._name, self._pause = name, pause

    async def generate(self, request: Request, _: Any, adapter: str | None) -> AsyncGenerator[Any, None]:
        yield Accepted(1)
        for number in (1, 2):
            finish = "length" if number == 2 else None
            yield [Delta(c, f"{self._name}/{adapter} ", number, finish=finish) for c in range(request.n)]
            await asyncio.sleep(self._pause)

    async def embed(self, request: Any, adapter: str | None) -> Embedded:
        await asyncio.sleep(self._pause)
        return Embedded([[float(APPLICATIONS.index(self._name))] for _ in request.inputs], len(request.inputs))

    async def describe(self) -> Description:
        described.append(self._name)
        await asyncio.sleep(self._pause)
        return Description(self._name, 100, False, 0, 50, 4, 1)

    async def stats(self) -> EngineStats:
        await asyncio.sleep(self._pause)
        return EngineStats(running=1, queued=0, tokens_in=0, tokens_out=0)


def table(**routes: str | tuple[str, str]) -> dict[str, Any]:
    """A user_config: each name leads to an application; an adapter's to (application, base)."""
    routed = {
        name: Route({to: 1.0}) if isinstance(to, str) else Route({to[0]: 1.0}, parent=to[1])
        for name, to in routes.items()
    }
    return {
        "table": {name: vars(route) for name, route in routed.items()},
        "engines": dict.fromkeys(APPLICATIONS, ENGINE),
    }


def use(
    monkeypatch: pytest.MonkeyPatch, what: Callable[[httpx.AsyncClient, Any], Awaitable[None]], pause: float = 0.2
) -> None:
    """Run a coroutine function with a client and a gateway whose applications take one sequence each."""

    async def main() -> None:
        kind = Gateway.func_or_class.__mro__[1]  # without what Serve wraps around it
        bound = {name: LocalHandle(Application(name, pause)) for name in APPLICATIONS}
        gateway = kind(HttpConfig(ingress="proxy", work_ahead=0, access_log=False), None, bound)
        for watching in gateway._watching:  # there is no Serve to ask
            watching.cancel()
        monkeypatch.setattr(serve, "status", lambda: serve_status(APPLICATIONS))
        monkeypatch.setattr(
            serve, "get_replica_context", lambda: SimpleNamespace(servable_object=gateway, replica_tag="here")
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as client:
            await what(client, gateway)

    asyncio.run(main())


async def ask(client: httpx.AsyncClient, model: str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "x", **fields})


def asking(client: httpx.AsyncClient, model: str, count: int, **fields: Any) -> list[asyncio.Task[httpx.Response]]:
    return [asyncio.create_task(ask(client, model, **fields)) for _ in range(count)]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


def shown(model: str) -> set[str]:
    return {name for name in GAUGES if REGISTRY.get_sample_value(f"raymodels_serve_{name}", {"model": model})}


@pytest.mark.parametrize("stream", [False, True])
def test_what_waits_for_a_removed_name_is_404_and_what_runs_ends(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        await gateway.reconfigure(table(gone="one", stays="two"))
        requests = asking(client, "gone", 3, stream=stream)
        await until(lambda: gateway._admission.queue("gone").waiting == 2)
        assert shown("gone") >= {"replicas", "running_requests", "queue_requests"}
        await gateway.reconfigure(table(stays="two"))
        running, *waiting = requests
        answers = await asyncio.gather(*waiting)
        assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(404, "model_not_found")] * 2
        assert not running.done()  # at once, not when it would have been their turn
        answer = await running
        assert answer.status_code == 200
        assert answer.text.count("one/None") == 2
        assert not stream or answer.text.endswith("data: [DONE]\n\n")
        assert gateway._admission._queues.keys() <= {"stays"}
        assert shown("gone") == set()
        assert (await ask(client, "gone")).status_code == 404
        assert (await ask(client, "stays")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200

    use(monkeypatch, what)


def test_what_waits_goes_to_where_its_name_leads_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        await gateway.reconfigure(table(name="one"))
        requests = asking(client, "name", 3)
        await until(lambda: gateway._admission.queue("name").waiting == 2)
        await gateway.reconfigure(table(name="two"))
        texts = [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*requests)]
        assert texts == ["one/None one/None ", "two/None two/None ", "two/None two/None "]

    use(monkeypatch, what)


def test_what_waits_for_an_adapter_follows_it_to_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        await gateway.reconfigure(table(base="one", adapter=("one", "base"), other=("one", "base")))
        requests = asking(client, "base", 2) + asking(client, "adapter", 2) + asking(client, "other", 1)
        await until(lambda: gateway._admission.queue("base").waiting == 4)
        await gateway.reconfigure(table(renamed="two", adapter=("two", "renamed")))
        answers = await asyncio.gather(*requests)
        assert [answer.status_code for answer in answers] == [200, 404, 200, 200, 404]
        assert answers[2].json()["choices"][0]["text"] == "two/adapter two/adapter "
        assert gateway._admission._queues.keys() == {"renamed"}

    use(monkeypatch, what)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions"])
def test_a_request_in_parts_ends_where_it_began(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        await gateway.reconfigure(table(name="one"))
        fields = {"input": ["x"] * 5} if "embed" in path else {"prompt": "x" * 5, "stream": True, "n": 1}
        if "embed" not in path:
            gateway._engines["one"] = EngineConfig(max_batch=2, max_queue=50)
            fields["n"] = 2
            others = asking(client, "name", 1)
            await until(lambda: gateway._admission.queue("name").running == 1)
        else:
            others = []
        request = asyncio.create_task(client.post(path, json={"model": "name", **fields}))
        await until(lambda: gateway._admission.queue("name").waiting_sequences > 0)
        await until(lambda: gateway._admission.queue("name").running == 1 + len(others))
        await gateway.reconfigure(table(name="two"))
        await gateway.reconfigure(table())
        answer = await request
        assert answer.status_code == 200
        if "embed" in path:
            assert [each["embedding"] for each in answer.json()["data"]] == [[0.0]] * 5
        else:
            assert (answer.text.count("one/None"), answer.text.count("two/None")) == (4, 0)
        await asyncio.gather(*others)
        assert gateway._admission._queues == {}

    use(monkeypatch, what)


WRONG = [
    None,
    "a table",
    [],
    {},
    {"table": None},
    {"table": {"name": {}}},
    {"table": {"name": {"applications": {}}}},
    {"table": {"name": {"applications": {"two": 0}}}},
    {"table": {"name": {"applications": {"two": float("nan")}}}},
    {"table": {"name": {"applications": ["two"]}}},
    {"table": {"name": {"applications": {"two": 1}, "parents": "x"}}},
    {"table": {"name": {"applications": {"two": 1}, "parent": "nobody"}}},
    {"table": {"a": {"applications": {"two": 1}, "parent": "b"}, "b": {"applications": {"two": 1}, "parent": "a"}}},
    {"table": {"name": {"applications": {"two": 1}}}, "engines": {"two": {"max_batch": 0}}},
    {"tables": {}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_table_that_cannot_be_used_leaves_the_one_before_in_force_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: Any
) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        with pytest.raises(ConfigError):  # there is none before: the deployment fails
            await gateway.reconfigure(wrong)
        await gateway.reconfigure(table(name="one", adapter=("one", "name")))
        before = dict(gateway._routes.table), dict(gateway._engines)
        with caplog.at_level(logging.ERROR):
            await gateway.reconfigure(wrong)
        assert "the new table cannot be used, the one before stays in force" in caplog.text
        assert (gateway._routes.table, gateway._engines) == before
        assert (await ask(client, "adapter")).status_code == 200

    failures = REGISTRY.get_sample_value("raymodels_serve_table_failures_total") or 0
    use(monkeypatch, what, pause=0)
    assert REGISTRY.get_sample_value("raymodels_serve_table_failures_total") == failures + 1


def test_what_is_told_of_a_name_is_of_what_it_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    described.clear()

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        await gateway.reconfigure(table(name="one", gone="one"))
        paths = ("/v1/models", "/v1/models/name", "/v1/models/gone", "/openapi.json", "/metrics")
        told = [asyncio.create_task(client.get(path)) for path in paths]
        await until(lambda: len(described) == 6)
        await gateway.reconfigure(table(name="two"))
        models, name, gone, page, metrics = await asyncio.gather(*told)
        assert [each["id"] for each in models.json()["data"]] == ["name"]
        assert (name.json()["root"], gone.status_code) == (None, 404)
        assert (page.status_code, metrics.status_code) == (200, 200)
        assert (await client.get("/v1/models/name")).json()["root"] == "two"
        assert shown("gone") == set()

    use(monkeypatch, what)


def random_table(draw: random.Random) -> dict[str, Any]:
    bases = {name: draw.choice(APPLICATIONS) for name in "abcd" if draw.random() < 0.6}
    adapters = {name: draw.choice(list(bases)) for name in "xyz" if bases and draw.random() < 0.5}
    return table(**bases, **{name: (bases[base], base) for name, base in adapters.items()})


@pytest.mark.parametrize("seed", range(2))
def test_random_tables_under_load(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw, led, statuses = random.Random(seed), list[dict[str, Any]](), list[int]()

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        async def client_of(number: int) -> None:
            own = random.Random(1000 * seed + number)
            while len(led) < 60:
                model, first = own.choice("abcdxyz"), max(0, len(led) - 1)
                stream = own.random() < 0.5
                if own.random() < 0.1:
                    assert (await client.get(f"/v1/models/{model}")).status_code in (200, 404)
                    assert (await client.get("/v1/models")).status_code == 200
                    continue
                if own.random() < 0.2:
                    answer = await client.post("/v1/embeddings", json={"model": model, "input": ["x"] * 3})
                    found = {APPLICATIONS[int(e["embedding"][0])] for e in answer.json().get("data", [])}
                else:
                    answer = await ask(client, model, stream=stream)
                    found = {name for name in APPLICATIONS if f"{name}/" in answer.text}
                statuses.append(answer.status_code)
                if answer.status_code == 404:
                    assert any(model not in tables for tables in led[first:])
                    continue
                assert answer.status_code == 200, answer.text
                assert "error" not in answer.text
                assert len(found) == 1, "one request is answered by one version"
                assert any(found & tables[model]["applications"].keys() for tables in led[first:] if model in tables)

        async def changes() -> None:
            while len(led) < 60:
                new = random_table(draw)
                led.append(new["table"])
                await gateway.reconfigure(new if draw.random() < 0.9 else {"table": 5})
                if gateway._routes.table.keys() != new["table"].keys():
                    led[-1] = led[-2] if len(led) > 1 else {}
                await asyncio.sleep(draw.uniform(0, 0.02))

        await gateway.reconfigure(random_table(draw))
        led.append({name: vars(route) for name, route in gateway._routes.table.items()})
        await asyncio.gather(changes(), *(client_of(number) for number in range(12)))
        await gateway.reconfigure(table())
        assert gateway._admission._queues == {}
        gateway._capacity.update({"one": Replicas(1, "GONE")})
        assert not [name for name in "abcdxyz" if shown(name)]

    use(monkeypatch, what, pause=0.003)
    assert {200, 404} == set(statuses)
