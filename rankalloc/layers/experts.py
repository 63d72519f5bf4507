"""Experts whose weights are stacked: one parameter (experts, …, …) holds the matrices of all experts of a block.

To everything that chooses ranks each expert's matrix is a layer of its own, called by the parameter and the expert's
number, ``model.layers.0.mlp.experts.gate_up_proj.3``. :class:`ExpertMatrix` stands for it: a layer that has a weight
and is never called, since the module of the experts reads the whole parameter.

    (E, out, in)    Mixtral, Qwen-MoE, DeepSeek, OLMoE      W of expert e is parameter[e]
    (E, in, out)    GPT-OSS (``is_transposed``)             W of expert e is parameter[e]ᵀ
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError


class Traffic:
    """How many tokens a module of experts sent to each of them since it was last asked.

    Args:
        experts: how many there are.

    Attributes:
        watched: whether to count; nothing is counted, and nothing is spent on it, until a method asks.
        counts: (experts,) float32; None before the first counted pass.
    """

    def __init__(self, experts: int) -> None:
        self.experts, self.watched = experts, False
        self.counts: torch.Tensor | None = None

    def count(self, arguments: Iterable[Any]) -> None:
        """Add the tokens of one forward pass: the first argument of whole numbers says which expert gets which token.

        Raises:
            ConfigError: no argument does.
        """
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        chosen = next((t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool), None)
        if chosen is None:
            raise ConfigError(
                "routing=True counts the tokens of each expert, and this model does not tell its experts which token "
                "is whose; leave routing out"
            )
        index = chosen.detach().flatten().clamp(0, self.experts)  # one past the last is a token for no expert here
        found = torch.zeros(self.experts + 1, device=index.device)
        found.scatter_add_(0, index.long(), torch.ones_like(index, dtype=torch.float32))
        self.counts = found[:-1] if self.counts is None else self.counts + found[:-1]


class ExpertMatrix(nn.Module):
    """One expert's matrix in a stacked parameter, seen as the weight (d_out, d_in) of a linear layer.

    Args:
        owner: the module of the experts; not a submodule of this one.
        parameter: name of the stacked parameter in ``owner``.
        expert: which of its matrices.
    """

    def __init__(self, owner: nn.Module, parameter: str, expert: int) -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that it is no submodule and a deep copy has the copy's own
        self.parameter, self.expert = parameter, expert
        self.traffic: Traffic | None = None  # of its experts, once they are adapted

    @property
    def owner(self) -> nn.Module:
        """The module of the experts."""
        return self._owner[0]

    @property
    def stack(self) -> torch.Tensor:
        """The stacked parameter, (experts, …, …)."""
        return getattr(self.owner, self.parameter)

    @property
    def transposed(self) -> bool:
        """Whether the stack is (experts, in, out)."""
        return bool(getattr(self.owner, "is_transposed", False))

    @property
    def weight(self) -> torch.Tensor:
        """(d_out, d_in), a view of the stack."""
        matrix = self.stack[self.expert]
        return matrix.T if self.transposed else matrix

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        return f"{self.parameter}[{self.expert}], in_features={self.in_features}, out_features={self.out_features}"


def stacked_weights(module: nn.Module) -> list[str]:
    """Names of the parameters in which this module keeps the matrices of several experts, (experts, …, …)."""
    is_experts = hasattr(module, "num_experts") or "expert" in type(module).__name__.lower()
    return [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3] if is_experts else []


def expert_matrices(model: nn.Module) -> dict[str, ExpertMatrix]:
    """{full name: matrix} of every expert of every stacked parameter in ``model``, in the model's order."""
    found: dict[str, ExpertMatrix] = {}
    for name, module in model.named_modules():
        for parameter in stacked_weights(module):
            stack: Any = getattr(module, parameter)
            if not stack.is_floating_point():  # packed in a way of its own
                continue
            prefix = f"{name}.{parameter}" if name else parameter
            for expert in range(len(stack)):
                found[f"{prefix}.{expert}"] = ExpertMatrix(module, parameter, expert)
    return found


def stack_of(name: str) -> str:
    """The full name of the stacked parameter in that of an expert's matrix."""
    return name.rpartition(".")[0]


def expert_of(name: str) -> int:
    """The expert's number in the full name of its matrix."""
    return int(name.rpartition(".")[2])
