"""Folding adapters into the weights of their layers, and measuring what rounding costs.

W' = round(W + s·P·Λ·Q) in the weight's own type. A half-precision weight has few digits, and ΔW is small beside it, so
part of the update is lost for good. That share is measured for each layer:

    loss = ‖W' − (W + ΔW)‖_F / ‖ΔW‖_F          0 when nothing was lost, 1 when as much was lost as was there

Cost: one pass over each weight in float64, a few rows at a time.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..errors import RankallocError
from ..layers.adaptable import weight_view
from ..layers.experts import ExpertMatrix
from ..layers.quantized import no_longer_quantized, plain_linear, scheme_of
from ..layers.sharding import is_sharded
from .adapter import Adapter
from .adapter_set import Adapters, parents_of
from .attaching import detach

_ROWS = 1 << 20  # numbers compared at a time
_MUCH = 0.1

log = logging.getLogger(__name__)


@torch.no_grad()
def merge(adapters: Adapters, *, dequantize: bool = False) -> nn.Module:
    """Fold ΔW = s·P·Λ·Q into the weights and take the adapters out.

    The product is formed in the adapters' dtype and rounded once to the weight's. What that rounding lost is in
    ``adapters.merge_loss`` afterwards, {module name: ‖W' − (W + ΔW)‖_F / ‖ΔW‖_F}; a loss above a tenth is logged.

    Args:
        dequantize: merge into a quantised base by replacing each adapted layer with an nn.Linear in floating point.
            W is then the weight as it was quantised, the one that the adapter was trained on.

    Returns:
        The plain model.

    Raises:
        RankallocError: an adapted weight is tied to another module's, which folding would change
            too, or is computed from other parameters, or is sharded over processes, or is quantised and ``dequantize``
            is not given, or ΔW is not finite. Nothing has been changed then.
        NotAdaptedError: ranks were to be chosen for these adapters and never were.
    """
    own = adapters.own("PEFT merges them: call model.merge_and_unload()")
    adapters.check_adapted()
    owners: dict[int, set[str]] = {}
    for name, parameter in adapters.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    holders: dict[int, list[nn.Module]] = {}
    for module in adapters.model.modules():
        holders.setdefault(id(module._parameters.get("weight")), []).append(module)
    deltas = {}
    for name, adapter in own.items():
        if not _is_stored(adapter.base_layer):
            raise RankallocError(
                f"the weight of {name} is computed from other parameters, so nothing can be folded into it; remove its "
                "parametrization first, or keep the adapter unmerged"
            )
        if is_sharded(adapter.weight):
            raise RankallocError(
                f"the weight of {name} is sharded over processes (FSDP), and none of them holds all of it; save the "
                "adapter and merge it in one process"
            )
        if scheme_of(adapter.base_layer) and not dequantize:
            raise RankallocError(
                f"{name} is quantised ({type(adapter.base_layer.weight).__name__}), and an update is too small for so "
                "few bits; pass dequantize=True to merge into floating-point layers, or load the unquantised base and "
                "merge there"
            )
        if len(holders.get(id(adapter.base_layer.weight), ())) > 1:
            raise RankallocError(
                f"{name} shares its weight with another module ({', '.join(sorted(owners[id(adapter.weight)]))}), "
                "which merging would change too; untie them first, or keep the adapter unmerged"
            )
        deltas[name] = adapter.delta_weight()
        if not torch.isfinite(deltas[name]).all():
            raise RankallocError(f"the update of {name} is not finite; merging would destroy the model")
    adapters.merge_loss = {
        name: _fold(adapters.model, adapter, deltas.pop(name)) for name, adapter in own.items()
    }
    worst = max(adapters.merge_loss, key=adapters.merge_loss.__getitem__, default=None)
    if worst is not None and adapters.merge_loss[worst] > _MUCH:
        log.warning(
            "merging lost %.1f %% of the update of %s to rounding; load the base in a wider type, or keep the adapter "
            "unmerged", 100 * adapters.merge_loss[worst], worst,
        )
    model = detach(adapters)
    no_longer_quantized(model)
    return model


def _is_stored(layer: nn.Module) -> bool:
    """Whether the weight is a parameter, or part of one, and not computed from others."""
    if isinstance(layer, ExpertMatrix):
        return layer.parameter in layer.owner._parameters
    return "weight" in layer._parameters


def _fold(model: nn.Module, adapter: Adapter, delta: torch.Tensor) -> float:
    """Add ``delta`` (d_out, d_in) to the base layer's weight; the share of it that rounding lost."""
    if scheme_of(adapter.base_layer):
        plain = plain_linear(adapter.base_layer)
        for parent, attribute in parents_of(model, adapter.base_layer):
            parent._modules[attribute] = plain
    view = weight_view(adapter.base_layer)
    step = max(1, _ROWS // max(1, view.shape[1]))
    lost = whole = 0.0
    for start in range(0, view.shape[0], step):
        rows, update = view[start : start + step], delta[start : start + step]
        exact = rows.double() + update.double()
        rows.copy_((rows.to(delta.dtype) + update).to(rows.dtype))
        lost += (rows.double() - exact).square().sum().item()
        whole += update.double().square().sum().item()
    weight = adapter.weight.data
    if view.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():  # its strides allow no matrix view
        weight.copy_(adapter.layout.stored(view, weight))
    return (lost / whole) ** 0.5 if whole else 0.0
