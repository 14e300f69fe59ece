"""The settings of an endpoint."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raymodels.config.section import Positive, Section


class AutoscalingConfig(Section):
    min_replicas: int = Field(1, ge=0)
    max_replicas: Positive = 1
    target_ongoing_requests: float = Field(8, gt=0, description="requests in flight per replica that scaling aims at")
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


class EngineConfig(Section):
    """How one replica turns tokens into tokens."""

    max_batch: Positive = Field(32, description="sequences decoded together")
    max_context: Positive | None = Field(None, description="tokens of prompt plus output; default: the model's")
    max_queue: Positive = Field(256, description="requests waiting for a place in the batch; more are answered 429")
    prefill_chunk: Positive = Field(512, description="prompt tokens computed between two decode steps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: float32 on CPU")
    threads: Positive | None = Field(None, description="CPU threads of a replica; default: its cpus")


class ModelServeConfig(Section):
    """One model version as a group of replicas."""

    model: str = Field(description="NAME, NAME@3 or NAME@alias in the registry")
    served_as: str | None = Field(None, description="the model name that clients use; default: NAME")
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
    max_body_bytes: Positive = 8 << 20
    request_timeout_s: float = Field(600, gt=0)
    gateway_replicas: Positive = 1
    gateway_cpus: float = Field(0.1, gt=0)


class ServeConfig(Section):
    """An endpoint: a gateway and the model versions behind it."""

    registry: str = "./registry"
    models: list[ModelServeConfig] = Field(min_length=1)
    http: HttpConfig = HttpConfig()
    start_timeout_s: float = Field(600, gt=0, description="how long all first replicas may take to become ready")

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [model.public_name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models: {', '.join(twice)} is served twice: set served_as")
        return self
