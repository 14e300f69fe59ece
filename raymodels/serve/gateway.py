"""HTTP in front of all models: OpenAI's routes, health and metrics.

Ray Serve copies the class by value where it decorates it. So what the class uses stands above it, and annotations are
not postponed: FastAPI could not resolve their names in the copy.
"""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from ray import serve
from starlette.exceptions import HTTPException

from raymodels.config import EngineConfig, HttpConfig, TableConfig, validate
from raymodels.errors import ConfigError
from raymodels.serve.admission import Admission, Turn
from raymodels.serve.answers import Answer, Usage, answer_to, embeddings
from raymodels.serve.bodies import Bodies
from raymodels.serve.capacity import Capacity
from raymodels.serve.catalog import Catalog
from raymodels.serve.front import FAILED, Door, Front, Visit, forbidden, not_loading
from raymodels.serve.listener import Listener, shared_port
from raymodels.serve.metrics import CLIENT_LEFT, engine_stats, metrics_page, own_figures, table_refused
from raymodels.serve.one_each import MAX_BYTES, OneEach
from raymodels.serve.openapi import page
from raymodels.serve.parts import PartedCall, check_size, in_parts, sent
from raymodels.serve.quotas import (
    Work,
    check_prompt,
    estimated_prompt,
    estimated_tokens,
    limited,
    most_prompt_tokens,
    sequences,
)
from raymodels.serve.replica import NOBODY, Process, Waiting, this_process
from raymodels.serve.routing import Call, Route, Routes, Target
from raymodels.serve.schema import (
    EmbeddingRequest,
    Problem,
    Refused,
    Request,
    read_chat,
    read_completion,
    read_detokenize,
    read_embedding,
    read_tokenize,
)
from raymodels.serve.tls import certificate

log = logging.getLogger(__name__)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """With ``http.ingress: direct``, listen as long as the gateway lives; it is there shortly after this has begun."""
    listening = asyncio.create_task(_listen(app))
    yield
    if listener := await listening:
        await listener.drain()


async def _listen(app: FastAPI) -> Listener | None:
    while (gateway := serve.get_replica_context().servable_object) is None:
        await asyncio.sleep(0.01)
    if gateway.port is None:
        return None
    return Listener(app, gateway.port, gateway.certificate, gateway.front.http.max_connections)


app = FastAPI(title="raymodels", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan)
app.add_middleware(Door, front=lambda: serve.get_replica_context().servable_object.front)
JSON = "application/json"
DESCRIBE_S, STATS_S, FIGURES_S = 2.0, 1.0, 3.0
FRESH_S = 1.0
"""How old what is known of the replicas may be when models are listed."""
IGNORED = "X-Raymodels-Ignored"
"""The header that names the fields that an answer does not follow."""
SERVER_SENT_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


@app.exception_handler(HTTPException)
async def _on_http(http: HttpRequest, error: HTTPException) -> JSONResponse:
    message = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(Problem(status=error.status_code, message=message).body(), error.status_code, error.headers)


def _check_media_type(http: HttpRequest) -> None:
    given = http.headers.get("Content-Type", JSON).partition(";")[0].strip().lower()
    if given != JSON:
        message = f"Content-Type {given!r} is not understood: send {JSON}"
        raise Refused(Problem(status=415, message=message, code="unsupported_media_type"))


async def _body(http: HttpRequest, limit: int, deadline: float) -> bytes:
    """The body, of which no more than ``limit`` bytes are ever held."""
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for piece in http.stream():
                body += piece
                if len(body) > limit:
                    raise Refused(Problem(status=413, message=f"the body is over {limit} bytes", code="body_too_large"))
    except TimeoutError:
        message = "the body did not arrive within the request's time"
        raise Refused(Problem(status=408, message=message, code="timeout")) from None
    return bytes(body)


async def _events(request: Request, answer: Answer, call: Call | PartedCall, visit: Visit) -> AsyncIterator[bytes]:
    """The answer as server-sent events. A failure is an event too: the status has long been sent."""
    try:
        if opening := answer.opening():
            yield _sent(opening)
        async for deltas in call.deltas():
            visit.got(deltas)
            if chunks := [chunk for delta in deltas if (chunk := answer.chunk(delta)) is not None]:
                yield _sent(chunks)
        if request.stream_options and request.stream_options.include_usage:
            yield _sent([answer.usage_chunk(call.usage)])
        visit.status = 200
        yield b"data: [DONE]\n\n"
    except Refused as refused:
        visit.refused(refused.problem)
        yield _sent([refused.problem.body()])
    except Exception as error:
        log.error("request %s failed", visit.id, exc_info=error)
        visit.refused(FAILED)
        yield _sent([FAILED.body()])
    finally:
        call.cancel()


def _sent(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n" for chunk in chunks)


@serve.deployment
@serve.ingress(app)
class Gateway:
    """Answers OpenAI's routes for every model in its table.

    Args:
        table: model name -> route.
        bound: application -> handle, of models deployed in the gateway's own application.
        engines: application -> the settings of its replicas' engines.
    """

    def __init__(
        self,
        http: HttpConfig,
        table: dict[str, Route] | None = None,
        bound: dict[str, Any] | None = None,
        engines: dict[str, EngineConfig] | None = None,
    ) -> None:
        self._http = http
        self._built = dict(engines or {})
        self._engines = dict(self._built)
        self._routes = Routes(dict(table or {}), dict(bound or {}), http.replica_wait_s)
        self.port = shared_port(http.host, http.port) if http.ingress == "direct" else None
        self.certificate = certificate(http) if self.port else None
        self.front = Front(http)
        self._capacity = Capacity(http, self._routes.table, self._engines)
        self._admission = Admission(self._capacity.room, self.front.quotas, self._routes.base)
        self._one_each = OneEach()
        self._bodies = Bodies(http.max_body_bytes)
        self._catalog = Catalog(self._routes, self._capacity, self._admission.dispatch)
        self._gateways: Any = None
        self._configured = bool(table)
        watches = (self._capacity.watch(self._admission.dispatch), self._routes.watch())
        self._watching = [asyncio.get_running_loop().create_task(watch) for watch in watches]

    async def reconfigure(self, changes: dict[str, Any]) -> None:
        """Take over another table, as `TableConfig` describes it, while requests go on. Called by Ray Serve.

        Serve would end a gateway in which this raises, and all streams with it. So a table that cannot be used is
        logged, and the one before stays in force.

        Raises:
            ConfigError: the first one cannot be used.
        """
        try:
            given = validate(changes, TableConfig)
        except ConfigError as error:
            if not self._configured:
                raise
            table_refused()
            log.error("the new table cannot be used, the one before stays in force: %s", error)
            return
        self._configured = True
        self._engines.clear()
        self._engines |= self._built | given.engines
        self._routes.replace({name: Route(**route.model_dump()) for name, route in given.table.items()})
        self._catalog.clear()
        self._admission.renamed()
        await self._capacity.look()
        self._admission.dispatch()

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(self) -> JSONResponse:
        unready = await self._capacity.unready(self._admission.dispatch)
        if unready:
            return JSONResponse({"status": "unready", "models_without_replicas": unready}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics(self) -> Response:
        shown = await asyncio.to_thread(metrics_page, await self._all_figures())  # of 100,000 figures it takes a second
        return Response(shown, media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(self, http: HttpRequest) -> dict[str, Any]:
        allowed = [name for name in self._routes.table if http.state.visit.tenant.allows(name)]
        about = await self._catalog.descriptions(allowed, http.state.visit.deadline, FRESH_S)
        return {"object": "list", "data": [self._catalog.listed(*found) for found in about.items()]}

    @app.get("/v1/models/{model:path}")
    async def model(self, http: HttpRequest, model: str) -> dict[str, Any]:
        self._check(http.state.visit, model)
        about = await self._catalog.descriptions([model], http.state.visit.deadline, FRESH_S)
        self._routes.check(model)  # it may have gone meanwhile
        return self._catalog.listed(model, about[model])

    @app.post("/v1/completions")
    async def completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, read_chat)

    @app.post("/v1/embeddings")
    async def embeddings(self, http: HttpRequest) -> JSONResponse:
        request = await self._read(http, read_embedding)
        visit: Visit = http.state.visit
        self._check(visit, request.model)
        turn, target = await self._turn(visit, request)
        if most_prompt_tokens(visit.tenant, self._http):
            with visit.sending(estimated_prompt(visit.body_bytes)):
                await self._checked(visit, request, target)
        vectors: list[list[float]] = [[]] * turn.sequences
        visit.usage = usage = Usage(0)

        async def compute(part: EmbeddingRequest, begin: int) -> None:
            with visit.sending(estimated_prompt(visit.body_bytes) * sequences(part) // turn.sequences):
                found = await self._routes.ask(target, "embed", part, target.adapter, deadline=visit.deadline)
            vectors[begin : begin + len(found.vectors)] = found.vectors
            usage.prompt_tokens += found.prompt_tokens

        await in_parts(request, turn, compute)
        return JSONResponse(embeddings(request, vectors, usage.prompt_tokens))

    @app.post("/tokenize")
    async def tokenize(self, http: HttpRequest) -> Response:
        return await self._tokenizer(http, "tokenize", await self._read(http, read_tokenize, MAX_BYTES))

    @app.post("/detokenize")
    async def detokenize(self, http: HttpRequest) -> Response:
        return await self._tokenizer(http, "detokenize", await self._read(http, read_detokenize, MAX_BYTES))

    @app.get("/tokenizer_info")
    async def tokenizer_info(self, http: HttpRequest) -> JSONResponse:
        given = http.query_params.get("model")
        model = self._routes.only() if given is None else given
        return JSONResponse({"model": model} | await self._ask(http, model, "tokenizer_info"))

    @app.get("/openapi.json")
    async def openapi(self, http: HttpRequest) -> JSONResponse:
        names = [name for name in self._routes.table if http.state.visit.tenant.allows(name)]
        about = await self._catalog.descriptions(names, asyncio.get_running_loop().time() + DESCRIBE_S, FRESH_S)
        return JSONResponse(page(about, self._http))

    async def process(self) -> Process:
        return this_process()

    async def figures(self) -> tuple[str, list[Metric]]:
        """This gateway's name, and what it has measured. Called by the one that is asked for all gateways' figures."""
        models = {self._routes.base(name) for name in self._routes.table}
        await asyncio.gather(*(self._show_engine(model) for model in models))
        return serve.get_replica_context().replica_tag, own_figures()

    async def _all_figures(self) -> dict[str, list[Metric]]:
        """The figures of every gateway that answers in time, and this one's in any case."""
        own, found = serve.get_replica_context(), dict[str, list[Metric]]()
        if self._http.gateway_replicas > 1:
            try:
                async with asyncio.timeout(FIGURES_S):
                    if self._gateways is None:
                        made = asyncio.to_thread(serve.get_deployment_handle, own.deployment, own.app_name)
                        self._gateways = await made
                    answers = await self._gateways.broadcast("figures").results_async(return_exceptions=True)
                found = dict(answer for answer in answers if not isinstance(answer, BaseException))
            except Exception as error:
                log.warning("a gateway does not answer, so this one's figures are shown alone: %r", error)
        return found if own.replica_tag in found else found | dict([await self.figures()])

    async def _show_engine(self, model: str) -> None:
        """Show what an engine of the model says of itself. Asking must not start a model that has no replica."""
        if not self._capacity.running(model):
            return
        try:
            stats = await self._routes.ask(model, "stats", deadline=asyncio.get_running_loop().time() + STATS_S)
        except Refused:
            return
        if model in self._routes.table:
            engine_stats(model, asdict(stats))

    def _waiting(self, turn: Turn) -> Waiting:
        """What waits for a request's model at all gateways, if it is the same at each."""
        queue, gateways = turn.queue, self._http.gateway_replicas
        return Waiting(gateways * queue.waiting_sequences, gateways * queue.waiting_tokens) if queue else NOBODY

    async def _read(self, http: HttpRequest, read: Callable[[Any], Any], most_bytes: float = math.inf) -> Any:
        visit: Visit = http.state.visit
        body = await _body(http, int(min(most_bytes, self._http.max_body_bytes)), visit.deadline)
        _check_media_type(http)
        visit.body_bytes = len(body)
        check = partial(self._admission.check, visit.tenant, len(body))
        return await self._bodies.read(body, read, visit.tenant.name, visit.deadline, check)

    async def _tokenizer(self, http: HttpRequest, method: str, request: Any) -> Response:
        """What a replica's tokenizer makes of a text or of tokens. It costs the tokens, as a prompt of them does."""
        visit: Visit = http.state.visit
        async with self._one_each.turn(visit.tenant, visit.body_bytes, visit.deadline):
            found = await self._ask(http, request.model, method, request)
        visit.charged_tokens += found.tokens
        return Response(found.body, media_type=JSON)

    async def _ask(self, http: HttpRequest, model: str | None, method: str, *args: Any) -> Any:
        """What a replica answers at once, without computing."""
        visit: Visit = http.state.visit
        name = self._routes.only() if model is None else model
        self._check(visit, name)
        tokens = estimated_prompt(visit.body_bytes) if args else 0
        await visit.hold(self._admission.slot(visit.tenant, name, tokens, 0, visit.deadline))
        with visit.sending(tokens):
            return await self._routes.ask(name, method, *args, deadline=visit.deadline)

    async def _turn(self, visit: Visit, request: Work) -> tuple[Turn, Target]:
        """Wait until a model computes something of a request, and to what its name leads then.

        Adapters take turns with the model that they share replicas with, and embeddings with all else that it computes.
        """
        for application in self._routes.table[request.model].applications:
            if engine := self._engines.get(application):
                check_size(request, engine)
        tokens = estimated_tokens(visit.body_bytes, request)
        slot = self._admission.slot(visit.tenant, request.model, tokens, sequences(request), visit.deadline)
        turn = await visit.hold(slot)
        return turn, self._routes.target(request.model)

    async def _call(self, visit: Visit, request: Request) -> Call | PartedCall:
        """Wait for a request's turn, and send it to a replica."""
        turn, target = await self._turn(visit, request)

        async def send(part: Request) -> Call:
            return await self._routes.call(part, visit.deadline, self._waiting(turn), target)

        with visit.sending(estimated_prompt(visit.body_bytes)):
            return await sent(request, turn, send, lambda: self._checked(visit, request, target))

    async def _checked(self, visit: Visit, request: Work, target: Target) -> int:
        """The prompt tokens of a request. Raises `Refused`: 400, it cannot be answered, or not for this tenant."""
        found: int = await self._routes.ask(target, "check", request, target.adapter, deadline=visit.deadline)
        check_prompt(found, visit.tenant, self._http, request)
        return found

    def _check(self, visit: Visit, model: str) -> None:
        """Raises `Refused`: 403, this tenant may not call this model; 404, there is none; 503, it does not load."""
        if not visit.tenant.allows(model):
            raise forbidden(visit.tenant, model)
        self._routes.check(model)
        visit.model = model
        if why := self._capacity.failure(model):
            raise not_loading(model, why)

    async def _answer(self, http: HttpRequest, read: Callable[[Any], Request]) -> Response:
        visit: Visit = http.state.visit
        request = await self._read(http, read)
        self._check(visit, request.model)
        request = limited(request, visit.tenant, self._http)
        call = await self._call(visit, request)
        visit.at_end(call.cancel)
        visit.usage = call.usage
        check_prompt(call.usage.prompt_tokens, visit.tenant, self._http, request)
        answer = answer_to(request)
        ignored = {IGNORED: ", ".join(call.ignored)} if call.ignored else {}
        if request.stream:
            visit.status = CLIENT_LEFT  # until the stream has been sent to its end
            return StreamingResponse(_events(request, answer, call, visit), headers=SERVER_SENT_EVENTS | ignored)
        deltas = await call.whole(visit.got)
        visit.usage = call.usage
        return JSONResponse(answer.whole(deltas, call.usage), headers=ignored)
