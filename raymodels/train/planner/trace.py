"""What one forward and backward pass of a model holds beside its weights, found by running it on tensors without data.

Activations: the formula of Korthikanti et al. (2022), "Reducing Activation Recomputation in Large Transformer Models"
(section 4: s b h (34 + 5 a s / h) bytes a layer in 16 bits) counts one architecture and one attention kernel. Here the
real modules and the real loss run on fake tensors, so that every architecture, precision and task is counted as it is:
fused attention keeps no scores, RMS norms keep float32 copies, and the cross-entropy keeps float32 logits, which at
large vocabularies outweigh many layers.

A pass costs the same in each layer. So two and three layers are run, and the rest is extrapolated; a test holds that
equal to running all of them.
"""

from __future__ import annotations

import copy
import functools
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raymodels.models.build import DTYPES, construct
from raymodels.tasks import task

LAYERS_RUN = (2, 3)
# transformers' own attention without a mask: it drops a mask that hides nothing, but only after a look at its data.
UNMASKED = "sdpa_unmasked"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)


@dataclass(frozen=True)
class Moment:
    """After an operation: bytes ``live`` beside weights and their gradients, and bytes of ``gradients`` made so far."""

    phase: str  # forward, upper (backward of the head and the last layer), lower (the rest)
    live: int
    gradients: int


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one micro batch on one rank.

    Attributes:
        kept: bytes that the forward pass leaves behind for the backward pass.
        before_loss: the most bytes held before the output head begins.
        moments: what is held, operation by operation.
    """

    kept: int
    before_loss: int
    moments: tuple[Moment, ...]

    def peak(self, gradients: Callable[[int], float], forward: float = 0.0) -> float:
        """The most bytes held at once.

        Args:
            gradients: bytes held for gradients once so many bytes of them have been made.
            forward: bytes that are held in addition while the layers' forward pass runs.
        """
        return max(self.before_loss + forward, max(m.live + gradients(m.gradients) for m in self.moments))


def trace(
    config: PreTrainedConfig, *, kind: str, batch: int, tokens: int, precision: str, checkpointing: bool, masked: bool
) -> Pass:
    """Run a pass of a micro batch of ``batch`` samples of ``tokens`` tokens; allocates nothing.

    Args:
        kind: of task.
        checkpointing: recompute each layer's activations in backward.
        masked: samples are padded, so attention carries a mask; packed samples are full.
    """
    return _trace(json.dumps(config.to_dict(), default=str), kind, batch, tokens, precision, checkpointing, masked)


@functools.cache
def _trace(written: str, kind: str, batch: int, tokens: int, precision: str, checkpointing: bool, masked: bool) -> Pass:
    raw = json.loads(written)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    setting = (kind, batch, tokens, precision, checkpointing, masked)
    if config.num_hidden_layers <= max(LAYERS_RUN):
        return _run(config, *setting)
    short, longer = (_run(with_layers(config, layers), *setting) for layers in LAYERS_RUN)
    more = config.num_hidden_layers - LAYERS_RUN[0]
    kept = longer.kept - short.kept
    gradients = longer.moments[-1].gradients - short.moments[-1].gradients
    moments = (
        Moment(m.phase, m.live, m.gradients + more * gradients)
        if m.phase == "lower"
        else Moment(m.phase, m.live + more * kept, m.gradients)
        for m in short.moments
    )
    return Pass(short.kept + more * kept, short.before_loss + more * kept, tuple(moments))


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with another number of layers."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = (changed.layer_types * layers)[:layers]
    return changed


def _run(
    config: PreTrainedConfig, kind: str, batch: int, tokens: int, precision: str, checkpointing: bool, masked: bool
) -> Pass:
    with FakeTensorMode():
        if not masked:
            config._attn_implementation = UNMASKED
        model = construct(config, DTYPES[precision])
        model.tie_weights()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        with _Meter(model) as meter:
            loss = task(kind).loss(model, samples)
            kept = meter.live
            meter.phase = "upper"
            loss.backward()  # type: ignore[no-untyped-call]
        return Pass(kept, meter.before_loss, tuple(meter.moments))


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, from their making to their end, and the gradients of parameters.

    A parameter's gradient is dropped as it arrives: where it goes from there is the ZeRO stage's to say.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self.live = self.gradients = self.before_loss = 0
        self.moments: list[Moment] = []
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for parameter in model.parameters():
            self._known[parameter.untyped_storage()] = 0
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._upper = {id(parameter) for parameter in layers_of(model)[-1].parameters()}
        head = model.get_output_embeddings()
        assert head is not None
        head.register_forward_pre_hook(lambda *_: self._head_begins())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.moments.append(Moment(self.phase, self.live, self.gradients))
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        weakref.finalize(storage, self._ended, size)

    def _ended(self, size: int) -> None:
        self.live -= size

    def _arrived(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.numel() * parameter.element_size()
        parameter.grad = None
        self._upper.discard(id(parameter))
        if not self._upper:
            self.phase = "lower"
        self.moments.append(Moment(self.phase, self.live, self.gradients))

    def _head_begins(self) -> None:
        self.before_loss = max(moment.live for moment in self.moments)


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The transformer layers of a model."""
    return next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
