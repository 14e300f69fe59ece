"""Train with Ray Train and DeepSpeed ZeRO. Meets serving only at the checkpoint."""
