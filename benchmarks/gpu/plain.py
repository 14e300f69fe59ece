"""The loops that ours is set beside: plain torch, and DeepSpeed's engine without raymodels' loop."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from raymodels.config import Config
from raymodels.data.batches import Batch, micro_batches
from raymodels.data.dataset import Split, open_prepared
from raymodels.data.order import sample_ids
from raymodels.models.build import DTYPES, architecture, construct, initialize
from raymodels.train.engine import parameter_groups
from raymodels.train.schedule import learning_rate

FIRST_SCALE = 2.0**16


class Samples:
    """The samples of a run's steps, as one worker gets them."""

    def __init__(self, config: Config, place: str, device: torch.device) -> None:
        self.config, self.device = config, device
        self.prepared = open_prepared(place)
        self.split: Split = self.prepared.split("train", config.data.seq_len, config.data.pack)

    def batches(self, step: int) -> list[Batch]:
        train = self.config.train
        ids = sample_ids(self.config.run.seed, step, train.global_batch, len(self.split))
        found = micro_batches(self.split, np.asarray(ids), train.micro_batch)
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in found]


class PlainTorch:
    """What one writes without DeepSpeed. In half precision AdamW updates float32 copies of the weights.

    In fp16 the loss is scaled; a step whose gradients are not finite is left out and halves the scale.
    """

    def __init__(self, samples: Samples, device: torch.device) -> None:
        config = samples.config
        self.config, self.samples = config, samples
        self._dtype = DTYPES[config.train.precision]
        prepared = samples.prepared
        shape = architecture(
            config.model, vocab_size=prepared.vocab_size, seq_len=config.data.seq_len, eos_id=prepared.eos_id
        )
        self.model = construct(shape, self._dtype)
        initialize(self.model, config.run.seed, nullcontext)
        self.model.to(device)
        if config.train.activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._params = [p for group in parameter_groups(self.model, 0.0) for p in group["params"]]
        half = self._dtype != torch.float32
        self._masters = [p.detach().float().clone() for p in self._params] if half else self._params
        of = dict(zip(map(id, self._params), self._masters, strict=True))
        groups = parameter_groups(self.model, config.train.weight_decay)
        groups = [{**group, "params": [of[id(p)] for p in group["params"]]} for group in groups]
        self._adam = torch.optim.AdamW(groups, betas=config.train.betas, eps=config.train.eps)
        self.scale = FIRST_SCALE if self._dtype == torch.float16 else 1.0
        self.left_out = 0

    def step(self, step: int) -> float:
        """One optimizer step; the mean loss before it, in nats."""
        batches = self.samples.batches(step)
        targets = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        total = torch.zeros((), device=batches[0]["labels"].device)
        for batch in batches:
            logits = self.model(input_ids=batch["input_ids"]).logits
            loss = functional.cross_entropy(
                logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss * (self.scale / targets)).backward()
            total += loss.detach()
        self._update(learning_rate(self.config.train, step))
        return float(total) / targets

    def _update(self, lr: float) -> None:
        if self._masters is not self._params:
            for master, param in zip(self._masters, self._params, strict=True):
                master.grad = None if param.grad is None else param.grad.float().div_(self.scale)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self.config.train.clip_norm or math.inf)
        if math.isfinite(float(norm)):
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            if self._masters is not self._params:
                with torch.no_grad():
                    torch._foreach_copy_(self._params, self._masters)
        else:
            self.scale, self.left_out = self.scale / 2, self.left_out + 1
        for tensor in (*self._params, *self._masters):
            tensor.grad = None


class PlainDeepSpeed:
    """A DeepSpeed script's step, on an engine that exists: so that both loops fit beside each other."""

    def __init__(self, samples: Samples, engine: Any) -> None:
        self.samples, self.engine = samples, engine

    def step(self, step: int) -> float:
        """One optimizer step; the mean loss before it, in nats."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.samples.config.train, step)
        batches, total = self.samples.batches(step), torch.zeros((), device=self.samples.device)
        for batch in batches:
            logits = self.engine(input_ids=batch["input_ids"]).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return float(total) / len(batches)
