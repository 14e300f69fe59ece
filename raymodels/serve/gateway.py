"""HTTP in front of all models: OpenAI's routes, health and metrics.

Ray Serve copies the class by value where it decorates it. So what the class uses stands above it, and annotations are
not postponed: FastAPI could not resolve their names in the copy.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from ray import serve
from starlette.exceptions import HTTPException

from raymodels.config import HttpConfig
from raymodels.serve.answers import Answer, answer_to
from raymodels.serve.metrics import CLIENT_LEFT, Clock
from raymodels.serve.routing import Call, Route, Routes
from raymodels.serve.schema import Problem, Refused, Request, read_chat, read_completion

app = FastAPI(title="raymodels", docs_url=None, redoc_url=None)
SERVER_SENT_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


@app.exception_handler(Refused)
async def _on_refused(_: HttpRequest, refused: Refused) -> JSONResponse:
    problem = refused.problem
    headers = {"Retry-After": str(problem.retry_after_s)} if problem.retry_after_s else None
    return JSONResponse(problem.body(), problem.status, headers)


@app.exception_handler(HTTPException)
async def _on_http(http: HttpRequest, error: HTTPException) -> JSONResponse:
    message = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(Problem(status=error.status_code, message=message).body(), error.status_code, error.headers)


async def _json(http: HttpRequest, limit: int) -> Any:
    """The decoded body, of which no more than ``limit`` bytes are ever held."""
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > limit:
            raise Refused(Problem(status=413, message=f"the body is over {limit} bytes", code="body_too_large"))
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(Problem(status=400, message=f"the body is not JSON: {error}")) from error


async def _events(request: Request, answer: Answer, call: Call, clock: Clock) -> AsyncIterator[bytes]:
    """The answer as server-sent events. A failure is an event too: the status has long been sent."""
    status = CLIENT_LEFT
    try:
        if opening := answer.opening():
            yield _sent(opening)
        async for deltas in call.deltas():
            clock.text()
            yield _sent([answer.chunk(delta) for delta in deltas])
        if request.stream_options and request.stream_options.include_usage:
            yield _sent([answer.usage_chunk(call.usage)])
        yield b"data: [DONE]\n\n"
        status = 200
    except Refused as refused:
        status = refused.problem.status
        yield _sent([refused.problem.body()])
    finally:
        call.cancel()
        clock.end(status, call.usage)


def _sent(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n" for chunk in chunks)


@serve.deployment
@serve.ingress(app)
class Gateway:
    """Answers OpenAI's routes for every model in its table.

    Args:
        table: model name -> route.
        bound: application -> handle, of models deployed in the gateway's own application.
    """

    def __init__(self, http: HttpConfig, table: dict[str, Route], bound: dict[str, Any] | None = None) -> None:
        self._http = http
        self._routes = Routes(table, dict(bound or {}))

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(self) -> JSONResponse:
        unready = await self._routes.unready()
        if unready:
            return JSONResponse({"status": "unready", "models_without_replicas": unready}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics(self) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self._describe(name) for name in self._routes.table]}

    @app.get("/v1/models/{model:path}")
    async def model(self, model: str) -> dict[str, Any]:
        return await self._describe(model)

    @app.post("/v1/completions")
    async def completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, "completions", read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, "chat_completions", read_chat)

    async def _describe(self, model: str) -> dict[str, Any]:
        about = await self._routes.describe(model)
        return {
            "id": model,
            "object": "model",
            "created": about.published_unix_seconds,
            "owned_by": "raymodels",
            "root": about.reference,
            "max_model_len": about.context,
            "has_chat_template": about.has_chat_template,
        }

    async def _answer(self, http: HttpRequest, route: str, read: Callable[[Any], Request]) -> Response:
        clock = Clock(route)
        with clock.failing():
            request = read(await _json(http, self._http.max_body_bytes))
            deadline = asyncio.get_running_loop().time() + self._http.request_timeout_s
            call = await self._routes.call(request, deadline)
            clock.model = request.model
            answer = answer_to(request)
            if not request.stream:
                deltas = [delta async for batch in call.deltas() for delta in batch]
                clock.end(200, call.usage)
                return JSONResponse(answer.whole(deltas, call.usage))
        return StreamingResponse(_events(request, answer, call, clock), headers=SERVER_SENT_EVENTS)
