"""The settings of a training run."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator

from raymodels.config.section import Name, Positive, Section

# Where things lie, on what the run runs and how it is watched over: these shape no result, and may differ between two
# starts of one run. A checkpoint fits any number of workers and any ZeRO stage.
NOT_MEANING: dict[str, Any] = {
    "run": {"storage"},
    "data": {"prepared"},
    "train": {"micro_batch", "activation_checkpointing", "report_every", "on_divergence", "divergence"},
    "zero": True,
    "workers": True,
    "checkpoint": True,
    "eval": True,
    "retry": True,
    "registry": True,
    "publish": True,
}


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
        if self.arch == "gpt2" and "rope_theta" in given:
            raise ValueError("arch gpt2 learns its positions: remove rope_theta")
        return self


class DivergenceConfig(Section):
    """When a loss counts as diverged, and how far a remedy may go. A loss that is no number counts at once."""

    factor: float = Field(2.0, gt=1, description="diverged is a loss over this many times the running median")
    patience: Positive = Field(10, description="for so many steps in a row; skip acts on the first")
    window: int = Field(
        50, ge=5, description="steps that the median is of; before so many and in warm-up none diverges"
    )
    max_skips: Positive = Field(10, description="batches that a run may drop with skip; one more stops it")
    rollback_steps: Positive = Field(100, description="how far to go back before the first diverged step")
    max_rollbacks: Positive = Field(2, description="in a run; one more stops it")


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
    on_divergence: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="what to do about a loss that diverges or is no number: end the run; go back to a checkpoint "
        "before it and drop that batch; or go back further and drop all batches since it began",
    )
    divergence: DivergenceConfig = DivergenceConfig()

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

    count: Positive | tuple[Positive, Positive] = Field(
        description="how many; [least, most] makes the run elastic: it takes what the cluster has, and what comes later"
    )
    cpus: float = Field(1, gt=0, description="CPU cores per worker")
    gpus: int = Field(0, ge=0, le=1, description="GPUs per worker; 0 trains on CPU over gloo, 1 on CUDA over NCCL")
    device_memory: ByteSize | None = Field(
        None,
        description="a worker's, of its GPU or of its share of the host, such as 80GB; for the plan, none: unknown",
    )
    start_timeout_s: float = Field(300, gt=0, description="how long to wait for the cluster to hold all workers")
    collective_timeout_s: float = Field(1800, gt=0, description="after which a stuck collective ends the run")
    resize_after_s: float = Field(60, ge=0, description="how long there must be room for more before a run grows")

    @field_validator("count", mode="before")
    @classmethod
    def _one_or_two(cls, count: Any) -> Any:
        if isinstance(count, (list, tuple)) and len(count) != 2:
            raise ValueError(f"{list(count)} is no range: give one number of workers, or [least, most]")
        return count

    @property
    def least(self) -> int:
        return self.count[0] if isinstance(self.count, tuple) else self.count

    @property
    def most(self) -> int:
        return self.count[1] if isinstance(self.count, tuple) else self.count

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"count [{self.least}, {self.most}]: the least number of workers comes first")
        return self


class CheckpointConfig(Section):
    every: int | str = Field(
        100,
        description="steps; or time, such as 90s, 10m or 2h; or auto, from what a save costs and how often runs fail. "
        "The last step always makes one",
    )
    keep: Positive = Field(3, description="how many committed checkpoints to keep, the newest ones")
    retry_s: float = Field(120, ge=0, description="for how long to try a save again that storage refuses")

    @field_validator("every")
    @classmethod
    def _interval(cls, every: int | str) -> int | str:
        steps = isinstance(every, int) and every > 0
        if not steps and not re.fullmatch(r"auto|(?=.*[1-9])[0-9]+(\.[0-9]+)?[smh]", str(every)):
            raise ValueError(
                f"{every!r} is no interval: give steps such as 100, a time such as 90s, 10m or 2h, or auto"
            )
        return every


class EvalConfig(Section):
    every: Positive = Field(100, description="steps between evaluations; the last step always makes one")
    samples: Positive | None = Field(None, description="held-out samples per evaluation; none takes all")


Retries = Annotated[int, Field(ge=0)] | Literal["always"]


class RetryConfig(Section):
    """How often in a row a run starts again by itself, from its last checkpoint, after each class of fault.

    An attempt that has saved a checkpoint ends the row: what happens once a week is no reason to end a run of months.
    What would only happen again is never tried again and has no setting: a bug, a setting that cannot work, a
    checkpoint that does not fit, storage that refuses access. For a diverged loss see ``train.on_divergence``.
    """

    lost_node: Retries = Field(10, description="a node died or is out of reach")
    worker_killed: Retries = Field(3, description="a worker's process was killed or crashed, its node lives")
    preemption: Retries = Field("always", description="the provider took a node back, with notice")
    hang: Retries = Field(3, description="a rank stood still or skipped a collective")
    storage: Retries = Field(3, description="storage failed: full, unreachable, an input or output error")
    out_of_memory: Retries = Field(0, description="of a host or a GPU: most would only run out again")
    data: Retries = Field(0, description="a sample could not be read")


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
    retry: RetryConfig = RetryConfig()
    registry: str = Field("./registry", description="folder or bucket of published model versions")
    publish: PublishConfig | None = Field(None, description="none leaves the run's checkpoints unpublished")

    @model_validator(mode="after")
    def _across(self) -> Self:
        train, workers = self.train, self.workers
        if workers.most > train.global_batch:
            raise ValueError(
                f"train.global_batch {train.global_batch} has no sample for each of workers.count {workers.most}: "
                "raise the first or lower the second"
            )
        limit = self.model.max_positions
        if limit is not None and self.data.seq_len > limit:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is over model.max_positions {limit}: lower it or raise that"
            )
        if train.precision == "fp16" and workers.gpus == 0:
            raise ValueError("train.precision fp16 needs workers.gpus 1: use fp32 on CPU")
        return self

    def accumulation(self, world_size: int) -> int:
        """Micro batches that each of so many workers adds up in one optimizer step, perhaps with empty rows."""
        per_worker = -(-self.train.global_batch // world_size)
        return -(-per_worker // self.train.micro_batch)

    @property
    def place(self) -> str:
        """The run directory."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"

    def meaning(self) -> dict[str, Any]:
        """The part that shapes the result, as plain data; places do not."""
        return self.model_dump(mode="json", by_alias=True, exclude=NOT_MEANING)

    def digest(self) -> str:
        """SHA-256 of the meaning."""
        return hashlib.sha256(json.dumps(self.meaning(), sort_keys=True).encode()).hexdigest()
