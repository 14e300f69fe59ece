"""Call an endpoint: `Client`, and `AsyncClient` for asyncio. Needs neither torch nor ray.

    with Client("http://127.0.0.1:8000") as client:
        print(client.complete("def ", max_tokens=32).text)
        for delta in client.stream("def ", max_tokens=32):
            print(delta.text, end="", flush=True)

Answers 429 and 503 are retried with growing, jittered waits, or after what ``Retry-After`` asks for, and so is a
refused connection. Nothing is retried once a stream began. All that is not I/O lives in `raymodels.protocol`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar, Unpack

import httpx

from raymodels import protocol
from raymodels.answers import (
    ChatCompletion,
    ChatOptions,
    Completion,
    CompletionOptions,
    Delta,
    Detokenized,
    EmbeddingList,
    Message,
    Model,
    ModelList,
    Prompt,
    StreamOptions,
    Tokens,
)
from raymodels.errors import ClientError

TIMEOUT = httpx.Timeout(600, connect=5)
H = TypeVar("H", httpx.Client, httpx.AsyncClient)


class _Caller(Generic[H]):
    """How both clients are made, and shown."""

    _http_kind: type[H]
    _http: H

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        ca: str | None = None,
        timeout: float | httpx.Timeout = TIMEOUT,
        retries: int = 3,
    ) -> None:
        self._retries = retries
        self._http = self._http_kind(
            base_url=protocol.root_url(base_url),
            headers=protocol.headers(api_key),
            verify=protocol.trusted(ca),
            timeout=timeout,
        )

    def __repr__(self) -> str:
        key = "'***'" if "Authorization" in self._http.headers else "None"
        return f"{type(self).__name__}({self._http.base_url!r}, api_key={key})"


class Client(_Caller[httpx.Client]):
    """Calls an endpoint, one call at a time per thread; may be shared by threads.

    Args:
        base_url: the endpoint's address, with or without ``/v1`` at its end.
        api_key: sent as a bearer token; never shown.
        ca: a PEM file of the only CAs to trust for https; default: those that are publicly trusted.
        timeout: seconds to wait for a connection, and for each next piece of an answer.
        retries: how often to try again after a refused connection or an answer 429 or 503.
    """

    _http_kind = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Model]:
        return list(protocol.parse(self._answer("GET", "/v1/models"), ModelList).data)

    def complete(self, prompt: Prompt, *, model: str | None = None, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue a prompt, given as text or token ids. Without ``model``, the only one served.

        Raises:
            ClientError: and its kinds, as drawn in `raymodels.errors`.
        """
        request = protocol.body(self._model(model), options, CompletionOptions, prompt=prompt)
        return protocol.parse(self._answer("POST", "/v1/completions", request), Completion)

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion:
        """Answer a conversation of messages with a ``role`` and a ``content``; raises as `complete` does."""
        request = protocol.body(self._model(model), options, ChatOptions, messages=protocol.chat_messages(messages))
        return protocol.parse(self._answer("POST", "/v1/chat/completions", request), ChatCompletion)

    def embed(self, texts: Prompt, *, model: str | None = None) -> list[list[float]]:
        """The vector of each text, of length 1; raises as `complete` does."""
        request = {"model": self._model(model), "input": texts}
        return protocol.vectors(protocol.parse(self._answer("POST", "/v1/embeddings", request), EmbeddingList))

    def tokenize(self, text: str, *, model: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; raises as `complete` does."""
        request = {"model": self._model(model), "prompt": text, "add_special_tokens": add_special_tokens}
        return list(protocol.parse(self._answer("POST", "/tokenize", request), Tokens).tokens)

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids; raises as `complete` does."""
        request = {"model": self._model(model), "tokens": list(tokens)}
        return protocol.parse(self._answer("POST", "/detokenize", request), Detokenized).prompt

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message | Mapping[str, Any]] | None = None,
        model: str | None = None,
        **options: Unpack[StreamOptions],
    ) -> Generator[Delta, None, None]:
        """A completion or a chat, as it is generated. The request is sent when iteration begins.

        Closing the iterator early closes the connection, which ends the generation.

        Raises:
            ConnectionFailed: also where the stream was cut off.
            ClientError: as `complete`; a failure in mid-stream too.
        """
        path, known, fields = protocol.stream_request(prompt, messages)
        request = protocol.body(self._model(model), options, known, **fields)
        response = self._send("POST", path, request)
        decoder = protocol.StreamDecoder()
        try:
            for piece in response.iter_bytes():
                yield from decoder.feed(piece)
        except httpx.TransportError as error:
            raise protocol.unreachable(error, response.request) from error
        finally:
            response.close()
        decoder.close()

    def _model(self, model: str | None) -> str:
        return model or protocol.only(self.models())

    def _answer(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> httpx.Response:
        response = self._send(method, path, content)
        try:
            response.read()
        except httpx.TransportError as error:
            raise protocol.unreachable(error, response.request) from error
        return response

    def _send(self, method: str, path: str, content: Mapping[str, Any] | None) -> httpx.Response:
        """Send until it succeeds; the answer's body is still to be read."""
        request = self._http.build_request(method, path, json=content)
        for attempt in itertools.count():
            try:
                response = self._http.send(request, stream=True)
                if response.is_success:
                    return response
                response.read()
                error: ClientError = protocol.failure(response)
            except httpx.TransportError as cause:
                error = protocol.unreachable(cause, request)
                error.__cause__ = cause
            time.sleep(protocol.wait_before_retry(error, attempt, self._retries))
        raise AssertionError("unreachable")


class AsyncClient(_Caller[httpx.AsyncClient]):
    """`Client` for asyncio: the same calls, awaited, and ``async for`` over `stream`."""

    _http_kind = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[Model]:
        return list(protocol.parse(await self._answer("GET", "/v1/models"), ModelList).data)

    async def complete(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[CompletionOptions]
    ) -> Completion:
        request = protocol.body(await self._model(model), options, CompletionOptions, prompt=prompt)
        return protocol.parse(await self._answer("POST", "/v1/completions", request), Completion)

    async def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        model: str | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion:
        request = protocol.body(
            await self._model(model), options, ChatOptions, messages=protocol.chat_messages(messages)
        )
        return protocol.parse(await self._answer("POST", "/v1/chat/completions", request), ChatCompletion)

    async def embed(self, texts: Prompt, *, model: str | None = None) -> list[list[float]]:
        request = {"model": await self._model(model), "input": texts}
        return protocol.vectors(protocol.parse(await self._answer("POST", "/v1/embeddings", request), EmbeddingList))

    async def tokenize(self, text: str, *, model: str | None = None, add_special_tokens: bool = True) -> list[int]:
        request = {"model": await self._model(model), "prompt": text, "add_special_tokens": add_special_tokens}
        return list(protocol.parse(await self._answer("POST", "/tokenize", request), Tokens).tokens)

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        request = {"model": await self._model(model), "tokens": list(tokens)}
        return protocol.parse(await self._answer("POST", "/detokenize", request), Detokenized).prompt

    async def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message | Mapping[str, Any]] | None = None,
        model: str | None = None,
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[Delta, None]:
        """As `Client.stream`; wrap it in `contextlib.aclosing` to leave early."""
        path, known, fields = protocol.stream_request(prompt, messages)
        request = protocol.body(await self._model(model), options, known, **fields)
        response = await self._send("POST", path, request)
        decoder = protocol.StreamDecoder()
        try:
            async for piece in response.aiter_bytes():
                for delta in decoder.feed(piece):
                    yield delta
        except httpx.TransportError as error:
            raise protocol.unreachable(error, response.request) from error
        finally:
            await response.aclose()
        decoder.close()

    async def _model(self, model: str | None) -> str:
        return model or protocol.only(await self.models())

    async def _answer(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> httpx.Response:
        response = await self._send(method, path, content)
        try:
            await response.aread()
        except httpx.TransportError as error:
            raise protocol.unreachable(error, response.request) from error
        return response

    async def _send(self, method: str, path: str, content: Mapping[str, Any] | None) -> httpx.Response:
        request = self._http.build_request(method, path, json=content)
        for attempt in itertools.count():
            try:
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                await response.aread()
                error: ClientError = protocol.failure(response)
            except httpx.TransportError as cause:
                error = protocol.unreachable(cause, request)
                error.__cause__ = cause
            await asyncio.sleep(protocol.wait_before_retry(error, attempt, self._retries))
        raise AssertionError("unreachable")
