"""What every request passes before its route and after it: an id, a key, a deadline, the log, metrics and spans.

`Door` is ASGI middleware. What it knows of a request is a `Visit`, which routes find as ``request.state.visit`` and
fill in. All that a request holds is given back when its answer has been sent, however that ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymodels.config import HttpConfig, TenantConfig
from raymodels.serve import metrics
from raymodels.serve.access_log import milliseconds, open_log
from raymodels.serve.admission import Turn
from raymodels.serve.answers import Usage
from raymodels.serve.engine import Delta
from raymodels.serve.quotas import Quotas
from raymodels.serve.schema import RETRY_AFTER_S, Problem, Refused
from raymodels.serve.tenants import ANYBODY, Tenants
from raymodels.serve.tracing import Stage, Tracing, start_tracing

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
PROBES = frozenset(["/healthz", "/readyz"])
"""Answered to anybody, and not logged."""
METRICS = "/metrics"
UNKNOWN = TenantConfig(name="unknown", keys=(), models=())
"""Whoever calls, until their key has been read."""
UNDONE = frozenset([429, 500, 503])
"""Statuses that say that a replica has not done what it was sent."""
FAILED = Problem(status=500, message="the server failed", type="server_error", code="internal_error")


class Visit:
    """One request, from its arrival to the end of its answer."""

    def __init__(self, scope: Scope, request_id: str, deadline: float) -> None:
        self._scope = scope
        self.id = request_id
        self.deadline = deadline
        """When to give up, in the event loop's time."""
        self.tenant = UNKNOWN
        self.model = ""
        """Empty until it is one that is served: metrics have a label for each."""
        self.status = 0
        """What the log and the metrics say; 0 until the answer begins. The end of a stream may change it."""
        self.problem: Problem | None = None
        self.body_bytes = 0
        self.usage: Usage | None = None
        self.charged_tokens = 0
        """What it costs beside its usage."""
        self.queued_s: float | None = None
        self.admitted_s = 0.0
        self.first_token_s: float | None = None
        self.finishes: dict[int, str] = {}
        """Why each choice ended."""
        self.arrived_unix_ns = time.time_ns()
        self._start = time.perf_counter()
        self._latest: dict[int, tuple[float, int]] = {}
        self._held = AsyncExitStack()

    async def hold(self, place: AbstractAsyncContextManager[Turn]) -> Turn:
        """Take a place at a model, until the answer has been sent; it is settled with this visit's ``usage``."""
        turn = await self._held.enter_async_context(place)
        self.queued_s, self.admitted_s = turn.queued_s, self.seconds()
        self._held.callback(lambda: setattr(turn, "used_tokens", self.tokens))
        return turn

    def enter(self, block: AbstractContextManager[None]) -> None:
        """Enter a block that lasts until the answer has been sent."""
        self._held.enter_context(block)

    @contextmanager
    def sending(self, tokens: int) -> Iterator[None]:
        """Charge so many tokens, estimated, for what a replica is sent unless it says here how many they are.

        So what is given up costs what it may have used, and what is refused for what it says the same.
        """
        self.charged_tokens += tokens
        try:
            yield
        except Refused as refused:
            if refused.problem.status in UNDONE:
                self.charged_tokens -= tokens
            raise
        self.charged_tokens -= tokens

    def at_end(self, do: Callable[[], Any]) -> None:
        """Have something done once the answer has been sent, or nobody waits for it any longer."""
        self._held.callback(do)

    def got(self, deltas: list[Delta]) -> None:
        """Tokens have come from the model."""
        now = self.seconds()
        if self.first_token_s is None:
            self.first_token_s = now
            metrics.FIRST_TOKEN.labels(self.model, self.route).observe(now)
        for delta in deltas:
            before, generated = self._latest.get(delta.choice, (now, delta.generated))
            if delta.generated > generated:
                gap = (now - before) / (delta.generated - generated)
                metrics.INTER_TOKEN.labels(self.model, self.route).observe(gap)
            self._latest[delta.choice] = (now, delta.generated)
            if delta.finish:
                self.finishes[delta.choice] = delta.finish

    def refused(self, problem: Problem) -> None:
        self.problem, self.status = problem, problem.status

    @property
    def route(self) -> str:
        """The name of the route's function; empty where there is no such route."""
        return getattr(self._scope.get("endpoint"), "__name__", "")

    def seconds(self) -> float:
        """Since it arrived."""
        return time.perf_counter() - self._start

    @property
    def tokens(self) -> int:
        """What it is charged."""
        usage = self.usage or Usage(0)
        return self.charged_tokens + usage.prompt_tokens + usage.completion_tokens

    async def __aenter__(self) -> Visit:
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self._held.__aexit__(*raised)


class Front:
    """Lets requests in and accounts for them.

    Raises:
        ConfigError: ``http.keys_file`` cannot be used.
        ServeError: tracing is asked for and not installed.
    """

    def __init__(self, http: HttpConfig) -> None:
        self.http = http
        self._tenants = Tenants(http.keys_file)
        self._tenants.watch()
        self.quotas = Quotas(http.gateway_replicas)
        self._access_log = open_log() if http.access_log else None
        self._tracing = start_tracing(http.otlp_endpoint)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the app, and account for it."""
        headers, started = Headers(scope=scope), False
        given = headers.get("x-request-id", "")
        keep = REQUEST_ID.fullmatch(given) is not None
        loop_time = asyncio.get_running_loop().time()
        visit = Visit(scope, given if keep else uuid.uuid4().hex, loop_time + self.http.request_timeout_s)

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                visit.status = visit.status or message["status"]
                if not keep or self.http.ingress == "direct":
                    # Serve's proxy returns one that came with the request, and makes one where there is none.
                    MutableHeaders(scope=message)["X-Request-ID"] = visit.id
            await send(message)

        scope.setdefault("state", {})["visit"] = visit
        try:
            async with visit:
                try:
                    visit.tenant = self._tenant(scope["path"], headers)
                    visit.enter(self.quotas.request(visit.tenant, loop_time))
                    visit.deadline = min(visit.deadline, loop_time + asked_seconds(headers.get("x-request-timeout")))
                    if scope["path"] == METRICS and not visit.tenant.metrics:
                        raise unreadable(visit.tenant)
                    await app(scope, receive, sending)
                except Refused as refused:
                    visit.refused(refused.problem)
                    await refusal(refused.problem)(scope, receive, sending)
        except ClientDisconnect:
            visit.status = metrics.CLIENT_LEFT
        except asyncio.CancelledError:
            visit.status = metrics.CLIENT_LEFT
            raise
        except Exception as error:
            visit.refused(FAILED)
            if started:
                raise
            log.error("request %s failed", visit.id, exc_info=error)
            await refusal(FAILED)(scope, receive, sending)
        finally:
            self._account(visit, scope["path"], headers)

    def _tenant(self, path: str, headers: Headers) -> TenantConfig:
        if path in PROBES or (path == METRICS and self.http.metrics_open):
            return ANYBODY
        return self._tenants.of(headers.get("authorization"))

    def _account(self, visit: Visit, path: str, headers: Mapping[str, str]) -> None:
        """Count a request that has ended, make its spans and log it."""
        count(visit)
        if path in PROBES or path == METRICS:
            return
        facts = {
            "request_id": visit.id,
            "tenant": visit.tenant.name,
            "model": visit.model or None,
            "route": visit.route or None,
            "status": visit.status,
            "error": visit.problem.code or visit.problem.type if visit.problem else None,
            "tokens_in": visit.usage.prompt_tokens if visit.usage else None,
            "tokens_out": visit.usage.completion_tokens if visit.usage else None,
            "queue_ms": milliseconds(visit.queued_s),
            "ttft_ms": milliseconds(visit.first_token_s),
            "total_ms": milliseconds(visit.seconds()),
            "finish": ",".join(sorted(set(visit.finishes.values()))) or None,
        }
        if self._tracing:
            facts["trace_id"] = self._trace(self._tracing, visit, headers)
        if self._access_log:
            self._access_log.info("request", extra={"fields": facts})

    def _trace(self, tracing: Tracing, visit: Visit, headers: Mapping[str, str]) -> str:
        waited = visit.queued_s
        stages = []
        if waited is not None:
            stages.append(Stage("queue", visit.admitted_s - waited, visit.admitted_s))
            if visit.first_token_s is not None:
                stages.append(Stage("first token", visit.admitted_s, visit.first_token_s))
        attributes = {
            "http.response.status_code": visit.status,
            "http.route": visit.route or None,
            "gen_ai.request.model": visit.model or None,
            "gen_ai.usage.input_tokens": visit.usage.prompt_tokens if visit.usage else None,
            "gen_ai.usage.output_tokens": visit.usage.completion_tokens if visit.usage else None,
            "raymodels.tenant": visit.tenant.name,
            "raymodels.request_id": visit.id,
        }
        error = visit.problem.message if visit.problem and visit.problem.status >= 500 else None
        name, total_s = visit.route or "unknown route", visit.seconds()
        return tracing.record(name, headers, visit.arrived_unix_ns, total_s, stages, attributes, error)


class Door:
    """Middleware that passes every HTTP request through the front."""

    def __init__(self, app: ASGIApp, front: Callable[[], Front]) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._front().serve(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)


def refusal(problem: Problem) -> JSONResponse:
    """The answer that says so."""
    headers = {}
    if problem.retry_after_s:
        headers["Retry-After"] = str(problem.retry_after_s)
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.body(), problem.status, headers)


def forbidden(tenant: TenantConfig, model: str) -> Refused:
    """The refusal of a model that this tenant may not call, whether or not it is there."""
    message = f"the key of {tenant.name} does not give access to a model {model!r}"
    return Refused(
        Problem(status=403, message=message, type="permission_error", param="model", code="model_not_allowed")
    )


def unreadable(tenant: TenantConfig) -> Refused:
    """The refusal of the metrics, which are of all tenants, to one that may not read them."""
    message = f"the key of {tenant.name} does not give access to {METRICS}: its tenant needs metrics: true"
    return Refused(Problem(status=403, message=message, type="permission_error", code="metrics_not_allowed"))


def not_loading(model: str, why: str) -> Refused:
    """The refusal of a model of which no replica starts. Serve may go on trying, so it may pass."""
    return Refused(
        Problem(
            status=503,
            message=f"the model {model!r} does not load: {why}",
            type="server_error",
            code="model_not_loading",
            retry_after_s=RETRY_AFTER_S,
        )
    )


def asked_seconds(header: str | None) -> float:
    """The time that a client gives its request, from its ``X-Request-Timeout`` header; infinite without one.

    Raises:
        Refused: 400, it is no positive number of seconds.
    """
    if header is None:
        return math.inf
    try:
        seconds = float(header)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        message = "the header X-Request-Timeout must be a positive number of seconds"
        raise Refused(Problem(status=400, message=message, code="invalid_timeout"))
    return seconds


def count(visit: Visit) -> None:
    """Count a request that has ended."""
    model, route, tenant = visit.model, visit.route, visit.tenant.name
    metrics.REQUESTS.labels(model, route, tenant, str(visit.status)).inc()
    metrics.DURATION.labels(model, route).observe(visit.seconds())
    if visit.problem:
        metrics.REFUSED.labels(model, tenant, visit.problem.code or visit.problem.type).inc()
    if visit.usage:
        metrics.TOKENS_IN.labels(model, tenant).inc(visit.usage.prompt_tokens)
        metrics.TOKENS_OUT.labels(model, tenant).inc(visit.usage.completion_tokens)
    for finish in visit.finishes.values():
        metrics.FINISHED.labels(model, finish).inc()
