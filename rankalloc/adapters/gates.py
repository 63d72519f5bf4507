"""Gates of a mixture: how much of each adapter an input gets.

    g(h) = softmax(W norm(h) + b)        or sigmoid; W (K, d), b (K,), for K adapters

norm is layer normalisation without parameters, so that one learning rate suits features of any size. W and b begin at
zero: every adapter has an equal part, 1 / K, and a sigmoid 1 / 2. A softmax chooses between adapters, a sigmoid lets
each in or out by itself.

The features h of an input are one of two:

- of a layer: the layer's own input, so each token has its gates at each layer (LoRA-Flow, Wang et al., arXiv
  2402.11455, and PHATGOOSE, Muqeeth et al., arXiv 2402.05859, do so);
- of the model (:class:`ModelGate`): the mean of the token embeddings, so all layers share the gates.

A model that generates must not see what comes next, in training no more than afterwards. There the mean at each token
is over that token and those before it, which makes training, generation with a cache, and generation without one the
same function. Padding has no part in any mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import RankallocError
from ..layers.replicas import DATA_PARALLEL, is_replica

ACTIVATIONS = ("softmax", "sigmoid")
MODEL_GATE = "rankalloc_gate"
"""The attribute of a model that holds the gate of all its layers."""

# whether a backward pass is running here, as in the second pass of a checkpointed part; torch has no public name for it
_in_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)


class Gate(nn.Module):
    """Weights (…, K) of K adapters from features (…, d), in float32.

    Args:
        width: d.
        count: K.
        activation: one of :data:`ACTIVATIONS`.
        device: of its parameters.
    """

    def __init__(self, width: int, count: int, activation: str = "softmax", device: Any = None) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.zeros(count, width, device=device))
        self.bias = nn.Parameter(torch.zeros(count, device=device))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = F.layer_norm(features.float(), features.shape[-1:])
        return self._activated(F.linear(features.to(self.weight.dtype), self.weight, self.bias).float())

    def _activated(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1) if self.activation == "softmax" else scores.sigmoid()

    @torch.no_grad()
    def constant(self) -> torch.Tensor | None:
        """The gates (K,) when they are the same for every input, on the CPU; None when they depend on it."""
        return None if self.weight.any() else self._activated(self.bias.float()).cpu()

    @torch.no_grad()
    def fix(self, gates: torch.Tensor) -> None:
        """Give every input these gates (K,): parts of 1 for a softmax, each between 0 and 1 for a sigmoid."""
        gates = gates.double()
        least = torch.finfo(torch.float32).tiny
        log = gates.clamp_min(least).log()
        scores = log if self.activation == "softmax" else log - (1 - gates).clamp_min(least).log()
        self.weight.zero_()
        self.bias.copy_(scores)

    def extra_repr(self) -> str:
        count, width = self.weight.shape
        return f"d={width}, adapters={count}, {self.activation}"


class ModelGate(nn.Module):
    """One gate for all layers of a model, from the mean of its token embeddings.

    It hangs in the model as :data:`MODEL_GATE`, where :func:`read_inputs`, a hook of the model, calls it.

    Args:
        gate: over the model's embeddings.
        causal: whether the mean at each token is over those up to it alone.

    Attributes:
        now: gates of the call that is running, (batch, K), or (batch, tokens, K) if ``causal``; None between calls.
        tokens: of the call that is running.
        is_over: whether that call has returned, so that only the backward pass of it may still ask.
        sequence: what ``generate`` is about to continue: all token ids so far and their mask; None outside of it.
    """

    def __init__(self, gate: Gate, causal: bool) -> None:
        super().__init__()
        self.gate, self.causal = gate, causal
        self.now: torch.Tensor | None = None
        self.tokens = 0
        self.is_over = False
        self.sequence: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "now": None, "sequence": None}  # a copy is in no call

    def read(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Compute the gates of a call of ``model`` with these arguments."""
        ids: Any = inputs.get("input_ids")
        embedded, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
        sequence, self.sequence = self.sequence, None
        given = embedded if embedded is not None else ids
        if given is None:
            raise RankallocError(
                f"the gates of this mixture are computed from token embeddings, and {type(model).__name__} was called "
                "without input_ids and inputs_embeds; give it one of them, or mix with gate='layer'"
            )
        self.tokens, positions = given.shape[1], inputs.get("position_ids")
        if embedded is None and sequence is not None and _continues(ids, sequence[0]):
            ids, mask = sequence
            positions = None  # those of the new tokens alone; what is generated is one text
        elif _length(inputs.get("past_key_values")):
            raise RankallocError(
                "this call continues a cached text, and the gates of this mixture need all of it: let "
                "model.generate continue it, call without a cache, or mix with gate='layer'"
            )
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            if embedded is None:
                embedded = F.embedding(ids.to(weight.device), weight)
            mask = _mask_of(mask, embedded)
            if self.causal:
                features = mean_so_far(embedded, mask, positions)[:, -self.tokens :]
            else:
                features = (embedded.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        self.now, self.is_over = self.gate(features.to(self.gate.weight.device)), False

    def gates_for(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The gates of a layer's input x (…, d), such that they broadcast over (…, K)."""
        if self.now is None or self.is_over and _in_backward() == -1:
            raise RankallocError(
                f"the gates of this mixture are computed when the whole model is called, and {name} was called without "
                "it; call the model that was given to rankalloc.mix, or mix with gate='layer'"
            )
        gates, lead = self.now.to(x.device), x.shape[:-1]
        rows = gates.shape[0]
        if len(lead) == 1 and lead[0] == rows * self.tokens:  # the tokens of all rows in one line
            each = gates if self.causal else gates[:, None].expand(-1, self.tokens, -1)
            return each.reshape(lead[0], -1)
        if not self.causal and lead[:1] == (rows,):
            return gates.reshape(rows, *[1] * (len(lead) - 1), -1)
        if self.causal and lead == (rows, self.tokens):
            return gates
        raise RankallocError(
            f"{name} gets an input of the shape {tuple(x.shape)}, whose rows cannot be told from those of the "
            f"{rows} texts of {self.tokens} tokens that the gates are for; mix with gate='layer'"
        )


def read_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a model that holds a :class:`ModelGate`."""
    if is_replica(model):
        raise RankallocError(DATA_PARALLEL)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    getattr(model, MODEL_GATE).read(model, {**dict(zip(names, args, strict=False)), **kwargs})


def forget_inputs(model: Any, *_: Any) -> None:
    """A forward hook of such a model: its gates are for this call alone, and for the backward pass of it."""
    gate = getattr(model, MODEL_GATE)
    gate.is_over = True
    if not torch.is_grad_enabled():
        gate.now = None


def mean_so_far(
    embedded: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """At each token, the mean of (batch, tokens, d) over it and those before it of its own text.

    Args:
        mask: (batch, tokens), 0 for padding.
        positions: (batch, tokens); a text begins where they are 0, as where several are packed into one row.
    """
    counted = mask.to(torch.float32)
    sums, counts = (embedded.float() * counted[..., None]).cumsum(1), counted.cumsum(1)[..., None]
    if positions is not None and positions.shape[-1:] == mask.shape[-1:] and positions.dim() <= 2:
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        begins = (positions.to(mask.device).expand_as(mask) == 0) & (places > 0)
        start = torch.where(begins, places, 0).cummax(1).values[..., None]
        before = (start > 0).float()
        earlier = (start - 1).clamp_min(0)
        sums = sums - before * sums.gather(1, earlier.expand_as(sums))
        counts = counts - before * counts.gather(1, earlier)
    return sums / counts.clamp_min(1)


def _mask_of(mask: Any, embedded: torch.Tensor) -> torch.Tensor:
    """The mask (batch, tokens) of what is ``embedded``."""
    shape = embedded.shape[:2]
    if mask is None:
        return torch.ones(shape, device=embedded.device)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape == shape:
        return mask.to(embedded.device, torch.float32)
    got = f"one of the shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
    raise RankallocError(
        f"the gates of this mixture need an attention_mask of the shape {tuple(shape)}, that of the text, and got {got}"
        "; give that one, or mix with gate='layer'"
    )


def _continues(ids: torch.Tensor | None, whole: torch.Tensor) -> bool:
    """Whether ``ids`` are the last of ``whole``."""
    return ids is not None and ids.shape[1] <= whole.shape[1] and torch.equal(ids, whole[:, -ids.shape[1] :])


def _length(cache: Any) -> int:
    """Tokens in a cache of keys and values."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


class Prompted:
    """``prepare_inputs_for_generation`` of a model with a :class:`ModelGate`, which is told of the whole text: with a
    cache the model itself gets its newest token alone."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.__signature__ = inspect.signature(model.prepare_inputs_for_generation)  # which generate looks at

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = type(self.model).prepare_inputs_for_generation(self.model, input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        getattr(self.model, MODEL_GATE).sequence = (
            input_ids, mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        )
        return prepared
