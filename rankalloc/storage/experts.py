"""Adapters of stacked experts in PEFT's format: ``target_parameters``.

PEFT adapts a stacked parameter (:mod:`rankalloc.layers.experts`) with one rank r for all of its experts:

    lora_A (E·r, d_in)     rows of expert 0, then of expert 1, ...
    lora_B (d_out, r·E)    columns of the first rank of every expert, then of the second, ...

An expert of a lower rank is padded with zeros to the highest in its parameter; reading removes them again. Several
parameters of one module are several wrappers, the one around the first parameter innermost, so keys begin with
``experts.base_layer`` for the first of two and ``experts`` for the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..layers.experts import ExpertMatrix, expert_of, stack_of

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Stack:
    """A stacked parameter to write.

    Attributes:
        owner: the name of the module that holds it.
        experts: how many matrices it has.
    """

    owner: str
    experts: int


def stacked(bases: Mapping[str, nn.Module], factors: Mapping[str, Pair]) -> tuple[dict[str, Stack], dict[str, Pair]]:
    """The factors of experts gathered by their stacks, in the order of the layers; all others as they are.

    Args:
        bases: {layer name: frozen layer}.
        factors: {layer name: (A (k, d_in), B (d_out, k))}.

    Returns:
        ``{name of a parameter: its stack}``, and the factors, those of a parameter of E experts and highest rank r as
        (r, E·d_in) and (E·d_out, r).
    """
    stacks: dict[str, Stack] = {}
    gathered: dict[str, dict[int, Pair]] = {}
    result: dict[str, Pair] = {}
    for name, pair in factors.items():
        base = bases[name]
        if not isinstance(base, ExpertMatrix):
            result[name] = pair
            continue
        stack = stack_of(name)
        stacks[stack] = Stack(stack_of(stack), len(base.stack))
        gathered.setdefault(stack, {})[expert_of(name)] = pair
        result[stack] = pair  # its place; filled below
    for name, held in stacks.items():
        result[name] = _side_by_side(gathered[name], held.experts)
    return stacks, result


def _side_by_side(pairs: Mapping[int, Pair], experts: int) -> Pair:
    one_a, one_b = next(iter(pairs.values()))
    rank = max(len(a) for a, _ in pairs.values())
    a = one_a.new_zeros(rank, experts, one_a.shape[1])
    b = one_b.new_zeros(experts, len(one_b), rank)
    for expert, (own_a, own_b) in pairs.items():
        a[: len(own_a), expert] = own_a
        b[expert, :, : own_b.shape[1]] = own_b
    return a.flatten(1), b.flatten(0, 1)


def pack_stack(experts: int, a: torch.Tensor, b: torch.Tensor) -> Pair:
    """(r, E·d_in) and (E·d_out, r) as PEFT's lora_A (E·r, d_in) and lora_B (d_out, r·E)."""
    lora_a = a.unflatten(1, (experts, -1)).transpose(0, 1).flatten(0, 1)
    lora_b = b.unflatten(0, (experts, -1)).permute(1, 2, 0).flatten(1)
    return lora_a, lora_b


def unpack_stack(experts: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> list[Pair]:
    """The inverse of :func:`pack_stack`, expert by expert: (A (r, d_in), B (d_out, r)) each."""
    a = lora_a.unflatten(0, (experts, -1))
    b = lora_b.unflatten(1, (-1, experts))
    return [(a[expert], b[..., expert]) for expert in range(experts)]


def keyed_as(owners: Mapping[str, str]) -> dict[str, str]:
    """The name under which each layer's factors are in PEFT's file.

    Args:
        owners: {layer or parameter: the module that holds that parameter, "" for a layer}, in the model's order.
    """
    result = {}
    for name, owner in owners.items():
        beside = [other for other, holder in owners.items() if owner and holder == owner]
        result[name] = owner + ".base_layer" * (len(beside) - 1 - beside.index(name)) if owner else name
    return result
