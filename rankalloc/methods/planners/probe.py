"""Observing a model on data without changing it; every planner works through this."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...errors import ConfigError, RankallocError
from ...layers.adaptable import shape_of
from ...layers.batches import evaluating, on_device

LossFn = Callable[..., torch.Tensor]


@dataclass
class Probe:
    """A model, the layers whose ranks are planned, and the batches to look at.

    Attributes:
        model: with or without adapters; adapters must be at ΔW = 0.
        targets: {name: base layer}.
        batches: each a mapping for ``model(**batch)``, a pair (x, y), or x alone.
        peaks: {name: highest rank}.
        seed: of everything a planner draws.
        loss_fn: ``loss_fn(outputs, labels)`` (``loss_fn(outputs)`` for x alone); None for the model's own.
        notes: what the user should know, one sentence each; planners add to it.
    """

    model: nn.Module
    targets: dict[str, nn.Module]
    batches: Sequence[Any]
    peaks: Mapping[str, int]
    seed: int = 0
    loss_fn: LossFn | None = None
    notes: list[str] = field(default_factory=list)

    def shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of a target."""
        return shape_of(self.targets[name])

    def device_of(self, name: str) -> torch.device:
        """The device of a target's weight."""
        return cast(torch.Tensor, self.targets[name].weight).device

    def generator(self, name: str) -> torch.Generator:
        """A generator on the CPU for the random numbers of this layer, seeded by the seed and the layer's position."""
        generator = torch.Generator()
        generator.manual_seed(self.seed * 1_000_003 + list(self.targets).index(name))
        return generator

    def kaiming(self, name: str, rank: int) -> torch.Tensor:
        """Q (rank, d_in) as plain LoRA draws it: uniform within ±1/√d_in, float32, beside the layer's weight."""
        d_in, _ = self.shape(name)
        drawn = torch.rand(rank, d_in, generator=self.generator(name)) * 2 - 1
        return (drawn / d_in**0.5).to(self.device_of(name))

    def forward(self, batch: Any) -> Any:
        """Run the model on one batch and return its loss, or None if it gives none.

        Raises ConfigError when the batch is none that the model can be called with.
        """
        first = next(iter(self.targets), None)
        batch = on_device(batch, torch.device("cpu") if first is None else self.device_of(first))
        try:
            if isinstance(batch, Mapping):
                outputs, labels = self.model(**batch), [batch.get("labels")]
            else:
                x, *labels = batch if isinstance(batch, (tuple, list)) else (batch,)
                outputs = self.model(x)
        except (TypeError, ValueError) as error:
            # prompts without tensors (GRPO), or several texts in one batch (sentence-transformers)
            held = f"a mapping of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigError(
                f"a {type(self.model).__name__} cannot be called with a batch that is {held} ({error}): plan from "
                "batches that it takes, with rankalloc.plan_ranks, or use a method that looks at training itself"
            ) from error
        if self.loss_fn is not None:
            return self.loss_fn(outputs, *labels)
        if isinstance(outputs, Mapping):
            return outputs.get("loss")
        return getattr(outputs, "loss", None)

    def loss(self, index: int) -> torch.Tensor:
        """The loss on batch ``index``, a scalar.

        Raises:
            ConfigError: there is none.
            RankallocError: it is not finite.
        """
        loss = self.forward(self.batches[index])
        if loss is None:
            raise ConfigError(
                "the model returned no loss for a batch: put labels into the batches, or pass loss_fn=, a function "
                "(outputs, labels) -> loss"
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ConfigError(f"a loss must be a tensor with one element, got {got}; let loss_fn average it")
        if not torch.isfinite(loss).all():
            raise RankallocError(
                f"the loss on batch {index} is {loss.item()}: ranks cannot be planned from it; check the batch and the "
                "model's weights"
            )
        return loss.reshape(())

    @contextmanager
    def hooked(self, hook: Callable[[str, torch.Tensor, torch.Tensor], Any]) -> Iterator[None]:
        """Call ``hook(name, x, y)`` at every forward pass of every target, x (..., d_in), y (..., d_out); a value it
        returns replaces y."""

        def of(name: str) -> Callable[..., Any]:
            return lambda module, args, kwargs, y: hook(name, args[0] if args else next(iter(kwargs.values())), y)

        handles = [m.register_forward_hook(of(n), with_kwargs=True) for n, m in self.targets.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, loss: torch.Tensor, index: int) -> None:
        """Backward from the loss on batch ``index`` into the tensors that the hooks put into the graph.

        Raises RankallocError when the loss depends on no target.
        """
        if not loss.requires_grad:
            raise RankallocError(
                f"the loss on batch {index} does not depend on any layer to be adapted: nothing can be planned from "
                "it; check loss_fn and target_modules"
            )
        loss.backward()



@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without trainable parameters; afterwards its modes, requires_grad, gradients
    and buffers, and the state of every random generator, are as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    fork: dict[str, Any] = {"devices": []}
    if accelerator is not None:
        fork = {"devices": range(torch.accelerator.device_count()), "device_type": accelerator.type}
    with torch.random.fork_rng(**fork), torch.enable_grad(), evaluating(model):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.data.copy_(before)
            random.setstate(states[0])
            np.random.set_state(states[1])


def low_rank(x: torch.Tensor, P: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """x (..., d_in) times (P Q)ᵀ, (..., d_out), in the factors' dtype."""
    return F.linear(F.linear(x.to(Q.dtype), Q), P)
