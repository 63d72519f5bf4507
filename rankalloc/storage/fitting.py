"""Factors from a file as matrices for one layer of a model: unpacked, checked, and of no more than full rank."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..errors import AdapterFileError, RankallocError
from ..layers.adaptable import kind_of, shape_of
from ..layers.kinds import LAYER_KINDS
from ..lowrank import Factors, cut, decompose
from .reading import FinishedAdapter


def fit(finished: FinishedAdapter, name: str, base: nn.Module) -> Factors:
    """The factors of layer ``name`` in the file as matrices P (d_out, r) and Q (r, d_in) for ``base``.

    Raises:
        AdapterFileError: they do not fit ``base``, or a weight is not finite.
    """
    layer, kind = finished.layers[name], LAYER_KINDS[kind_of(base) or "linear"]
    if layer.plain:
        _require_sides(finished, name, (layer.d_in, layer.d_out), base)
    try:
        return finished.factors(name, None if layer.plain and kind.plain else partial(kind.unpack, base))
    except AdapterFileError:
        raise
    except RankallocError as error:
        raise AdapterFileError(f"{finished.folder} does not fit {name}: {error}") from None


def no_ranks(finished: FinishedAdapter, name: str, sides: tuple[int, int], base: nn.Module) -> Factors:
    """The factors of a layer without ranks, which the file leaves out. Raises AdapterFileError when ``base`` is not of
    the shape (d_in, d_out) that the file tells."""
    _require_sides(finished, name, sides, base)
    d_in, d_out = sides
    return Factors(torch.zeros(d_out, 0), torch.zeros(0, d_in))


def _require_sides(finished: FinishedAdapter, name: str, told: tuple[int, int], base: nn.Module) -> None:
    if told != (here := shape_of(base)):
        raise AdapterFileError(
            f"{finished.folder} was made for another model: {name} is {told[0]} → {told[1]} in the adapter and "
            f"{here[0]} → {here[1]} here"
        )


def at_full_rank(factors: Factors) -> Factors:
    """``factors``, or, where their rank is above min(d_out, d_in), the same ΔW with exactly that rank.

    PEFT allows any rank, but no update of a layer has more singular triplets than the layer's shorter side. The
    reduction keeps all of them, so nothing is lost but the rounding of float32.
    """
    highest = min(len(factors.P), factors.Q.shape[1])
    if factors.rank <= highest:
        return factors
    lora_a, lora_b = cut(factors, decompose(factors, exact=True), highest, torch.float32)
    return Factors(lora_b, lora_a)
