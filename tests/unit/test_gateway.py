"""The gateway's routes, in this process: behind it is a model that is a script, in the place of Ray Serve's handle."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve

from raymodels.config import EngineConfig, HttpConfig
from raymodels.serve.access_log import LOGGER
from raymodels.serve.capacity import Replicas
from raymodels.serve.encoding import Answered
from raymodels.serve.engine import Delta
from raymodels.serve.gateway import Gateway, app
from raymodels.serve.openapi import page
from raymodels.serve.replica import Accepted, Description, Embedded
from raymodels.serve.routing import Route
from raymodels.serve.schema import EmbeddingRequest, Problem, Request
from raymodels.serve.tenants import add_key
from tests.unit.endpoint import LocalHandle, serve_status

running = 0
most = 0


class Script:
    """A model whose prompt is what it does: how many tokens, how long each takes, or how it fails."""

    async def generate(self, request: Request, *_: Any) -> AsyncGenerator[Any, None]:
        global running, most
        running += 1
        most = max(most, running)
        try:
            told = json.loads(request.prompts[0])  # type: ignore[union-attr, arg-type]
            yield Accepted(told.get("prompt_tokens", 5))
            for number in range(1, told.get("tokens", 2) + 1):
                await asyncio.sleep(told.get("pause", 0))
                if number == told.get("fails_at"):
                    raise ValueError("the cause")
                last = number == told.get("tokens", 2)
                choices = range(request.n * len(request.prompts))  # type: ignore[union-attr]
                yield [Delta(c, f"t{number} ", number, finish="length" if last else None) for c in choices]
        finally:
            running -= 1

    async def check(self, request: Any, adapter: str | None) -> int | Problem:
        if isinstance(request, EmbeddingRequest):
            return 3 * len(request.inputs)
        if any("bad" in prompt for prompt in request.prompts):
            return Problem(status=400, message="a bad prompt", param="prompt")
        return 5 * len(request.prompts)

    async def describe(self) -> Description:
        return Description(
            reference="m@1",
            context=100,
            has_chat_template=False,
            published_unix_seconds=0,
            vocabulary=50,
            choices=4,
            dimensions=2,
        )

    async def embed(self, request: Any, adapter: str | None) -> Embedded:
        return Embedded([[0.6, 0.8] for _ in request.inputs], 3 * len(request.inputs))

    async def tokenize(self, request: Any) -> Answered:
        return Answered(b'{"tokens": [1, 2]}', 2)

    async def detokenize(self, request: Any) -> Answered:
        return Answered(b'{"prompt": ""}', 0)

    async def tokenizer_info(self) -> dict[str, Any]:
        return {}


Use = Callable[[httpx.AsyncClient, Any], Awaitable[Any]]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a coroutine function with a client and the gateway; ``log`` gets the access log."""
    written = io.StringIO()

    async def main(http: HttpConfig, what: Use) -> Any:
        plain = Gateway.func_or_class.__mro__[1]  # without what Serve wraps around it
        engines = {"m--v1": EngineConfig(max_batch=4, max_queue=8), "n--v1": EngineConfig(max_batch=4)}
        table = {"m": Route({"m--v1": 1.0}), "n": Route({"n--v1": 1.0})}
        gateway = plain(http, table, {"m--v1": LocalHandle(Script()), "n--v1": LocalHandle(Script())}, engines)
        for watching in gateway._watching:  # there is no Serve to ask
            watching.cancel()
        monkeypatch.setattr(serve, "status", lambda: serve_status(["m--v1", "n--v1"]))
        monkeypatch.setattr(
            serve, "get_replica_context", lambda: SimpleNamespace(servable_object=gateway, replica_tag="here")
        )
        for handler in logging.getLogger(LOGGER).handlers:
            handler.setStream(written)  # type: ignore[attr-defined]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            try:
                return await what(client, gateway)
            finally:
                await gateway._bodies.close()

    def run(what: Use, **http: Any) -> Any:
        global most
        most = 0
        return asyncio.run(main(HttpConfig(ingress="proxy", **http), what))

    run.log = lambda: [json.loads(line) for line in written.getvalue().splitlines()]  # type: ignore[attr-defined]
    yield run
    logging.getLogger(LOGGER).handlers = []


def body(model: str = "m", stream: bool = False, max_tokens: int = 8, **told: Any) -> dict[str, Any]:
    return {"model": model, "prompt": json.dumps(told), "stream": stream, "max_tokens": max_tokens}


async def ask(client: httpx.AsyncClient, key: str | None = None, timeout: float | None = None, **how: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"X-Request-Timeout": str(timeout)} if timeout else {}
    return await client.post("/v1/completions", json=body(**how), headers=headers)


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_whole_and_streamed(use: Any) -> None:
    async def what(client: httpx.AsyncClient, _: Any) -> None:
        whole = (await ask(client)).json()
        assert (whole["choices"][0]["text"], whole["usage"]["total_tokens"]) == ("t1 t2 ", 7)
        streamed = (await ask(client, stream=True)).text
        assert streamed.endswith("data: [DONE]\n\n")

    use(what)
    for line in use.log():
        assert (line["status"], line["tokens_in"], line["tokens_out"], line["finish"]) == (200, 5, 2, "length")
        assert (line["model"], line["route"], line["tenant"]) == ("m", "completions", "anybody")


def test_no_more_are_sent_to_a_model_than_it_has_room_for(use: Any) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        answers = await asyncio.gather(*(ask(client, pause=0.01) for _ in range(13)))
        assert {answer.status_code for answer in answers} == {200}
        assert gateway._admission.queue("m").running == 0

    use(what)
    assert most == 5  # max_batch 4 and a quarter of it ahead


def test_a_full_queue_is_429(use: Any) -> None:
    async def what(client: httpx.AsyncClient, _: Any) -> None:
        answers = await asyncio.gather(*(ask(client, pause=0.05) for _ in range(20)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert [error(answer) for answer in refused] == [(429, "queue_full")] * 7  # 5 run, 8 wait
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)

    use(what)


async def busy(client: httpx.AsyncClient, key: str, until: asyncio.Event) -> None:
    """More requests than the model takes at once, for as long as they are wanted."""

    async def one() -> None:
        while not until.is_set():
            answer = await ask(client, key, pause=0.005)
            assert answer.status_code in (200, 429)  # the other key's request may fill the queue
            await asyncio.sleep(0.001 if answer.status_code == 429 else 0)

    await asyncio.gather(*(one() for _ in range(6)))


@pytest.mark.parametrize(
    ("path", "fields", "answers"),
    [
        ("/v1/embeddings", {"input": ["x"] * 4}, 4),  # of four places one is left to tenants with less
        ("/v1/embeddings", {"input": ["x"] * 12}, 12),  # all that four places and a queue of eight hold
        ("/v1/completions", {"prompt": "{}", "n": 3}, 3),
        ("/v1/completions", {"prompt": "{}", "n": 4}, 4),
        ("/v1/completions", {"prompt": ["{}"] * 4, "n": 3}, 12),
    ],
)
def test_a_large_request_gets_its_turn_while_another_key_never_stops(
    use: Any, tmp_path: Path, path: str, fields: dict[str, Any], answers: int
) -> None:
    file = str(tmp_path / "keys.yaml")
    loud, quiet = add_key(file, "loud"), add_key(file, "quiet")

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        enough = asyncio.Event()
        others = asyncio.create_task(busy(client, loud, enough))
        while not gateway._admission.queue("m").waiting:
            await asyncio.sleep(0)
        own = {"Authorization": f"Bearer {quiet}"}
        async with asyncio.timeout(10):
            answer = (await client.post(path, json={"model": "m", **fields}, headers=own)).json()
        enough.set()
        await others
        found = answer.get("data") or answer["choices"]
        assert [each["index"] for each in found] == list(range(answers))
        assert answer["usage"]["prompt_tokens"] == (3 * answers if "data" in answer else 5 * len(found) // fields["n"])
        assert gateway._admission.queue("m").idle

    use(what, keys_file=file)
    assert use.log()[-1]["status"] == 200


def test_of_prompts_computed_in_parts_a_bad_one_is_told_before_the_stream_begins(use: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a")

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        own = {"Authorization": f"Bearer {key}"}
        body = {"model": "m", "stream": True, "prompt": ["{}"] * 11 + ['{"bad": 1}']}
        answer = await client.post("/v1/completions", json=body, headers=own)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        streamed = await client.post("/v1/completions", json=body | {"prompt": ["{}"] * 12}, headers=own)
        events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if "{" in line]
        assert {event["choices"][0]["index"] for event in events} == set(range(12))
        assert gateway._admission.queue("m").idle

    use(what, keys_file=file)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"input": ["x"] * 13}, "input"),
        ("/v1/completions", {"prompt": "{}", "n": 5}, "n"),
        ("/v1/completions", {"prompt": ["{}"] * 13}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 5}, "n"),
    ],
)
def test_what_never_fits_is_refused_without_waiting(use: Any, path: str, fields: dict[str, Any], param: str) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        others = [asyncio.create_task(ask(client, pause=0.2)) for _ in range(5)]
        while gateway._admission.queue("m").running < 5:
            await asyncio.sleep(0)
        answer = await client.post(path, json={"model": "m", **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert "over the" in answer.json()["error"]["message"]
        assert not any(other.done() for other in others)
        await asyncio.gather(*others)

    use(what)


def test_listing_models_starts_none(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        monkeypatch.setattr(serve, "status", lambda: serve_status(["m--v1"]))
        gateway._routes.bound["n--v1"] = None  # asking its replicas would fail
        awake, asleep = (await client.get("/v1/models")).json()["data"]
        assert (awake["id"], awake["root"], awake["max_model_len"]) == ("m", "m@1", 100)
        assert (asleep["id"], asleep["root"], asleep["max_model_len"]) == ("n", None, None)
        assert (await client.get("/v1/models/n")).json() == asleep
        assert (await client.get("/openapi.json")).status_code == 200
        monkeypatch.setattr(serve, "status", lambda: serve_status([]))
        await gateway._capacity.look()
        assert (await client.get("/v1/models/m")).json() == awake  # as last heard of

    use(what)


def test_listing_models_asks_serve_no_more_than_once_a_moment(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    async def what(client: httpx.AsyncClient, _: Any) -> None:
        monkeypatch.setattr(serve, "status", lambda: asked.append(1) or serve_status(["m--v1"]))
        monkeypatch.setattr("raymodels.serve.gateway.FRESH_S", 60.0)
        for path in ["/v1/models", "/v1/models/m", "/openapi.json"] * 3:
            assert (await client.get(path)).status_code == 200

    use(what)
    assert len(asked) == 1


def test_a_model_that_does_not_load_is_503_with_the_cause_and_leaves_others_unharmed(use: Any) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        failed = {"n--v1": Replicas(0, "REPLICA_STARTUP_FAILED", "model.safetensors was changed")}
        gateway._capacity.update({"m--v1": Replicas(1, "UPSCALE_COMPLETED"), **failed})
        gateway._capacity._looked_at = asyncio.get_running_loop().time()
        for answer in (
            await client.get("/v1/models/n"),
            await ask(client, model="n"),
            await ask(client, model="n", stream=True),
            await client.post("/v1/embeddings", json={"model": "n", "input": "x"}),
        ):
            assert error(answer) == (503, "model_not_loading")
            assert answer.json()["error"]["message"] == "the model 'n' does not load: model.safetensors was changed"
            assert int(answer.headers["Retry-After"]) >= 1
        assert (await ask(client)).status_code == 200
        assert (await client.get("/v1/models/m")).json()["root"] == "m@1"
        assert [(each["id"], each["root"]) for each in (await client.get("/v1/models")).json()["data"]] == [
            ("m", "m@1"),
            ("n", None),
        ]
        await gateway._capacity.look()  # by now it runs
        assert (await ask(client, model="n")).status_code == 200

    use(what)
    assert {line["error"] for line in use.log() if line["status"] == 503} == {"model_not_loading"}


def test_every_route_asks_for_the_key_and_shows_a_tenant_its_own_models(use: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a", models=["m"])

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        described = page({}, HttpConfig(keys_file=file))["paths"]
        routes = [(method, path) for path, methods in described.items() for method in methods]
        keyed = [(method, path) for method, path in routes if path not in ("/healthz", "/readyz")]
        assert len(keyed) >= 8
        for method, path in [*keyed, ("get", "/metrics"), ("get", "/openapi.json"), ("get", "/nowhere")]:
            answer = await client.request(method, path.replace("{model}", "m"))
            assert error(answer) == (401, "invalid_api_key"), path
        assert (await client.get("/healthz")).status_code == 200
        own = {"Authorization": f"Bearer {key}"}
        listed = (await client.get("/v1/models", headers=own)).json()["data"]
        assert [model["id"] for model in listed] == ["m"]
        assert (await client.get("/v1/models/m", headers=own)).status_code == 200
        for method, path, sent in (
            ("GET", "/v1/models/n", None),
            ("GET", "/tokenizer_info?model=n", None),
            ("POST", "/v1/completions", body("n")),
            ("POST", "/v1/chat/completions", {"model": "n", "messages": [{"role": "user", "content": "x"}]}),
            ("POST", "/v1/embeddings", {"model": "n", "input": "x"}),
            ("POST", "/tokenize", {"model": "n", "prompt": "x"}),
            ("POST", "/detokenize", {"model": "n", "tokens": [1]}),
        ):
            answer = await client.request(method, path, json=sent, headers=own)
            assert error(answer) == (403, "model_not_allowed"), path
        assert error(await ask(client, key, model="nowhere")) == (403, "model_not_allowed")

    use(what, keys_file=file)


def test_an_unknown_model_is_404_and_makes_no_queue_and_no_label(use: Any) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        assert error(await ask(client, model="nowhere")) == (404, "model_not_found")
        assert gateway._admission._queues == {}
        assert 'model="nowhere"' not in (await client.get("/metrics")).text

    use(what)


def test_quotas_hold_on_every_route_that_has_a_model_work(use: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a", requests_per_minute=3)

    async def what(client: httpx.AsyncClient, _: Any) -> list[int]:
        own = {"Authorization": f"Bearer {key}"}
        return [
            (await client.post(path, json={"model": "m", **sent}, headers=own)).status_code
            for path, sent in (
                ("/v1/embeddings", {"input": ["x", "y"]}),
                ("/tokenize", {"prompt": "x"}),
                ("/v1/completions", {"prompt": "{}"}),
                ("/v1/completions", {"prompt": "{}"}),
                ("/v1/embeddings", {"input": "x"}),
                ("/tokenize", {"prompt": "x"}),
            )
        ]

    assert use(what, keys_file=file) == [200, 200, 200, 429, 429, 429]
    assert use.log()[0]["tokens_in"] == 6


def test_used_tokens_settle_the_quota(use: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a", tokens_per_minute=100)

    async def what(client: httpx.AsyncClient, _: Any) -> list[int]:
        # Each may take 40 and more, and takes 7: the quota is for four of them at least, and not for one with 90.
        answers = [(await ask(client, key, max_tokens=20, stream=n % 2 == 0)).status_code for n in range(4)]
        answers.append((await ask(client, key, max_tokens=20, prompt_tokens=90)).status_code)
        return [*answers, (await ask(client, key, max_tokens=20)).status_code]

    assert use(what, keys_file=file) == [200] * 5 + [429]


def test_a_failure_in_the_middle_of_a_stream_is_an_event(use: Any) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        text = (await ask(client, stream=True, tokens=3, fails_at=2)).text
        events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
        assert events[0]["choices"][0]["text"] == "t1 "
        assert events[-1]["error"]["type"] == "server_error"
        assert "the cause" not in text
        assert gateway._admission.queue("m").running == 0

    use(what)
    assert use.log()[0]["status"] == 500


@pytest.mark.parametrize("stream", [True, False])
def test_the_deadline_of_a_request_is_its_own(use: Any, stream: bool) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        answer = await ask(client, timeout=1.0, stream=stream, tokens=3, pause=0.6)
        assert "timeout" in answer.text
        assert answer.status_code == (200 if stream else 504)
        assert gateway._admission.queue("m").running == 0

    use(what)
    assert use.log()[0]["status"] == 504


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(use: Any, stream: bool) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        asking = asyncio.create_task(ask(client, stream=stream, tokens=3, pause=30))
        while not running:
            await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.wait([asking])
        assert gateway._admission.queue("m").running == 0
        while running:
            await asyncio.sleep(0.005)

    use(what)
    assert use.log()[0]["status"] == 499


def test_limits_of_prompt_and_output(use: Any) -> None:
    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        assert error(await ask(client, max_tokens=11)) == (400, "output_too_long")
        assert error(await ask(client, max_tokens=10, prompt_tokens=21)) == (400, "prompt_too_long")
        assert (await ask(client, max_tokens=10, prompt_tokens=20)).status_code == 200
        assert gateway._admission.queue("m").running == 0

    use(what, max_output_tokens=10, max_prompt_tokens=20)


def test_a_body_that_does_not_come_is_408(use: Any) -> None:
    async def what(client: httpx.AsyncClient, _: Any) -> None:
        async def trickle() -> AsyncGenerator[bytes, None]:
            yield b"{"
            await asyncio.sleep(30)

        answer = await client.post(
            "/v1/completions",
            content=trickle(),
            headers={"X-Request-Timeout": "0.05", "Content-Type": "application/json"},
        )
        assert error(answer) == (408, "timeout")

    use(what)


def test_too_large_a_body_is_413(use: Any) -> None:
    async def what(client: httpx.AsyncClient, _: Any) -> None:
        assert error(await ask(client, filler="x" * 1000)) == (413, "body_too_large")

    use(what, max_body_bytes=1000)


@pytest.mark.parametrize(
    ("method", "path", "sent", "status"),
    [
        ("POST", "/v1/completions", {"content": b"x" * 3000}, 413),
        ("POST", "/v1/completions", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ("POST", "/v1/completions", {"content": b"{"}, 400),
        ("POST", "/v1/completions", {"json": {"model": "m", "prompt": "x", "unknown": 1}}, 400),
        ("POST", "/v1/completions", {"json": {"model": "nowhere", "prompt": "x"}}, 404),
        ("POST", "/v1/completions", {"headers": {"X-Request-Timeout": "soon"}}, 400),
        ("GET", "/v1/completions", {}, 405),
        ("GET", "/nowhere", {}, 404),
        ("GET", "/openapi.json", {}, 200),
        ("GET", "/v1/models", {}, 200),
        ("GET", "/v1/models/m", {}, 200),
        ("POST", "/tokenize", {"json": {"model": "m", "prompt": "x"}}, 200),
        ("POST", "/detokenize", {"json": {"model": "m", "tokens": []}}, 200),
        ("GET", "/tokenizer_info?model=m", {}, 200),
    ],
)
def test_every_request_with_a_key_counts(
    use: Any, tmp_path: Path, method: str, path: str, sent: dict[str, Any], status: int
) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a", requests_per_minute=2)

    async def what(client: httpx.AsyncClient, _: Any) -> None:
        headers = {"Authorization": f"Bearer {key}"} | sent.get("headers", {})
        ask = {"url": path, "method": method} | sent | {"headers": headers}
        assert [(await client.request(**ask)).status_code for _ in range(3)] == [status, status, 429]
        refused = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert error(refused) == (429, "requests_per_minute_exceeded")
        assert 1 <= int(refused.headers["Retry-After"]) <= 30
        assert (await client.get("/healthz")).status_code == 200

    use(what, keys_file=file, max_body_bytes=2000)


def test_embeddings_are_under_the_limit_of_a_prompt(use: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a", max_prompt_tokens=6)

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        own = {"Authorization": f"Bearer {key}"}
        for texts, status in ((2, 200), (3, 400), (12, 400)):  # of three tokens each; the last ones in parts
            answer = await client.post("/v1/embeddings", json={"model": "m", "input": ["x"] * texts}, headers=own)
            assert answer.status_code == status
        assert (error(answer), answer.json()["error"]["param"]) == ((400, "prompt_too_long"), "input")
        assert gateway._admission.queue("m").idle

    use(what, keys_file=file)


@pytest.mark.parametrize(
    ("path", "fields", "method"),
    [
        ("/v1/embeddings", {"input": "x" * 400}, "embed"),
        ("/v1/completions", {"prompt": "x" * 400, "max_tokens": 1}, "generate"),
        ("/tokenize", {"prompt": "x" * 400}, "tokenize"),
    ],
)
@pytest.mark.parametrize("how", ["given up", "refused"])
def test_what_a_replica_was_sent_is_charged_however_it_ends(
    use: Any, tmp_path: Path, path: str, fields: dict[str, Any], method: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a", tokens_per_minute=150)
    begun, problem = asyncio.Event(), Problem(status=400, message="too long", param="prompt")

    async def once(*_: Any) -> Any:
        begun.set()
        await asyncio.sleep(30 if how == "given up" else 0)
        return problem

    async def stream(*_: Any) -> AsyncGenerator[Any, None]:
        yield await once()

    monkeypatch.setattr(Script, method, stream if method == "generate" else once)

    async def what(client: httpx.AsyncClient, _: Any) -> None:
        own = {"Authorization": f"Bearer {key}"}
        asking = asyncio.create_task(client.post(path, json={"model": "m", **fields}, headers=own))
        await begun.wait()
        if how == "given up":
            asking.cancel()
        await asyncio.wait([asking])
        answer = await client.post(path, json={"model": "m", **fields}, headers=own)
        assert error(answer) == (429, "tokens_per_minute_exceeded")
        assert 10 <= int(answer.headers["Retry-After"]) <= 60  # about 110 of 150 are used, and as many asked for

    use(what, keys_file=file)


def test_tokens_of_the_tokenizers_routes_are_charged(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(tmp_path / "keys.yaml")
    key = add_key(file, "a", tokens_per_minute=100)

    async def tokenize(*_: Any) -> Answered:
        return Answered(b"{}", 95)

    monkeypatch.setattr(Script, "tokenize", tokenize)

    async def what(client: httpx.AsyncClient, _: Any) -> list[int]:
        own = {"Authorization": f"Bearer {key}"}
        body = {"model": "m", "prompt": "x"}
        return [(await client.post("/tokenize", json=body, headers=own)).status_code for _ in range(2)]

    assert use(what, keys_file=file) == [200, 429]


def test_too_large_a_text_for_a_tokenizer_is_413(use: Any) -> None:
    async def what(client: httpx.AsyncClient, _: Any) -> None:
        for path, field in (("/tokenize", {"prompt": "x" * (1 << 20)}), ("/detokenize", {"tokens": [1] * 600_000})):
            assert error(await client.post(path, json={"model": "m", **field})) == (413, "body_too_large")

    use(what)


def test_probes_ask_serve_once_a_moment_and_see_what_changes(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    there = ["m--v1", "n--v1"]

    def status() -> Any:
        asked.append(time.monotonic())
        time.sleep(0.02)
        return serve_status(there)

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        monkeypatch.setattr(serve, "status", status)
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(32)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(asked) == 1  # the first ones waited for one look
        there.remove("n--v1")
        assert (await client.get("/readyz")).status_code == 200
        await gateway._capacity.look()  # as the watch does every two seconds
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(32)))
        assert {answer.status_code for answer in answers} == {503}
        assert answers[0].json()["models_without_replicas"] == ["n"]
        assert len(asked) <= 3
        there.append("n--v1")
        await asyncio.sleep(0.6)  # what is unready is looked at again by who asks
        assert (await client.get("/readyz")).status_code == 200
        assert len(asked) <= 4

    use(what)


def test_a_body_is_not_read_for_a_key_over_its_quota(use: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    key = add_key(file, "a", tokens_per_minute=100)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        assert (await ask(client, key, prompt_tokens=200)).status_code == 200
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            for size in (10, 1 << 20):
                answer = await client.post(path, content=b"no JSON".ljust(size), headers=headers)
                assert error(answer) == (429, "tokens_per_minute_exceeded")
        assert not gateway._bodies._readers._idle  # no process was started for it

    use(what, keys_file=file)


def test_a_large_body_is_answered_as_a_small_one(use: Any) -> None:
    large = {"user": "x" * (1 << 20)}

    async def what(client: httpx.AsyncClient, gateway: Any) -> None:
        whole = await client.post("/v1/completions", json=body(tokens=2) | large)
        assert whole.json()["choices"][0]["text"] == "t1 t2 "
        embedded = await client.post("/v1/embeddings", json={"model": "m", "input": [[1, 2], [3]]} | large)
        assert len(embedded.json()["data"]) == 2
        assert (await client.post("/tokenize", json={"prompt": "x" * (1 << 19)})).status_code == 400  # two models
        wrong = await client.post("/v1/completions", json=body() | large | {"n": 0})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "n")

    use(what)


@pytest.mark.parametrize("field", ["prompt", "metadata", "response_format", "messages", "input", "unknown"])
def test_what_is_nested_deep_is_400_in_any_field(use: Any, field: str) -> None:
    deep = "[" * 600 + "]" * 600

    async def what(client: httpx.AsyncClient, _: Any) -> None:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            content = f'{{"model":"m","{field}":{deep}}}'
            answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")

    use(what)
