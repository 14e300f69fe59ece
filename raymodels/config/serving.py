"""The settings of an endpoint."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator

from raymodels.config.section import Positive, Section

KEY_HASH = re.compile(r"sha256:[0-9a-f]{64}")


class AutoscalingConfig(Section):
    """How many replicas a model has; `raymodels.serve.autoscale` is the policy. Replay it before changing it."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: Positive = 1
    first_replicas: Positive = Field(1, description="ordered at once by a request that finds no replica at all")
    target_ongoing_requests: float = Field(8, gt=0, description="requests in flight per replica that scaling aims at")
    target_load: float = Field(0.8, gt=0, le=1, description="share of a full replica's tokens/s that scaling aims at")
    target_ttft_s: float | None = Field(
        None,
        gt=0,
        description="time to first token (95th percentile) above which a queue calls for more; none: ignored",
    )
    drain_s: float = Field(30, gt=0, description="a queue is to be gone in this time once new replicas have started")
    dead_band: float = Field(0.1, ge=0, description="share of spare replicas that is kept before any is let go")
    max_step_up: float = Field(1, gt=0, description="most replicas added at a time, as a share of those there")
    max_step_down: float = Field(0.5, gt=0, le=1, description="most replicas let go at a time, as a share")
    upscale_delay_s: float = Field(10, ge=0, description="how long more must have been needed without a break")
    downscale_delay_s: float = Field(
        300, ge=0, description="how long fewer must have been enough without a break; at least the start-up time"
    )
    idle_s: float = Field(300, ge=0, description="time without any request before the last one goes, if none may stay")
    start_up_s: float = Field(60, gt=0, description="what a replica takes to start, until that has been measured")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.first_replicas > self.max_replicas:
            raise ValueError(f"first_replicas {self.first_replicas} is more than max_replicas {self.max_replicas}")
        return self


class EngineConfig(Section):
    """How one replica turns tokens into tokens."""

    kind: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="auto: vLLM on a GPU where it is installed, else transformers"
    )
    max_batch: Positive = Field(32, description="sequences decoded together")
    max_context: Positive | None = Field(None, description="tokens of prompt plus output; default: the model's")
    max_queue: Positive = Field(256, description="requests waiting for a place in the batch; more are answered 429")
    prefill_chunk: Positive = Field(
        512, description="most prompt tokens in a step; fewer beside streams, where the step would take over 0.2 s"
    )
    kv_memory: ByteSize | None = Field(
        None, description="for keys and values, such as 8GB; default: 80 % of a GPU's free memory, on CPU up to 4GB"
    )
    prefix_cache: float = Field(
        0.25, ge=0, lt=1, description="the part of kv_memory that keeps known prompt beginnings"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: float32 on CPU")
    quantization: Literal["none", "int8"] = Field("none", description="int8: weights of 8 bits, about 1 % less exact")
    threads: Positive | None = Field(None, description="CPU threads of a replica; default: its cpus")


class ModelServeConfig(Section):
    """One model version as a group of replicas."""

    model: str = Field(description="NAME, NAME@3 or NAME@alias in the registry")
    served_as: str | None = Field(None, description="the model name that clients use; default: NAME")
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters over this model, in PEFT's format: the model name that clients use for each -> its "
        "folder (./folder, /folder) or NAME, NAME@3 or NAME@alias in the registry (`raymodels models publish`)",
    )
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    engine: EngineConfig = EngineConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()

    @property
    def public_name(self) -> str:
        return self.served_as or self.model.partition("@")[0]


class HttpConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, lt=65536)
    ingress: Literal["proxy", "direct"] = Field(
        "direct", description="clients talk to the gateways on the head node, or with more delay to Ray Serve's proxies"
    )
    tls_cert: str | None = Field(
        None, description="PEM file of the certificate and its chain; with tls_key, https alone is answered"
    )
    tls_key: str | None = Field(None, description="PEM file of its key, such as a mounted secret's")
    max_body_bytes: Positive = Field(8 << 20, description="of a request; what replicas are sent and send follows it")
    max_connections: Positive = Field(
        4096, description="of one gateway, with ingress direct; one that waits for its client makes room for a new one"
    )
    request_timeout_s: float = Field(600, gt=0, description="the header X-Request-Timeout may ask for less")
    replica_wait_s: float = Field(
        120, gt=0, description="how long a request waits for a replica to take it where none runs; then 503"
    )
    gateway_replicas: Positive = Field(1, description="quotas and queues are divided among them evenly")
    gateway_cpus: float = Field(0.1, gt=0)
    keys_file: str | None = Field(None, description="tenants and their hashed keys; without it anybody may call")
    metrics_open: bool = Field(False, description="with keys_file: whether anybody may read /metrics, without a key")
    max_prompt_tokens: Positive | None = Field(None, description="of all prompts of a request together")
    max_output_tokens: Positive | None = Field(None, description="of one choice; default: what the context leaves")
    max_queue_tokens: Positive = Field(1_000_000, description="in and out, of requests waiting for one model")
    work_ahead: float = Field(
        0.25, ge=0, description="without keys_file: sent to a replica beyond max_batch, as a share of it"
    )
    reserve: float = Field(
        0.25, ge=0, lt=1, description="with keys_file: share of max_batch left to tenants who hold no more than that"
    )
    access_log: bool = Field(True, description="one line of JSON per request on the gateway's stdout")
    otlp_endpoint: str | None = Field(
        None, description="http://HOST:4318 of an OpenTelemetry collector; default: OTEL_EXPORTER_OTLP_ENDPOINT"
    )

    @property
    def message_bytes(self) -> int:
        """The largest message between gateways and replicas.

        A body becomes up to 1.5 times as large there, and the tokens of its text, with their names, 20 times.
        """
        return min(max(32 * self.max_body_bytes, 64 << 20), 2**31 - 1)

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ValueError(f"{missing} is missing: tls_cert and tls_key belong together")
        return self


class ServeConfig(Section):
    """An endpoint: a gateway and the model versions behind it."""

    registry: str = "./registry"
    models: list[ModelServeConfig] = Field(min_length=1)
    http: HttpConfig = HttpConfig()
    start_timeout_s: float = Field(600, gt=0, description="how long all first replicas may take to become ready")
    version_wait_s: float = Field(
        0, ge=0, description="how long a RayService waits for a version that is not published yet; it tries only once"
    )

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [name for model in self.models for name in (model.public_name, *model.adapters)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models: {', '.join(twice)} is served twice: set served_as, or rename an adapter")
        return self


class RouteConfig(Section):
    """Where a model name leads."""

    applications: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        min_length=1, description="Serve application, or deployment beside the gateway -> its share of requests"
    )
    shadow: str | None = Field(None, description="an application that sees a copy of them")
    parent: str | None = Field(None, description="of an adapter's name: that of its base")


class TableConfig(Section):
    """The gateway's table, its ``user_config`` for Ray Serve: what may change without a restart."""

    table: dict[str, RouteConfig] = Field(description="model name -> where it leads")
    engines: dict[str, EngineConfig] = Field(
        {}, description="application -> the settings of its replicas' engines, unless the gateway was built with them"
    )

    @model_validator(mode="after")
    def _parents(self) -> Self:
        bases = {name for name, route in self.table.items() if route.parent is None}
        for name, route in self.table.items():
            if route.parent is not None and route.parent not in bases:
                raise ValueError(f"table.{name}.parent: {route.parent} is no model of this table")
        return self


class TenantConfig(Section):
    """Who may call with which keys, and how much. A limit that is not set is none."""

    name: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=100)
    keys: tuple[str, ...] = Field(description="sha256:HEX of each key; several while one replaces another")
    models: tuple[str, ...] = Field(("*",), description="names of the models it may call; * is every model")
    metrics: bool = Field(False, description="whether it may read /metrics, which shows the usage of all tenants")
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = Field(None, description="of prompts and answers")
    concurrency: Positive | None = Field(None, description="requests waiting or answered at once")
    priority: int = Field(1, ge=1, le=1000, description="its share of a busy model, relative to other tenants' shares")
    max_prompt_tokens: Positive | None = Field(None, description="default: http.max_prompt_tokens")
    max_output_tokens: Positive | None = Field(None, description="default: http.max_output_tokens")

    @field_validator("keys", mode="before")
    @classmethod
    def _hashes(cls, keys: Any) -> Any:
        """Says what is wrong without the value: it may be a key that was put here in the place of its hash."""
        if not isinstance(keys, list | tuple) or not all(isinstance(k, str) and KEY_HASH.fullmatch(k) for k in keys):
            raise ValueError("must be a list of sha256: and 64 hex digits each, as `raymodels keys add` writes them")
        return keys

    def allows(self, model: str) -> bool:
        return "*" in self.models or model in self.models


class KeysConfig(Section):
    """The file of `http.keys_file`."""

    tenants: tuple[TenantConfig, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for what, values in (
            ("name", [tenant.name for tenant in self.tenants]),
            ("key", [key for tenant in self.tenants for key in tenant.keys]),
        ):
            if twice := [value for value, times in Counter(values).items() if times > 1]:
                raise ValueError(f"tenants: the {what} {twice[0]} is there twice")
        return self
