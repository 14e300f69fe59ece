"""The HTTP API as a client sees it: requests built, answers and streams parsed, retries decided.

Does no I/O itself: `Client` and `AsyncClient` share all of it.
"""

from __future__ import annotations

import email.utils
import json
import random
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from raymodels.answers import (
    ChatOptions,
    CompletionOptions,
    Delta,
    EmbeddingList,
    Message,
    Model,
    Prompt,
    Usage,
)
from raymodels.errors import (
    BadRequest,
    ClientError,
    ConfigError,
    ConnectionFailed,
    NotAllowed,
    NotFound,
    Overloaded,
    ServerFailed,
    StatusError,
)

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0  # a server that asks for more is reported instead of waited for
DONE = "[DONE]"

R = TypeVar("R", bound=BaseModel)


def root_url(base_url: str) -> str:
    """The server's address without the ``/v1`` that other clients want at its end.

    Raises:
        ConfigError: it is not an HTTP address.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url {base_url!r} must start with http:// or https://")
    return base_url.rstrip("/").removesuffix("/v1")


def headers(api_key: str | None) -> dict[str, str]:
    if api_key is None:
        return {}
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise ConfigError("api_key must be printable ASCII without spaces or line ends (it is not shown here)")
    return {"Authorization": f"Bearer {api_key}"}


def trusted(ca: str | None) -> ssl.SSLContext | bool:
    """What httpx is to verify certificates with.

    Raises:
        ConfigError: the file holds no certificates.
    """
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"ca: {ca} is no PEM file of certificates: {error.strerror or error}") from error


def only(models: Sequence[Model]) -> str:
    """The name of the one model there is.

    Raises:
        ClientError: there are none, or several.
    """
    if not models:
        raise ClientError("the server has no model: start it with one, or wait until it is ready")
    if len(models) > 1:
        raise ClientError(f"the server has several models: give model= one of {', '.join(m.id for m in models)}")
    return models[0].id


def body(model: str, options: Mapping[str, Any], known: type, **fields: Any) -> dict[str, Any]:
    """A request's JSON; an option that is None is left to the server.

    Raises:
        TypeError: an option that ``known`` does not have, as for any other call with a wrong keyword.
    """
    unknown = sorted(options.keys() - known.__annotations__.keys())
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}; there are {', '.join(sorted(known.__annotations__))}")
    given = {name: value for name, value in options.items() if value is not None}
    return {"model": model, **fields, **given}


def chat_messages(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [m.model_dump(exclude_none=True) if isinstance(m, Message) else dict(m) for m in messages]


def stream_request(
    prompt: Prompt | None, messages: Sequence[Message | Mapping[str, Any]] | None
) -> tuple[str, type, dict[str, Any]]:
    """The path, the options and the fields of a stream of either kind."""
    if (prompt is None) == (messages is None):
        raise TypeError("stream takes either a prompt or messages=")
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    if messages is not None:
        return "/v1/chat/completions", ChatOptions, {"messages": chat_messages(messages), **fields}
    return "/v1/completions", CompletionOptions, {"prompt": prompt, **fields}


def parse(response: httpx.Response, kind: type[R]) -> R:
    """A successful answer as a typed result.

    Raises:
        ClientError: it is not what this API answers, so something else answered.
    """
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise ClientError(
            f"{response.request.url.path} answered what is no {kind.__name__} ({where}: {first['msg']}): "
            f"is base_url a raymodels endpoint? It began {response.text[:100]!r}"
        ) from None


def vectors(found: EmbeddingList) -> list[list[float]]:
    """In the order of the texts."""
    return [list(each.embedding) for each in sorted(found.data, key=lambda each: each.index)]


def failure(response: httpx.Response) -> StatusError:
    """The error of an answer that is not a success; its body must have been read."""
    try:
        content = response.json()
    except ValueError:
        content = None
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict):
        error = {"message": response.text.strip()[:300] or response.reason_phrase}
    return _status_error(response.status_code, error, retry_after(response.headers.get("Retry-After")))


def _status_error(status: int, error: Mapping[str, Any], wait: float | None = None) -> StatusError:
    classes: dict[int, type[StatusError]] = {
        400: BadRequest,
        401: NotAllowed,
        403: NotAllowed,
        404: NotFound,
        413: BadRequest,
        422: BadRequest,
        429: Overloaded,
        503: Overloaded,
    }
    kind = classes.get(status, ServerFailed if status >= 500 else StatusError)
    remedy = "; set api_key" if status == 401 else ""
    return kind(
        f"{error.get('message') or 'no reason given'} (HTTP {status}){remedy}",
        status=status,
        kind=error.get("type"),
        param=error.get("param"),
        retry_after=wait,
    )


def retry_after(value: str | None) -> float | None:
    """The seconds a ``Retry-After`` header asks for, given as a number or an HTTP date; none if it is neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def unreachable(error: httpx.TransportError, request: httpx.Request) -> ConnectionFailed:
    """What it means to a user that no answer came."""
    place = f"{request.url.scheme}://{request.url.netloc.decode()}"
    if untrusted := _untrusted(error):
        return ConnectionFailed(
            f"the certificate of {place} is not trusted ({untrusted.verify_message}): give its CA's file as ca"
        )
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ConnectionFailed(f"cannot connect to {place} ({error or 'timed out'}): is the endpoint running there?")
    if isinstance(error, httpx.TimeoutException):
        return ConnectionFailed(f"no answer from {place} in time: give the client a longer timeout, or ask for less")
    return ConnectionFailed(f"the connection to {place} broke: {error or type(error).__name__}")


def _untrusted(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """What OpenSSL said of the server's certificate, if that is the cause."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def wait_before_retry(error: ClientError, attempt: int, retries: int) -> float:
    """The seconds to wait before trying again after failed attempt number ``attempt``, from 0.

    Raises:
        ClientError: ``error`` itself, where trying again is no use, not safe, or has been done ``retries`` times.
    """
    # Only a connection that was never made is surely without effect: what was sent may have been done.
    refused = isinstance(error.__cause__, httpx.ConnectError) and not _untrusted(error)
    asked = error.retry_after if isinstance(error, Overloaded) else None
    if attempt >= retries or not (refused or isinstance(error, Overloaded)) or (asked or 0) > LONGEST_WAIT_S:
        raise error
    if asked is not None:
        return asked
    return min(FIRST_WAIT_S * 2.0**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)


class StreamDecoder:
    """Server-sent events, fed as bytes in any pieces, to deltas."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._event = ""
        self._done = False

    def feed(self, piece: bytes) -> Iterator[Delta]:
        """The deltas that this piece completes.

        Raises:
            StatusError: the server reported an error in the stream.
            ClientError: an event is not this API's.
        """
        # By bytes and newline only: str.splitlines would also cut at U+2028 inside a JSON string.
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            yield from self._line(line.removesuffix(b"\r").decode("utf-8", "replace"))

    def close(self) -> None:
        """Say that the bytes have ended.

        Raises:
            ConnectionFailed: the stream was cut off.
        """
        if not self._done:
            raise ConnectionFailed("the stream ended before it was complete: what came so far is cut off")

    def _line(self, line: str) -> Iterator[Delta]:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif not line and self._data:
            data, event = "\n".join(self._data), self._event
            self._data, self._event = [], ""
            yield from self._dispatch(event, data)

    def _dispatch(self, event: str, data: str) -> Iterator[Delta]:
        if self._done:
            return
        if data == DONE:
            self._done = True
            return
        try:
            content = json.loads(data)
        except ValueError:
            content = None
        if event == "error" or (isinstance(content, dict) and content.get("error")):
            _raise_streamed(content, data)
        try:
            yield from _deltas(content)
        except (ValidationError, TypeError, AttributeError, KeyError):
            raise ClientError(f"the stream holds what is no delta of this API: {data[:100]!r}") from None


def _raise_streamed(content: Any, data: str) -> NoReturn:
    error = content.get("error", content) if isinstance(content, dict) else None
    if not isinstance(error, dict):
        error = {"message": str(error or data)[:300]}
    code = str(error.get("code", ""))
    raise _status_error(int(code) if code.isdigit() else 500, error)


def _deltas(chunk: dict[str, Any]) -> Iterator[Delta]:
    for choice in chunk["choices"]:
        gained = choice["delta"] if "delta" in choice else {"content": choice["text"]}
        news = {"text": gained.get("content") or "", "tool_calls": gained.get("tool_calls") or ()}
        delta = Delta.model_validate({**choice, **news})
        if delta.text or delta.tool_calls or delta.finish_reason or delta.logprobs:
            yield delta
    if chunk.get("usage"):
        yield Delta(usage=Usage.model_validate(chunk["usage"]))
