"""Every setting, as frozen pydantic models. Imports neither torch nor ray.

`Config` describes a training run, `ServeConfig` an endpoint. Both are read by `load` from YAML with dotted overrides.
Every default and its meaning stands here and nowhere else; unknown keys are errors that name the nearest right one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raymodels.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$", max_length=100)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


class RunConfig(Section):
    """Who this run is and where it keeps everything."""

    name: Name
    storage: str = Field("./runs", description="folder or bucket of all runs; shared by all nodes")
    seed: int = Field(17, ge=0, lt=2**31, description="of the sample order, the initial weights and dropout")


class TaskConfig(Section):
    kind: Literal["causal_lm"] = "causal_lm"


class TokenizerConfig(Section):
    """Load a tokenizer, or train a byte-level BPE on the source."""

    from_: str | None = Field(None, alias="from", description="a directory or hub id; none trains a new one")
    vocab_size: int = Field(8192, ge=257, description="of a newly trained tokenizer")
    train_bytes: Positive = Field(32_000_000, description="how much of the source a new tokenizer is trained on")


class DataConfig(Section):
    """What to train on, and how it becomes samples of token ids."""

    source: str | list[str] = Field(
        description="python-stdlib, hf:NAME, hf:./folder, or paths and globs of text, .jsonl or .parquet "
        "files, local or s3:// or gs://"
    )
    format: Literal["auto", "text", "jsonl", "parquet"] = Field("auto", description="auto goes by the file name")
    text_field: str = Field("text", description="the field of JSONL, Parquet and Hugging Face rows to read")
    hf_config: str | None = None
    hf_split: str = "train"
    seq_len: int = Field(ge=2, description="tokens in one sample")
    pack: bool = Field(True, description="samples cut from the joined documents; otherwise one document's, padded")
    eval_fraction: float = Field(0.02, gt=0, lt=0.5, description="of the documents, held out by their name's hash")
    tokenizer: TokenizerConfig | None = Field(None, description="default: model.from's own, else a trained one")
    prepared: str = Field("./prepared", description="where prepared datasets are kept, one folder per fingerprint")


class ModelConfig(Section):
    """A model's shape, or where to start from."""

    from_: str | None = Field(None, alias="from", description="a directory, a hub id, or registry:NAME[@N|@alias]")
    arch: Literal["llama", "qwen3", "qwen2", "gpt2"] = "llama"
    hidden_size: Positive | None = None
    layers: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = Field(None, description="grouped-query attention; default: heads")
    intermediate_size: Positive | None = Field(None, description="default: arch's usual multiple of hidden_size")
    max_positions: Positive | None = Field(None, description="the longest context; default: data.seq_len")
    rope_theta: float = Field(10_000.0, gt=0)
    tie_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _shape(self) -> Self:
        shape = {"hidden_size": self.hidden_size, "layers": self.layers, "heads": self.heads}
        defaults = {key: field.default for key, field in type(self).model_fields.items() if key != "from_"}
        given = sorted(key for key, default in defaults.items() if getattr(self, key) != default)
        if self.from_ is not None:
            if given:
                raise ValueError(f"from takes its shape from the model it loads: remove {', '.join(given)}")
            return self
        missing = [key for key, value in shape.items() if value is None]
        if missing:
            raise ValueError(f"give {', '.join(missing)}, or from")
        assert self.hidden_size and self.heads
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.arch == "gpt2" and self.kv_heads not in (None, self.heads):
            raise ValueError("arch gpt2 has no grouped-query attention: remove kv_heads")
        return self


class TrainConfig(Section):
    """The optimisation. Gradient accumulation follows from the batch sizes and the workers."""

    steps: Positive
    global_batch: Positive = Field(description="samples in one optimizer step, over all workers")
    micro_batch: Positive = Field(description="samples in one forward pass of one worker")
    lr: float = Field(gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="of lr, where cosine and linear end")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="of matrices; vectors (biases, norms) are not decayed")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm; 0 does not clip")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = Field(False, description="recompute activations in backward to save memory")
    report_every: Positive = Field(10, description="steps between reports to the driver")

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class OffloadConfig(Section):
    """Where a ZeRO state lives. The defaults are DeepSpeed's."""

    device: Literal["none", "cpu", "nvme"] = "none"
    path: str | None = Field(None, description="a folder on a local NVMe disk, for device nvme")
    pin_memory: bool = True
    buffer_count: Positive | None = None

    @model_validator(mode="after")
    def _nvme(self) -> Self:
        if (self.device == "nvme") != (self.path is not None):
            raise ValueError("path goes with device nvme: give both or neither")
        return self


class ZeroConfig(Section):
    """DeepSpeed ZeRO. Sizes are in elements, as in DeepSpeed; none leaves DeepSpeed's default."""

    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: OffloadConfig = OffloadConfig()
    offload_params: OffloadConfig = OffloadConfig()
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    round_robin_gradients: bool | None = None
    reduce_bucket_size: Positive | None = None
    allgather_bucket_size: Positive | None = None
    prefetch_bucket_size: int | None = Field(None, ge=0)
    param_persistence_threshold: int | None = Field(None, ge=0)
    max_live_parameters: Positive | None = None
    max_reuse_distance: int | None = Field(None, ge=0)
    sub_group_size: Positive | None = None
    hpz_partition_size: Positive | None = Field(None, description="ZeRO++: secondary shards, usually GPUs per node")
    quantized_weights: bool | None = Field(None, description="ZeRO++: int8 all-gather of weights")
    quantized_gradients: bool | None = Field(None, description="ZeRO++: int4 reduction of gradients")
    raw: dict[str, Any] = Field(
        default_factory=dict, description="further keys for DeepSpeed's config; may not contradict anything here"
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.offload_optimizer.device != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 does not partition it")
        if self.offload_params.device != "none" and self.stage != 3:
            raise ValueError(f"offload_params needs stage 3, not {self.stage}: only stage 3 partitions parameters")
        if self.offload_optimizer.device == "nvme" and self.stage != 3:
            raise ValueError(f"offload_optimizer to nvme needs stage 3, not {self.stage}: use device cpu, or stage 3")
        stage3 = [
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "hpz_partition_size",
            "quantized_weights",
            "quantized_gradients",
        ]
        for key in stage3:
            if getattr(self, key) is not None and self.stage != 3:
                raise ValueError(f"{key} needs stage 3, not {self.stage}: remove it, or set stage 3")
        return self


class WorkersConfig(Section):
    """The worker group: one process, one rank, per worker."""

    count: Positive
    cpus: float = Field(1, gt=0, description="CPU cores per worker")
    gpus: int = Field(0, ge=0, le=1, description="GPUs per worker; 0 trains on CPU over gloo, 1 on CUDA over NCCL")
    start_timeout_s: float = Field(300, gt=0, description="how long to wait for the cluster to hold all workers")
    collective_timeout_s: float = Field(1800, gt=0, description="after which a stuck collective ends the run")


class CheckpointConfig(Section):
    every: Positive = Field(100, description="steps between checkpoints; the last step always makes one")
    keep: Positive = Field(3, description="how many committed checkpoints to keep, the newest ones")


class EvalConfig(Section):
    every: Positive = Field(100, description="steps between evaluations; the last step always makes one")
    samples: Positive | None = Field(None, description="held-out samples per evaluation; none takes all")


class PublishConfig(Section):
    """Make the finished run a version in the registry."""

    name: Name
    alias: Name | None = Field(None, description="an alias to move to the new version, such as prod")


class Config(Section):
    """A training run, whole."""

    run: RunConfig
    task: TaskConfig = TaskConfig()
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    zero: ZeroConfig = ZeroConfig()
    workers: WorkersConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    registry: str = Field("./registry", description="folder or bucket of published model versions")
    publish: PublishConfig | None = Field(None, description="none leaves the run's checkpoints unpublished")

    @model_validator(mode="after")
    def _across(self) -> Self:
        train, workers = self.train, self.workers
        per_pass = train.micro_batch * workers.count
        if train.global_batch % per_pass:
            raise ValueError(
                f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} "
                f"x workers.count {workers.count} = {per_pass}"
            )
        limit = self.model.max_positions
        if limit is not None and self.data.seq_len > limit:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is over model.max_positions {limit}: lower it or raise that"
            )
        if train.precision == "fp16" and workers.gpus == 0:
            raise ValueError("train.precision fp16 needs workers.gpus 1: use fp32 on CPU")
        return self

    @property
    def accumulation(self) -> int:
        """Micro batches that one worker adds up in one optimizer step."""
        return self.train.global_batch // (self.train.micro_batch * self.workers.count)

    @property
    def place(self) -> str:
        """The run directory."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"

    def digest(self) -> str:
        """SHA-256 of everything that shapes the result; places do not."""
        return hashlib.sha256(json.dumps(meaning(self), sort_keys=True).encode()).hexdigest()


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


Root = TypeVar("Root", Config, ServeConfig)

# Where things lie, not what they are: may differ between two starts of one run.
PLACES = {"run": {"storage"}, "data": {"prepared"}, "registry": True, "publish": True}


def load(path: str | Path, overrides: list[str] | None = None, root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """Read a YAML config and apply ``a.b=value`` overrides, whose values are YAML too.

    Raises:
        ConfigError: the file cannot be read, an override has no ``=``, or a setting is wrong; names each setting.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from error
    raw = _mapping(text, str(path))
    for override in overrides or []:
        _apply(raw, override)
    return validate(raw, root)


def from_yaml(text: str, source: str) -> Config:
    """A training config from YAML text; ``source`` is its name in errors."""
    return validate(_mapping(text, source))


def validate(raw: dict[str, Any], root: type[Root] = Config) -> Root:  # type: ignore[assignment]
    """Check a config given as plain data, as `load` does."""
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentences(error, root))) from None


def dump(config: BaseModel) -> dict[str, Any]:
    """Plain data that `validate` reads back to an equal config. Unset optional settings are left out."""
    return config.model_dump(mode="json", by_alias=True, exclude_none=True)


def to_yaml(config: BaseModel) -> str:
    return yaml.safe_dump(dump(config), sort_keys=False)


def meaning(config: Config) -> dict[str, Any]:
    """The part of a config that shapes the result."""
    return config.model_dump(mode="json", by_alias=True, exclude=PLACES)  # type: ignore[arg-type]


def difference(old: Config, new: Config) -> list[str]:
    """What differs in meaning, one ``section.key: old -> new`` a line."""
    before, after = _flat(meaning(old)), _flat(meaning(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read config {source}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config {source} must be a mapping of sections, not {type(raw).__name__}")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: {error}") from error
    if isinstance(value, str):
        value = _number(value)
    node: Any = raw
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key)] if isinstance(node, list) and key.isdigit() else node.setdefault(key, {})
        if node is None or not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {key} is not a section")
    if isinstance(node, list):
        raise ConfigError(f"--set {override}: {parents[-1]} is a list: address an element, as in models.0.cpus=2")
    node[last] = value


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-3 as a string; everyone who types it means the number.
    try:
        return float(text)
    except ValueError:
        return text


def _sentences(error: ValidationError, root: type[BaseModel]) -> list[str]:
    sentences = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys_at(root, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            sentences.append(f"{path}: unknown key; {hint}")
        elif item["type"] == "missing":
            sentences.append(f"{path}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
            sentences.append(f"{path}: {message}{shown}" if path else f"{message}{shown}")
    return sentences


def _keys_at(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a path, following optional and list types."""
    for key in path:
        if isinstance(key, int):
            continue
        field = next(f for n, f in model.model_fields.items() if key in (n, f.alias))
        model = _section_of(field.annotation)
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return (
        next(found for part in annotation.__args__ if (found := _section_of(part)) is not None)
        if hasattr(annotation, "__args__")
        else None
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}
