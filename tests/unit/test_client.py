"""The client against a real HTTP server on this machine that answers what each test scripts."""

import asyncio
import contextlib
import email.utils
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from raymodels import errors, protocol
from raymodels.answers import Message, Usage
from raymodels.client import AsyncClient, Client

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "text": "hello", "finish_reason": "length", "logprobs": None, "new_field": 1}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
CHAT = {
    "id": "chat-1",
    "model": "tiny",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
}


class Endpoint:
    """Answers requests from a list, in order, and the last one again and again; keeps what it was asked."""

    url: str

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.answers: list[Callable[[], Response]] = []
        self.asked: list[Any] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.models = ["tiny"]

    def will(self, *answers: Callable[[], Response]) -> None:
        self.answers = list(answers)

    async def list_models(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [{"id": name} for name in self.models]})

    async def generate(self, request: Request) -> Response:
        self.asked.append(await request.json())
        self.times.append(time.monotonic())
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()


@contextlib.contextmanager
def serving(endpoint: Endpoint, listener: socket.socket) -> Iterator[None]:
    routes = [
        Route("/v1/models", endpoint.list_models),
        Route("/v1/completions", endpoint.generate, methods=["POST"]),
        Route("/v1/chat/completions", endpoint.generate, methods=["POST"]),
    ]
    config = uvicorn.Config(Starlette(routes=routes), log_level="critical", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def local_socket(port: int = 0) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    listener = local_socket()
    endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with serving(endpoint, listener):
        yield endpoint


@pytest.fixture
def endpoint(server: Endpoint) -> Endpoint:
    server.forget()
    return server


class Blocking:
    """An `AsyncClient` called as a `Client` is, so that one test holds for both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.runner = asyncio.Runner()
        self.client = AsyncClient(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.client)

    def __enter__(self) -> "Blocking":
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.client.close())
        self.runner.close()

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        deltas = self.client.stream(*args, **kwargs)
        try:
            while True:
                yield self.runner.run(anext(deltas))
        except StopAsyncIteration:
            pass
        finally:
            self.runner.run(deltas.aclose())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.runner.run(getattr(self.client, name)(*args, **kwargs))


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(kind: Any, endpoint: Endpoint) -> Iterator[Client]:
    with kind(endpoint.url) as client:
        yield client


def json_answer(content: Any, status: int = 200, **headers: str) -> Callable[[], Response]:
    return lambda: JSONResponse(content, status, {key.replace("_", "-"): value for key, value in headers.items()})


def error_answer(status: int, message: str = "no", **headers: str) -> Callable[[], Response]:
    error = {"message": message, "type": "some_error", "param": "max_tokens", "code": None}
    return json_answer({"error": error}, status, **headers)


def events(*pieces: str | bytes | Exception) -> Callable[[], Response]:
    async def body() -> Any:
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece
            await asyncio.sleep(0.01)

    return lambda: StreamingResponse(body(), media_type="text/event-stream")


def chunk(text: str, **choice: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text, **choice}]}, ensure_ascii=False)}\n\n"


def test_complete(client: Client, endpoint: Endpoint) -> None:
    endpoint.will(json_answer(COMPLETION))
    completion = client.complete("def ", max_tokens=2, temperature=0.0, stop=["\n"], seed=None)  # type: ignore[arg-type]
    assert completion.text == "hello"
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage == Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
    assert endpoint.asked == [{"model": "tiny", "prompt": "def ", "max_tokens": 2, "temperature": 0.0, "stop": ["\n"]}]


def test_chat(client: Client, endpoint: Endpoint) -> None:
    endpoint.will(json_answer(CHAT))
    answer = client.chat([{"role": "system", "content": "be brief"}, Message(role="user", content="hi")], model="m")
    assert answer.text == "hi"
    assert endpoint.asked[0]["messages"][1] == {"role": "user", "content": "hi"}
    assert endpoint.asked[0]["model"] == "m"


def test_an_unknown_option_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.complete("x", model="m", temprature=1)  # type: ignore[call-arg]


def test_base_url_with_and_without_v1(kind: Any, endpoint: Endpoint) -> None:
    for suffix in ("", "/", "/v1", "/v1/"):
        with kind(endpoint.url + suffix) as client:
            assert [model.id for model in client.models()] == ["tiny"]


def test_base_url_must_be_http() -> None:
    with pytest.raises(errors.ConfigError, match="http://"):
        Client("127.0.0.1:8000")


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_the_only_model_is_needed(client: Client, endpoint: Endpoint, names: list[str]) -> None:
    endpoint.models = names
    with pytest.raises(errors.ClientError, match="model= one of a, b" if names else "no model"):
        client.complete("x")


def test_api_key_is_sent_and_hidden(kind: Any, endpoint: Endpoint) -> None:
    with kind(endpoint.url, api_key="sk-secret") as client:
        client.models()
        assert "secret" not in repr(client)
        assert "***" in repr(client)
    assert endpoint.keys == ["Bearer sk-secret"]


def test_a_malformed_api_key_is_not_shown() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Client(api_key="sk-secret\n")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "status, kind_of_error",
    [
        (400, errors.BadRequest),
        (401, errors.NotAllowed),
        (403, errors.NotAllowed),
        (404, errors.NotFound),
        (413, errors.BadRequest),
        (418, errors.StatusError),
        (422, errors.BadRequest),
        (500, errors.ServerFailed),
        (502, errors.ServerFailed),
    ],
)
def test_an_error_answer_becomes_its_error(
    client: Client, endpoint: Endpoint, status: int, kind_of_error: type[errors.StatusError]
) -> None:
    endpoint.will(error_answer(status, "too long"))
    with pytest.raises(kind_of_error, match="too long") as caught:
        client.complete("x", model="tiny")
    assert type(caught.value) is kind_of_error
    assert (caught.value.status, caught.value.kind, caught.value.param) == (status, "some_error", "max_tokens")
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("text", ["<html>Bad gateway</html>", '"text"', "[]", ""])
def test_an_error_that_is_not_openais(client: Client, endpoint: Endpoint, text: str) -> None:
    endpoint.will(lambda: PlainTextResponse(text, 502))
    with pytest.raises(errors.ServerFailed, match="HTTP 502"):
        client.complete("x", model="tiny")


@pytest.mark.parametrize("answer", [PlainTextResponse("<html>Welcome"), JSONResponse({"choices": 3})])
def test_an_answer_of_something_else(client: Client, endpoint: Endpoint, answer: Response) -> None:
    endpoint.will(lambda: answer)
    with pytest.raises(errors.ClientError, match="base_url"):
        client.complete("x", model="tiny")


@pytest.mark.parametrize("status", [429, 503])
def test_overload_is_retried_as_often_as_asked(kind: Any, endpoint: Endpoint, status: int) -> None:
    endpoint.will(error_answer(status, Retry_After="0"))
    with kind(endpoint.url, retries=2) as client, pytest.raises(errors.Overloaded) as caught:
        client.complete("x", model="tiny")
    assert caught.value.retry_after == 0.0
    assert len(endpoint.asked) == 3


def test_retry_after_is_waited_for(client: Client, endpoint: Endpoint) -> None:
    soon = email.utils.formatdate(time.time() + 2, usegmt=True)
    endpoint.will(error_answer(503, Retry_After="0.3"), error_answer(429, Retry_After=soon), json_answer(COMPLETION))
    assert client.complete("x", model="tiny").text == "hello"
    first, second, third = endpoint.times
    assert second - first >= 0.3
    assert third - second >= 0.4  # HTTP dates have whole seconds


def test_without_retry_after_waits_grow(client: Client, endpoint: Endpoint) -> None:
    endpoint.will(error_answer(503), error_answer(503, Retry_After="tomorrow"), json_answer(COMPLETION))
    client.complete("x", model="tiny")
    first, second, third = endpoint.times
    assert second - first >= 0.25
    assert third - second >= 0.5


def test_a_retry_after_of_an_hour_is_reported(client: Client, endpoint: Endpoint) -> None:
    endpoint.will(error_answer(429, Retry_After="3600"))
    with pytest.raises(errors.Overloaded) as caught:
        client.complete("x", model="tiny")
    assert caught.value.retry_after == 3600.0
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("attempt, least, most", [(0, 0.25, 0.5), (3, 2.0, 4.0), (20, 30.0, 60.0)])
def test_back_off_is_exponential_with_jitter(attempt: int, least: float, most: float) -> None:
    error = errors.Overloaded("busy", status=503)
    waits = {protocol.wait_before_retry(error, attempt, retries=99) for _ in range(50)}
    assert least <= min(waits) < max(waits) <= most


def test_a_refused_connection_is_retried(kind: Any) -> None:
    endpoint = Endpoint()
    with local_socket() as listener:  # a port that is free now and refuses until the server listens
        port = listener.getsockname()[1]
    with contextlib.ExitStack() as stack:
        begin = threading.Timer(0.2, lambda: stack.enter_context(serving(endpoint, local_socket(port))))
        begin.start()
        with kind(f"http://127.0.0.1:{port}") as client:
            assert client.models()[0].id == "tiny"
        begin.join()


def test_nothing_listens(kind: Any) -> None:
    with local_socket() as listener:
        port = listener.getsockname()[1]
    with (
        kind(f"http://127.0.0.1:{port}", retries=0) as client,
        pytest.raises(errors.ConnectionFailed, match=f"127.0.0.1:{port}"),
    ):
        client.models()


def test_a_timeout_is_not_retried(kind: Any, endpoint: Endpoint) -> None:
    async def never() -> Any:
        await asyncio.sleep(30)
        yield b""

    endpoint.will(lambda: StreamingResponse(never()))
    with (
        kind(endpoint.url, timeout=httpx.Timeout(60, read=1)) as client,
        pytest.raises(errors.ConnectionFailed, match="timeout"),
    ):
        client.complete("x", model="tiny")
    assert len(endpoint.asked) == 1


def test_stream_of_a_completion(client: Client, endpoint: Endpoint) -> None:
    usage = 'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}}\n\n'
    endpoint.will(
        events(": ping\n\n", chunk("a"), chunk("\u2028b"), chunk("", finish_reason="stop"), usage, "data: [DONE]\n\n")
    )
    deltas = list(client.stream("x", max_tokens=3))
    assert [delta.text for delta in deltas] == ["a", "\u2028b", "", ""]
    assert deltas[2].finish_reason == "stop"
    assert deltas[3].usage == Usage(prompt_tokens=1, completion_tokens=3, total_tokens=4)
    assert endpoint.asked[0]["stream"] is True


def test_stream_of_a_chat(client: Client, endpoint: Endpoint) -> None:
    first = 'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\r\n\r\n'
    text = 'data: {"choices": [{"index": 0, "delta": {"content": "hé"}, "finish_reason": null}]}\r\n\r\n'.encode()
    split = text.index("é".encode()) + 1  # in the middle of a character
    endpoint.will(events(first, text[:split], text[split:], "data: [DONE]\r\n\r\n"))
    assert [delta.text for delta in client.stream(messages=[{"role": "user", "content": "hi"}])] == ["hé"]


def test_stream_takes_one_kind_of_input(client: Client) -> None:
    with pytest.raises(TypeError, match="either"):
        list(client.stream("x", messages=[]))


def test_stream_is_retried_before_it_begins(client: Client, endpoint: Endpoint) -> None:
    endpoint.will(error_answer(429, Retry_After="0"), events(chunk("a"), "data: [DONE]\n\n"))
    assert [delta.text for delta in client.stream("x", model="tiny")] == ["a"]


@pytest.mark.parametrize(
    "pieces, error, message",
    [
        ([chunk("a")], errors.ConnectionFailed, "cut off"),
        ([chunk("a"), RuntimeError("died")], errors.ConnectionFailed, "broke"),
        ([chunk("a"), 'data: {"error": {"message": "overloaded", "code": 503}}\n\n'], errors.Overloaded, "overloaded"),
        ([chunk("a"), 'event: error\ndata: {"message": "replica died"}\n\n'], errors.ServerFailed, "replica died"),
        ([chunk("a"), "event: error\ndata: it broke\n\n"], errors.ServerFailed, "it broke"),
        ([chunk("a"), "data: {}\n\n"], errors.ClientError, "no delta"),
        ([chunk("a"), "data: <html>\n\n"], errors.ClientError, "no delta"),
    ],
)
def test_a_stream_that_fails_raises_and_is_not_retried(
    client: Client, endpoint: Endpoint, pieces: list[Any], error: type[errors.ClientError], message: str
) -> None:
    endpoint.will(events(*pieces))
    got = []
    with pytest.raises(error, match=message):
        got.extend(delta.text for delta in client.stream("x", model="tiny"))
    assert len(endpoint.asked) == 1


def test_a_stream_times_out_between_pieces(kind: Any, endpoint: Endpoint) -> None:
    async def stuck() -> Any:
        yield chunk("a")
        await asyncio.sleep(30)

    endpoint.will(lambda: StreamingResponse(stuck()))
    with kind(endpoint.url, timeout=httpx.Timeout(60, read=1)) as client:
        deltas = client.stream("x", model="tiny")
        assert next(deltas).text == "a"
        with pytest.raises(errors.ConnectionFailed, match="in time"):
            next(deltas)


def test_leaving_a_stream_closes_its_connection(client: Client, endpoint: Endpoint) -> None:
    left = threading.Event()

    async def endless() -> Any:
        try:
            while True:
                yield chunk("a")
                await asyncio.sleep(0.01)
        finally:
            left.set()

    endpoint.will(lambda: StreamingResponse(endless()))
    deltas = client.stream("x", model="tiny")
    next(deltas)
    deltas.close()
    assert left.wait(60)
