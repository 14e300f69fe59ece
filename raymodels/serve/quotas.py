"""How much a tenant may ask for: requests and tokens per minute, requests at once, tokens of one request.

Every request counts from the moment its key is known, whatever becomes of it. Its tokens are known only when it has
ended, so an estimate is charged first and settled then.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from raymodels.config import HttpConfig, TenantConfig
from raymodels.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Problem, Refused

BYTES_PER_TOKEN = 4
UNSAID_COMPLETION_TOKENS = 16
UNSAID_CHAT_TOKENS = 256
"""Expected of a chat that names no limit: it ends where the model ends it."""

Work = CompletionRequest | ChatRequest | EmbeddingRequest
Generation = TypeVar("Generation", CompletionRequest, ChatRequest)


@dataclass
class Bucket:
    """A token bucket of one minute's worth, kept as what is missing in it, so that a new limit holds at once."""

    missing: float = 0.0
    at: float = 0.0

    def wait_s(self, amount: float, per_minute: float, now: float) -> float:
        """Seconds until ``amount`` can be taken. More than a minute's worth needs a full bucket, and leaves a debt."""
        self.missing = max(0.0, self.missing - (now - self.at) * per_minute / 60)
        self.at = now
        return max(0.0, self.missing + min(amount, per_minute) - per_minute) * 60 / per_minute

    def take(self, amount: float) -> None:
        self.missing += amount


@dataclass
class Account:
    """What one tenant has used."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    open: int = 0


class Quotas:
    """The accounts of all tenants.

    Args:
        gateways: gateways that share a tenant's requests evenly; each grants its part of a quota.
    """

    def __init__(self, gateways: int = 1) -> None:
        self._gateways = gateways
        self._accounts: defaultdict[str, Account] = defaultdict(Account)

    @contextmanager
    def request(self, tenant: TenantConfig, now: float) -> Iterator[None]:
        """Charge a request, which is open for as long as the block lasts.

        Raises:
            Refused: 429, the tenant is over a quota; says which and for how long.
        """
        account = self._accounts[tenant.name]
        if tenant.concurrency and account.open >= max(1, tenant.concurrency // self._gateways):
            raise _over("requests at once", tenant.concurrency, 1)
        self._take(account.requests, 1, tenant.requests_per_minute, "requests per minute", now)
        account.open += 1
        try:
            yield
        finally:
            account.open -= 1

    def check(self, tenant: TenantConfig, tokens: float, now: float) -> Account:
        """The account that so many tokens would be charged to; raises as `request` where they could not be."""
        account = self._accounts[tenant.name]
        self._fits(account.tokens, tokens, tenant.tokens_per_minute, "tokens per minute", now)
        return account

    def charge(self, tenant: TenantConfig, tokens: float, now: float) -> Account:
        """Charge so many tokens, estimated, to be settled once it is known how many it took; raises as `request`."""
        account = self.check(tenant, tokens, now)
        account.tokens.take(tokens)
        return account

    def settle(self, account: Account, estimated: float, used: float) -> None:
        """Put what was really used in the place of the estimate."""
        account.tokens.take(used - estimated)

    def _take(self, bucket: Bucket, amount: float, limit: int | None, name: str, now: float) -> None:
        self._fits(bucket, amount, limit, name, now)
        bucket.take(amount)

    def _fits(self, bucket: Bucket, amount: float, limit: int | None, name: str, now: float) -> None:
        if limit is None:
            bucket.missing = -math.inf  # whatever is taken, it is full when a limit comes
        elif wait := bucket.wait_s(amount, limit / self._gateways, now):
            raise _over(name, limit, wait)


def _over(what: str, limit: int, wait_s: float) -> Refused:
    message = f"this key's limit of {limit:,} {what} is reached: try again later"
    code, retry_after_s = what.replace(" ", "_") + "_exceeded", max(1, math.ceil(wait_s))
    return Refused(
        Problem(status=429, message=message, type="rate_limit_error", code=code, retry_after_s=retry_after_s)
    )


def estimated_prompt(body_bytes: int) -> int:
    """What the prompt of a request may take, judged by its size before anybody has encoded it."""
    return body_bytes // BYTES_PER_TOKEN + 1


def estimated_tokens(body_bytes: int, request: Work) -> int:
    """What a request may take, of prompt and answer together, as `estimated_prompt`."""
    prompt = estimated_prompt(body_bytes)
    if isinstance(request, EmbeddingRequest):
        return prompt
    asked = _asked(request)
    return prompt + sequences(request) * (UNSAID_CHAT_TOKENS if asked is None else asked)


def sequences(request: Work) -> int:
    """How many sequences a request occupies a model with."""
    if isinstance(request, EmbeddingRequest):
        return len(request.inputs)
    return request.n * (len(request.prompts) if isinstance(request, CompletionRequest) else 1)


def limited(request: Generation, tenant: TenantConfig, http: HttpConfig) -> Generation:
    """The request, with its output bounded as it must be for this tenant.

    Raises:
        Refused: 400, it asks for more; names the field.
    """
    most = tenant.max_output_tokens or http.max_output_tokens
    if most is None:
        return request
    fields = ("max_tokens",) if isinstance(request, CompletionRequest) else ("max_completion_tokens", "max_tokens")
    field = next((field for field in fields if getattr(request, field) is not None), None)
    asked = _asked(request)
    if asked is not None and asked <= most:
        return request
    if field is None:
        return request.model_copy(update={fields[0]: most})
    message = f"{field}: {asked} is over the {most} output tokens that are allowed here"
    raise Refused(Problem(status=400, message=message, param=field, code="output_too_long"))


def most_prompt_tokens(tenant: TenantConfig, http: HttpConfig) -> int | None:
    return tenant.max_prompt_tokens or http.max_prompt_tokens


def check_prompt(prompt_tokens: int, tenant: TenantConfig, http: HttpConfig, request: Work) -> None:
    """Check the tokens of a request's prompts or texts, all together, once they are known.

    Raises:
        Refused: 400, this tenant may not send so many.
    """
    most = most_prompt_tokens(tenant, http)
    if most is not None and prompt_tokens > most:
        field = {ChatRequest: "messages", EmbeddingRequest: "input"}.get(type(request), "prompt")
        message = f"{field}: {prompt_tokens} tokens are over the {most} that are allowed here"
        raise Refused(Problem(status=400, message=message, param=field, code="prompt_too_long"))


def _asked(request: CompletionRequest | ChatRequest) -> int | None:
    """Most tokens of a choice; none for a chat that goes on for as long as the context allows."""
    if isinstance(request, CompletionRequest):
        return UNSAID_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    return request.max_completion_tokens or request.max_tokens
