"""Every setting, as frozen pydantic models. Imports neither torch nor ray.

`Config` describes a training run, `ServeConfig` an endpoint. Both are read by `load` from YAML with dotted overrides.
Every default and its meaning stands here and nowhere else; unknown keys are errors that name the nearest right one.
"""

from raymodels.config.files import from_yaml, load, to_yaml
from raymodels.config.plain import changed_settings, difference, dump, validate
from raymodels.config.serving import (
    AutoscalingConfig,
    EngineConfig,
    HttpConfig,
    KeysConfig,
    ModelServeConfig,
    ServeConfig,
    TableConfig,
    TenantConfig,
)
from raymodels.config.training import (
    CheckpointConfig,
    Config,
    DataConfig,
    DivergenceConfig,
    EvalConfig,
    ModelConfig,
    OffloadConfig,
    PublishConfig,
    RetryConfig,
    RunConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
    WorkersConfig,
    ZeroConfig,
)

__all__ = [
    "AutoscalingConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DivergenceConfig",
    "EngineConfig",
    "EvalConfig",
    "HttpConfig",
    "KeysConfig",
    "ModelConfig",
    "ModelServeConfig",
    "OffloadConfig",
    "PublishConfig",
    "RetryConfig",
    "RunConfig",
    "ServeConfig",
    "TableConfig",
    "TaskConfig",
    "TenantConfig",
    "TokenizerConfig",
    "TrainConfig",
    "WorkersConfig",
    "ZeroConfig",
    "changed_settings",
    "difference",
    "dump",
    "from_yaml",
    "load",
    "to_yaml",
    "validate",
]
