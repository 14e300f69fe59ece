"""raymodels: one config trains a Transformer with Ray Train and DeepSpeed ZeRO, registers it and serves it."""

__version__ = "0.1.0"
